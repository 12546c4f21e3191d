"""Give the title back to the champion before this one."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import job


@click.option("--model", metavar="NAME", help="By default the model of this store's last dataset.")
@click.option("--why", required=True, metavar="TEXT", help="Kept in the history and with the version.")
@job("detr rollback --why 'misses small cats'")
def main(settings, store: Path, model: str | None, why: str) -> dict:
    """Give the title back to the champion before this one; the gate refuses the one that lost it from then on."""
    from pipelines.registry import rollback
    from pipelines.workflow import find_name

    tracker, name = find_name(settings, store, model)
    result = rollback(tracker, name, why)
    now = f"Version {result['version']} of {name} is champion again" if result["version"] else (
        f"{name} has no champion now; the next version that passes the gate is the first one"
    )  # fmt: skip
    return {"model": name, **result, "text": f"{now} (was version {result['previous']}): {why}"}


if __name__ == "__main__":
    main()
