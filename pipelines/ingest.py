"""Images and annotations -> Parquet shards that hold the encoded bytes untouched (Ray Data).

One Ray Data row is the plan of one shard, a file: the task reads the images it names, checks and writes them. A
shard is there whole or not at all, with a note beside it; an attempt that follows a killed one redoes
only the shards without a note. `dataset.json` is written last.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow.fs import FileInfo, FileType

from pipelines.alike import SIDE, thumbnail
from pipelines.coco import CROWD, MAX_FILE_BYTES, CocoFile, image_place, image_record, read_coco, split_train, to_record
from pipelines.folders import other_layout
from pipelines.metrics import count_images
from pipelines.mirror import check_seen, name_of
from pipelines.progress import console, progress
from pipelines.settings import DataSettings, RunSettings, UserError, digest
from pipelines.stage import read_json, write_json
from pipelines.storage import Folder, from_task, is_remote, join, kind, list_files, not_done, plain, read_file

FORMAT = 1
# A training reads a group for each of its images: small ones cost little, and 16 rows still stream well.
ROW_GROUP = 16  # rows
ROW_GROUP_BYTES = 16 * 2**20  # fewer rows than that where images are large
ORIENTATION = 0x0112  # EXIF tag
# Not in the digests of rows: sha256 stands for the image, and neither training nor evaluation sees the others.
UNSEEN = ("image", "thumbnail", "extra", "segmentations", "extras", "absent")

ANNOTATION = pa.struct(
    [
        ("id", pa.int64()),
        ("category_id", pa.int64()),
        ("bbox", pa.list_(pa.float64())),
        ("area", pa.float64()),
        ("iscrowd", pa.bool_()),
        ("reject", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("image", pa.binary()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("exif_orientation", pa.int8()),
        ("thumbnail", pa.binary(SIDE**2)),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("labels", pa.list_(pa.int32())),
        ("annotations", pa.list_(ANNOTATION)),
        # What else the source says of the image and of each annotation: JSON, null where there is nothing.
        ("extra", pa.string()),
        ("segmentations", pa.list_(pa.string())),
        ("extras", pa.list_(pa.string())),
        ("absent", pa.list_(pa.list_(pa.string()))),  # members that the source leaves out
    ]
)
REJECTS = pa.schema(
    [
        ("split", pa.string()),
        ("file_name", pa.string()),
        ("annotation_id", pa.int64()),  # null for a whole image
        ("reason", pa.string()),
        ("record", pa.string()),  # JSON of what is in no shard: {"image", "annotations"}, or the annotation
    ]
)


@dataclass(frozen=True)
class Source:
    """A checked COCO folder, local or on S3. `inputs` is what the content of the shards depends on (JSON-like)."""

    path: str
    images: str
    name: str
    files: dict[str, CocoFile]  # train; val unless it is to be split off; test where there is one
    inputs: dict[str, Any]


def source(settings: RunSettings, path: Path | str) -> Source:
    """Find and check the annotation files of the COCO folder `path`; images are listed, not opened.

    Raises UserError: exit code 2 for what is missing or wrong in the data, 1 where its store does not answer.
    """
    data, path = settings.data, plain(path)
    if kind(path) != FileType.Directory:
        raise UserError(f"There is no folder {path}; data.path must name one with images and COCO files.", 2)
    read = other_layout(path, data)
    images, files = read(path, settings) if read else _coco_folder(settings, path)
    train = files["train"]
    if not train.boxes:
        first = next(train.rejects(), None)
        why = f" (the first of {len(train.table)}: {first['reason']})" if first else ""
        raise UserError(f"{train.path} has no box that can be trained on{why}.", 2)
    _check_categories(files)

    inputs: dict[str, Any] = {
        "name": data.name or posixpath.basename(path.rstrip("/") if is_remote(path) else str(Path(path).resolve())),
        "annotations": {split: file.sha256 for split, file in files.items()},
        "images": _listing(images, files),
    }
    if "val" not in files:
        inputs["split"] = {"val_fraction": data.val_fraction, "seed": settings.seed}
    return Source(path, images, inputs["name"], files, inputs)


def ingest(settings: RunSettings, source: Source, folder: Path) -> dict[str, Any]:
    """Write the source's shards, `rejects.parquet` and, last, `dataset.json` into the folder.

    Ray must be initialised. Every image ends in a shard or in rejects.parquet with a reason, every
    annotation in its image's row, with a reason when training must not see it. Returns {"name",
    "digest", "classes", "images": {split: n}, "boxes": {split: n}, "rejected_images",
    "rejected_annotations"}. Raises UserError (exit code 1) when more than
    settings.ingest.max_reject_fraction of the images or of the annotations (crowds apart) are rejected, or all of one
    split.
    """
    folder = Path(folder)
    check_seen(folder)
    files = dict(source.files)
    if "val" not in files:
        limit = settings.ingest.max_pixels
        files["train"], files["val"] = split_train(
            files["train"], settings.data.val_fraction, settings.seed, source.images, limit
        )
        files = {split: files[split] for split in ("train", "val", "test") if split in files}

    annotations_lost = [{"split": split, **reject} for split, file in files.items() for reject in file.rejects()]
    _check_annotations(settings, files, annotations_lost, folder)

    place = Folder(name_of(folder))
    shards = []  # (split, plan's file name, images), in order
    for plan in _plans(settings, source, files):
        shards.append((plan["split"], f"{plan['path']}.json", len(plan["images"])))
        place.put(f"plans/{shards[-1][1]}", json.dumps(plan).encode())
    done = _run(shards, place)
    for _, plan, _ in shards:
        place.delete(f"plans/{plan}")
    if not is_remote(place.uri):
        (folder / "plans").rmdir()
    else:  # what other machines wrote
        for result in done:
            if result["rows"]:
                (folder / result["path"]).write_bytes(place.get(result["path"]))
            write_json(folder / _note(result["path"]), result)

    splits: dict[str, dict] = {}
    images_lost: list[dict] = []
    for split, file in files.items():
        mine = [result for shard, result in zip(shards, done, strict=True) if shard[0] == split]
        splits[split] = _split_record(mine, file)
        images_lost += [{"split": split, **reject} for result in mine for reject in result["rejects"]]
        _check_sums(split, file, mine)
    pq.write_table(pa.Table.from_pylist(images_lost + annotations_lost, REJECTS), folder / "rejects.parquet")

    _check_rejected(settings, files, splits, images_lost, folder)
    categories = files["train"].categories
    dataset = {
        "format": FORMAT,
        "digest": digest([categories, {split: record["digest"] for split, record in splits.items()}]),
        "name": source.name,
        "categories": categories,
        "splits": splits,
        "rejected_images": len(images_lost),
        "rejected_annotations": len(annotations_lost),
        "source": {"path": source.path, "images": source.images},
        "inputs": source.inputs,
        "settings": settings.ingest.model_dump(),
    }
    write_json(folder / "dataset.json", dataset)
    _tell(dataset, source, folder)
    return {
        "name": source.name,
        "digest": dataset["digest"],
        "classes": len(categories),
        "images": {split: record["images"] for split, record in splits.items()},
        "boxes": {split: record["boxes"] for split, record in splits.items()},
        "rejected_images": len(images_lost),
        "rejected_annotations": len(annotations_lost),
    }


def write_shard(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read and check the images of one plan and write their shard; the work of one Ray task.

    Returns (and leaves beside the shard, as `<shard>.json`) {"format", "plan", "path", "rows", "bytes", "boxes",
    "turned": images with an EXIF orientation, "per_class", "max_objects", "annotations", "digests": one per row,
    "rejects"}. Without a usable image no shard is written. A shard whose note fits the plan and that rejected nothing
    is left as it is; a rejected image is looked at again, since its fault may be mended.
    """
    path = folder / plan["path"]
    note = folder / _note(plan["path"])
    fingerprint = digest(plan, 64)
    if note.is_file() and path.is_file():
        former = read_json(note)
        if former["plan"] == fingerprint and former["bytes"] == path.stat().st_size and not former["rejects"]:
            return former

    result: dict[str, Any] = {
        "format": FORMAT,
        "plan": fingerprint,
        "path": plan["path"],
        "rows": 0,
        "bytes": 0,
        "boxes": 0,
        "turned": 0,
        "per_class": [0] * len(plan["labels"]),
        "max_objects": 0,
        "annotations": 0,
        "digests": [],
        "rejects": [],
    }
    labels = {category_id: label for label, category_id in enumerate(plan["labels"])}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # a killed ingest's worker may still write its own
    # No compression: images are compressed already, and the rest is small.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": ["image_id"]}
    with pq.ParquetWriter(part, SCHEMA, **options) as writer:
        rows: list[dict] = []
        for record in plan["images"]:
            row = _row(record, labels, plan["max_pixels"])
            if isinstance(row, str):
                lost = {"file_name": record["file_name"], "reason": row, "record": _as_it_was(record)}
                result["rejects"].append(lost)
                continue
            rows.append(row)
            _count(result, row)
            if len(rows) == ROW_GROUP or sum(len(row["image"]) for row in rows) >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    if result["rows"]:
        os.replace(part, path)
        result["bytes"] = path.stat().st_size
    else:
        path.unlink(missing_ok=True)
    for left in folder.glob(f".{path.name}.*part"):  # ours where no row came, and those of the killed
        left.unlink(missing_ok=True)
    write_json(note, result)
    return result


