"""What people take from a table of detections: COCO's results JSON, and pictures."""
from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from pipelines.listing import coco_names
from pipelines.plan import images_of, read_part, tables
from pipelines.progress import progress, track
from pipelines.settings import UserError
from pipelines.storage import Folder, read_listed

SEPARATOR = ",\n"
LONGEST = 120  # bytes of a picture's name: file systems take 255, some of them 143, and a part has a longer one


def check_coco(path: str) -> None:
    """Raise UserError (exit code 2) where no file can be written; before the work that it is to hold."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name a file for --coco.", 2)
    if not os.path.isdir(folder):
        raise UserError(f"{path} cannot be written: there is no folder {folder} on this machine; make it first.", 2)


def coco_ids(path: str) -> dict[str, int]:
    """The ids of a COCO file's images by key (pipelines/listing.py), from the file alone; local or on S3.

    Raises UserError (exit code 2) where an image has none, or another's, and where it is no COCO file.
    """
    ids: dict[str, int] = {}
    for where, name, image_id in coco_names(path):
        if image_id is None:
            raise UserError(f"{path}: {where} has no id (a whole number), which --coco needs.", 2)
        ids[posixpath.normpath(name)] = image_id
    for image_id, times in Counter(ids.values()).most_common(1):
        if times > 1:
            raise UserError(f"{path}: {times} images have the id {image_id}; --coco needs one for each.", 2)
    return ids


def write_coco(
    uri: str, path: Path, categories: list[dict[str, Any]], ids: dict[str, int] | None
) -> tuple[Path | None, int]:
    """Write a finished prediction as COCO's results: [{"image_id", "category_id", "bbox" xywh pixels, "score"}].

    ids: COCO's image ids by key, where the input had any. Otherwise images are numbered in the order of the table, and
    the numbers are said in a second file beside it, as a COCO dataset without annotations. Returns (that file or None,
    how many images were left out since they have no id: the table keeps images that went from the input). One part of
    the table is held at a time. Raises UserError as `tables`.
    """
    path = Path(path)
    named = None if ids is not None else path.with_name(f"{path.stem}.images.json")
    parts = [place.with_name(f".{place.name}.{os.getpid()}") for place in (path, named) if place]
    with ExitStack() as stack:
        files = [stack.enter_context(part.open("w", encoding="utf-8")) for part in parts]
        found = _Items(files[0], "[")
        start = f'{{"categories": {json.dumps(categories)}, "annotations": [], "images": ['
        images = _Items(files[1], start) if named else None
        bar = stack.enter_context(progress())
        task, number, left_out = bar.add_task(path.name, total=None, note=""), 0, 0
        for table in tables(uri, lambda rows: bar.advance(task, rows)):
            for row in table.to_pylist():
                number += 1
                image_id = number if ids is None else ids.get(row["image_key"])
                if image_id is None:
                    left_out += 1
                    continue
                if images:
                    images.add({"id": image_id, "file_name": row["image_key"], "width": row["width"],
                                "height": row["height"]})  # fmt: skip
                for (left, top, right, bottom), score, category in zip(
                    row["boxes"], row["scores"], row["category_ids"], strict=True
                ):
                    found.add({"image_id": image_id, "category_id": category,
                               "bbox": [left, top, right - left, bottom - top], "score": score})  # fmt: skip
        found.end("]")
        if images:
            images.end("]}")
    for part, place in zip(parts, (path, named), strict=False):
        os.replace(part, place)
    return named, left_out


class _Items:
    """A JSON list that is written item by item."""

    def __init__(self, file: TextIO, start: str):
        self.file, self.before = file, start

    def add(self, item: dict[str, Any]) -> None:
        self.file.write(f"{self.before}{json.dumps(item)}")
        self.before = SEPARATOR

    def end(self, text: str) -> None:
        self.file.write(f"{'' if self.before == SEPARATOR else self.before}{text}\n")


def save_pictures(uri: str, number: int, max_pixels: int, classes: list[str]) -> list[str]:
    """Draw the detections on some images, spread evenly over a finished prediction, into its folder pictures/.

    Only the parts of the table that they are in are read. Returns where they are; an image that is no longer as it was
    is left out.
    """
    from detr.draw import class_colours, draw_detections
    from detr.transforms import ImageError, decode_image

    folder = Folder(uri)
    manifest = json.loads(folder.get("manifest.json"))
    colours, places, owed = class_colours(classes), [], 0
    chosen = _spread(manifest["parts"], min(number, manifest["images"]))
    for part, share in track(chosen, "pictures", len(chosen)):
        rows = [row for row in read_part(folder, part).to_pylist() if row["status"] == "ok"]
        taken = min(share + owed, len(rows))  # what rejects leave wanting the next part gives, if it can
        owed += share - taken
        if not taken:
            continue
        plan = json.loads(folder.get(manifest["plans"][part["run"] - 1]))
        listed = {image["key"]: image for image in images_of(folder, plan, part["shard"])}
        for row in (rows[at * len(rows) // taken] for at in range(taken)):
            image = listed[row["image_key"]]
            data, reason = read_listed(image["uri"], image["etag"], image["size"])
            try:
                picture = None if reason else decode_image(data, max_pixels)
            except ImageError:
                picture = None
            if picture is None:
                continue
            names = row["category_names"]
            drawn = draw_detections(picture, row["boxes"], names, row["scores"], [colours[name] for name in names])
            out = io.BytesIO()
            drawn.save(out, "JPEG", quality=90)
            name = f"pictures/{picture_name(row['image_key'])}"
            folder.put(name, out.getvalue())
            places.append(folder.place(name))
    return places


def picture_name(key: str) -> str:
    """An image's key as the name of a JPEG file, another for every key."""
    name = key.rpartition("://")[2].strip("./").replace("/", "__")
    if name == key and name.lower().endswith((".jpg", ".jpeg")) and len(name.encode()) <= LONGEST:
        return name
    short = name.encode()[: LONGEST - 13].decode(errors="ignore")
    return f"{short}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.jpg"


def _spread(parts: list[dict[str, Any]], number: int) -> list[tuple[dict[str, Any], int]]:
    """The parts in which `number` rows lie that are spread evenly over all, and how many of these are in each."""
    total, chosen, seen, before = sum(part["rows"] for part in parts), [], 0, 0
    for part in parts:
        seen += part["rows"]
        wanted = -(-seen * number // total)  # of the rows at * total / number, those before `seen`
        if wanted > before:
            chosen.append((part, wanted - before))
        before = wanted
    return chosen
