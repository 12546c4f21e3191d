"""Detections against truth: the twelve COCO numbers, per class, precision and recall, the best threshold.

The numbers are those of pycocotools, to the last digits; faster-coco-eval computes them.
"""
from __future__ import annotations

import math
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import calibration, confusion, error_types
from pipelines.matching import IOUS, Matches, match
from pipelines.metrics import count_images, took
from pipelines.mirror import check_seen, name_of
from pipelines.progress import progress
from pipelines.resample import average_precision, enough_images, image_weights, interval, mean_over_classes
from pipelines.settings import RunSettings, UserError
from pipelines.shards import read_split, split_shards
from pipelines.stage import read_json, write_json
from pipelines.storage import WORKING, from_task, locate

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
    "per_class": [{"name", "id", "AP", "AP50", "APs", "APm", "APl", "truth", "detections", "best_f1"}] in the
    categories' order, "precision_recall": {"iou", "recall" [101], "precision" [101] mean over the classes with truth,
    "per_class": [[101] or None]}, "best_f1": {"threshold", "f1", "precision", "recall"}}. `truth` counts
    objects that are no crowd, `detections` those that count under max_dets. best_f1 is at IoU 0.5; its
    threshold lies in the middle between the lowest score that it keeps and the highest that it drops (where it drops
    none, it is half of the lowest), so that no detection changes sides where a score's last digit differs. It is None
    where there is no detection.

    Raises ValueError as `match`.
    """
    matches = match(truth, detections, max_dets, IOUS[:1])
    precision, recall = _accumulate(truth, matches, [1, min(10, max_dets), max_dets])

    result: dict[str, Any] = {
        "AP": _mean(precision[..., 0, 2]),
        "AP50": _mean(precision[0, ..., 0, 2]),
        "AP75": _mean(precision[5, ..., 0, 2]),
    }
    result |= {f"AP{size}": _mean(precision[..., area, 2]) for area, size in enumerate("sml", 1)}
    result |= {f"AR{limit}": _mean(recall[..., 0, at]) for at, limit in enumerate((1, 10, 100))}
    result |= {f"AR{size}": _mean(recall[..., area, 2]) for area, size in enumerate("sml", 1)}

    (right,), (judged,) = matches.right, matches.judged
    per_class, curves = [], []
    for at, category in enumerate(truth["categories"]):
        mine = matches.label == at
        objects = int((matches.counted & (matches.object_label == at)).sum())
        curve = precision[0, :, at, 0, 2]
        curves.append(np.round(curve, 6).tolist() if objects else None)
        per_class.append(
            {
                "name": category["name"],
                "id": category["id"],
                "AP": _mean(precision[:, :, at, 0, 2]),
                "AP50": _mean(curve),
                **{f"AP{size}": _mean(precision[:, :, at, area, 2]) for area, size in enumerate("sml", 1)},
                "truth": objects,
                "detections": int(mine.sum()),
                "best_f1": _best_f1(matches.score[mine], right[mine], judged[mine], objects),
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
        "best_f1": _best_f1(matches.score, right, judged, int(matches.counted.sum())),
    }


def f1_at(matches: Matches, threshold: float) -> dict[str, float | None] | None:
    """{"threshold", "f1", "precision", "recall"} over all classes at IoU 0.5, of the scores from a threshold on.

    As `coco_metrics`'s best_f1, at a threshold that was chosen elsewhere. precision is None where nothing is found
    there; None without truth.
    """
    truth, kept = int(matches.counted.sum()), matches.score >= threshold
    if not truth:
        return None
    right, judged = int((matches.right[0] & kept).sum()), int((matches.judged[0] & kept).sum())
    return {
        "threshold": threshold,
        "f1": 2 * right / (judged + truth),
        "precision": right / judged if judged else None,
        "recall": right / truth,
    }


def full_metrics(
    truth: dict[str, Any], detections: list[dict[str, Any]] | dict[str, np.ndarray], max_dets: int = 100,
    resamples: int = 0, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """All that is said of a finished model: `coco_metrics`, how sure it is, and where the model errs.

    Beside what `coco_metrics` returns: "interval" of each class (95 % of its AP, by a bootstrap over the images),
    "intervals": {"AP", "AP50"}, each [low, high], or None without resamples or where too few images have objects
    (`enough_images`); "confusion", "calibration" and "errors" as pipelines.errors makes them, the first and the last at
    the overall best-F1 threshold.

    Raises ValueError as `match`.
    """
    metrics = coco_metrics(truth, detections, max_dets)
    matches = match(truth, detections, max_dets)
    ap = average_precision(matches, image_weights(len(matches.images), resamples, seed))
    of_classes, over_all = enough_images(matches)
    for at, one in enumerate(metrics["per_class"]):
        one["interval"] = interval(ap[:, at].mean(axis=-1)) if of_classes[at] else None
    means = {"AP": mean_over_classes(ap.mean(axis=-1)), "AP50": mean_over_classes(ap[..., 0])}
    metrics["intervals"] = {name: interval(mean) if over_all else None for name, mean in means.items()}
    threshold = (metrics["best_f1"] or {}).get("threshold")
    names = [category["name"] for category in truth["categories"]]
    return {
        **metrics,
        "confusion": confusion(matches, names, threshold),
        "calibration": calibration(matches),
        "errors": error_types(matches, threshold),
    }


def evaluate(
    settings: RunSettings, dataset_folder: Path, checkpoint: Path, split: str, folder: Path
) -> dict[str, Any]:
    """Detect on every image of a split with a checkpoint, and measure; Ray is running.

    Writes detections.parquet (one row per image, all queries) and metrics.json (everything
    `full_metrics` returns) into folder, and returns what of it is not a curve or a matrix: the twelve numbers, the
    figures of each class, the best F1, the intervals; with the split's digest, the files, and the speed of decoding and
    detecting of all actors together (without their start).

    A checkpoint may lack classes of the dataset; of these it finds nothing. Raises UserError where it has one that
    the dataset has not, cannot be loaded, or what it works on cannot be had; RuntimeError where not every image was
    scored exactly once or one cannot be decoded.
    """
    import ray
    from ray.exceptions import RayTaskError

    from detr.checkpoint import CheckpointError, load_checkpoint

    check_seen(dataset_folder)
    shards = split_shards(dataset_folder, split)
    dataset = read_json(Path(dataset_folder) / "dataset.json")
    categories = dataset["categories"]
    labels = _dataset_labels(checkpoint, categories, dataset_folder)
    rows = read_split(Path(dataset_folder), split, ["image_id", "file_name", "width", "height", "annotations"])

    try:
        load_checkpoint(checkpoint)  # an actor that dies of it says so later and less clearly
    except CheckpointError as error:
        raise UserError(f"{error}.", 2) from error
    use_gpu = detects_on_gpus(settings)
    block = 2 * settings.evaluate.batch_size
    actors, sharing = places(ray.nodes(), use_gpu)
    fs, _ = locate(name_of(dataset_folder), WORKING)
    images = ray.data.read_parquet(
        [locate(name_of(shard))[1] for shard in shards], filesystem=fs, columns=["image_id", "file_name", "image"]
    )
    # A block is what comes back at once: a few batches, so that the bar moves within a shard.
    stream = images.repartition(target_num_rows_per_block=block).map_batches(
        DetectShard,
        fn_constructor_args=(ray.put(pack(checkpoint)), "cuda" if use_gpu else "cpu", settings.evaluate.batch_size,
                             settings.ingest.max_pixels, sharing),
        batch_size=settings.evaluate.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, math.ceil(rows.num_rows / block)))),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )  # fmt: skip
    tables, seconds, counts = [DETECTIONS.empty_table()], Counter(), Counter()
    with progress() as bar:
        task = bar.add_task(f"evaluate {split}", total=rows.num_rows, note="")
        try:
            for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
                tables.append(batch.select(DETECTIONS.names).cast(DETECTIONS))
                for actor, spent in zip(batch["actor"].to_pylist(), batch["seconds"].to_pylist(), strict=True):
                    seconds[actor] += spent
                    counts[actor] += 1
                bar.advance(task, batch.num_rows)
        except RayTaskError as error:
            raise from_task(error) or error from error
    detections = pa.concat_tables(tables).sort_by("image_id")
    check_ids(detections["image_id"].to_pylist(), rows["image_id"].to_pylist(), split)
    detections = _relabelled(detections, labels)

    metrics = full_metrics(
        coco_truth(rows, categories), detections_to_coco(detections, categories), settings.evaluate.max_dets,
        settings.evaluate.resamples, settings.seed,
    )  # fmt: skip
    folder = Path(folder)
    pq.write_table(detections, folder / "detections.parquet")
    head = {
        "format": 2,
        "split": split,
        "images": rows.num_rows,
        "dataset_digest": dataset["digest"],
        "max_dets": settings.evaluate.max_dets,
        "resamples": settings.evaluate.resamples,
    }
    write_json(folder / "metrics.json", head | metrics)
    kept_apart = ("precision_recall", "confusion", "calibration", "errors")
    return {
        **{key: value for key, value in metrics.items() if key not in kept_apart},
        "split": split,
        "split_digest": dataset["splits"][split]["digest"],
        "images": rows.num_rows,
        "resamples": settings.evaluate.resamples,
        "images_per_second": round(sum(counts[a] / seconds[a] for a in counts), 2) if counts else None,
        "detections": str(folder / "detections.parquet"),
        "metrics": str(folder / "metrics.json"),
    }


def pack(checkpoint: Path) -> dict[str, bytes]:
    """What `Detector.load` reads of a checkpoint, to be handed to actors: their machines may not have its folder."""
    return {name: (Path(checkpoint) / name).read_bytes() for name in ("model.safetensors", "config.json")}


@contextmanager
def unpacked(files: dict[str, bytes]) -> Iterator[Path]:
    """A folder with these files, while the block runs."""
    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        yield Path(place)


def detects_on_gpus(settings: RunSettings) -> bool:
    """Whether models detect on GPUs: as told, else where Ray has some. UserError where it is told and there is none."""
    import ray

    there = ray.cluster_resources().get("GPU", 0) > 0
    if settings.train.use_gpu and not there:
        raise UserError("train.use_gpu is true, but Ray has no GPU; set it to false, or go where there is one.", 2)
    return there if settings.train.use_gpu is None else settings.train.use_gpu


def places(nodes: list[dict[str, Any]], use_gpu: bool) -> tuple[int, int]:
    """How many actors the cluster (`ray.nodes()`) is to have, and how many of them at most share a node.

    One for each GPU, or without for each node with a CPU: Ray Data spreads them.
    """
    there = [node["Resources"] for node in nodes if node["Alive"]]
    if use_gpu:
        gpus = [int(resources.get("GPU", 0)) for resources in there]
        return max(1, sum(gpus)), max([1, *gpus])
    return max(1, sum(resources.get("CPU", 0) >= 1 for resources in there)), 1


class DetectShard:
    """Ray Data actor: batches of encoded images -> rows of detections (DETECTIONS), `seconds` spent on each, `actor`.

    checkpoint: a reference to what `pack` made; sharing: how many actors share the cores of a node.
    """

    def __init__(self, checkpoint, device: str, batch_size: int, max_pixels: int, sharing: int = 1):
        import ray
        import torch
        from joblib import cpu_count

        from pipelines.detect import Detector

        torch.set_num_threads(max(1, cpu_count() // sharing))  # Ray tells an actor one
        with unpacked(ray.get(checkpoint)) as folder:
            self.detector = Detector.load(folder, batch_size, device)
        self.max_pixels = max_pixels
        self.name = uuid.uuid4().hex

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.monotonic()
        rows = detect_rows(self.detector, batch, self.max_pixels)
        took("evaluate", time.monotonic() - started)
        count_images("evaluate", rows.num_rows)
        seconds = (time.monotonic() - started) / rows.num_rows
        rows = rows.append_column("seconds", pa.array([seconds] * rows.num_rows, pa.float64()))
        return rows.append_column("actor", pa.array([self.name] * rows.num_rows, pa.string()))


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


def _dataset_labels(checkpoint: Path, categories: list[dict[str, Any]], dataset_folder: Path) -> list[int]:
    """The dataset's label of each of the checkpoint's, by category id."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise UserError(f"{checkpoint} is no checkpoint: there is no config.json in it.", 2)
    ours = {category["id"]: (at, category["name"]) for at, category in enumerate(categories)}
    labels = []
    for theirs in read_json(path)["categories"]:
        at, name = ours.get(theirs["id"], (None, None))
        if name != theirs["name"]:
            there = f" (id {theirs['id']} is {name!r} there)" if at is not None else ""
            raise UserError(
                f"The checkpoint {checkpoint} has a class {theirs['name']!r} with the id {theirs['id']}, which the "
                f"dataset in {dataset_folder} does not have{there}; evaluate on a dataset with its classes, or "
                "train on this one.",
                2,
            )
        labels.append(at)
    return labels