def write_shard_to(target: str, plan: dict[str, Any]) -> dict[str, Any]:
    """`write_shard` into a folder, here or at s3://."""
    if not is_remote(target):
        return write_shard(plan, Path(target))
    there, note = Folder(target), _note(plan["path"])
    with tempfile.TemporaryDirectory() as place:
        for name in (note, plan["path"]):  # of a start before this one
            data = there.get(name)
            if data is not None:
                (Path(place) / name).write_bytes(data)
        result = write_shard(plan, Path(place))
        for path in (Path(place) / plan["path"], Path(place) / note):
            if path.is_file():
                there.put(path.name, path.read_bytes())
    return result


def _note(shard: str) -> str:
    return str(Path(shard).with_suffix(".json"))


def _coco_folder(settings: RunSettings, path: str) -> tuple[str, dict[str, CocoFile]]:
    """(the folder of the images, the splits) of a folder with COCO files."""
    data, images = settings.data, join(path, settings.data.images)
    if kind(images) != FileType.Directory:
        raise UserError(f"There is no images folder {images}; set data.images to its name in {path}.", 2)
    files: dict[str, CocoFile] = {}
    for split in ("train", "val", "test"):
        name = getattr(data, split)
        file = join(path, name)
        if kind(file) != FileType.NotFound:
            files[split] = read_coco(file, images, settings.ingest)
        elif split == "train":
            found = sorted(posixpath.basename(name) for name in list_files(path) if name.endswith(".json"))[:5]
            hint = f"set data.train to one of {', '.join(found)}" if found else "put a COCO file there"
            raise UserError(f"There is no annotation file {file}; {hint}.", 2)
        elif name != DataSettings.model_fields[split].default:
            raise UserError(f"There is no annotation file {file}, which data.{split} names.", 2)
    return images, files


