"""Detections against truth: the twelve COCO numbers, per class, precision and recall, the best threshold.

The numbers are those of pycocotools, to the last digits; faster-coco-eval computes them.
"""
from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.progress import progress
from pipelines.settings import RunSettings, UserError
from pipelines.shards import read_split, split_shards
from pipelines.stage import read_json, write_json

if TYPE_CHECKING:
    from pipelines.detect import Detector

IOU = 0.5  # of the precision-recall curve, the best F1 and the report's mistakes

DETECTIONS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy, pixels of the stored image
        ("scores", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int32())),
    ]
)


def coco_truth(rows: pa.Table | Iterable[dict[str, Any]], categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Shard rows (image_id, file_name, width, height, annotations) -> a COCO ground-truth dict.

    Boxes are the source's own, in float64; annotations that training rejects and crowds are in it, so
    that AP equals the source's. An annotation whose box is not four finite numbers (COCO's own tool
    breaks on it) or whose category is not in `categories` cannot be matched and is left out; ingest
    lists both with their reasons.
    """
    known = {category["id"] for category in categories}
    images, annotations = [], []
    for row in rows.to_pylist() if isinstance(rows, pa.Table) else rows:
        image = row["image_id"]
        images.append(
            {"id": image, "file_name": row["file_name"], "width": row["width"], "height": row["height"]}
        )
        for annotation in row["annotations"]:
            box = annotation["bbox"]
            whole = box is not None and len(box) == 4 and np.isfinite(box).all()
            if annotation["category_id"] not in known or not whole:
                continue
            area = annotation["area"]
            annotations.append(
                {
                    "id": annotation["id"],
                    "image_id": image,
                    "category_id": annotation["category_id"],
                    "bbox": [float(value) for value in box],
                    "area": float(box[2] * box[3] if area is None else area),
                    "iscrowd": int(annotation["iscrowd"]),
                    "reject": annotation.get("reject"),
                }
            )
    names = [{"id": category["id"], "name": category["name"]} for category in categories]
    return {"images": images, "annotations": annotations, "categories": names}


def detections_to_coco(table: pa.Table, categories: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """A detections table (DETECTIONS) -> the arrays `coco_metrics` takes, N detections in all.

    Returns image_id int64 [N], category_id int64 [N], bbox float64 [N, 4] xywh pixels, score float64 [N].
    """
    labels = table["labels"].combine_chunks()
    lengths = pc.list_value_length(labels).to_numpy(zero_copy_only=False)
    boxes = table["boxes"].combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
    boxes = boxes.astype(np.float64).reshape(-1, 4)
    ids = np.array([category["id"] for category in categories], np.int64)
    return {
        "image_id": np.repeat(table["image_id"].to_numpy(), lengths),
        "category_id": ids[labels.flatten().to_numpy(zero_copy_only=False)],
        "bbox": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
        "score": table["scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64),
    }


def coco_metrics(
    truth: dict[str, Any], detections: list[dict[str, Any]] | dict[str, np.ndarray], max_dets: int = 100
) -> dict[str, Any]:
    """COCO's box metrics of `detections` on `truth`; what has no ground truth is None, never -1.

    detections: a list of {"image_id", "category_id", "bbox" xywh pixels, "score"}, or those four as
    arrays. max_dets counts per image and class, as COCO's; the keys AR1, AR10 and AR100 are recall at
    1, 10 and max_dets.

    Returns {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
    "per_class": [{"name", "id", "AP", "AP50", "truth", "detections", "best_f1"}] in the categories'
    order, "precision_recall": {"iou", "recall" [101], "precision" [101] mean over the classes with truth,
    "per_class": [[101] or None]}, "best_f1": {"threshold", "f1", "precision", "recall"}}. `truth` counts
    objects that are no crowd, `detections` those that count under max_dets. best_f1 is at IoU 0.5; its
    threshold is inclusive and None where there is no detection.

    Raises ValueError for a detection of an image or category the truth does not have, numbers that are
    not finite, and image or category ids that occur twice.
    """
    images, categories, found = _checked(truth, detections, max_dets)
    limits = [1, min(10, max_dets), max_dets]
    precision, recall = _accumulate(truth, images, categories, found, limits)[:2]

    result: dict[str, Any] = {
        "AP": _mean(precision[..., 0, 2]),
        "AP50": _mean(precision[0, ..., 0, 2]),
        "AP75": _mean(precision[5, ..., 0, 2]),
    }
    result |= {f"AP{size}": _mean(precision[..., area, 2]) for area, size in enumerate("sml", 1)}
    result |= {f"AR{limit}": _mean(recall[..., 0, at]) for at, limit in enumerate((1, 10, 100))}
    result |= {f"AR{size}": _mean(recall[..., area, 2]) for area, size in enumerate("sml", 1)}

    matches = _match(truth, images, categories, found, max_dets)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in truth["annotations"]], bool)
    counted = np.array([a["category_id"] in categories for a in truth["annotations"]], bool) & ~crowd
    truth_category = np.array([a["category_id"] for a in truth["annotations"]], np.int64)
    hit = matches >= 0
    judged = ~hit  # a detection that lies on a crowd is neither right nor wrong
    judged[hit] = ~crowd[matches[hit]]

    per_class, curves = [], []
    for category in truth["categories"]:
        at = categories[category["id"]]
        mine = found["category_id"] == category["id"]
        objects = int((counted & (truth_category == category["id"])).sum())
        curve = precision[0, :, at, 0, 2]
        curves.append(np.round(curve, 6).tolist() if objects else None)
        per_class.append(
            {
                "name": category["name"],
                "id": category["id"],
                "AP": _mean(precision[:, :, at, 0, 2]),
                "AP50": _mean(curve),
                "truth": objects,
                "detections": int(mine.sum()),
                "best_f1": _best_f1(found["score"][mine & judged], hit[mine & judged], objects),
            }
        )
    known = [curve for curve in curves if curve]
    return {
        **result,
        "per_class": per_class,
        "precision_recall": {
            "iou": IOU,
            "recall": np.round(np.linspace(0, 1, 101), 2).tolist(),
            "precision": np.round(np.mean(known, axis=0), 6).tolist() if known else None,
            "per_class": curves,
        },
        "best_f1": _best_f1(found["score"][judged], hit[judged], int(counted.sum())),
    }


def match_detections(
    truth: dict[str, Any], detections: list[dict[str, Any]] | dict[str, np.ndarray], max_dets: int = 100
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """COCO's matching at IoU 0.5: which annotation each detection found.

    Returns the detections that count under max_dets, as arrays in the given order, and for each the
    position in truth["annotations"] of its match, or -1. Several detections may match one crowd.
    Raises ValueError as `coco_metrics`.
    """
    images, categories, found = _checked(truth, detections, max_dets)
    return found, _match(truth, images, categories, found, max_dets)


def evaluate(
    settings: RunSettings, dataset_folder: Path, checkpoint: Path, split: str, folder: Path
) -> dict[str, Any]:
    """Detect on every image of a split with a checkpoint, and measure; Ray is running.

    Writes detections.parquet (one row per image, all queries) and metrics.json (everything
    `coco_metrics` returns) into folder, and returns the twelve numbers, AP per class, the best F1, the
    split's digest, the files, and the speed of decoding and detecting (without the start of the actor).
    Raises UserError where checkpoint and dataset disagree on the categories, RuntimeError where not every
    image was scored exactly once or one cannot be decoded.
    """
    import ray


    shards = split_shards(dataset_folder, split)
    dataset = read_json(Path(dataset_folder) / "dataset.json")
    categories = dataset["categories"]
    _check_categories(checkpoint, categories, dataset_folder)
    rows = read_split(Path(dataset_folder), split, ["image_id", "file_name", "width", "height", "annotations"])

    use_gpu = settings.train.use_gpu
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    images = ray.data.read_parquet(shards, columns=["image_id", "file_name", "image"])
    # A block is what comes back at once: a few batches, so that the bar moves within a shard.
    stream = images.repartition(target_num_rows_per_block=2 * settings.evaluate.batch_size).map_batches(
        DetectShard,
        fn_constructor_args=(str(checkpoint), "cuda" if use_gpu else "cpu", settings.evaluate.batch_size,
                             settings.ingest.max_pixels),
        batch_size=settings.evaluate.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )  # fmt: skip
    tables, seconds = [DETECTIONS.empty_table()], 0.0
    with progress() as bar:
        task = bar.add_task(f"evaluate {split}", total=rows.num_rows, note="")
        for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(batch.select(DETECTIONS.names).cast(DETECTIONS))
            seconds += pc.sum(batch["seconds"]).as_py()
            bar.advance(task, batch.num_rows)
    detections = pa.concat_tables(tables).sort_by("image_id")
    check_ids(detections["image_id"].to_pylist(), rows["image_id"].to_pylist(), split)

    metrics = coco_metrics(
        coco_truth(rows, categories), detections_to_coco(detections, categories), settings.evaluate.max_dets
    )
    folder = Path(folder)
    pq.write_table(detections, folder / "detections.parquet")
    head = {
        "format": 1,
        "split": split,
        "images": rows.num_rows,
        "dataset_digest": dataset["digest"],
        "max_dets": settings.evaluate.max_dets,
    }
    write_json(folder / "metrics.json", head | metrics)
    numbers = {key: value for key, value in metrics.items() if key not in ("per_class", "precision_recall")}
    return {
        **numbers,
        "per_class": [{key: c[key] for key in ("name", "id", "AP", "AP50")} for c in metrics["per_class"]],
        "split": split,
        "split_digest": dataset["splits"][split]["digest"],
        "images": rows.num_rows,
        "images_per_second": round(rows.num_rows / seconds, 2) if seconds else None,
        "detections": str(folder / "detections.parquet"),
        "metrics": str(folder / "metrics.json"),
    }


class DetectShard:
    """Ray Data actor: batches of encoded images -> rows of detections (DETECTIONS) and `seconds` spent on each."""

    def __init__(self, checkpoint: str, device: str, batch_size: int, max_pixels: int):
        import torch

        from pipelines.detect import Detector

        torch.set_num_threads(os.cpu_count() or 1)  # the one actor has the machine; Ray tells it one thread
        self.detector = Detector.load(checkpoint, batch_size, device)
        self.max_pixels = max_pixels

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.monotonic()
        rows = detect_rows(self.detector, batch, self.max_pixels)
        seconds = (time.monotonic() - started) / rows.num_rows
        return rows.append_column("seconds", pa.array([seconds] * rows.num_rows, pa.float64()))


def detect_rows(detector: Detector, rows: pa.Table, max_pixels: int) -> pa.Table:
    """Shard rows (image_id, file_name, image) -> a row of detections (DETECTIONS) for each.

    Raises RuntimeError for an image that can no longer be decoded: ingest did decode it.
    """
    from detr.transforms import ImageError, decode_image

    images = []
    names = rows["file_name"].to_pylist()
    for name, data in zip(names, rows["image"].to_pylist(), strict=True):
        try:
            images.append(decode_image(data, max_pixels))
        except ImageError as error:
            raise RuntimeError(f"Image {name!r} can no longer be decoded: {error}") from error
    found = detector.detect(images)
    return pa.table(
        [
            rows["image_id"].combine_chunks(),
            pa.array(names, pa.string()),
            pa.array([list(f["boxes"]) for f in found], DETECTIONS.field("boxes").type),
            pa.array([f["scores"] for f in found], DETECTIONS.field("scores").type),
            pa.array([f["labels"] for f in found], DETECTIONS.field("labels").type),
        ],
        schema=DETECTIONS,
    )


def check_ids(seen: list[int], expected: list[int], split: str) -> None:
    """Raise RuntimeError unless every expected image was seen exactly once, and no other."""
    missing, unknown = set(expected) - set(seen), set(seen) - set(expected)
    twice = len(seen) - len(set(seen))
    if missing or unknown or twice:
        raise RuntimeError(
            f"Split {split!r} has {len(expected)} images, but {len(seen)} were scored: "
            f"{len(missing)} missing, {twice} more than once, {len(unknown)} unknown; AP would be wrong."
        )


def _check_categories(checkpoint: Path, categories: list[dict[str, Any]], dataset_folder: Path) -> None:
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise UserError(f"{checkpoint} is no checkpoint: there is no config.json in it.", 2)
    theirs = [(c["id"], c["name"]) for c in read_json(path)["categories"]]
    ours = [(c["id"], c["name"]) for c in categories]
    if theirs != ours:
        at = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), None)
        detail = f"label {at} is {theirs[at]} and {ours[at]}" if at is not None else (
            f"there are {len(theirs)} and {len(ours)}"
        )  # fmt: skip
        raise UserError(
            f"The checkpoint {checkpoint} and the dataset in {dataset_folder} have different categories "
            f"({detail}); evaluate on the dataset it was trained for, or train on this one.",
            2,
        )


def _checked(
    truth: dict[str, Any], detections: list[dict[str, Any]] | dict[str, np.ndarray], max_dets: int
) -> tuple[dict[int, int], dict[int, int], dict[str, np.ndarray]]:
    """Positions of image and category ids in ascending order, and the detections that count, as arrays."""
    if not isinstance(detections, dict):
        keys = ("image_id", "category_id", "bbox", "score")
        detections = {key: [detection[key] for detection in detections] for key in keys}
    found = {
        "image_id": np.asarray(detections["image_id"], np.int64).reshape(-1),
        "category_id": np.asarray(detections["category_id"], np.int64).reshape(-1),
        "bbox": np.asarray(detections["bbox"], np.float64).reshape(-1, 4),
        "score": np.asarray(detections["score"], np.float64).reshape(-1),
    }
    if len({len(values) for values in found.values()}) != 1:
        raise ValueError("detections are of unequal lengths")
    if not (np.isfinite(found["bbox"]).all() and np.isfinite(found["score"]).all()):
        raise ValueError("a detection has a box or a score that is not finite")
    positions = []
    for what, key in (("images", "image_id"), ("categories", "category_id")):
        ids = sorted(item["id"] for item in truth[what])
        if len(set(ids)) != len(ids):
            raise ValueError(f"the truth names {len(ids) - len(set(ids))} of its {what} twice")
        unknown = set(found[key].tolist()) - set(ids)
        if unknown:
            raise ValueError(
                f"detections name {len(unknown)} {key} the truth does not have, such as {min(unknown)}"
            )
        positions.append({item: at for at, item in enumerate(ids)})
    lost = {annotation["image_id"] for annotation in truth["annotations"]} - positions[0].keys()
    if lost:
        raise ValueError(f"annotations name {len(lost)} images the truth does not have, such as {min(lost)}")

    # The best max_dets of each image and class; among equal scores those that come first, as pycocotools.
    order = np.lexsort((-found["score"], found["category_id"], found["image_id"]))
    groups = np.stack([found["image_id"][order], found["category_id"][order]], axis=1)
    starts = np.flatnonzero(np.r_[True, (groups[1:] != groups[:-1]).any(axis=1)]) if len(order) else order
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    keep = np.sort(order[rank < max_dets])
    return positions[0], positions[1], {key: values[keep] for key, values in found.items()}


def _accumulate(truth, images, categories, found, limits, only_matching=False):
    """faster-coco-eval: precision [IoU, 101, class, area, limit], recall [IoU, class, area, limit], matches.

    Ids are renumbered: an annotation id 0 or one used twice spoils the matching otherwise.
    """
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    base = {
        "images": [{"id": at} for at in images.values()],
        "categories": [{"id": at + 1, "name": str(at)} for at in categories.values()],
    }
    objects = [
        {
            "id": number,
            "image_id": images[annotation["image_id"]],
            "category_id": categories[annotation["category_id"]] + 1,
            "bbox": annotation["bbox"],
            "area": annotation["area"],
            "iscrowd": int(annotation.get("iscrowd", 0)),
        }
        for number, annotation in enumerate(truth["annotations"], 1)
        if annotation["category_id"] in categories
    ]
    columns = (found[key].tolist() for key in ("image_id", "category_id", "bbox", "score"))
    found_objects = [
        {
            "id": number,
            "image_id": images[image],
            "category_id": categories[category] + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": 0,
        }
        for number, (image, category, box, score) in enumerate(zip(*columns, strict=True), 1)
    ]
    truth_coco, found_coco = (COCO(base | {"annotations": items}) for items in (objects, found_objects))
    run = COCOeval_faster(truth_coco, found_coco, "bbox")
    run.params.maxDets = limits
    if only_matching:
        # With one threshold and one range of areas, "matched" is exactly that matching.
        run.params.iouThrs = np.array([IOU])
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
    if not images or not categories:  # the library divides by their number
        shape = (len(run.params.iouThrs), 101, len(categories), 4, 3)
        return np.full(shape, -1.0), np.full(shape[:1] + shape[2:], -1.0), {}
    run.evaluate()
    return run.eval["precision"], run.eval["recall"], run.eval["matched"]


def _match(truth, images, categories, found, max_dets) -> np.ndarray:
    limits = [1, min(10, max_dets), max_dets]
    pairs = _accumulate(truth, images, categories, found, limits, only_matching=True)[2]
    matches = np.full(len(found["score"]), -1, np.int64)
    for pair in pairs:
        detection, annotation = pair.split("_")
        matches[int(detection) - 1] = int(annotation) - 1
    return matches


def _mean(values: np.ndarray) -> float | None:
    """Mean of what is defined; -1 marks classes, areas and thresholds without ground truth."""
    values = values[values > -1]
    return float(np.mean(values)) if values.size else None


def _best_f1(scores: np.ndarray, hits: np.ndarray, truth: int) -> dict[str, float | None] | None:
    """The score threshold with the best F1; among equals the highest. None without truth."""
    if not truth:
        return None
    if not len(scores):
        return {"threshold": None, "f1": 0.0, "precision": None, "recall": 0.0}
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(hits[order])
    last = np.r_[scores[1:] != scores[:-1], True]  # a threshold takes all of equal score or none
    kept = np.arange(1, len(scores) + 1)[last]
    f1 = 2 * right[last] / (kept + truth)
    best = int(np.argmax(f1))
    return {
        "threshold": float(scores[last][best]),
        "f1": float(f1[best]),
        "precision": float(right[last][best] / kept[best]),
        "recall": float(right[last][best] / truth),
    }
