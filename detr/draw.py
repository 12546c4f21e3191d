"""Boxes on images: what was found, and what is there."""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 480  # smaller images are enlarged to this, so that lines and words stay legible

# Okabe and Ito's colours (told apart with any colour vision) without their green, which is the truth's.
PALETTE = [
    (230, 159, 0), (86, 180, 233), (213, 94, 0), (204, 121, 167), (240, 228, 66), (0, 114, 178),
    (148, 103, 189), (255, 152, 150), (140, 86, 75), (23, 190, 207),
]  # fmt: skip
TRUTH = ((255, 255, 255), (0, 158, 80))


def class_colours(names: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """A colour for each name, the same for the same names in the same order; ten differ, then they recur."""
    return {name: PALETTE[at % len(PALETTE)] for at, name in enumerate(dict.fromkeys(names))}


def draw_detections(
    image: Image.Image,
    boxes: np.ndarray | Sequence[Sequence[float]],
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
    width: int | None = None,
) -> Image.Image:
    """A copy of the image with boxes [N, 4] (xyxy, pixels of `image`) and their labels on it.

    An image whose longer side is under 480 pixels is enlarged to that. scores [N] follow the labels;
    colours [N] are RGB, by default one per label; width is the lines' in pixels of the copy, by default
    one that suits its size. Raises ValueError for lists of unequal length.
    """
    if colours is None:
        by_name = class_colours(sorted(set(labels)))
        colours = [by_name[label] for label in labels]
    canvas, boxes = _canvas(image, boxes)
    _boxes(canvas, boxes, colours, width)
    _tags(canvas, boxes, labels, scores, colours)
    return canvas


def draw_truth_and_detections(
    image: Image.Image,
    truth_boxes: np.ndarray | Sequence[Sequence[float]],
    truth_names: Sequence[str],
    boxes: np.ndarray | Sequence[Sequence[float]],
    names: Sequence[str],
    scores: Sequence[float],
    colours: dict[str, tuple[int, int, int]] | None = None,
) -> Image.Image:
    """A copy of the image with the truth dashed in white and green, and detections in their class's colour.

    Boxes are xyxy in pixels of `image`. The truth is named only where no detection of that name covers
    it (IoU 0.5): there the two differ and the reader needs the word. colours maps names to RGB. Small
    images are enlarged as by `draw_detections`. Raises ValueError for lists of unequal length.
    """
    colours = colours or class_colours(sorted({*truth_names, *names}))
    rgb = [colours[name] for name in names]
    _, truth_boxes = _canvas(image, truth_boxes)
    canvas, boxes = _canvas(image, boxes)
    draw = ImageDraw.Draw(canvas)
    _boxes(canvas, boxes, rgb)
    for box in truth_boxes:
        _dashed(draw, _inside(box, canvas), max(1, _line(canvas) // 2))
    for box, name in zip(truth_boxes, truth_names, strict=True):
        same = boxes[[other == name for other in names]]
        if not (_iou(box, same) >= 0.5).any():
            _tag(draw, canvas, box, name, TRUTH[1], below=True)
    _tags(canvas, boxes, names, scores, rgb)
    return canvas


def _canvas(image: Image.Image, boxes) -> tuple[Image.Image, np.ndarray]:
    """The RGB copy to draw on, and the boxes in its pixels, float64 [N, 4]."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    canvas = image.convert("RGB")
    if max(image.size) < MIN_SIDE:
        scale = MIN_SIDE / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        canvas = canvas.resize(size, Image.Resampling.BICUBIC)
        boxes = boxes * (np.array(size * 2) / np.array(image.size * 2))
    elif canvas is image:
        canvas = image.copy()
    return canvas, boxes


def _boxes(canvas: Image.Image, boxes: np.ndarray, colours, width: int | None = None) -> None:
    draw = ImageDraw.Draw(canvas)
    for box, colour in zip(boxes, colours, strict=True):
        draw.rectangle(_inside(box, canvas), outline=colour, width=width or _line(canvas))


def _tags(canvas: Image.Image, boxes: np.ndarray, labels, scores, colours) -> None:
    """The words of all boxes, to be drawn last, so that no line crosses them; the surest on top."""
    draw = ImageDraw.Draw(canvas)
    texts = list(labels)
    if scores is not None:
        texts = [f"{label} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    for box, text, colour in reversed(list(zip(boxes, texts, colours, strict=True))):
        _tag(draw, canvas, box, text, colour)


def _line(canvas: Image.Image) -> int:
    return max(2, round(max(canvas.size) / 250))


def _inside(box: np.ndarray, canvas: Image.Image) -> list[float]:
    """The box clipped to the image, its corners in order whatever they were."""
    x1, x2 = sorted(np.clip(box[[0, 2]], 0, canvas.width - 1))
    y1, y2 = sorted(np.clip(box[[1, 3]], 0, canvas.height - 1))
    return [x1, y1, x2, y2]


def _tag(draw: ImageDraw.ImageDraw, canvas: Image.Image, box, text: str, colour, below: bool = False) -> None:
    """A word on the box's colour, above its top left corner or below its bottom left, inside the image."""
    font = ImageFont.load_default(max(14, round(max(canvas.size) / 36)))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = 2
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x1, y1, _, y2 = _inside(box, canvas)
    x = max(0, min(x1, canvas.width - width))
    y = y2 + 1 if below else y1 - height
    y = max(0, min(y, canvas.height - height))
    draw.rectangle([x, y, x + width, y + height], fill=colour)
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    draw.text((x + pad - left, y + pad - top), text, fill=(0, 0, 0) if light else (255, 255, 255), font=font)


def _dashed(draw: ImageDraw.ImageDraw, box: list[float], width: int) -> None:
    """A box of green dashes on white."""
    x1, y1, x2, y2 = box
    draw.rectangle(box, outline=TRUTH[0], width=width)
    dash = 4 * width + 4
    corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)])
    for start, end in itertools.pairwise(corners):
        length = np.abs(end - start).sum()
        for at in np.arange(0, length, 2 * dash):
            first, last = (start + (end - start) * min(1, step / length) for step in (at, at + dash))
            draw.line([*first, *last], fill=TRUTH[1], width=width)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of one box [4] with others [N, 4]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = sides.clip(0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-9)