def _relabelled(detections: pa.Table, labels: list[int]) -> pa.Table:
    """The detections with labels[label] for each label."""
    given = detections["labels"].combine_chunks()
    values = np.asarray(labels, np.int32)[given.flatten().to_numpy(zero_copy_only=False)]
    ends = np.cumsum(pc.list_value_length(given).to_numpy(zero_copy_only=False))
    column = pa.ListArray.from_arrays(np.r_[0, ends].astype(np.int32), pa.array(values, pa.int32()))
    return detections.set_column(detections.schema.get_field_index("labels"), DETECTIONS.field("labels"), column)


def _accumulate(truth: dict[str, Any], matches: Matches, limits: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """faster-coco-eval: precision [IoU, 101, class, area, limit] and recall [IoU, class, area, limit].

    Ids are renumbered: an annotation id 0 or one used twice spoils the library's matching otherwise.
    """
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    images, categories = len(matches.images), len(matches.categories)
    if not images or not categories:  # the library divides by their number
        shape = (len(IOUS), 101, categories, 4, 3)
        return np.full(shape, -1.0), np.full(shape[:1] + shape[2:], -1.0)
    base = {
        "images": [{"id": at} for at in range(images)],
        "categories": [{"id": at + 1, "name": str(at)} for at in range(categories)],
    }
    places = zip(matches.object_image.tolist(), matches.object_label.tolist(), truth["annotations"], strict=True)
    objects = [
        {
            "id": number,
            "image_id": image,
            "category_id": label + 1,
            "bbox": annotation["bbox"],
            "area": annotation["area"],
            "iscrowd": int(annotation.get("iscrowd", 0)),
        }
        for number, (image, label, annotation) in enumerate(places, 1)
        if label >= 0
    ]
    areas = matches.box[:, 2] * matches.box[:, 3]
    columns = (values.tolist() for values in (matches.image, matches.label + 1, matches.box, areas, matches.score))
    found = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "score": score}
        for number, (image, category, box, area, score) in enumerate(zip(*columns, strict=True), 1)
    ]
    truth_coco, found_coco = (COCO(base | {"annotations": items}) for items in (objects, found))
    run = COCOeval_faster(truth_coco, found_coco, "bbox")
    run.params.maxDets = limits
    run.evaluate()
    return run.eval["precision"], run.eval["recall"]


