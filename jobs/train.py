"""Train a DETR on the shards."""
from __future__ import annotations

from pathlib import Path

from jobs.common import job, ray_session


@job("detr train data.path=path/to/coco train.budget='20 minutes'")
def main(settings, store: Path) -> dict:
    """Train on data.path (ingested first if need be); stopped and started again it goes on."""
    from pipelines.workflow import check_training, find_data, train_stage

    check_training(settings, store)
    read = find_data(settings, store)
    with ray_session(settings):
        record = train_stage(settings, store, read())
    result = record["result"]
    folder = str(Path(record["folder"]) / "checkpoint")
    text = f"AP {result['AP']:.3f}, AP50 {result['AP50']:.3f} on val after {result['steps']} steps: {folder}"
    return {**result, "checkpoint": folder, "reused": record["reused"], "text": text}


if __name__ == "__main__":
    main()
