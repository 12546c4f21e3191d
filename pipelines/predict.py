"""Batch inference: a folder, list or bucket of images -> a Parquet table of detections, on Ray Data.

The images are listed once, sorted by key and cut into chunks; each chunk becomes one part file that
appears whole or not at all. An attempt that was killed is continued: parts that are there are kept. The
manifest comes last, and readers read only what it names.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import listing
from pipelines.listing import Image
from pipelines.progress import progress
from pipelines.settings import RunSettings, UserError, digest
from pipelines.stage import read_json, write_json
from pipelines.storage import from_task, read_file

CHUNK = 256  # images per part file
READERS = 8  # images read or decoded at a time by one process

DETECTIONS = pa.schema(
    [
        ("image_key", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),  # "ok", or why there are no detections
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy, pixels of the stored image
        ("scores", pa.list_(pa.float32())),
        ("category_ids", pa.list_(pa.int64())),
        ("category_names", pa.list_(pa.string())),
        ("model_name", pa.string()),
        ("model_version", pa.string()),
    ]
)


def list_images(input: str | Path, settings: RunSettings) -> list[dict[str, Any]]:
    """`listing.list_images` -> [{"key", "uri", "etag", "size"}, ...]."""
    return [dict(zip(Image._fields[:4], image, strict=False)) for image in listing.list_images(input, settings)]


def predict(
    settings: RunSettings,
    images: list[dict[str, Any]],
    checkpoint: Path,
    model_name: str,
    model_version: str,
    folder: Path,
) -> dict[str, Any]:
    """Detect on all `images` (from `list_images`); Ray is running.

    Writes detections-*.parquet (DETECTIONS, a row per image in order of key; an image that cannot be
    read has its reason as status) and manifest.json into folder. Returns {"folder", "images", "ok",
    "rejected", "rejects": {reason: n}, "detections": {category name: n}, "images_per_second",
    "score_threshold", "score_thresholds" ({category id: its own}), "reused_images"}. Raises UserError when
    more than `predict.max_reject_fraction` of the images cannot be read; the table is complete then, too.
    """
    folder = Path(folder)
    config = read_json(Path(checkpoint) / "config.json")
    threshold, of_classes = thresholds(settings, config)
    images = sorted(images, key=lambda image: image["key"])
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    plan = {
        "format": 1,
        "images": digest(images, 64),
        "weights_sha256": _sha256(Path(checkpoint) / "model.safetensors"),
        "model": {"name": model_name, "version": model_version},
        "score_threshold": threshold,
        "score_thresholds": of_classes,
        "max_pixels": settings.predict.max_pixels,
        "chunk": CHUNK,
    }
    _keep_what_fits(folder, plan)
    todo = [number for number, chunk in enumerate(chunks) if not _is_done(_part(folder, number), chunk)]
    waiting = [image for number in todo for image in chunks[number]]

    started = time.monotonic()
    with progress() as bar:
        task = bar.add_task("predict", total=len(images), completed=len(images) - len(waiting), note="")
        tables = _detect_all(settings, waiting, checkpoint, plan) if waiting else ()
        counted = _counted(tables, lambda rows: bar.advance(task, rows))
        for number, table in zip(todo, _cut(counted, [len(chunks[number]) for number in todo]), strict=True):
            _write_part(_part(folder, number), table, chunks[number])
    seconds = time.monotonic() - started

    manifest = _manifest(folder, chunks, plan)
    write_json(folder / "manifest.json", manifest)
    rejected, limit = manifest["rejected"], settings.predict.max_reject_fraction
    if rejected > limit * len(images):
        reason, count = next(iter(manifest["rejects"].items()))
        raise UserError(
            f"{rejected} of {len(images)} images could not be read, more than predict.max_reject_fraction "
            f"{limit} allows; {count} because {reason} (the other images' detections are in {folder})."
        )
    shown = ("images", "ok", "rejected", "rejects", "detections", "score_threshold", "score_thresholds")
    return {
        "folder": str(folder),
        **{key: manifest[key] for key in shown},
        "images_per_second": round(len(waiting) / seconds, 2) if waiting else None,
        "reused_images": len(images) - len(waiting),
    }


def thresholds(settings: RunSettings, config: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The least score, and that of single classes by category id: the one asked for, or a model's config.json's own."""
    asked = settings.predict.score_threshold
    return (config["score_threshold"], config.get("score_thresholds") or {}) if asked is None else (asked, {})


