"""Where a model errs: what it takes for what, whether its scores are true, and what each kind of error costs."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.matching import Matches, overlaps
from pipelines.resample import average_precision

IOU = 0.5
BACKGROUND_IOU = 0.1  # what overlaps less is on nothing
BINS = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])  # of scores; below is what nobody uses
WRONG_CLASS, POOR_BOX, BOTH, DUPLICATE, BACKGROUND, MISSED = KINDS = (
    "wrong class", "poor box", "wrong class and poor box", "duplicate", "background", "missed",
)  # fmt: skip


def confusion(matches: Matches, names: list[str], threshold: float | None) -> dict[str, Any]:
    """What was found as what, at IoU 0.5, by the detections whose score is at least the threshold (none where None).

    {"threshold", "iou", "names": names and "background", "matrix": whole numbers [K + 1, K + 1], rows truth, columns
    found, "unlabelled": [K]}. The last row was found where no labelled object is left, the last column is missed; a
    row's sum is the class's objects, a column's its detections. Right ones are COCO's, so they agree with best_f1; of
    the rest each, by descending score, goes to that object which it overlaps most of those that are left, if by 0.5 or
    more. Crowds, and what lies on one of its class, count nowhere. "unlabelled" are things that were found where
    nothing is labelled (errors of the kind "background"), each once, however many detections of a class it has.
    """
    nothing = len(names)
    matrix = np.zeros((nothing + 1, nothing + 1), np.int64)
    shown = _shown(matches, threshold)
    hits = np.flatnonzero(matches.right[0] & shown)
    np.add.at(matrix, (matches.label[hits], matches.label[hits]), 1)
    left = matches.counted.copy()
    left[matches.found[0, hits]] = False
    wrong = np.flatnonzero(~matches.right[0] & matches.judged[0] & shown)
    wrong = wrong[np.argsort(-matches.score[wrong], kind="stable")]
    for here, there in _by_image(matches.image, wrong, matches.object_image, np.flatnonzero(left)):
        shared = overlaps(matches.box[here], matches.object_box[there])
        for row, detection in zip(shared, here, strict=True):
            best = int(np.argmax(np.where(left[there], row, -1.0))) if len(there) else 0
            taken = len(there) > 0 and left[there[best]] and row[best] >= IOU
            truth = nothing
            if taken:
                left[there[best]] = False
                truth = matches.object_label[there[best]]
            matrix[truth, matches.label[detection]] += 1
    np.add.at(matrix[:, nothing], matches.object_label[left], 1)
    unlabelled = np.bincount(matches.label[_things(matches, shown)], minlength=nothing)
    return {
        "threshold": threshold, "iou": IOU, "names": [*names, "background"], "matrix": matrix.tolist(),
        "unlabelled": unlabelled.tolist(),
    }  # fmt: skip


def calibration(matches: Matches) -> dict[str, Any]:
    """Whether of the detections with a score of s the share s is right, at IoU 0.5 and from a score of 0.05 up.

    {"bins": [{"low", "high", "count", "score": their mean, "precision": the share that is right}], "error"}: the
    expected calibration error (Guo et al. 2017, arXiv 1706.04599), the mean distance of the two over the detections.
    What has no detection is None.
    """
    used = matches.judged[0] & (matches.score >= BINS[0])
    score, right = matches.score[used], matches.right[0][used]
    place = np.clip(np.searchsorted(BINS, score, side="right") - 1, 0, len(BINS) - 2)
    bins, apart = [], 0.0
    for at, (low, high) in enumerate(zip(BINS[:-1].tolist(), BINS[1:].tolist(), strict=True)):
        mine = place == at
        count = int(mine.sum())
        mean, share = (float(score[mine].mean()), float(right[mine].mean())) if count else (None, None)
        bins.append({"low": low, "high": high, "count": count, "score": mean, "precision": share})
        apart += count * abs(mean - share) if count else 0.0
    return {"bins": bins, "error": apart / len(score) if len(score) else None}


def error_types(matches: Matches, threshold: float | None) -> dict[str, Any]:
    """How often the model errs in which way, and what that costs (TIDE, Bolya et al. 2020, arXiv 2008.08115).

    {"threshold", "counts": of the detections whose score is at least the threshold (none where None), "cost": how much
    AP50 would rise if that kind alone were mended, all detections counted; None without truth}, both by kind.

    A detection that is not right at IoU 0.5 has, in this order, a "poor box" (its best overlap with an object of its
    class is 0.1 to 0.5), the "wrong class" (0.5 or more with another), is a "duplicate" (0.5 or more with one of its
    class, which a better one found), "background" (below 0.1 with all), or "wrong class and poor box". "missed" are
    objects that nothing found and no wrong class or poor box is about. Mended, the best detection with a wrong class
    or poor box is right where its object is not found otherwise, and all other wrong ones are gone; what was missed is
    no longer asked for.
    """
    kind, about = kinds_of_errors(matches)
    shown = _shown(matches, threshold)
    counts = {name: int((kind[shown] == at).sum()) for at, name in enumerate(KINDS)}
    counts[MISSED] = int(_missed(matches, kind, about, shown).sum())

    once = np.ones((1, len(matches.images)), np.int64)

    def ap50(mended: Matches) -> np.ndarray:
        return average_precision(replace(mended, found=mended.found[:1]), once)[0, :, 0]

    cost: dict[str, float | None] = dict.fromkeys(KINDS)
    if matches.counted.any():
        now = ap50(matches)
        for at, name in enumerate(KINDS[:-1]):
            cost[name] = float(np.nanmean(ap50(_mend(matches, kind == at, about))) - np.nanmean(now))
        missed = _missed(matches, kind, about, np.ones(len(kind), bool))
        rest = ap50(replace(matches, object_label=np.where(missed, -1, matches.object_label)))
        # Classes of which all was missed: what they find, if anything, is wrong.
        clean = ~np.isin(np.arange(len(now)), matches.label[matches.judged[0]])
        rest = np.where(np.isnan(rest) & ~np.isnan(now), clean, rest)
        cost[MISSED] = float(np.nanmean(rest) - np.nanmean(now))
    return {"threshold": threshold, "counts": counts, "cost": cost}


def kinds_of_errors(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] both: of each detection the kind of error, as a place in KINDS, and the annotation it is about.

    The kinds are as in `error_types`; only a wrong class or a poor box is about an annotation. What is not is -1.
    """
    kind = np.full(len(matches.score), -1)
    about = np.full(len(matches.score), -1)
    wrong = np.flatnonzero(~matches.right[0] & matches.judged[0])
    for here, there in _by_image(matches.image, wrong, matches.object_image, np.flatnonzero(matches.counted)):
        if not len(there):
            kind[here] = KINDS.index(BACKGROUND)
            continue
        shared = overlaps(matches.box[here], matches.object_box[there])
        own_class = matches.label[here][:, None] == matches.object_label[there]
        own, other = np.where(own_class, shared, 0), np.where(own_class, 0, shared)
        best = own.max(axis=1)
        tests = {
            POOR_BOX: (best >= BACKGROUND_IOU) & (best < IOU),
            WRONG_CLASS: other.max(axis=1) >= IOU,
            DUPLICATE: best >= IOU,
            BACKGROUND: shared.max(axis=1) < BACKGROUND_IOU,
        }
        kind[here] = np.select(list(tests.values()), [KINDS.index(name) for name in tests], KINDS.index(BOTH))
        nearest = np.select([tests[POOR_BOX], tests[WRONG_CLASS]], [own.argmax(axis=1), other.argmax(axis=1)], -1)
        about[here] = np.where(nearest >= 0, there[nearest], -1)
    return kind, about


