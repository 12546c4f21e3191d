"""Put a checkpoint into the MLflow registry."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import find_checkpoint, job, ray_session


@click.option("--checkpoint", metavar="FOLDER", help="By default the last one trained in this store.")
@job("detr register")
def main(settings, store: Path, checkpoint: str | None) -> dict:
    """Put a checkpoint into the MLflow registry, evaluated on val first if need be."""
    from pipelines.workflow import check_tracking, evaluate_stage, find_data, register_stage, run_of

    check_tracking(settings, store)
    of_dataset = find_checkpoint(settings, store, checkpoint)
    read = find_data(settings, store)
    with ray_session(settings):
        data = read()
        place, run_id = of_dataset(data)
        evaluation = evaluate_stage(settings, store, data, place, "val")
        run_id = run_id or run_of(settings, store, data, place)
        result = register_stage(settings, store, data, place, run_id, evaluation)["result"]
    ap = evaluation["result"]["AP"]
    measured = "no ground truth on val" if ap is None else f"AP {ap:.3f} on val"
    return {**result, "text": f"{result['uri']} ({measured})"}


if __name__ == "__main__":
    main()
