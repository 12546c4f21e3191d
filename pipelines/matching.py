"""COCO's matching of detections with objects, at each of its IoU thresholds, as arrays."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's


@dataclass(frozen=True)
class Matches:
    """N detections that count under max_dets, in the given order, G annotations, and which found which at T IoUs.

    Images are positions in `images`, labels positions in `categories`; an annotation of a category that is not asked
    for has the label -1 and is nothing that could be found. Boxes are xywh in pixels.
    """

    images: np.ndarray  # int64 [I], ids in ascending order
    categories: np.ndarray  # int64 [K], ids in the truth's order
    image: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N]
    score: np.ndarray  # float64 [N]
    box: np.ndarray  # float64 [N, 4]
    object_image: np.ndarray  # int64 [G]
    object_label: np.ndarray  # int64 [G]
    object_box: np.ndarray  # float64 [G, 4]
    crowd: np.ndarray  # bool [G]
    found: np.ndarray  # int64 [T, N], the annotation each detection is matched with, or -1

    @cached_property
    def right(self) -> np.ndarray:
        """bool [T, N]: found an object."""
        return (self.found >= 0) & ~self._on_crowd

    @cached_property
    def judged(self) -> np.ndarray:
        """bool [T, N]: right or wrong; one that lies on a crowd is neither."""
        return ~self._on_crowd

    @cached_property
    def counted(self) -> np.ndarray:
        """bool [G]: an object to be found, which a crowd is not."""
        return (self.object_label >= 0) & ~self.crowd

    @cached_property
    def _on_crowd(self) -> np.ndarray:
        if not len(self.crowd):
            return np.zeros(self.found.shape, bool)
        return (self.found >= 0) & self.crowd[self.found]


def match(
    truth: dict[str, Any], detections: list[dict[str, Any]] | dict[str, np.ndarray], max_dets: int = 100,
    ious: np.ndarray = IOUS,
) -> Matches:  # fmt: skip
    """Match detections with truth as COCO does: each, by descending score, takes the free object that it overlaps most.

    An object of its class, and by at least the IoU; where there is none, a crowd, which several may take. truth and
    detections are as `coco_metrics` takes them; ious [T] ascending. The overlaps are the library's own, so that none
    is on the other side of a threshold here.

    Raises ValueError for a detection of an image or category the truth does not have, numbers that are not finite,
    and image or category ids that occur twice.
    """
    given = _arrays(detections)
    images, image = _positions(truth, "images", "image_id", given)
    categories, label = _positions(truth, "categories", "category_id", given)
    annotations = truth["annotations"]
    of_image = {int(one): at for at, one in enumerate(images)}
    of_category = {int(one): at for at, one in enumerate(categories)}
    lost = {annotation["image_id"] for annotation in annotations} - of_image.keys()
    if lost:
        raise ValueError(f"annotations name {len(lost)} images the truth does not have, such as {min(lost)}")

    keep = np.sort(_best(image, label, given["score"], max_dets))
    image, label, score, box = image[keep], label[keep], given["score"][keep], given["bbox"][keep]
    objects = {
        "object_image": np.array([of_image[a["image_id"]] for a in annotations], np.int64),
        "object_label": np.array([of_category.get(a["category_id"], -1) for a in annotations], np.int64),
        "object_box": np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4),
        "crowd": np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool),
    }
    found = _match(image, label, score, box, **objects, ious=np.asarray(ious, np.float64))
    return Matches(images, categories, image, label, score, box, **objects, found=found)


def overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """IoU [N, M] of boxes [N, 4] and others [M, 4], xywh; with a crowd [M], the share of the box that lies on it."""
    from faster_coco_eval.core import mask

    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    return mask.iou(boxes, others, [0] * len(others) if crowd is None else crowd.astype(int).tolist())


def _arrays(detections: list[dict[str, Any]] | dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not isinstance(detections, dict):
        keys = ("image_id", "category_id", "bbox", "score")
        detections = {key: [detection[key] for detection in detections] for key in keys}
    given = {
        "image_id": np.asarray(detections["image_id"], np.int64).reshape(-1),
        "category_id": np.asarray(detections["category_id"], np.int64).reshape(-1),
        "bbox": np.asarray(detections["bbox"], np.float64).reshape(-1, 4),
        "score": np.asarray(detections["score"], np.float64).reshape(-1),
    }
    if len({len(values) for values in given.values()}) != 1:
        raise ValueError("detections are of unequal lengths")
    if not (np.isfinite(given["bbox"]).all() and np.isfinite(given["score"]).all()):
        raise ValueError("a detection has a box or a score that is not finite")
    return given


def _positions(
    truth: dict[str, Any], what: str, key: str, given: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The truth's ids (images in ascending order, categories in the given one), and each detection's place in them."""
    ids = np.array([item["id"] for item in truth[what]], np.int64)
    order = np.argsort(ids, kind="stable")
    ascending = ids[order]
    if twice := int((ascending[1:] == ascending[:-1]).sum()):
        raise ValueError(f"the truth names {twice} of its {what} twice")
    if unknown := np.setdiff1d(given[key], ids).tolist():
        raise ValueError(f"detections name {len(unknown)} {key} the truth does not have, such as {unknown[0]}")
    at = np.searchsorted(ascending, given[key])
    return (ascending, at) if what == "images" else (ids, order[at])


