"""Annotation files in COCO's format: read, check, explain what is wrong, and write them again.

A file whose structure is wrong is refused as a whole, in one sentence that names the record. A box
that cannot be trained on is kept, marked with the reason: evaluation wants the source's own truth.

A file is read item by item, and its annotations are kept in an Arrow table: COCO's own (118k images, 860k boxes) would
be gigabytes of Python objects.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.fs import FileType

from pipelines.alike import find_alike, thumbnail
from pipelines.json_stream import JsonObject, NotAnObject
from pipelines.progress import track
from pipelines.settings import IngestSettings, UserError
from pipelines.storage import is_remote, kind, locate, not_done, read_file

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".jp2", ".avif",
                    ".tga", ".mpo")  # fmt: skip
LARGEST_ID = 2**63 - 1
LARGEST_SIDE = 2**31 - 1
CROWD = "crowd"  # the reason that is no fault
ROUNDING = 1.0  # pixels that a box may reach over the edge wherever that is an error
MAX_FILE_BYTES = 2**29  # per image: keeps a binary column far from Arrow's 2 GiB
BATCH = 4096  # annotations that are Python objects at a time
IMAGE_KEYS = {"id", "file_name", "width", "height"}
ANNOTATION_KEYS = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}

TABLE = pa.schema(
    [
        ("image_id", pa.int64()),
        ("id", pa.int64()),
        ("category_id", pa.int64()),
        ("bbox", pa.list_(pa.float64(), 4)),  # the source's, xywh
        ("area", pa.float64()),
        ("iscrowd", pa.bool_()),
        ("segmentation", pa.large_string()),  # JSON
        ("extra", pa.large_string()),  # JSON: other members, and those of the above that their columns hold otherwise
        ("absent", pa.list_(pa.string())),  # members of the above that the source lacks
        ("box", pa.list_(pa.float64(), 4)),  # xyxy clamped to the image; null when rejected
        ("reject", pa.string()),  # why training must not see it
    ]
)
RAW = pa.schema(list(TABLE)[:-2])


@dataclass(frozen=True)
class CocoFile:
    """A checked annotation file.

    images: {"id", "file_name", "width", "height", "extra": JSON of the record's other members or None} in order of id.
    table: the annotations (TABLE), by image in the order of images, an image's in the file's order; those of image i
      are the rows starts[i] to starts[i + 1], and from starts[-1] on are those of images that the file does not list.
    categories: {"id", "name"} in order of id; the position is the label.
    document: the categories as they were, and what else the file holds beside images and annotations.
    """

    path: Path | str
    sha256: str
    images: list[dict[str, Any]]
    table: pa.Table
    starts: np.ndarray
    categories: list[dict[str, Any]]
    document: dict[str, Any]

    @property
    def boxes(self) -> int:
        """How many boxes can be trained on."""
        return self.table["reject"].null_count

    @property
    def clamped(self) -> int:
        """How many of these reached over the image's edge and were cut there."""
        used = self.table.filter(pc.is_null(self.table["reject"]))
        return int((_numbers(used["box"]) != _xyxy(_numbers(used["bbox"]))).any(1).sum())

    def annotations(self, position: int) -> list[dict[str, Any]]:
        """The annotations of the image at this position, in the file's order."""
        start, end = self.starts[position : position + 2].tolist()
        return self.table.slice(start, end - start).to_pylist()

    def rejects(self) -> Iterator[dict[str, Any]]:
        """Every annotation that training will not see, {"file_name", "annotation_id", "reason", "record": JSON of one
        of an image that the file does not list, which is in no other place, else None}."""
        listed = int(self.starts[-1])
        for position in np.flatnonzero(self.table["reject"].is_valid().to_numpy()).tolist():
            row = self.table.slice(position, 1).to_pylist()[0]
            image = int(np.searchsorted(self.starts, position, side="right")) - 1
            yield {
                "file_name": self.images[image]["file_name"] if position < listed else "",
                "annotation_id": row["id"],
                "reason": row["reject"],
                "record": None if position < listed else json.dumps(to_record(row, row["image_id"])),
            }


def read_coco(path: Path | str, images_root: Path | str, options: IngestSettings | None = None) -> CocoFile:
    """Read and check an annotation file (local or on S3) whose file names are relative to images_root.

    options: whether segmentation is kept, and what becomes of boxes over the image's edge. Raises UserError: exit code
    2 for what is wrong with the file, 1 where the store does not answer. Images are not opened.
    """
    try:
        return _read(path, images_root, options or IngestSettings())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "it may be cut short, so copy or write it again.",
            2,
        ) from error
    except RecursionError as error:  # what can be read so deep cannot be written
        raise UserError(f"{path} is not a COCO file: a record is nested too deep.", 2) from error
    except OSError as error:
        raise not_done(f"The annotation file {path}", "read", error) from error


