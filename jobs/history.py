"""Every verdict on a model, and every move of its champion."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import job


@click.option("--model", metavar="NAME", help="By default the model of this store's last dataset.")
@job("detr history")
def main(settings, store: Path, model: str | None) -> dict:
    """List every verdict on a registered model and every move of its champion, the oldest first: who, when and why."""
    from pipelines.registry import champion, history
    from pipelines.workflow import find_name

    tracker, name = find_name(settings, store, model)
    rows = history(tracker, name)
    standing = champion(tracker, name)
    lines = []
    for row in rows:
        which = f"version {row['version'] or 'none'}"
        if row["from"]:
            which = f"version {row['from']} -> {row['version'] or 'none'}"
        lines.append(f"{row['when']}  {row['who']}  {row['what']}: {which}")
        lines += [f"    {text}" for text in (row["reason"], row["why"]) if text]
    lines.append(f"Champion of {name}: version {standing['version']}." if standing else f"{name} has no champion.")
    return {"model": name, "champion": standing and standing["version"], "history": rows, "text": "\n".join(lines)}


if __name__ == "__main__":
    main()
