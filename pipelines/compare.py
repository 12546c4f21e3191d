"""Is one model better than another? Both judged on the same images, and on the same resamples of them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.evaluate import check_ids, coco_truth, detections_to_coco
from pipelines.matching import match
from pipelines.resample import (
    CONFIDENCE,
    TOO_FEW,
    average_precision,
    enough_images,
    image_weights,
    interval,
    mean_over_classes,
)
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
    ground truth is None; low and high are, too, without resamples, or with objects in too few images (`enough_images`).

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

    of_classes, over_all = enough_images(matches)  # the truth is the same for both

    def figures(of, enough) -> dict[str, float | None]:
        one, other = (float(of(ap)[0]) for ap in whole)
        if np.isnan(one):
            return dict.fromkeys(("first", "second", "difference", "low", "high"))
        low, high = (interval(of(drawn[1]) - of(drawn[0])) if enough else None) or (None, None)
        return {"first": one, "second": other, "difference": other - one, "low": low, "high": high}

    return {
        "images": rows.num_rows,
        "resamples": settings.evaluate.resamples,
        "confidence": CONFIDENCE,
        "AP": figures(lambda ap: mean_over_classes(ap.mean(axis=-1)), over_all),
        "AP50": figures(lambda ap: mean_over_classes(ap[..., 0]), over_all),
        "per_class": [
            {
                "name": category["name"], "id": category["id"],
                **figures(lambda ap, at=at: ap[:, at].mean(axis=-1), of_classes[at]),
            }
            for at, category in enumerate(dataset["categories"])
        ],
    }  # fmt: skip


def judgement(figures: dict[str, float | None], resamples: int) -> str:
    """What figures of `compare_evaluations` with so many resamples come to, in words."""
    if figures["difference"] is None:
        return "no ground truth"
    if figures["low"] is None:
        return TOO_FEW if resamples else "how sure is not known without evaluate.resamples"
    return "surely better" if figures["low"] > 0 else "surely worse" if figures["high"] < 0 else "no sure difference"


def in_words(name: str, figures: dict[str, float | None], resamples: int) -> str:
    """Figures of `compare_evaluations` as a sentence: how the second model does against the first."""
    word, change = judgement(figures, resamples), figures["difference"]
    if change is None:
        return f"{name}: {word}"
    how = "the same" if change == 0 else f"{abs(change):.3f} {'higher' if change > 0 else 'lower'}"
    low, high = figures["low"], figures["high"]
    sure = "" if low is None else f" ({low:+.3f} to {high:+.3f}, {100 * CONFIDENCE:.0f} %)"
    return f"{name} is {how}{sure}, {figures['second']:.3f} instead of {figures['first']:.3f}: {word}"