def _mean(values: np.ndarray) -> float | None:
    """Mean of what is defined; -1 marks classes, areas and thresholds without ground truth."""
    values = values[values > -1]
    return float(np.mean(values)) if values.size else None


def _best_f1(scores: np.ndarray, right: np.ndarray, judged: np.ndarray, truth: int) -> dict[str, float | None] | None:
    """The score threshold with the best F1; among equals the highest. None without truth."""
    if not truth:
        return None
    if not judged.any():
        return {"threshold": None, "f1": 0.0, "precision": None, "recall": 0.0}
    order = np.argsort(-scores, kind="stable")
    scores, right, kept = scores[order], np.cumsum(right[order]), np.cumsum(judged[order])
    last = np.r_[scores[1:] != scores[:-1], True] & (kept > 0)  # a threshold takes all of equal score or none
    scores, right, kept = scores[last], right[last], kept[last]
    f1 = 2 * right / (kept + truth)
    best = int(np.argmax(f1))
    lowest = float(scores[best])
    if best + 1 < len(scores):
        dropped = float(scores[best + 1])
        threshold = dropped + (lowest - dropped) / 2
        threshold = threshold if threshold > dropped else lowest  # nothing lies between them
    else:
        threshold = lowest - abs(lowest) / 2
    return {
        "threshold": threshold,
        "f1": float(f1[best]),
        "precision": float(right[best] / kept[best]),
        "recall": float(right[best] / truth),
    }
