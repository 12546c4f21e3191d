"""Is one model better than another? Both judged on the same images, and on the same resamples of them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.evaluate import check_ids, coco_truth, detections_to_coco
from pipelines.matching import match
from pipelines.resample import CONFIDENCE, average_precision, image_weights, interval, mean_over_classes
from pipelines.settings import RunSettings, UserError
from pipelines.shards import read_split
from pipelines.stage import read_json


def compare_evaluations(
    settings: RunSettings, dataset_folder: Path, split: str, first: Path, second: Path
) -> dict[str, Any]:
    """The paired difference of two evaluations (folders of `evaluate`) of one split of one dataset.

    Returns {"images", "resamples", "confidence", "AP": {"first", "second", "difference" (second less first), "low",
    "high"}, "AP50": the same, "per_class": [{"name", "id", and those five of its AP}]}. low and high bound the middle
    95 % of the differences over `evaluate.resamples` bootstrap resamples of the images, the same ones for both
    (a paired bootstrap: what is hard is hard for both, so the difference is surer than either). What has no
    ground truth, or no resamples, is None.

    Raises UserError where an evaluation is of another dataset or split.
    """
    dataset = read_json(Path(dataset_folder) / "dataset.json")
    rows = read_split(Path(dataset_folder), split, ["image_id", "file_name", "width", "height", "annotations"])
    truth = coco_truth(rows, dataset["categories"])
    ones = np.ones((1, rows.num_rows), int)
    weights = image_weights(rows.num_rows, settings.evaluate.resamples, settings.seed)
    whole, drawn = [], []
    for folder in (first, second):
        said = read_json(Path(folder) / "metrics.json")
        if (said["dataset_digest"], said["split"]) != (dataset["digest"], split):
            raise UserError(
                f"The evaluation in {folder} is of split {said['split']!r} of dataset {said['dataset_digest']}, not of "
                f"{split!r} of {dataset['digest']}; evaluate both on the same images.", 2,
            )  # fmt: skip
        table = pq.read_table(Path(folder) / "detections.parquet")
        check_ids(table["image_id"].to_pylist(), rows["image_id"].to_pylist(), split)
        matches = match(truth, detections_to_coco(table, dataset["categories"]), settings.evaluate.max_dets)
        whole.append(average_precision(matches, ones))
        drawn.append(average_precision(matches, weights))

    def figures(of) -> dict[str, float | None]:
        one, other = (float(of(ap)[0]) for ap in whole)
        if np.isnan(one):
            return dict.fromkeys(("first", "second", "difference", "low", "high"))
        low, high = interval(of(drawn[1]) - of(drawn[0])) or (None, None)
        return {"first": one, "second": other, "difference": other - one, "low": low, "high": high}

    return {
        "images": rows.num_rows,
        "resamples": settings.evaluate.resamples,
        "confidence": CONFIDENCE,
        "AP": figures(lambda ap: mean_over_classes(ap.mean(axis=-1))),
        "AP50": figures(lambda ap: mean_over_classes(ap[..., 0])),
        "per_class": [
            {"name": category["name"], "id": category["id"], **figures(lambda ap, at=at: ap[:, at].mean(axis=-1))}
            for at, category in enumerate(dataset["categories"])
        ],
    }


def in_words(name: str, figures: dict[str, float | None]) -> str:
    """A figure of `compare_evaluations` as a sentence: how the second model does against the first."""
    if figures["difference"] is None:
        return f"{name}: no ground truth"
    change = figures["difference"]
    said = f"{name} is the same" if change == 0 else (
        f"{name} is {abs(change):.3f} {'higher' if change > 0 else 'lower'}"
    )  # fmt: skip
    if figures["low"] is None:
        return f"{said}; how surely is not known without evaluate.resamples"
    sure = "surely better" if figures["low"] > 0 else "surely worse" if figures["high"] < 0 else "no sure difference"
    return f"{said} ({figures['low']:.3f} to {figures['high']:.3f}, {100 * CONFIDENCE:.0f} %): {sure}"
