"""What people take from a table of detections: COCO's results JSON, and pictures."""
from __future__ import annotations

import io
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from pipelines.plan import images_of, tables
from pipelines.progress import progress, track
from pipelines.storage import Folder, read_listed

SEPARATOR = ",\n"


def write_coco(uri: str, path: Path, categories: list[dict[str, Any]], ids: dict[str, int] | None) -> Path | None:
    """Write a finished prediction as COCO's results: [{"image_id", "category_id", "bbox" xywh pixels, "score"}].

    ids: COCO's image ids by key, where the input had any. Otherwise images are numbered in order of key, and the
    numbers are said in a second file beside it, as a COCO dataset without annotations; returns that file, or None.
    One part of the table is held at a time. Raises UserError as `tables`.
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
        task, number = bar.add_task(path.name, total=None, note=""), 0
        for table in tables(uri, lambda rows: bar.advance(task, rows)):
            for row in table.to_pylist():
                number += 1
                image_id = number if ids is None else ids[row["image_key"]]
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
    return named


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

    Returns where they are; an image that is no longer as it was is left out.
    """
    from detr.draw import class_colours, draw_detections
    from detr.transforms import ImageError, decode_image

    folder = Folder(uri)
    manifest = json.loads(folder.get("manifest.json"))
    colours, places, seen = class_colours(classes), [], 0
    step = max(1, manifest["ok"] / number)
    wanted = {int(at * step) for at in range(min(number, manifest["ok"]))}
    for part, table in track(zip(manifest["parts"], tables(uri), strict=True), "pictures", len(manifest["parts"])):
        rows = [row for row in table.to_pylist() if row["status"] == "ok"]
        chosen = [row for at, row in enumerate(rows, seen) if at in wanted]
        seen += len(rows)
        if not chosen:
            continue
        plan = json.loads(folder.get(f"{part['run']:04d}/plan.json"))
        listed = {image["key"]: image for image in images_of(folder, plan, part["shard"])}
        for row in chosen:
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
            name = row["image_key"].rpartition("://")[2].strip("/").replace("/", "__")
            name = f"pictures/{name}{'' if name.lower().endswith(('.jpg', '.jpeg')) else '.jpg'}"
            folder.put(name, out.getvalue())
            places.append(folder.place(name))
    return places
