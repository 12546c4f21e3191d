"""What measuring detections costs: pycocotools and ours on the same truth and detections.

\b
    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --images 5000

The set is made up, like COCO's val: 80 classes of which an image has a few, 7 objects and 100 detections an image, some
on the objects and most not. pycocotools is index, loadRes, evaluate, accumulate and summarize; ours is
`coco_metrics` from the same dicts, with all it returns. The intervals and the kinds of errors, which pycocotools does
not have, stand beside it. Rounds are interleaved, medians are printed.
"""
from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import click
import numpy as np
from common import machine, print_table

from pipelines.errors import calibration, confusion, error_types
from pipelines.evaluate import coco_metrics
from pipelines.matching import match
from pipelines.resample import average_precision, image_weights

TWELVE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CLASSES, OBJECTS, DETECTIONS = 80, 7, 100
WIDTH, HEIGHT = 640, 480


def make(images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO truth and detections of so many images."""
    random = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        size = np.exp(random.uniform(np.log(8), np.log(300), (count, 2)))
        return np.concatenate([random.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - size).clip(1), size], axis=1)

    annotations, detections = [], []
    for image in range(1, images + 1):
        classes = random.choice(CLASSES, 3, replace=False) + 1
        count = random.poisson(OBJECTS)
        mine, category = boxes(count), random.choice(classes, count)
        crowd = random.random(count) < 0.01
        for box, label, many in zip(mine.tolist(), category.tolist(), crowd.tolist(), strict=True):
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box,
                                "area": 0.7 * box[2] * box[3], "iscrowd": int(many)})  # fmt: skip
        on = min(3 * count, DETECTIONS)
        near = mine[np.arange(on) % max(count, 1)] * (1 + random.normal(0, 0.08, (on, 4)))
        found = np.concatenate([near, boxes(DETECTIONS - on)]).clip(0.5)
        label = np.r_[category[np.arange(on) % max(count, 1)], random.integers(1, CLASSES + 1, DETECTIONS - on)]
        score = np.r_[random.beta(3, 3, on), random.beta(1, 8, DETECTIONS - on)]
        detections += [
            {"image_id": image, "category_id": c, "bbox": box, "score": s}
            for c, box, s in zip(label.tolist(), found.tolist(), score.tolist(), strict=True)
        ]
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(1, CLASSES + 1)],
    }
    return truth, detections


def pycocotools(truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, float | None]:
    """The twelve numbers by the reference implementation, which writes into what it is given."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(detections), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return dict(zip(TWELVE, (None if value == -1 else float(value) for value in run.stats), strict=True))


def extras(truth: dict[str, Any], detections: list[dict[str, Any]]) -> None:
    matches = match(truth, detections)
    confusion(matches, [category["name"] for category in truth["categories"]], 0.5)
    calibration(matches)
    error_types(matches, 0.5)


@click.command(help=__doc__)
@click.option("--images", default=1000, show_default=True)
@click.option("--resamples", default=1000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def main(images: int, resamples: int, rounds: int, as_json: bool) -> None:
    truth, detections = make(images)

    def intervals(truth, detections):
        average_precision(match(truth, detections), image_weights(images, resamples, 0))

    sides: dict[str, Callable] = {
        "pycocotools": pycocotools,
        "ours": coco_metrics,
        f"intervals, {resamples} resamples": intervals,
        "confusion, calibration, kinds of errors": extras,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    coco_metrics(*make(2))  # what is imported late is imported
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            click.echo(f"round {number + 1} of {rounds}: {name}", err=True)
            given = copy.deepcopy((truth, detections))
            began = time.perf_counter()
            results[name] = sides[name](*given)
            seconds[name].append(time.perf_counter() - began)
    apart = max(abs((results["ours"][key] or 0) - (results["pycocotools"][key] or 0)) for key in TWELVE)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = middle["ours"] / middle["pycocotools"]
    if as_json:
        click.echo(json.dumps({"images": images, "seconds": seconds, "ratio": ratio, "difference": apart}))
        return
    print_table(
        f"{images} images, {len(truth['annotations'])} objects, {len(detections)} detections, {CLASSES} classes",
        ["", "seconds", "of pycocotools"],
        [[name, f"{value:.2f}", f"{value / middle['pycocotools']:.2f}"] for name, value in middle.items()],
        [f"The twelve numbers differ by at most {apart:.1e}.", machine("cpu")],
    )


if __name__ == "__main__":
    main()
