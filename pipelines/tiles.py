"""Large images with small objects: detected on whole and in overlapping tiles, what was found put together again.

After Akyon et al. 2022 (SAHI: slicing aided hyper inference).
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.ops import batched_nms

from pipelines.detect import Found

Part = tuple[int, int, int, int]  # x, y, width and height in the image

AT_BORDER = 2.0  # pixels: a box that comes so near a border of its tile may go on behind it
COVERED = 0.7  # the share of a cut box in which another box has its object


def tiles(width: int, height: int, size: int, overlap: float) -> list[Part]:
    """Tiles of one size that cover an image: at most `size` pixels wide and high, row by row.

    Neighbours share at least `overlap` (0..1) of their width or height: an object that is no larger than that is whole
    in one of them. None where the image itself is no larger than a tile.
    """
    if max(width, height) <= size:
        return []
    columns, rows = _starts(width, size, overlap), _starts(height, size, overlap)
    return [(x, y, min(width, size), min(height, size)) for y in rows for x in columns]


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where tiles begin along one side of an image: as few as there can be, evenly spread."""
    if length <= size:
        return [0]
    step = max(1, int(size * (1 - overlap)))
    gaps = -(-(length - size) // step)
    return [i * (length - size) // gaps for i in range(gaps + 1)]


def merge(width: int, height: int, parts: Sequence[tuple[Part, Found]], iou: float = 0.6) -> Found:
    """What was found in parts of an image (tiles, and the whole of it) -> what is in the image, each object once.

    found: boxes float32 [N, 4] (xyxy, in the part's own pixels), scores float32 [N], labels int64 [N], thresholds
    applied: a box of any score stands for its object here. Returns the same in the image's pixels, by descending
    score; of equal scores the earlier part's first.

    A box at a border where its part ends and the image does not may show a piece of an object. It is left out where
    another box of its label, no piece or a larger one, covers most of it. Of boxes of one label that overlap by more
    than `iou` the best remains (non-maximum suppression).
    """
    boxes, scores, labels, cut = [], [], [], []
    for (x, y, w, h), found in parts:
        own = found["boxes"].astype(np.float64).reshape(-1, 4)
        inner = np.array([x > 0, y > 0, x + w < width, y + h < height])
        cut.append((inner & (np.abs(own - (0, 0, w, h)) <= AT_BORDER)).any(1))
        boxes.append(own + np.array([x, y, x, y]))
        scores.append(found["scores"])
        labels.append(found["labels"])
    boxes, scores, labels = np.concatenate(boxes), np.concatenate(scores), np.concatenate(labels)
    kept = ~np.concatenate(cut)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for piece in sorted(np.flatnonzero(~kept), key=lambda i: (-area[i], i)):
        others = boxes[kept & (labels == labels[piece])]
        low, high = np.maximum(others[:, :2], boxes[piece, :2]), np.minimum(others[:, 2:], boxes[piece, 2:])
        shared = (high - low).clip(0).prod(1)
        kept[piece] = not (shared > COVERED * area[piece]).any()
    order = np.flatnonzero(kept)
    order = order[np.argsort(-scores[order], kind="stable")]
    # In float64: the library moves the boxes of each label far away from those of others.
    best = batched_nms(*(torch.from_numpy(x[order]) for x in (boxes, scores.astype(np.float64), labels)), iou).numpy()
    order = order[np.sort(best)]
    return {
        "boxes": boxes[order].astype(np.float32),
        "scores": scores[order].astype(np.float32),
        "labels": labels[order].astype(np.int64),
    }
