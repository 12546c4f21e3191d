"""How sure an AP is: a bootstrap over images (Efron 1979), which are drawn again and again from those there are.

Matching is per image, so it is done once; a resample only gives images other weights.
"""
from __future__ import annotations

import numpy as np

from pipelines.matching import Matches

RECALLS = np.linspace(0, 1, 101)  # at which COCO reads precision
CONFIDENCE = 0.95
# Images with objects from which on resamples say how sure an AP is. Those of a few images are nearly all alike, of one
# all the same: the interval would be far too narrow.
ENOUGH = 10
TOO_FEW = "too few images to say how sure"
CHUNK = 4_000_000  # weights of detections at once


def image_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """uint16 [resamples, images]: how often each is drawn when as many are drawn as there are, and put back."""
    random = np.random.default_rng(seed)
    weights = np.empty((resamples, images), np.uint16)
    for row in weights:
        row[:] = np.bincount(random.integers(0, max(images, 1), images), minlength=images)
    return weights


def average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """AP [B, K, T] of each class at each IoU, over all areas, for B rows of whole-numbered image weights [B, I].

    As if each image were in the data so many times: COCO's AP for weights of 1. NaN where the images drawn have no
    object of the class.
    """
    result = np.full((len(weights), len(matches.categories), len(matches.found)), np.nan)
    order = np.lexsort((matches.image, -matches.score, matches.label))  # as COCO sorts, ties by image
    bounds = np.searchsorted(matches.label[order], np.arange(len(matches.categories) + 1))
    for at in range(len(matches.categories)):
        objects = matches.object_image[matches.counted & (matches.object_label == at)]
        if not len(objects):
            continue
        mine = order[bounds[at] : bounds[at + 1]]
        rows = max(1, CHUNK // max(1, len(mine)))
        for start in range(0, len(weights), rows):
            chunk = slice(start, start + rows)
            result[chunk, at] = _class_ap(
                weights[chunk], matches.image[mine], matches.right[:, mine], matches.judged[:, mine], objects
            )
    return result


def mean_over_classes(ap: np.ndarray) -> np.ndarray:
    """[B, K] -> [B]: the mean over the classes that have an AP in a resample; NaN where none has."""
    known = ~np.isnan(ap)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, ap, 0).sum(axis=1) / np.maximum(count, 1), np.nan)


def enough_images(matches: Matches) -> tuple[np.ndarray, bool]:
    """bool [K], whether objects of each class are in ENOUGH images; and whether objects of any class are."""
    label, image = matches.object_label[matches.counted], matches.object_image[matches.counted]
    of_class = np.unique(np.stack([label, image]), axis=1)[0]
    return np.bincount(of_class, minlength=len(matches.categories)) >= ENOUGH, len(np.unique(image)) >= ENOUGH


def interval(values: np.ndarray) -> list[float] | None:
    """The middle 95 % [low, high] of values [B], of which NaN is left out; None where nothing is left."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    return np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()


def _class_ap(
    weights: np.ndarray, image: np.ndarray, right: np.ndarray, judged: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """AP [B, T] of one class; image [n], right and judged [T, n] of its detections by descending score.

    Precision has its peaks, and recall its steps, where a detection is right; only there are they looked at.
    """
    truth = weights[:, objects].sum(axis=1, dtype=np.int64)
    seen = np.cumsum(weights[:, image], axis=1, dtype=np.int32)
    result = np.zeros((len(weights), len(right)))
    for at in range(len(right)):
        hits = np.flatnonzero(right[at])
        if not len(hits):
            continue
        found = np.cumsum(weights[:, image[hits]], axis=1, dtype=np.int32)
        kept = seen[:, hits]
        neither = np.flatnonzero(~judged[at])
        if len(neither):
            passed = np.cumsum(weights[:, image[neither]], axis=1, dtype=np.int32)
            kept = kept - np.pad(passed, ((0, 0), (1, 0)))[:, np.searchsorted(neither, hits)]
        precision = found / np.maximum(kept, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # How many of the 101 recalls are reached with each: they read the precision there.
        reached = np.searchsorted(RECALLS, found / np.maximum(truth, 1)[:, None], side="right")
        result[:, at] = (precision * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    result[truth == 0] = np.nan
    return result