def _things(matches: Matches, shown: np.ndarray) -> np.ndarray:
    """int64 [n]: the best detection of each thing that was found where nothing is labelled, of its class and image."""
    import torch
    from torchvision.ops import batched_nms, box_convert

    kind, _ = kinds_of_errors(matches)
    alone = np.flatnonzero((kind == KINDS.index(BACKGROUND)) & shown)
    boxes = box_convert(torch.from_numpy(matches.box[alone]), "xywh", "xyxy")
    groups = torch.from_numpy(matches.image[alone] * len(matches.categories) + matches.label[alone])
    return alone[batched_nms(boxes, torch.from_numpy(matches.score[alone]), groups, IOU).numpy()]


def _missed(matches: Matches, kind: np.ndarray, about: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """bool [G]: the objects that none of the shown detections found, or is about."""
    missed = matches.counted.copy()
    missed[matches.found[0, matches.right[0] & shown]] = False
    missed[about[shown & (about >= 0)]] = False
    return missed


def _mend(matches: Matches, errors: np.ndarray, about: np.ndarray) -> Matches:
    """The matches without these errors: of those about an object that nothing found, the best is right."""
    free = matches.counted.copy()
    free[matches.found[0, matches.right[0]]] = False
    able = np.flatnonzero(errors & (about >= 0) & free[about])
    able = able[np.argsort(-matches.score[able], kind="stable")]
    able = able[np.unique(about[able], return_index=True)[1]]
    label, found = matches.label.copy(), matches.found[:1].copy()
    label[able], found[0, able] = matches.object_label[about[able]], about[able]
    keep = ~errors
    keep[able] = True
    return replace(
        matches, image=matches.image[keep], label=label[keep], score=matches.score[keep], box=matches.box[keep],
        found=found[:, keep],
    )  # fmt: skip


def _shown(matches: Matches, threshold: float | None) -> np.ndarray:
    return matches.score >= (np.inf if threshold is None else threshold)


def _by_image(
    image: np.ndarray, chosen: np.ndarray, object_image: np.ndarray, objects: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(the chosen detections, the objects) of each image that has one of the first; both keep their order."""
    chosen = chosen[np.argsort(image[chosen], kind="stable")]
    objects = objects[np.argsort(object_image[objects], kind="stable")]
    images = np.unique(image[chosen])
    both = image[chosen], object_image[objects]
    bounds = [np.searchsorted(ids, images, side) for ids in both for side in ("left", "right")]
    for first, last, first_object, last_object in zip(*bounds, strict=True):
        yield chosen[first:last], objects[first_object:last_object]
