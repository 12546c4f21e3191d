"""Tiles cover an image as promised, and what is found in them and in the whole comes out once."""
from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pipelines.tiles import merge, tiles


def found(boxes=(), scores=None, labels=None) -> dict[str, np.ndarray]:
    boxes = np.float32(boxes).reshape(-1, 4)
    return {
        "boxes": boxes,
        "scores": np.float32(np.linspace(0.9, 0.6, len(boxes)) if scores is None else scores),
        "labels": np.int64(np.zeros(len(boxes)) if labels is None else labels),
    }


def whole(width: int, height: int) -> tuple[int, int, int, int]:
    return 0, 0, width, height


def test_tiles_are_evenly_spread():
    assert tiles(1000, 600, 400, 0.25) == [(x, y, 400, 400) for y in (0, 200) for x in (0, 300, 600)]
    assert tiles(1001, 300, 400, 0.25) == [(0, 0, 400, 300), (200, 0, 400, 300), (400, 0, 400, 300), (601, 0, 400, 300)]
    assert tiles(400, 400, 400, 0.25) == tiles(1, 1, 400, 0.25) == []


@pytest.mark.parametrize("seed", range(20))
def test_any_tiles_cover_the_image_and_share_at_least_what_is_asked(seed):
    random = np.random.default_rng(seed)
    for _ in range(50):
        width, height, size = random.integers(1, 700, 3).tolist()
        overlap = float(random.choice([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9]))
        size = max(size, 10)  # of fewer pixels, nine tenths and no more cannot be shared
        made = tiles(width, height, size, overlap)
        assert bool(made) == (max(width, height) > size)
        assert len({(w, h) for _, _, w, h in made}) <= 1 and len(set(made)) == len(made)
        for axis, length in ((0, width), (1, height)):
            starts = sorted({tile[axis] for tile in made})
            if not made:
                continue
            side = made[0][2 + axis]
            assert side == min(length, size) and starts[0] == 0 and starts[-1] + side == length
            shared = [a + side - b for a, b in pairwise(starts)]
            assert all(overlap * side <= pixels < side for pixels in shared)
            if len(starts) > 2:  # one less would not do
                assert (length - side) / (len(starts) - 2) > max(1, int(size * (1 - overlap)))


def make_objects(seed: int, width: int, height: int, number: int, sides: tuple[float, float]) -> dict[str, np.ndarray]:
    """Objects of three classes, those of one class apart from each other."""
    random = np.random.default_rng(seed)
    boxes, labels = [], []
    while len(boxes) < number:
        side = np.minimum(random.uniform(*sides, 2), (width, height))
        low = random.uniform(0, 1, 2) * ((width, height) - side)
        box, label = np.r_[low, low + side], int(random.integers(3))
        others = [other for other, its in zip(boxes, labels, strict=True) if its == label]
        if all((np.minimum(box[2:], o[2:]) <= np.maximum(box[:2], o[:2])).any() for o in others):
            boxes.append(box)
            labels.append(label)
    order = random.permutation(number)
    return found(np.array(boxes), (order + 1) / (number + 1), labels)


