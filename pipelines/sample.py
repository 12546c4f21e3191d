"""The built-in dataset: handwritten digits pasted on crops of two photographs, as a COCO folder.

Nothing is downloaded; both sources come with scikit-learn:

* `load_digits`: 1,797 handwritten digits of 8x8 pixels, a copy of the test set of the "Optical
  Recognition of Handwritten Digits" data (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository).
* `load_sample_images`: two photographs by others. `china.jpg` is by danielbuechele
  (https://www.flickr.com/photos/danielbuechele/6061409035/), `flower.jpg` by vultilion
  (https://www.flickr.com/photos/vultilion/6056698931/). Both are released under the Creative Commons
  licence Attribution 2.0 (https://creativecommons.org/licenses/by/2.0/), retrieved 21 August 2011 by
  Robert Layton. Here they are cropped, scaled, mirrored, and have digits pasted on them. (scikit-learn's
  README names danielbuechele in flower.jpg's attribution line, but links to vultilion's page.)

A digit appears in one split only: train, val and test are drawn from disjoint handwriting samples.
"""
from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipelines.progress import console, track
from pipelines.settings import SampleSettings, UserError
from pipelines.stage import read_json, write_json

SPLITS = ("train", "val", "test")
SHARES = (0.7, 0.85)  # of the digits: train up to the first, val up to the second, test the rest
DESCRIPTION = "Handwritten digits on photographs, made by detr"
INK = 0.3  # a pixel belongs to a digit's box when at least this much of it is the digit's colour
CONTRAST = 85.0  # least difference in brightness (0..255) between a digit and what lies under it
CREDIT = (
    "Photographs: china.jpg by danielbuechele and flower.jpg by vultilion (Flickr), CC BY 2.0, changed. "
    "Digits: E. Alpaydin and C. Kaynak, UCI Machine Learning Repository."
)


def write_sample(settings: SampleSettings, folder: Path) -> dict:
    """Write `images/` and `instances_<split>.json` (test only when asked for) into the folder.

    Returns {"folder", "images": {split: n}, "boxes": {split: n}}. The same settings give the same
    bytes, in whatever order the images are made. Written already, nothing is done; the annotation files
    are written last, so who finds them finds their images. Raises UserError (exit code 2) when the
    folder holds another dataset.
    """
    folder = Path(folder)
    images = folder / "images"
    counts = {split: getattr(settings, split) for split in SPLITS if getattr(settings, split)}
    paths = {split: folder / f"instances_{split}.json" for split in SPLITS}
    info = {"description": DESCRIPTION, "credit": CREDIT, "version": "1", "settings": settings.model_dump()}

    present = {split: _read_own(path) for split, path in paths.items() if path.exists()}
    if present.keys() == counts.keys() and all(
        coco["info"] == info and all((images / image["file_name"]).is_file() for image in coco["images"])
        for coco in present.values()
    ):
        return _summary(folder, present)
    for split in present:  # of other settings: would soon name images with other content
        paths[split].unlink()

    images.mkdir(parents=True, exist_ok=True)
    jobs = [(split, index) for split in counts for index in range(1, counts[split] + 1)]
    made: dict[str, list] = {split: [] for split in counts}

    def make(job: tuple[str, int]) -> tuple[str, tuple[int, int], list]:
        split, index = job
        image, objects = draw_scene(settings.seed, split, index, settings.max_objects)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=92)
        part = images / f".{split}_{index:06d}.part"
        part.write_bytes(data.getvalue())
        os.replace(part, images / _name(split, index))
        return split, image.size, objects

    _photographs(), _digits(settings.seed)  # before the threads, so that they are loaded once
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for split, size, objects in track(pool.map(make, jobs), "Drawing images", len(jobs)):
            made[split].append((size, objects))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the rest is not drawn first

    result = {split: _coco(split, made[split], info) for split in counts}
    for split, coco in result.items():
        write_json(paths[split], coco)
    summary = _summary(folder, result)
    total = {what: sum(summary[what].values()) for what in ("images", "boxes")}
    console.print(f"Made {total['images']} images with {total['boxes']} boxes in {folder}.")
    return summary