def _plans(settings: RunSettings, source: Source, files: dict[str, CocoFile]) -> Iterator[dict[str, Any]]:
    """The plans of all shards: images in order of id, rows_per_shard each."""
    labels = [category["id"] for category in files["train"].categories]
    step = settings.ingest.rows_per_shard
    for split, file in files.items():
        for shard, start in enumerate(range(0, len(file.images), step)):
            yield {
                "split": split,
                "path": f"{split}-{shard:05d}.parquet",
                "labels": labels,
                "max_pixels": settings.ingest.max_pixels,
                "images": [
                    {
                        **image,
                        "place": image_place(source.images, image["file_name"]),
                        "annotations": file.annotations(start + n),
                    }
                    for n, image in enumerate(file.images[start : start + step])
                ],
            }


def _run(shards: list[tuple[str, str, int]], place: Folder) -> list[dict]:
    """The result of every shard's plan, in their order."""
    import ray
    from ray.exceptions import RayTaskError

    target = place.uri

    def work(row: dict[str, Any]) -> dict[str, Any]:
        try:
            result = write_shard_to(target, read_json(join(target, f"plans/{row['plan']}")))
        except OSError as error:  # a full disk
            raise not_done(target, "written", error) from error
        count_images("ingest", result["rows"], len(result["rejects"]))
        return {"number": row["number"], "result": json.dumps(result)}

    # Results travel as text: what Arrow does not know, Ray Data would pickle.
    rows = [{"number": number, "plan": plan} for number, (_, plan, _) in enumerate(shards)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(work)
    dataset.context.enable_progress_bars = False
    done: dict[int, dict] = {}
    with progress() as bar:
        task = bar.add_task("Reading images", total=sum(images for *_, images in shards), note="")
        try:
            for row in dataset.iter_rows():
                done[row["number"]] = json.loads(row["result"])
                bar.advance(task, shards[row["number"]][2])
        except RayTaskError as error:
            raise from_task(error) or error from error
    return [done[number] for number in range(len(shards))]


def _as_it_was(record: dict[str, Any]) -> str:
    """The image of a plan and its annotations as JSON, as the source had them."""
    annotations = [to_record(annotation, record["id"]) for annotation in record["annotations"]]
    return json.dumps({"image": image_record(record), "annotations": annotations})


def _row(record: dict[str, Any], labels: dict[int, int], max_pixels: int) -> dict[str, Any] | str:
    """The shard's row of one image, or the reason why it is rejected."""
    from detr.transforms import ImageError, decode_image

    data, reason = read_file(record["place"], MAX_FILE_BYTES)
    if reason is not None:
        return reason
    try:
        image = decode_image(data, max_pixels)
    except ImageError as error:
        return str(error)
    size = image.size
    if size != (record["width"], record["height"]):
        # The boxes were drawn on another picture: using them would teach nonsense.
        turned = size[::-1] == (record["width"], record["height"]) and _orientation(data) > 4
        return f"the image is {size[0]}x{size[1]}, the annotations say {record['width']}x{record['height']}" + (
            " (its EXIF orientation turns it when it is shown; boxes must be those of the image as stored)" * turned
        )
    used = [a for a in record["annotations"] if a["reject"] is None]
    return {
        "image_id": record["id"],
        "file_name": record["file_name"],
        "image": data,
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": size[0],
        "height": size[1],
        "exif_orientation": _orientation(data),
        "thumbnail": thumbnail(image),
        "boxes": [a["box"] for a in used],
        "labels": [labels[a["category_id"]] for a in used],
        "annotations": [{name: a[name] for name in ANNOTATION.names} for a in record["annotations"]],
        "extra": record["extra"],
        "segmentations": [a["segmentation"] for a in record["annotations"]],
        "extras": [a["extra"] for a in record["annotations"]],
        "absent": [a["absent"] for a in record["annotations"]],
    }


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 (as stored) where there is none or it makes no sense."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF, of an image that is fine otherwise
            value = Image.open(io.BytesIO(data)).getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged EXIF raises anything; the pixels were decoded all the same
        value = None
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _count(result: dict[str, Any], row: dict[str, Any]) -> None:
    result["rows"] += 1
    result["boxes"] += len(row["boxes"])
    result["turned"] += row["exif_orientation"] != 1
    result["max_objects"] = max(result["max_objects"], len(row["boxes"]))
    result["annotations"] += len(row["annotations"])
    for label in row["labels"]:
        result["per_class"][label] += 1
    said = {name: value for name, value in row.items() if name not in UNSEEN}
    result["digests"].append(digest(said, 64))


def _split_record(shards: list[dict], file: CocoFile) -> dict[str, Any]:
    return {
        # over the rows, so that it does not depend on how many of them a shard holds
        "digest": digest([row for shard in shards for row in shard["digests"]]),
        "images": sum(shard["rows"] for shard in shards),
        "boxes": sum(shard["boxes"] for shard in shards),
        "turned": sum(shard["turned"] for shard in shards),
        "per_class": [sum(shard["per_class"][label] for shard in shards) for label in range(len(file.categories))],
        "max_objects": max(shard["max_objects"] for shard in shards),
        "shards": [{k: shard[k] for k in ("path", "rows", "bytes")} for shard in shards if shard["rows"]],
        "annotations_file": posixpath.basename(str(file.path)),
        "document": json.dumps(file.document),  # text, since it may hold what is no valid Unicode
    }


def _check_sums(split: str, file: CocoFile, shards: list[dict]) -> None:
    """Images and annotations in = in shards + rejected. Anything else is a fault of ours."""
    lost = {reject["file_name"] for shard in shards for reject in shard["rejects"]}
    kept = np.array([image["file_name"] not in lost for image in file.images])
    used = np.concatenate([[0], np.cumsum(file.table["reject"].is_null().to_numpy())])[file.starts]
    sums = {
        "images": (kept.sum(), sum(shard["rows"] for shard in shards)),
        "annotations": (np.diff(file.starts)[kept].sum(), sum(shard["annotations"] for shard in shards)),
        "boxes": (np.diff(used)[kept].sum(), sum(shard["boxes"] for shard in shards)),
    }
    for what, (expected, written) in sums.items():
        assert written == expected, f"{split}: {expected} {what} to write, {written} written"


def _check_rejected(
    settings: RunSettings, files: dict[str, CocoFile], splits: dict[str, dict], lost: list[dict], folder: Path
) -> None:
    total = sum(len(file.images) for file in files.values())
    first = "; ".join(f"{reject['file_name']}: {reject['reason']}" for reject in lost[:3])
    table = folder / "rejects.parquet"
    for split, record in splits.items():
        if not record["images"]:
            raise UserError(f"Not one image of {split} can be used ({first}); all are listed in {table}.", 2)
    if not splits["train"]["boxes"]:
        raise UserError(f"No box is left to train on after {len(lost)} images were rejected; see {table}.", 2)
    if len(lost) > settings.ingest.max_reject_fraction * total:
        raise UserError(
            f"{len(lost)} of {total} images were rejected, more than ingest.max_reject_fraction="
            f"{settings.ingest.max_reject_fraction:g} allows ({first}); mend them, or raise the limit; "
            f"all are listed in {table}.",
            2,
        )


def _check_annotations(settings: RunSettings, files: dict[str, CocoFile], lost: list[dict], folder: Path) -> None:
    """Stop before images are read, if many annotations have a fault."""
    faulty = [reject for reject in lost if reject["reason"] != CROWD]
    total = sum(len(file.table) for file in files.values()) - (len(lost) - len(faulty))
    table = folder / "rejects.parquet"
    if len(faulty) > settings.ingest.max_reject_fraction * total:
        pq.write_table(pa.Table.from_pylist(lost, REJECTS), table)
        first = "; ".join(f"id {reject['annotation_id']}: {reject['reason']}" for reject in faulty[:3])
        raise UserError(
            f"{len(faulty)} of {total} annotations were rejected, more than ingest.max_reject_fraction="
            f"{settings.ingest.max_reject_fraction:g} allows ({first}); mend them, or raise the limit; "
            f"all are listed in {table}.",
            2,
        )


def _check_categories(files: dict[str, CocoFile]) -> None:
    """val and test must speak of train's categories; they may leave some out."""
    train = {category["id"]: category["name"] for category in files["train"].categories}
    for split in ("val", "test"):
        for category in files[split].categories if split in files else ():
            name, known = category["name"], train.get(category["id"])
            if known is None:
                raise UserError(
                    f"{files[split].path} has the category {name!r} (id {category['id']}), which "
                    f"{files['train'].path} lacks; add it to that file's categories, or remove it here.",
                    2,
                )
            if known != name:
                raise UserError(
                    f"Category {category['id']} is {known!r} in {files['train'].path}, but {name!r} in "
                    f"{files[split].path}; give both files the same categories.",
                    2,
                )


def _listing(images: str, files: dict[str, CocoFile]) -> str:
    """Digest of name, size and time of the images named, without opening them."""
    total = hashlib.sha256()
    remote = list_files(images, recursive=True) if is_remote(images) else None
    for name in sorted({image["file_name"] for file in files.values() for image in file.images}):
        total.update(f"{name}\0{_state(images, name, remote)}\0".encode())
    return total.hexdigest()


def _state(images: str, name: str, remote: dict[str, FileInfo] | None) -> str:
    """Size and time of an image, or that it is missing."""
    if remote is not None:
        info = remote.get(posixpath.normpath(name))
        return f"{info.size}\0{info.mtime_ns}" if info else "missing"
    try:
        stat = os.stat(os.path.join(images, name))
    except OSError:
        return "missing"
    return f"{stat.st_size}\0{stat.st_mtime_ns}"


def _tell(dataset: dict[str, Any], source: Source, folder: Path) -> None:
    splits = dataset["splits"].items()
    counts = "; ".join(f"{split} {part['images']} images, {part['boxes']} boxes" for split, part in splits)
    text = f"Dataset {dataset['name']} ({len(dataset['categories'])} classes): {counts}."
    if "split" in source.inputs:
        text += " Val was split off train."
    clamped = sum(file.clamped for file in source.files.values())
    if clamped:
        text += f" {clamped} boxes reached over the image's edge and were cut there."
    turned = sum(part["turned"] for _, part in splits)
    if turned:
        text += f" {turned} images have an EXIF orientation, which is not applied: boxes are those of images as stored."
    if dataset["rejected_images"] or dataset["rejected_annotations"]:
        text += (
            f" Rejected: {dataset['rejected_images']} images, {dataset['rejected_annotations']} annotations; "
            f"reasons in {folder / 'rejects.parquet'}."
        )
    console.print(text)
