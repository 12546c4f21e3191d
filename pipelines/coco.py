"""Annotation files in COCO's format: read, check, explain what is wrong.

A file whose structure is wrong is refused as a whole, in one sentence that names the record. A box
that cannot be trained on is kept, marked with the reason: evaluation wants the source's own truth.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.alike import find_alike, thumbnail
from pipelines.progress import track
from pipelines.settings import UserError

LARGEST_ID = 2**63 - 1
LARGEST_SIDE = 2**31 - 1


@dataclass(frozen=True)
class CocoFile:
    """A checked annotation file.

    images: {"id", "file_name", "width", "height"} in order of id.
    annotations_by_image: for every image id its annotations in the file's order, each
      {"id", "category_id", "bbox": source xywh as floats, "area", "iscrowd": bool,
       "reject": reason or None, "box": xyxy clamped to the image, None when rejected}.
    categories: {"id", "name"} in order of id; the position is the label.
    rejects: (file name, annotation id, reason) of every annotation that training will not see,
      including those of images the file does not list (these are in no other place).
    """

    path: Path
    sha256: str
    images: list[dict[str, Any]]
    annotations_by_image: dict[int, list[dict[str, Any]]]
    categories: list[dict[str, Any]]
    rejects: list[tuple[str, int, str]]

    @property
    def boxes(self) -> int:
        """How many boxes can be trained on."""
        return sum(a["reject"] is None for rows in self.annotations_by_image.values() for a in rows)

    @property
    def clamped(self) -> int:
        """How many of these reached over the image's edge and were cut there."""
        return sum(
            row["box"] != _xyxy(row["bbox"])
            for rows in self.annotations_by_image.values()
            for row in rows
            if row["reject"] is None
        )


def read_coco(path: Path, images_root: Path) -> CocoFile:
    """Read and check an annotation file whose file names are relative to images_root.

    Raises UserError: exit code 2 when the file is missing or not COCO, 1 when a file name leaves
    images_root or nothing usable is in it. Images are not opened.
    """
    path = Path(path)
    content, sha256 = _load(path)
    categories = _categories(path, content["categories"])
    images = _images(path, content["images"], Path(images_root))
    by_id = {image["id"]: image for image in images}
    labels = {category["id"] for category in categories}

    rows: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    rejects: list[tuple[str, int, str]] = []
    seen: set[int] = set()
    for number, record in enumerate(content["annotations"]):
        where = f"annotations[{number}]"
        image_id, row = _annotation(path, where, record)
        image = by_id.get(image_id)
        if row["id"] in seen:
            row["reject"] = "the annotation id was used before"
        elif image is None:
            row["reject"] = f"there is no image {image_id}"
        elif row["category_id"] not in labels:
            row["reject"] = f"there is no category {row['category_id']}"
        else:
            row["box"], row["reject"] = _check_box(row["bbox"], row["area"], image["width"], image["height"])
            if row["reject"] is None and row["iscrowd"]:
                row["box"], row["reject"] = None, "crowd"
        seen.add(row["id"])
        if image is not None:
            rows[image_id].append(row)
        if row["reject"] is not None:
            rejects.append((image["file_name"] if image else "", row["id"], row["reject"]))
    return CocoFile(path, sha256, images, rows, categories, rejects)


def safe_join(root: Path, name: str) -> Path:
    """root/name for a relative name with forward slashes that stays under root, links followed.

    Raises ValueError with the reason otherwise.
    """
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
    path = os.path.join(root, name)
    try:
        inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), ""))
    except OSError as error:
        raise ValueError(f"cannot be followed ({error.strerror})") from error
    if not inside:
        raise ValueError("is a link that leaves the images folder")
    return Path(path)


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
    coco: CocoFile, fraction: float, seed: int, images_root: Path, max_pixels: int
) -> tuple[CocoFile, CocoFile]:
    """Split one file's images at random into (train, val), about `fraction` of them val.

    Images that look alike (the same bytes, or nearly the same picture at 8x8 pixels) stay together, so
    that val holds nothing training has seen; unless they are so many that no split would be left: then
    only identical files do. Reads every image once. Depends on nothing but the files and the seed.
    Raises UserError (exit code 1) when there are fewer than two different images.
    """
    paths = [safe_join(images_root, image["file_name"]) for image in coco.images]
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
            f"{coco.path} cannot be split: it has no two different images; add some or set data.val.", 1
        )
    train = _select(coco, set(range(len(paths))) - val)
    unlisted = [reject for reject in coco.rejects if not reject[0]]  # of images the file does not list
    return replace(train, rejects=unlisted + train.rejects), _select(coco, val)