def detections_of(folder: Path | str) -> pa.Table:
    """The table (DETECTIONS) a finished prediction left in folder: the parts its manifest names, verified.

    Raises UserError if it is not finished or a part is not what was written.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} holds no finished prediction (no manifest.json); run it again.", 2)
    tables = [DETECTIONS.empty_table()]
    for part in read_json(folder / "manifest.json")["parts"]:
        path = folder / part["path"]
        if not path.is_file() or _sha256(path) != part["sha256"]:
            raise UserError(f"{path} is not what was written; delete {folder} and predict again.")
        tables.append(pq.read_table(path, schema=DETECTIONS))
    return pa.concat_tables(tables)


class DetectImages:
    """Ray Data actor: batches of images' bytes -> rows of DETECTIONS."""

    def __init__(self, checkpoint: str, device: str, actors: int, options: dict[str, Any]):
        import torch

        from pipelines.detect import Detector

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // actors))  # Ray tells a worker one
        self.detector = Detector.load(checkpoint, options["batch_size"], device)
        self.options = options

    def __call__(self, batch: pa.Table) -> pa.Table:
        return detect_rows(self.detector, batch.to_pylist(), self.options)


def read_rows(rows: list[dict[str, Any]]) -> pa.Table:
    """Images ({"key", "uri", "etag", "size"}) -> the same with `data` (bytes or null) and `error`."""
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(_read, rows))
    names = {"key": pa.string(), "uri": pa.string(), "etag": pa.string(), "size": pa.int64()}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in names.items()}
    columns["data"] = pa.array([data for data, _ in read], pa.large_binary())
    columns["error"] = pa.array([error for _, error in read], pa.string())
    return pa.table(columns)


def detect_rows(detector, rows: list[dict[str, Any]], options: dict[str, Any]) -> pa.Table:
    """Rows of `read_rows` -> rows of DETECTIONS, in their order.

    options: score_threshold, score_thresholds ({category id: threshold}, may be absent), max_pixels, model_name,
    model_version.
    """
    from detr.transforms import ImageError, decode_image
    from pipelines.detect import label_thresholds

    def decode(row: dict[str, Any]):
        if row["error"] is not None:
            return row["error"]
        try:
            return decode_image(row["data"], options["max_pixels"])
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        decoded = list(pool.map(decode, rows))
    images = [image for image in decoded if not isinstance(image, str)]
    found = iter(detector.detect(images) if images else [])
    least = label_thresholds(detector.categories, options["score_threshold"], options.get("score_thresholds"))
    out = []
    for row, image in zip(rows, decoded, strict=True):
        result = {
            "image_key": row["key"],
            "etag": row["etag"],
            "size": row["size"],
            "model_name": options["model_name"],
            "model_version": options["model_version"],
        }
        if isinstance(image, str):
            result |= {"status": image, "boxes": [], "scores": [], "category_ids": [], "category_names": []}
        else:
            one = next(found)
            keep = one["scores"] >= least[one["labels"]]
            labels = one["labels"][keep].tolist()
            result |= {
                "status": "ok",
                "width": image.width,
                "height": image.height,
                "boxes": one["boxes"][keep].tolist(),
                "scores": one["scores"][keep].tolist(),
                "category_ids": [detector.categories[label]["id"] for label in labels],
                "category_names": [detector.categories[label]["name"] for label in labels],
            }
        out.append(result)
    return pa.Table.from_pylist(out, schema=DETECTIONS)


