"""Put a checkpoint into the MLflow registry."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import job, last_training, latest_checkpoint, ray_session


@click.option("--checkpoint", metavar="FOLDER", help="By default the last one trained in this store.")
@job("detr register")
def main(settings, store: Path, checkpoint: str | None) -> dict:
    """Put a checkpoint into the MLflow registry, evaluated on val first if need be."""
    from pipelines.workflow import evaluate_stage, ingest_stage, register_stage, run_of

    if checkpoint is None:
        last_training(store)  # before images are read
    with ray_session(settings):
        data = ingest_stage(settings, store)
        place, run_id = latest_checkpoint(settings, store, data, checkpoint)
        evaluation = evaluate_stage(settings, store, data, place, "val")
        run_id = run_id or run_of(settings, store, data, place)
        result = register_stage(settings, store, data, place, run_id, evaluation)["result"]
    ap = evaluation["result"]["AP"]
    measured = "no ground truth on val" if ap is None else f"AP {ap:.3f} on val"
    return {**result, "text": f"{result['uri']} ({measured})"}


if __name__ == "__main__":
    main()
