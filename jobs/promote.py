"""Make a version champion if it passes the gate."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import GATE_REFUSED, job, ray_session


@click.option("--version", metavar="N", help="By default the newest version.")
@click.option("--why", default="", metavar="TEXT", help="Kept with the verdict.")
@job("detr promote --version 2 --why 'more night images'")
def main(settings, store: Path, version: str | None, why: str) -> dict:
    """Make a version champion if it passes the gate; exit code 3 and the reasons if not.

    It is measured beside the present champion on the same validation images; the settings gate.… say what it must show.
    """
    from pipelines.registry import newest_version, registered_name
    from pipelines.settings import UserError
    from pipelines.tracking import tracker
    from pipelines.workflow import check_tracking, download_model, evaluate_stage, find_data, promote_stage

    check_tracking(settings, store)
    read = find_data(settings, store)
    with ray_session(settings):
        data = read()
        name = registered_name(settings, data["result"]["name"])
        version = version or newest_version(tracker(settings, store, data["result"]["name"]), name)
        try:
            place, _, _ = download_model(settings, store, f"models:/{name}/{version}")
        except UserError as error:
            if error.exit_code == 2:  # there is no such version
                raise
            evaluation = None  # its files are spoilt: a verdict, too
        else:
            evaluation = evaluate_stage(settings, store, data, place, "val")
        result = promote_stage(settings, store, data, version, evaluation, why)["result"]
    lines = [f"{'yes' if rule['ok'] else 'NO ':<4} {rule['rule']}: {rule['words']}" for rule in result["rules"]]
    text = "\n".join([*lines, result["reason"]])
    return {**result, "exit_code": 0 if result["promoted"] else GATE_REFUSED, "text": text}


if __name__ == "__main__":
    main()