def _best(image: np.ndarray, label: np.ndarray, score: np.ndarray, max_dets: int) -> np.ndarray:
    """The best max_dets of each image and class; among equal scores those that come first, as pycocotools."""
    order = np.lexsort((-score, label, image))
    rank = _rank(image[order], label[order])
    return order[rank < max_dets]


def _rank(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Place of each among those of its image and class, which follow each other."""
    new = np.r_[True, (image[1:] != image[:-1]) | (label[1:] != label[:-1])][: len(image)]
    starts = np.flatnonzero(new)
    return np.arange(len(image)) - np.repeat(starts, np.diff(np.r_[starts, len(image)]))


def _match(image, label, score, box, object_image, object_label, object_box, crowd, ious) -> np.ndarray:
    """Matches.found [T, N]: all images, classes and IoUs side by side, the best detections of each first."""
    order = np.lexsort((-score, label, image))
    places = np.empty(len(order), np.int64)
    places[order] = _rank(image[order], label[order])
    known = np.flatnonzero(object_label >= 0)
    known = known[np.lexsort((object_label[known], object_image[known]))]
    classes = int(max(label.max(initial=0), object_label.max(initial=0))) + 1
    mine, theirs = (image * classes + label)[order], (object_image * classes + object_label)[known]
    both = np.intersect1d(mine, theirs)
    pairs = []  # of detection, annotation and their overlap, where it suffices for the lowest threshold
    bounds = [np.searchsorted(keys, both, side).tolist() for keys in (mine, theirs) for side in ("left", "right")]
    for first, last, first_object, last_object in zip(*bounds, strict=True):
        here, there = order[first:last], known[first_object:last_object]
        shared = overlaps(box[here], object_box[there], crowd[there])
        rows, columns = np.nonzero(shared >= ious[0])
        pairs.append((here[rows], there[columns], shared[rows, columns]))
    found = np.full((len(ious), len(score)), -1, np.int64)
    if not pairs:
        return found
    detection, annotation, shared = (np.concatenate(parts) for parts in zip(*pairs, strict=True))

    # A detection's best comes last: objects after crowds, then by overlap, of equal ones that which is listed last.
    best_last = np.lexsort((annotation, shared, ~crowd[annotation], detection, places[detection]))
    detection, annotation, shared = detection[best_last], annotation[best_last], shared[best_last]
    turns = np.searchsorted(places[detection], np.arange(places.max() + 2))
    taken = np.zeros((len(ious), len(crowd)), bool)
    for turn in map(slice, turns[:-1], turns[1:]):
        here, there = detection[turn], annotation[turn]
        at, pair = np.nonzero((shared[turn] >= ious[:, None]) & ~taken[:, there])
        last = np.r_[(at[1:] != at[:-1]) | (here[pair][1:] != here[pair][:-1]), True][: len(at)]
        at, pair = at[last], pair[last]
        found[at, here[pair]] = there[pair]
        taken[at, there[pair]] = ~crowd[there[pair]]
    return found