def draw_scene(
    seed: int, split: str, index: int, max_objects: int
) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """One image (RGB, long side 96..160 pixels) and its objects, [(digit 0..9, [x, y, w, h])].

    A pure function of its arguments. Boxes are the tight box of the visible ink in whole pixels.
    """
    rng = np.random.default_rng([seed % 2**63, SPLITS.index(split), index])
    canvas = _background(rng)
    height, width = canvas.shape[:2]
    which, images, labels = _digits(seed)
    objects: list[tuple[int, list[int]]] = []
    for _ in range(rng.integers(0, max_objects, endpoint=True)):
        digit = rng.choice(which[split])
        tall = min(np.exp(rng.uniform(np.log(24), np.log(64))), 0.75 * min(height, width))
        alpha = _ink(images[digit], tall, rng.uniform(0.75, 1.3))
        h, w = alpha.shape
        if w > width:
            continue
        for _ in range(20):
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            if all(_apart([x, y, w, h], box) for _, box in objects):
                place = canvas[y : y + h, x : x + w]
                colour = _colour(rng, place, alpha)
                place += alpha[:, :, None] * (colour - place)
                objects.append((int(labels[digit]), [x, y, w, h]))
                break
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8)), objects


@cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_image

    return [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


@cache
def _digits(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """({split: which digits}, images [1797, 8, 8] in 0..1, labels [1797])."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed % 2**63).permutation(len(digits.images))
    parts = np.split(order, [int(share * len(order)) for share in SHARES])
    return dict(zip(SPLITS, parts, strict=True)), digits.images.astype(np.float32) / 16, digits.target


def _background(rng: np.random.Generator) -> np.ndarray:
    """A crop of a photograph, float32 [H, W, 3]."""
    photo = _photographs()[rng.integers(2)]
    long = round(rng.triangular(96, 128, 160))
    short = round(long * rng.uniform(0.65, 1))
    width, height = (long, short) if rng.random() < 0.6 else (short, long)
    zoom = rng.uniform(0.7, min(photo.width / width, photo.height / height, 3.5))
    w, h = width * zoom, height * zoom
    x, y = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + w, y + h))
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return np.asarray(crop, np.float32) * np.float32(rng.uniform(0.7, 1.1))


def _ink(digit: np.ndarray, height: float, stretch: float) -> np.ndarray:
    """The digit [8, 8] at about this height: float32 in 0..1, cut to the tight box of its ink.

    stretch: its width relative to the handwriting's own proportions.
    """
    margin = np.pad(digit, 2)  # so that strokes at the border end as softly as the others
    scale = height / (np.ptp(np.nonzero(digit.max(1) > INK)) + 1)
    size = round(len(margin) * scale * stretch), round(len(margin) * scale)
    big = np.asarray(Image.fromarray(margin).resize(size, Image.Resampling.BICUBIC))
    alpha = np.clip((big - 0.3) / 0.45, 0, 1)  # steeper edges: strokes instead of clouds
    rows, columns = np.nonzero((alpha > INK).any(1))[0], np.nonzero((alpha > INK).any(0))[0]
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _colour(rng: np.random.Generator, place: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """A random colour that can be seen on the place [h, w, 3]; the better of black and white at need."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    under = (place @ weights)[alpha > INK]
    mean = under.mean()
    wanted = max(CONTRAST, CONTRAST / 2 + 1.3 * under.std())  # more on a busy background
    for colour in rng.uniform(0, 255, (16, 3)).astype(np.float32):
        if abs(colour @ weights - mean) > wanted:
            return colour
    return np.full(3, 0 if mean > 127 else 255, np.float32)


def _apart(a: list[int], b: list[int]) -> bool:
    """Whether two boxes xywh overlap little: IoU below 0.1, and a fifth of the smaller at most."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    areas = a[2] * a[3], b[2] * b[3]
    return both / (sum(areas) - both) < 0.1 and both <= min(areas) / 5


def _name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.jpg"


def _coco(split: str, made: list, info: dict) -> dict:
    images, annotations = [], []
    for image_id, ((width, height), objects) in enumerate(made, 1):
        images.append({"id": image_id, "file_name": _name(split, image_id), "width": width, "height": height})
        for digit, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": digit + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    return {"format": 1, "info": info, "categories": categories, "images": images, "annotations": annotations}


def _read_own(path: Path) -> dict:
    """An annotation file of an earlier write_sample; UserError for anybody else's."""
    try:
        coco = read_json(path)
        own = coco["info"]["description"] == DESCRIPTION
    except (ValueError, KeyError, TypeError):
        own = False
    if own:
        return coco
    raise UserError(f"{path} belongs to another dataset; give the built-in images an empty folder.", 2)


def _summary(folder: Path, files: dict[str, dict]) -> dict:
    return {
        "folder": str(folder),
        "images": {split: len(coco["images"]) for split, coco in files.items()},
        "boxes": {split: len(coco["annotations"]) for split, coco in files.items()},
    }
