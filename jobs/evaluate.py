"""Measure a checkpoint: the COCO numbers, AP per class."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import job, latest_checkpoint, ray_session


@click.option("--checkpoint", metavar="FOLDER|models:/…", help="By default the last one trained in this store.")
@click.option("--split", default="val", show_default=True, help="train, val or test.")
@job("detr evaluate --split test")
def main(settings, store: Path, checkpoint: str | None, split: str) -> dict:
    """Measure a checkpoint on a split: the 12 COCO numbers and AP per class, each image exactly once."""
    from pipelines.workflow import evaluate_stage, ingest_stage

    with ray_session(settings):
        data = ingest_stage(settings, store)
        place, _ = latest_checkpoint(settings, store, data, checkpoint)
        record = evaluate_stage(settings, store, data, place, split)
    result = record["result"]
    return {**result, "reused": record["reused"], "text": table(result)}


def table(result: dict) -> str:
    """The figures as text; what has no ground truth says so."""

    def show(value: float | None) -> str:
        return "no ground truth" if value is None else f"{value:.3f}"

    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    lines = [f"{result['images']} images of {result['split']}"]
    lines += [f"{name:<6} {show(result[name])}" for name in names]
    width = max(len(c["name"]) for c in result["per_class"])
    lines += [f"{c['name']:<{width}}  AP {show(c['AP'])}  AP50 {show(c['AP50'])}" for c in result["per_class"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