def _read(path: Path | str, images_root: Path | str, options: IngestSettings) -> CocoFile:
    fs, place = _annotation_file(path)
    found: dict[str, Any] = {}
    document: dict[str, Any] = {}
    with fs.open_input_stream(place) as file:
        content = JsonObject(file)
        if content.empty:
            raise UserError(f"The annotation file {path} is empty; write it again.", 2)
        members = content.members()
        while True:
            try:
                key, value = next(members)
            except StopIteration:
                break
            except NotAnObject as error:
                raise UserError(
                    f"{path} is not a COCO file: it holds a {_kind(error.value)}, not an object with images, "
                    "annotations and categories.",
                    2,
                ) from error
            if key in found:
                raise UserError(f"{path} is not a COCO file: it has {key!r} twice.", 2)
            if key not in ("images", "annotations", "categories"):
                document[key] = list(value) if isinstance(value, Iterator) else value
            elif not isinstance(value, Iterator):
                raise UserError(
                    f"{path} is not a COCO file: {key!r} is a {_kind(value)}; it must be a list of objects.", 2
                )
            elif key == "images":
                found[key] = _images(path, value, images_root)
            elif key == "annotations":
                found[key] = pa.Table.from_batches(_annotations(path, value, options.segmentation), RAW)
            else:
                document[key] = list(value)
                found[key] = _categories(path, document[key])
    for key in ("images", "annotations", "categories"):
        if key not in found:
            raise UserError(f"{path} is not a COCO file: it has no {key!r}; it must be a list of objects.", 2)
    for key in ("images", "categories"):
        if not found[key]:
            raise UserError(f"{path} has nothing to use: its list {key!r} is empty.", 2)
    images, categories = found["images"], found["categories"]
    table, starts = _judge(found.pop("annotations"), images, categories, options)
    return CocoFile(path, content.sha256, images, table, starts, categories, document)


def coco_from(
    path: str, sha256: str, content: dict[str, list], images_root: str, options: IngestSettings
) -> CocoFile:
    """As `read_coco`, of lists of images, annotations and categories that something else at `path` says."""
    images, categories = _images(path, content["images"], images_root), _categories(path, content["categories"])
    for what, found in (("image", images), ("class", categories)):
        if not found:
            raise UserError(f"{path} has nothing to use: there is no {what}.", 2)
    raw = pa.Table.from_batches(_annotations(path, iter(content["annotations"]), options.segmentation), RAW)
    table, starts = _judge(raw, images, categories, options)
    return CocoFile(path, sha256, images, table, starts, categories, {"categories": content["categories"]})


def safe_join(root: Path, name: str) -> Path:
    """root/name for a relative name with forward slashes that stays under root, links followed.

    Raises ValueError with the reason otherwise.
    """
    _check_name(name)
    path = os.path.join(root, name)
    try:
        inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), ""))
    except OSError as error:
        raise ValueError(f"cannot be followed ({error.strerror})") from error
    if not inside:
        raise ValueError("is a link that leaves the images folder")
    return Path(path)


def image_place(root: Path | str, name: str) -> str:
    """Where the image `name` of the folder or s3:// prefix `root` is: `safe_join`, and the same of a URI."""
    if not is_remote(root):
        return str(safe_join(Path(root), name))
    _check_name(name)
    return f"{str(root).rstrip('/')}/{posixpath.normpath(name)}"


def _check_name(name: str) -> None:
    if not name or "\0" in name:
        raise ValueError("is empty or holds a NUL character")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode") from error
    if "\\" in name or name[1:2] == ":":
        raise ValueError("has a backslash or a drive letter; write relative names with forward slashes")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise ValueError("leaves the images folder")
    if posixpath.normpath(name) == "." or parts[-1] == "":
        raise ValueError("names a folder")


