"""AP on "val" while a training runs: by its workers in between, or beside it as a task of Ray's."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from detr.draw import class_colours, draw_truth_and_detections, picture_grid
from detr.transforms import decode_image
from pipelines.detect import Detector
from pipelines.evaluate import DETECTIONS, check_ids, coco_metrics, coco_truth, detect_rows, detections_to_coco
from pipelines.mirror import at_hand
from pipelines.settings import RunSettings
from pipelines.shards import read_split, split_shards
from pipelines.stage import read_json
from pipelines.tracking import Tracker, forget_last_steps
from pipelines.training_log import TrainingLog, progress_of
from pipelines.training_state import MODEL
from pipelines.workers import gather_over_workers, of_first_worker, use_machine

SHOWN, SHOWN_FROM = 6, 0.3  # pictures of a validation, and the score a detection on them has at least


@torch.inference_mode()
def validate(
    detector: Detector, dataset: dict[str, Any], dataset_folder: Path, settings: RunSettings,
    rank: int = 0, workers: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """COCO metrics of a detector on the split "val", every image once, shared among the workers, and known to all.

    All workers have to call it with the same weights.
    """
    mine = find_objects(detector, dataset_folder, settings, rank, workers)
    found = pa.concat_tables(gather_over_workers(mine) if workers > 1 else [mine])
    metrics = None
    if rank == 0:
        rows = read_split(dataset_folder, "val", ["image_id", "file_name", "width", "height", "annotations"])
        check_ids(found["image_id"].to_pylist(), rows["image_id"].to_pylist(), "val")
        metrics = coco_metrics(
            coco_truth(rows, dataset["categories"]), detections_to_coco(found, dataset["categories"]),
            settings.evaluate.max_dets,
        )  # fmt: skip
        # Without any ground truth there is no AP; training goes on and the report says so in words.
        metrics |= {"AP": metrics["AP"] or 0.0, "AP50": metrics["AP50"] or 0.0}
    return of_first_worker(metrics)


def find_objects(detector: Detector, dataset_folder: Path, settings: RunSettings, rank: int, workers: int) -> pa.Table:
    """What a detector finds on one worker's part of the split "val" (evaluate.DETECTIONS).

    Images share a batch with the same others whatever the number of workers: to the last digits, what is found on an
    image depends on how many are in its batch.
    """
    size, tables = settings.evaluate.batch_size, [DETECTIONS.empty_table()]
    for shard in split_shards(dataset_folder, "val"):  # one at a time: the images need not fit in memory together
        images = pq.read_table(shard, columns=["image_id", "file_name", "image", "width", "height"])
        # Only images of like size can share a batch.
        images = images.sort_by([(key, "ascending") for key in ("height", "width", "image_id")])
        for start in range(rank * size, len(images), workers * size):
            tables.append(detect_rows(detector, images.slice(start, size), settings.ingest.max_pixels))
    return pa.concat_tables(tables)


def validate_checkpoint(
    checkpoint, *, settings: dict[str, Any], dataset_folder: str, log: str, tracker: dict[str, Any], run_id: str,
    of_val: dict[str, str], device: str,
) -> dict[str, Any]:  # fmt: skip
    """Ray Train's validation task: the averaged model of a checkpoint, measured while the training goes on."""
    use_machine()
    forget_last_steps()  # of a run that another process has logged since
    known = RunSettings.model_validate(settings)
    place = at_hand(dataset_folder)
    dataset = read_json(place / "dataset.json")
    with checkpoint.as_directory() as files:
        detector = Detector.load(Path(files) / MODEL, known.evaluate.batch_size, device)
        step = read_json(Path(files) / MODEL / "config.json")["trained"]["step"]
    said = TrainingLog(progress_of(log, step), Tracker(**tracker), run_id, of_val)
    try:
        metrics = validate(detector, dataset, place, known)
    except Exception as error:
        said.say(f"The validation of step {step} failed: {error}")
        said.finish()
        raise
    said.validation(step, metrics, sample_predictions(detector, dataset, place, known))
    said.finish()
    return {"AP": metrics["AP"], "AP50": metrics["AP50"], "metrics": metrics}


def sample_predictions(
    detector: Detector, dataset: dict[str, Any], dataset_folder: Path, settings: RunSettings
) -> Image.Image:
    """Some validation images with truth and detections, always the same ones."""
    names = [category["name"] for category in dataset["categories"]]
    shard = split_shards(dataset_folder, "val")[0]
    rows = pq.ParquetFile(shard).iter_batches(SHOWN, columns=["image", "boxes", "labels"])
    pictures = []
    for row in next(rows).to_pylist():
        image = decode_image(row["image"], settings.ingest.max_pixels)
        (found,) = detector.detect([image])
        kept = found["scores"] >= SHOWN_FROM
        pictures.append(draw_truth_and_detections(
            image, row["boxes"], [names[label] for label in row["labels"]], found["boxes"][kept],
            [names[label] for label in found["labels"][kept]], found["scores"][kept].tolist(), class_colours(names),
        ))  # fmt: skip
    return picture_grid(pictures)