def _load(path: Path) -> tuple[dict[str, Any], str]:
    """The file's JSON object with its three lists, and the sha256 of its bytes."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"There is no annotation file {path}.", 2) from error
    except OSError as error:
        raise UserError(f"The annotation file {path} cannot be read: {error.strerror}.", 2) from error
    if not data.strip():
        raise UserError(f"The annotation file {path} is empty; write it again.", 2)
    try:
        content = json.loads(data)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "it may be cut short, so copy or write it again.",
            2,
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, too deep
        raise UserError(f"{path} is not JSON that can be read: {str(error).splitlines()[0]}.", 2) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a COCO file: it holds a {_kind(content)}, not an object with images, "
            "annotations and categories.",
            2,
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            found = f"{key!r} is a {_kind(content[key])}" if key in content else f"it has no {key!r}"
            raise UserError(f"{path} is not a COCO file: {found}; it must be a list of objects.", 2)
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{path} has nothing to use: its list {key!r} is empty.", 1)
    return content, hashlib.sha256(data).hexdigest()


def _categories(path: Path, records: list) -> list[dict[str, Any]]:
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


def _images(path: Path, records: list, root: Path) -> list[dict[str, Any]]:
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
            safe_join(root, name)
        except ValueError as error:
            raise UserError(
                f"{path}: {where} (id {image_id}) has the file name {_short(name)}, which {error}; "
                f"nothing was read, mend the name.",
                1,
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
        images[image_id] = {"id": image_id, "file_name": name, "width": width, "height": height}
    return [images[key] for key in sorted(images)]


def _annotation(path: Path, where: str, record: Any) -> tuple[int, dict[str, Any]]:
    """(image id, the annotation with its types checked, not yet judged)."""
    row: dict[str, Any] = {"id": _whole(path, where, record, "id")}
    image_id = _whole(path, where, record, "image_id")
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
    row["reject"], row["box"] = None, None
    return image_id, row


def _xyxy(bbox: list[float]) -> list[float]:
    x, y, w, h = bbox
    return [x, y, x + w, y + h]


def _check_box(
    bbox: list[float], area: float, width: int, height: int
) -> tuple[list[float] | None, str | None]:
    """(xyxy clamped to the image, None) or (None, the reason why the box cannot be used)."""
    w, h = bbox[2:]
    if not all(math.isfinite(value) for value in (*bbox, area)):
        return None, "a number of the box or its area is not finite"
    if w < 0 or h < 0:
        return None, "the box has a negative width or height"
    if w == 0 or h == 0:
        return None, "the box has no area"
    sides = (width, height, width, height)
    box = [min(max(value, 0.0), float(side)) for value, side in zip(_xyxy(bbox), sides, strict=True)]
    x0, y0, x1, y1 = np.float32(box)  # as training will see it
    if x1 <= x0 or y1 <= y0:
        return None, "nothing of the box is inside the image"
    return box, None


def _whole(
    path: Path, where: str, record: Any, key: str, least: int = -LARGEST_ID, most: int = LARGEST_ID
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


def _wrong(path: Path, where: str, key: str, wanted: str, record: dict) -> UserError:
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


def _look(path: Path, max_pixels: int) -> tuple[str, bytes | None]:
    """(sha256 of the bytes, thumbnail); a file that cannot be read looks like no other."""
    from detr.transforms import ImageError, decode_image

    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError:
        data = None
    if data is None:
        return str(path), None  # ingest will say why
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


def _select(coco: CocoFile, positions: set[int]) -> CocoFile:
    """The file with only the images at these positions."""
    images = [image for position, image in enumerate(coco.images) if position in positions]
    names = {image["file_name"] for image in images}
    rows = {image["id"]: coco.annotations_by_image[image["id"]] for image in images}
    return replace(
        coco,
        images=images,
        annotations_by_image=rows,
        rejects=[reject for reject in coco.rejects if reject[0] in names],
    )