def look(objects: dict[str, np.ndarray], part: tuple[int, int, int, int], least: float) -> dict[str, np.ndarray]:
    """What a detector finds that sees an object from this share of it on: what is in the part of it, in its pixels."""
    x, y, w, h = part
    boxes = objects["boxes"].astype(np.float64)
    inside = np.c_[boxes[:, :2].clip((x, y), None), boxes[:, 2:].clip(None, (x + w, y + h))]
    share = (inside[:, 2:] - inside[:, :2]).clip(0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    seen = share >= least
    return found(inside[seen] - (x, y, x, y), objects["scores"][seen], objects["labels"][seen])


def assert_each_once(got: dict[str, np.ndarray], objects: dict[str, np.ndarray]) -> None:
    order = np.argsort(-objects["scores"])
    assert got["labels"].tolist() == objects["labels"][order].tolist()
    np.testing.assert_allclose(got["boxes"], objects["boxes"][order], atol=1e-3)
    np.testing.assert_array_equal(got["scores"], objects["scores"][order])


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("least", [1 - 1e-6, 0.4], ids=["whole objects", "pieces, too"])
@pytest.mark.parametrize("seed", range(4))
def test_every_object_comes_out_once_whatever_the_overlap(seed, least, overlap):
    """Those that lie across borders, and those larger than a tile, from the whole image; the others from anywhere."""
    width, height = 900, 640
    objects = make_objects(seed, width, height, 30, (8, 60))
    large = make_objects(seed + 100, width, height, 2, (320, 500))
    objects = {key: np.concatenate([objects[key], large[key] + 3 * (key == "labels")]) for key in objects}
    objects["scores"] = np.float32(np.random.default_rng(seed).permutation(32) + 1) / 33
    parts = [whole(width, height), *tiles(width, height, 256, overlap)]
    assert_each_once(merge(width, height, [(part, look(objects, part, least)) for part in parts]), objects)


def test_small_objects_that_the_whole_image_does_not_show_come_from_the_tiles():
    width, height = 1024, 700
    objects = make_objects(3, width, height, 60, (6, 60))  # each no larger than 64, what tiles share
    parts = tiles(width, height, 256, 0.25)
    seen = [(whole(width, height), found()), *((part, look(objects, part, 0.4)) for part in parts)]
    assert_each_once(merge(width, height, seen), objects)


def test_a_piece_stays_where_nothing_else_has_its_object():
    """200 x 100 pixels in two tiles that share 20, and an object across both that is not seen in the whole image."""
    left, right = (0, 0, 110, 100), (90, 0, 110, 100)
    cut = found([[40, 10, 110, 60]])
    parts = [(whole(200, 100), found()), (left, cut), (right, found([[0, 10, 9, 60]]))]
    got = merge(200, 100, parts)  # the right one shows 19 pixels of the object, all in what the left one shows
    assert got["boxes"].tolist() == [[40, 10, 110, 60]]
    # Another class there is no reason to leave it out; one of its own is, and so is a whole box with a lower score.
    other = (whole(200, 100), found([[30, 0, 150, 80]], [0.3], [1]))
    assert merge(200, 100, [other, (left, cut)])["labels"].tolist() == [0, 1]
    got = merge(200, 100, [(whole(200, 100), found([[40, 10, 130, 60]], [0.3])), (left, cut)])
    assert got["boxes"].tolist() == [[40, 10, 130, 60]] and got["scores"].tolist() == [np.float32(0.3)]
    # A piece that sticks out of it is another object's.
    got = merge(200, 100, [(whole(200, 100), found([[80, 10, 130, 60]], [0.3])), (left, cut)])
    assert len(got["boxes"]) == 2


def test_the_border_of_the_image_cuts_nothing():
    left, right = (0, 0, 110, 100), (90, 0, 110, 100)
    large = found([[0, 0, 60, 100]], [0.5])  # of its label, around the other, and its IoU with it is small
    corners = (left, found([[0, 0, 20, 30]])), (right, found([[90, 70, 110, 100]]))
    got = merge(200, 100, [(whole(200, 100), large), *corners])
    assert got["boxes"].tolist() == [[0, 0, 20, 30], [180, 70, 200, 100], [0, 0, 60, 100]]


def test_of_boxes_of_one_object_the_best_remains_and_order_is_by_score():
    left, right = (0, 0, 120, 100), (80, 0, 120, 100)
    parts = [
        (whole(200, 100), found([[91, 20, 110, 40], [20, 20, 40, 40]], [0.5, 0.7])),
        (left, found([[90, 20, 110, 40]], [0.6])),
        (right, found([[10, 20, 31, 41], [10, 20, 30, 40]], [0.9, 0.9], [0, 1])),
    ]
    got = merge(200, 100, parts)
    assert got["boxes"].tolist() == [[90, 20, 111, 41], [90, 20, 110, 40], [20, 20, 40, 40]]
    assert got["labels"].tolist() == [0, 1, 0] and got["scores"].tolist() == np.float32([0.9, 0.9, 0.7]).tolist()
    assert [got[key].dtype for key in ("boxes", "scores", "labels")] == [np.float32, np.float32, np.int64]
    assert len(merge(200, 100, parts, iou=0.95)["boxes"]) == 5


def test_labels_stay_apart_in_an_image_of_many_pixels():
    """Far from the origin, and with many classes, boxes of other labels must not come near each other."""
    boxes = [[60_000 + 3 * i, 59_000, 60_010 + 3 * i, 59_010] for i in range(90)]
    got = merge(80_000, 80_000, [(whole(80_000, 80_000), found(boxes, labels=range(90)))])
    assert sorted(got["labels"].tolist()) == list(range(90))


def test_nothing_found_is_nothing():
    got = merge(500, 300, [(whole(500, 300), found()), *((part, found()) for part in tiles(500, 300, 200, 0.2))])
    assert got["boxes"].shape == (0, 4) and got["scores"].shape == got["labels"].shape == (0,)