def masks_of(annotations: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """The `segmentation` of annotations -> masks bool [N, height, width].

    Polygons are joined, none leave an empty mask; run lengths (crowds have them) come packed or as numbers.
    Raises ValueError when run lengths are of another size.
    """
    from pycocotools import mask as run_lengths

    masks = np.zeros((len(annotations), height, width), bool)
    for mask, annotation in zip(masks, annotations, strict=True):
        shape = annotation["segmentation"]
        if isinstance(shape, list):
            shape = run_lengths.merge(run_lengths.frPyObjects(shape, height, width)) if shape else None
        elif isinstance(shape["counts"], list):
            shape = run_lengths.frPyObjects(shape, height, width)
        if shape is not None:
            mask[:] = run_lengths.decode(shape)
    return masks


def split_train(
    coco: CocoFile, fraction: float, seed: int, images_root: Path | str, max_pixels: int
) -> tuple[CocoFile, CocoFile]:
    """Split one file's images at random into (train, val), about `fraction` of them val.

    Images that look alike (the same bytes, or nearly the same picture at 8x8 pixels) stay together, so
    that val holds nothing training has seen; unless they are so many that no split would be left: then
    only identical files do. Reads every image once. Depends on nothing but the files and the seed.
    Raises UserError (exit code 1) when there are fewer than two different images.
    """
    paths = [image_place(images_root, image["file_name"]) for image in coco.images]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        looks = pool.map(lambda path: _look(path, max_pixels), paths)
        digests, thumbnails = zip(*track(looks, "Looking for near-duplicates", len(paths)), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the rest is not read first

    wanted = max(1, round(fraction * len(paths)))
    for groups in (_alike(digests, thumbnails), _alike(digests, [None] * len(digests))):
        order = np.random.default_rng(seed % 2**63).permutation(len(groups))
        val: set[int] = set()
        for group in (groups[i] for i in order):
            if len(val) + len(group) <= wanted and len(val) + len(group) < len(paths):
                val.update(group)
        if len(val) >= max(1, wanted / 2):
            break
    if not val:
        raise UserError(
            f"{coco.path} cannot be split: it has no two different images; add some or set data.val.", 2
        )
    return _select(coco, sorted(set(range(len(paths))) - val), rest=True), _select(coco, sorted(val))


def to_record(row: dict[str, Any], image_id: int) -> dict[str, Any]:
    """A row of TABLE, or of a shard's annotations, as the source had it."""
    record = {
        "id": row["id"], "image_id": image_id, "category_id": row["category_id"], "bbox": row["bbox"],
        "area": row["area"], "iscrowd": int(row["iscrowd"]),
    }  # fmt: skip
    if row["segmentation"] is not None:
        record["segmentation"] = json.loads(row["segmentation"])
    if row["extra"] is not None:
        record |= json.loads(row["extra"])
    return {key: value for key, value in record.items() if key not in row["absent"]}


def image_record(image: dict[str, Any]) -> dict[str, Any]:
    """An image of CocoFile, or a shard's row, as the source had it."""
    record = {"id": image["id"], **{key: image[key] for key in ("file_name", "width", "height")}}
    return record | json.loads(image["extra"] or "{}")


def _annotation_file(path: Path | str):
    """(file system, path in it) of an annotation file."""
    found = kind(path)
    if found != FileType.File:
        raise UserError({
            FileType.NotFound: f"There is no annotation file {path}.",
            FileType.Directory: f"{path} is a folder; name an annotation file.",
        }.get(found, f"{path} is not a file, but a pipe or a device."), 2)  # fmt: skip
    return locate(path)


def _categories(path: Path | str, records: list) -> list[dict[str, Any]]:
    categories: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(records):
        where = f"categories[{number}]"
        category_id = _whole(path, where, record, "id")
        name = record.get("name")
        if not isinstance(name, str) or not name.strip() or not _unicode(name):
            raise _wrong(path, where, "name", "a text", record)
        if category_id in categories:
            raise UserError(
                f"{path}: categories {categories[category_id]['name']!r} and {name!r} both have the id "
                f"{category_id}; give each its own.",
                2,
            )
        categories[category_id] = {"id": category_id, "name": name}
    return [categories[key] for key in sorted(categories)]


def _images(path: Path | str, records: Iterable, root: Path | str) -> list[dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    names: dict[str, int] = {}
    for number, record in enumerate(records):
        where = f"images[{number}]"
        image_id = _whole(path, where, record, "id")
        name = record.get("file_name")
        if not isinstance(name, str):
            raise _wrong(path, where, "file_name", "a text", record)
        if image_id in images:
            raise UserError(
                f"{path}: images {images[image_id]['file_name']!r} and {name!r} both have the id {image_id}; "
                "give each its own.",
                2,
            )
        try:
            image_place(root, name)
        except ValueError as error:
            raise UserError(
                f"{path}: {where} (id {image_id}) has the file name {_short(name)}, which {error}; "
                f"nothing was read, mend the name.",
                2,
            ) from error
        other = names.setdefault(posixpath.normpath(name), image_id)
        if other != image_id:
            raise UserError(
                f"{path}: images {other} and {image_id} both have the file name {_short(name)}; "
                "merge their annotations under one id.",
                2,
            )
        width = _whole(path, where, record, "width", 1, LARGEST_SIDE)
        height = _whole(path, where, record, "height", 1, LARGEST_SIDE)
        extra = _json({key: value for key, value in record.items() if key not in IMAGE_KEYS})
        images[image_id] = {"id": image_id, "file_name": name, "width": width, "height": height, "extra": extra}
    return [images[key] for key in sorted(images)]


def _annotations(path: Path | str, records: Iterator, segmentation: bool) -> Iterator[pa.RecordBatch]:
    """The annotations with their types checked, not yet judged, as batches of RAW."""
    numbered = enumerate(records)
    while some := list(islice(numbered, BATCH)):
        rows = [_annotation(path, f"annotations[{number}]", record, segmentation) for number, record in some]
        yield pa.RecordBatch.from_pylist(rows, RAW)


def _annotation(path: Path | str, where: str, record: Any, segmentation: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"id": _whole(path, where, record, "id")}
    row["image_id"] = _whole(path, where, record, "image_id")
    row["category_id"] = _whole(path, where, record, "category_id")
    bbox = record.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        raise _wrong(path, where, "bbox", "four numbers [x, y, width, height]", record)
    row["bbox"] = [_float(value) for value in bbox]
    area = record.get("area")
    if area is None:
        area = row["bbox"][2] * row["bbox"][3]
    if not _is_number(area):
        raise _wrong(path, where, "area", "a number", record)
    row["area"] = _float(area)
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1, None):
        raise _wrong(path, where, "iscrowd", "0 or 1", record)
    row["iscrowd"] = bool(crowd)
    extra = {key: value for key, value in record.items() if key not in ANNOTATION_KEYS}
    for key in ("bbox", "area", "iscrowd"):  # what became another value: null, numbers beyond float64
        if key in record and record[key] != row[key]:
            extra[key] = record[key]
    row["absent"] = [key for key in ("area", "iscrowd") if key not in record]
    row["extra"] = _json(extra)
    row["segmentation"] = json.dumps(record["segmentation"]) if segmentation and "segmentation" in record else None
    return row


def _judge(
    raw: pa.Table, images: list[dict[str, Any]], categories: list[dict[str, Any]], options: IngestSettings
) -> tuple[pa.Table, np.ndarray]:
    """The checked annotations as CocoFile's table and starts."""
    ids, image_ids, category_ids = (raw[key].to_numpy() for key in ("id", "image_id", "category_id"))
    bbox, area = _numbers(raw["bbox"]), raw["area"].to_numpy()
    known = np.array([image["id"] for image in images], np.int64)
    position = np.searchsorted(known, image_ids)
    listed = known[np.minimum(position, len(known) - 1)] == image_ids
    position[~listed] = len(known)
    # Without an image any size will do: such a box is rejected for that.
    sides = np.array([(image["width"], image["height"]) for image in images] + [(1, 1)], np.float64)[position]
    with np.errstate(invalid="ignore", over="ignore"):
        whole = _xyxy(bbox)
        box = np.clip(whole, 0.0, np.tile(sides, 2))
        over = np.abs(whole - box).max(1, initial=0) > ROUNDING
        x0, y0, x1, y1 = box.astype(np.float32).T  # as training will see it
        outside = (x1 <= x0) | (y1 <= y0)
    once = np.zeros(len(raw), bool)
    once[np.unique(ids, return_index=True)[1]] = True
    reasons = {  # the first that fits
        "the annotation id was used before": ~once,
        "there is no image {image}": ~listed,
        "there is no category {category}": ~np.isin(category_ids, [category["id"] for category in categories]),
        "a number of the box or its area is not finite": ~(np.isfinite(bbox).all(1) & np.isfinite(area)),
        "the box has a negative width or height": (bbox[:, 2:] < 0).any(1),
        "the box has no area": (bbox[:, 2:] == 0).any(1),
        "nothing of the box is inside the image": outside,
        "the box reaches over the image's edge": over & (options.over_edge == "reject"),
        CROWD: raw["iscrowd"].to_numpy(zero_copy_only=False),
    }
    reject = np.full(len(raw), None, object)
    for reason, faulty in reversed(reasons.items()):
        for row in np.flatnonzero(faulty).tolist():
            reject[row] = reason.format(image=image_ids[row], category=category_ids[row])
    lost = pa.array(reject != None)  # noqa: E711 - element by element
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(box.ravel()), 4, mask=lost)
    raw = raw.append_column("box", boxes).append_column("reject", pa.array(reject, pa.string()))
    order = np.argsort(position, kind="stable")
    starts = np.searchsorted(position[order], np.arange(len(images) + 1))
    columns = {}
    for name in TABLE.names:  # one by one, so that not all of it is there twice
        columns[name] = raw[name].take(order).combine_chunks()
        raw = raw.drop_columns(name)
    return pa.table(columns, TABLE), starts


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of boxes, none of them null -> float64 [N, 4]."""
    return pc.list_flatten(column).to_numpy().reshape(-1, 4)


def _xyxy(bbox: np.ndarray) -> np.ndarray:
    """Boxes xywh -> xyxy, float64 [N, 4]."""
    return np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], 1)


def _json(members: dict[str, Any]) -> str | None:
    return json.dumps(members) if members else None


def _whole(
    path: Path | str, where: str, record: Any, key: str, least: int = -LARGEST_ID, most: int = LARGEST_ID
) -> int:
    """record[key] as a whole number in the range; 3.0 counts as 3."""
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a COCO file: {where} is a {_kind(record)}, not an object.", 2)
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        kind = "a whole number" if least < 0 else "a positive whole number"
        raise _wrong(path, where, key, kind, record)
    return value


def _wrong(path: Path | str, where: str, key: str, wanted: str, record: dict) -> UserError:
    if not isinstance(record, dict):
        return UserError(f"{path} is not a COCO file: {where} is a {_kind(record)}, not an object.", 2)
    identity = f" (id {_short(record['id'])})" if key != "id" and "id" in record else ""
    found = f"is {_short(record[key])}" if key in record else "is missing"
    return UserError(f"{path}: {where}{identity}: {key!r} {found}; it must be {wanted}.", 2)


def _short(value: Any) -> str:
    """A value for a message: one line, not long, printable."""
    text = ascii(value) if not isinstance(value, str) or not _unicode(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _kind(value: Any) -> str:
    names = {dict: "JSON object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _look(path: str, max_pixels: int) -> tuple[str, bytes | None]:
    """(sha256 of the bytes, thumbnail); a file that cannot be read looks like no other."""
    from detr.transforms import ImageError, decode_image

    data, reason = read_file(path, MAX_FILE_BYTES)
    if reason is not None:
        return path, None  # ingest will say why
    try:
        small = thumbnail(decode_image(data, max_pixels))
    except ImageError:
        small = None
    return hashlib.sha256(data).hexdigest(), small


def _alike(digests: Sequence[str], thumbnails: Sequence[bytes | None]) -> list[list[int]]:
    """Indices grouped by equal digest, or thumbnails that are nearly the same."""
    parent = list(range(len(digests)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, digest in enumerate(digests):
        parent[root(i)] = root(first.setdefault(digest, i))
    known = [i for i, small in enumerate(thumbnails) if small is not None]
    if known:
        small = np.frombuffer(b"".join(thumbnails[i] for i in known), np.uint8).reshape(len(known), -1)
        for i, near in zip(known, find_alike(small, small), strict=True):
            for b in near:
                parent[root(known[b])] = root(i)
    groups: dict[int, list[int]] = {}
    for i in range(len(digests)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def _select(coco: CocoFile, positions: list[int], rest: bool = False) -> CocoFile:
    """The file with only the images at these positions, and, for rest, annotations of images it does not list."""
    counts = np.diff(coco.starts)[positions]
    rows = [np.arange(coco.starts[i], coco.starts[i + 1]) for i in positions]
    if rest:
        rows.append(np.arange(coco.starts[-1], len(coco.table)))
    return replace(
        coco,
        images=[coco.images[i] for i in positions],
        table=coco.table.take(np.concatenate(rows)),
        starts=np.concatenate([[0], np.cumsum(counts)]),
    )
