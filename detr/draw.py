"""Boxes on images: what was found, and what is there. Where the model looked, and where each query looks."""
from __future__ import annotations

import itertools
import math
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


def draw_decoder_attention(
    image: Image.Image,
    attention: np.ndarray,
    boxes: np.ndarray | Sequence[Sequence[float]],
    labels: Sequence[str],
    scores: Sequence[float],
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> Image.Image:
    """A panel per detection: its box, and the attention [N, h, w] of its query over the image (paper, figure 6).

    boxes [N, 4] are xyxy in pixels of `image`; colours [N] are RGB, by default one per label. Each panel has its
    own scale: its brightest spot is where that query looks most. Without detections the image is the only panel.
    Raises ValueError for lists of unequal length.
    """
    if colours is None:
        by_name = class_colours(sorted(set(labels)))
        colours = [by_name[label] for label in labels]
    panels = []
    for weights, box, label, score, colour in zip(attention, boxes, labels, scores, colours, strict=True):
        panel, box = _panel(image, box, weights)
        _boxes(panel, box, [colour], 2)
        _tags(panel, box, [label], [score], [colour])
        panels.append(panel)
    return _sheet(panels or [_panel(image, [])[0]])


def draw_encoder_attention(
    image: Image.Image, attention: np.ndarray, points: np.ndarray | Sequence[Sequence[float]]
) -> Image.Image:
    """The image with the points [P, 2] (x, y in its pixels), then the attention [P, h, w] of each (paper, figure 3).

    The encoder's self-attention tends to part one object from its neighbours. Raises ValueError for lists of
    unequal length.
    """
    points = np.asarray(points, np.float64).reshape(-1, 2)
    overview, places = _panel(image, np.tile(points, 2))
    panels = [overview]
    for number, (weights, place) in enumerate(zip(attention, places, strict=True), 1):
        panel, _ = _panel(image, [], weights)
        for canvas in (overview, panel):
            _mark(canvas, place[:2], str(number), PALETTE[(number - 1) % len(PALETTE)])
        panels.append(panel)
    return _sheet(panels)


def draw_queries(boxes: np.ndarray) -> Image.Image:
    """A panel per query with the centres of its boxes [I, Q, 4] (cxcywh in 0..1) in I images (paper, figure 7).

    Green boxes have both sides under a third of the image's; of the others red ones are at least as wide as
    high and blue ones higher than wide, each side as a share of the image's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    images, queries = boxes.shape[:2]
    columns = math.ceil(math.sqrt(queries))
    rows = math.ceil(queries / columns)
    number = np.arange(queries)
    corners = np.stack([number % columns * 1.06, number // columns * 1.15], 1)  # of panels a unit wide and high
    x, y = np.moveaxis(boxes[..., :2].clip(0, 1) + corners, -1, 0)
    small = (boxes[..., 2:] < 1 / 3).all(-1)
    wide = ~small & (boxes[..., 2] >= boxes[..., 3])
    width, height = columns * 1.06 + 0.1, rows * 1.15 + 0.1  # of all panels
    figure = Figure(figsize=(max(width, 5), height + 0.4), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, height / (height + 0.4)))
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-0.08, width - 0.08)
    axes.set_ylim(height - 0.22, -0.22)
    frames = [Rectangle(corner, 1, 1) for corner in corners]
    axes.add_collection(PatchCollection(frames, facecolor="#f5f5f2", edgecolor="#c9c9c4", linewidth=0.6))
    for at, corner in enumerate(corners):
        axes.text(*corner, f" {at}", fontsize=6, color="#52514e", va="bottom")
    area = float(np.clip(400 / max(1, images), 0.5, 8))  # of a dot in square points
    for kind, word, colour in (
        (small, "small", "#009e50"), (wide, "large, wide", "#d62728"), (~(small | wide), "large, high", "#1f5fd6"),
    ):  # fmt: skip
        axes.scatter(x[kind], y[kind], area, colour, linewidths=0, alpha=0.7, label=word)
    figure.legend(loc="upper center", ncols=3, frameon=False, fontsize=8, markerscale=(16 / area) ** 0.5,
                  title=f"box centres of {queries} queries in {images} images", title_fontsize=8)  # fmt: skip
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def picture_grid(images: list[Image.Image], width: int = 1200, columns: int = 3, gap: int = 8) -> Image.Image:
    """Pictures in rows that fill the width, those of a row equally high and none cropped."""
    sheet = Image.new("RGB", (width, 0), "white")
    for start in range(0, len(images), columns):
        row = images[start : start + columns]
        shapes = sum(image.width / image.height for image in row)
        height = min((width - gap * (len(row) - 1)) / shapes, width / 2)
        taller = Image.new("RGB", (width, sheet.height + round(height) + (gap if start else 0)), "white")
        taller.paste(sheet)
        x = 0.0
        for image in row:
            size = max(1, round(height * image.width / image.height)), max(1, round(height))
            taller.paste(image.resize(size, Image.Resampling.LANCZOS), (round(x), taller.height - size[1]))
            x += size[0] + gap
        sheet = taller
    return sheet


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


def _panel(image: Image.Image, boxes, attention: np.ndarray | None = None) -> tuple[Image.Image, np.ndarray]:
    """The image at the size of a panel, under its attention [h, w] if there is one; and boxes in its pixels."""
    scale = min(1, MIN_SIDE / max(image.size))
    small = image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * (np.array(small.size * 2) / np.array(image.size * 2))
    panel, boxes = _canvas(small, boxes)
    if attention is not None:
        from matplotlib import colormaps

        heat = Image.fromarray(attention.astype(np.float32)).resize(panel.size, Image.Resampling.BILINEAR)
        heat = np.asarray(heat)[..., None] / max(float(attention.max()), 1e-12)
        grey = np.asarray(panel.convert("L"), np.float32)[..., None]
        heat = heat.clip(0, 1) ** 0.7
        colour = colormaps["inferno"](heat[..., 0])[..., :3] * 255
        share = 0.85 * heat
        mixed = 0.75 * grey * (1 - share) + colour * share
        panel = Image.fromarray(mixed.round().astype(np.uint8))
    return panel, boxes


def _mark(canvas: Image.Image, place: np.ndarray, text: str, colour) -> None:
    """A disc with a word in it."""
    draw = ImageDraw.Draw(canvas)
    radius = 11
    x, y = place
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour, outline=(255, 255, 255), width=2)
    draw.text((x, y), text, fill=(0, 0, 0), font=ImageFont.load_default(14), anchor="mm")


def _sheet(panels: list[Image.Image], gap: int = 8) -> Image.Image:
    """Panels of one size in rows on white."""
    columns = len(panels) if len(panels) <= 3 else min(4, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    width, height = panels[0].width + gap, panels[0].height + gap
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % columns * width, number // columns * height))
    return sheet


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