def _detect_all(
    settings: RunSettings, images: list[dict[str, Any]], checkpoint: Path, plan: dict[str, Any]
) -> Iterator[pa.Table]:
    """The Ray part: rows of DETECTIONS for the images, in their order."""
    import ray
    from ray.exceptions import RayTaskError

    from detr.checkpoint import CheckpointError, load_checkpoint

    try:
        load_checkpoint(checkpoint)  # an actor that dies of it says so a minute later and less clearly
    except CheckpointError as error:
        raise UserError(f"{error}.") from error
    use_gpu = settings.train.use_gpu
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    actors, batch_size = settings.predict.actors, settings.predict.batch_size
    options = {
        "batch_size": batch_size,
        "score_threshold": plan["score_threshold"],
        "score_thresholds": plan["score_thresholds"],
        "max_pixels": plan["max_pixels"],
        "model_name": plan["model"]["name"],
        "model_version": plan["model"]["version"],
    }
    stream = (
        # Small blocks: they hold the encoded images on their way to the actors.
        ray.data.from_items(images, override_num_blocks=max(1, len(images) // (4 * batch_size)))
        .map_batches(_read_batch, batch_size=batch_size, batch_format="pyarrow", num_cpus=0.5)
        .map_batches(
            DetectImages,
            fn_constructor_args=(str(Path(checkpoint).resolve()), "cuda" if use_gpu else "cpu", actors, options),
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
    )
    stream.context.execution_options.preserve_order = True  # parts are cut from the stream by count
    stream.context.enable_progress_bars = False
    try:
        for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield batch.select(DETECTIONS.names).cast(DETECTIONS)
    except RayTaskError as error:
        raise from_task(error) or error from error


def _read_batch(batch: pa.Table) -> pa.Table:
    return read_rows(batch.to_pylist())


def _read(row: dict[str, Any]) -> tuple[bytes | None, str | None]:
    """(bytes, None), or (None, why not). An object store that does not answer ends the job instead."""
    data, reason = read_file(row["uri"])
    if reason is None and len(data) != row["size"]:
        return None, "it changed after it was listed"
    return data, reason


def _part(folder: Path, number: int) -> Path:
    return folder / f"detections-{number:05d}.parquet"


def _keep_what_fits(folder: Path, plan: dict[str, Any]) -> None:
    """Parts in the folder stay if they were made by the same plan; otherwise they go."""
    folder.mkdir(parents=True, exist_ok=True)
    for half in folder.glob(".detections-*"):
        half.unlink()
    path = folder / "plan.json"
    if path.is_file() and read_json(path) == plan:
        return
    for old in (folder / "manifest.json", path, *folder.glob("detections-*.parquet")):
        old.unlink(missing_ok=True)
    write_json(path, plan)


def _is_done(path: Path, chunk: list[dict[str, Any]]) -> bool:
    if not path.is_file():
        return False
    try:
        keys = pq.read_table(path, columns=["image_key"])["image_key"].to_pylist()
    except (OSError, pa.ArrowException):  # a torn disk; write it again
        return False
    return keys == [image["key"] for image in chunk]


def _counted(tables: Iterable[pa.Table], tell: Callable[[int], None]) -> Iterator[pa.Table]:
    for table in tables:
        tell(table.num_rows)
        yield table


def _cut(tables: Iterable[pa.Table], sizes: list[int]) -> Iterator[pa.Table]:
    """The stream of tables, cut anew into tables of these sizes; RuntimeError unless they add up."""
    tables = iter(tables)
    held = DETECTIONS.empty_table()
    for size in sizes:
        while held.num_rows < size:
            table = next(tables, None)
            if table is None:
                raise RuntimeError(f"{size - held.num_rows} images or more came back without an answer")
            held = pa.concat_tables([held, table])
        yield held.slice(0, size)
        held = held.slice(size)
    extra = held.num_rows + sum(table.num_rows for table in tables)
    if extra:
        raise RuntimeError(f"{extra} more images came back than were sent")


def _write_part(path: Path, table: pa.Table, chunk: list[dict[str, Any]]) -> None:
    """Write a part whole or not at all, once it is sure that it holds exactly the chunk's images."""
    if table["image_key"].to_pylist() != [image["key"] for image in chunk]:
        raise RuntimeError(f"the images of {path.name} are not those that were sent, or not in their order")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, temporary)
    os.replace(temporary, path)


def _manifest(folder: Path, chunks: list[list[dict[str, Any]]], plan: dict[str, Any]) -> dict[str, Any]:
    """What the parts hold, read back from them; RuntimeError unless every image is there exactly once."""
    parts, keys = [], Counter()
    status, categories = Counter(), Counter()
    for number in range(len(chunks)):
        path = _part(folder, number)
        table = pq.read_table(path, columns=["image_key", "status", "category_names"])
        keys.update(table["image_key"].to_pylist())
        status.update(table["status"].to_pylist())
        categories.update(name for names in table["category_names"].to_pylist() for name in names)
        parts.append({"path": path.name, "rows": table.num_rows, "sha256": _sha256(path)})
    expected = Counter(image["key"] for chunk in chunks for image in chunk)
    if keys != expected or any(count > 1 for count in expected.values()):
        raise RuntimeError(f"{folder}: not every image was counted exactly once")
    ok = status.pop("ok", 0)
    return {
        "format": 1,
        "parts": parts,
        "images": ok + status.total(),
        "ok": ok,
        "rejected": status.total(),
        "rejects": dict(status.most_common()),
        "detections": dict(sorted(categories.items())),
        "model": plan["model"],
        "weights_sha256": plan["weights_sha256"],
        "score_threshold": plan["score_threshold"],
        "score_thresholds": plan["score_thresholds"],
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
