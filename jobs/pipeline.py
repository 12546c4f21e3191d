"""Run all stages, from labelled images to a promoted model, detections and a report."""
from __future__ import annotations

import os
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from jobs.common import INTERRUPTED, STOPPED, fail, job, ray_session


@job("detr pipeline data.path=path/to/coco")
def main(settings, store: Path) -> dict:
    """Run all stages; killed and started again it goes on, and what is done already is not done again."""
    from pipelines.ingest import source
    from pipelines.tracking import end_open_runs
    from pipelines.workflow import check_training, data_path, pipeline

    if settings.sweep.in_pipeline:
        from pipelines.sweep import plan

        plan(settings)
    check_training(settings, store)
    found = source(settings, data_path(settings, store))  # what is wrong is said before Ray starts
    with ray_session(settings, dashboard=settings.sweep.in_pipeline):
        try:
            outcome = pipeline(settings, store, found)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or SIGTERM as Ray hands it on
            end_open_runs("KILLED")
            # The stages run in the workflow's threads; they end with the process and are taken up by the next start.
            try:
                with redirect_stdout(sys.__stdout__):
                    fail(STOPPED, INTERRUPTED, click.get_current_context().params["as_json"])
            finally:
                sys.__stdout__.flush()
                os._exit(INTERRUPTED)
    verdict, split = outcome["verdict"], "test" if "test" in outcome["AP"] else "val"
    lines = [
        f"AP {_show(outcome['AP'][split])}, AP50 {_show(outcome['AP50'][split])} on {split}.",
        f"{'Promoted' if verdict['promoted'] else 'Refused'}: {verdict['reason']}",
        f"Report:     {outcome['report']}",
        f"Detections: {outcome['predictions'] or 'none, for want of a champion'}",
        f"Checkpoint: {outcome['checkpoint']}",
        f"MLflow:     {_place_of_runs(settings.tracking.uri, store)}",
    ]
    return {**outcome, "text": "\n".join(lines)}


def _place_of_runs(uri: str | None, store: Path) -> str:
    """Where to look at them: a server, or the command that starts one."""
    if uri and uri.startswith(("http://", "https://")):
        return uri
    return f"{_mlflow()} ui --backend-store-uri {uri or f'sqlite:///{store}/mlflow.db'}"


def _mlflow() -> str:
    """MLflow's command, as it can be typed here: of a virtual environment that is not activated with its folder."""
    ours = Path(sys.executable).with_name("mlflow")
    if not ours.exists() or shutil.which("mlflow") == str(ours):
        return "mlflow"
    return shlex.quote(str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours))


def _show(value: float | None) -> str:
    return "unknown (no ground truth)" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
