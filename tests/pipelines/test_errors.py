import numpy as np
import pytest

from pipelines.errors import KINDS, calibration, confusion, error_types
from pipelines.evaluate import coco_metrics
from pipelines.matching import match

NAMES = ["cat", "dog"]


def scene(objects, detections, images=(5, 6)):
    """objects: (image, category, box, crowd?); detections: (image, category, box, score) -> Matches."""
    truth = {
        "images": [{"id": image} for image in images],
        "categories": [{"id": at, "name": name} for at, name in enumerate(NAMES, 1)],
        "annotations": [{"id": n, "image_id": image, "category_id": category, "bbox": list(box),
                         "area": box[2] * box[3], "iscrowd": int(bool(crowd))}
                        for n, (image, category, box, *crowd) in enumerate(objects, 1)],
    }  # fmt: skip
    keys = ("image_id", "category_id", "bbox", "score")
    return truth, [dict(zip(keys, one, strict=True)) for one in detections]


LEFT, MIDDLE, RIGHT, FAR = (0, 0, 10, 10), (40, 0, 10, 10), (80, 0, 10, 10), (0, 80, 10, 10)
HALF_OFF = (84, 0, 10, 10)  # IoU 0.43 with RIGHT
OBJECTS = [(5, 1, LEFT), (5, 2, MIDDLE), (5, 1, RIGHT), (6, 1, LEFT), (6, 2, (50, 50, 40, 40), True)]
DETECTIONS = [
    (5, 1, LEFT, 0.9),  # right
    (5, 1, (0, 0, 10, 9), 0.8),  # a duplicate
    (5, 1, MIDDLE, 0.7),  # the wrong class
    (5, 1, HALF_OFF, 0.6),  # a poor box
    (5, 2, HALF_OFF, 0.5),  # both
    (5, 2, FAR, 0.45),  # nothing there
    (6, 2, (60, 60, 9, 9), 0.4),  # on the crowd
]


def test_each_kind_of_error_by_hand():
    found = error_types(match(*scene(OBJECTS, DETECTIONS)), 0.3)
    assert found["counts"] == dict.fromkeys(KINDS, 1)  # missed: the cat in the second image
    few = error_types(match(*scene(OBJECTS, DETECTIONS)), 0.65)["counts"]
    assert few == {**dict.fromkeys(KINDS, 0), "duplicate": 1, "wrong class": 1, "missed": 2}
    nothing = error_types(match(*scene(OBJECTS, [])), None)
    assert nothing["counts"] == {**dict.fromkeys(KINDS, 0), "missed": 4} and nothing["threshold"] is None


def test_the_cost_of_each_kind_is_the_ap50_of_the_mended_detections():
    """Each kind mended by hand in the detections, or the truth, and measured by COCO's own tool."""
    truth, detections = scene(OBJECTS, DETECTIONS)
    before = coco_metrics(truth, detections)["AP50"]
    cost = error_types(match(truth, detections), 0.3)["cost"]

    def after(change, objects=OBJECTS):
        given = [d for d in (change.get(d, d) for d in DETECTIONS) if d]
        return coco_metrics(*scene(objects, given))["AP50"] - before

    right, duplicate, wrong_class, poor_box, both, background, _ = DETECTIONS
    expected = {
        "wrong class": after({wrong_class: (5, 2, MIDDLE, 0.7)}),
        "poor box": after({poor_box: (5, 1, RIGHT, 0.6)}),
        "wrong class and poor box": after({both: None}),
        "duplicate": after({duplicate: None}),
        "background": after({background: None}),
        "missed": after({}, [o for o in OBJECTS if o[0] != 6 or len(o) > 3]),
    }
    assert cost == pytest.approx(expected, abs=1e-12)
    assert all(cost[kind] > 0 for kind in ("wrong class", "poor box", "missed")) and min(cost.values()) >= 0
    assert right in DETECTIONS


def test_only_the_best_of_several_about_an_object_is_mended():
    objects = [(5, 1, LEFT), (5, 2, MIDDLE)]
    twice = [(5, 1, MIDDLE, 0.9), (5, 1, MIDDLE, 0.8), (5, 2, (40, 0, 10, 4), 0.7)]
    cost = error_types(match(*scene(objects, twice)), 0.1)["cost"]
    # The dog is found, once; the cat is not, and what hid it is gone.
    assert cost["wrong class"] == pytest.approx(0.5) and cost["poor box"] == pytest.approx(0.5)
    cost = error_types(match(*scene([*objects, (6, 2, LEFT)], twice)), 0.1)["cost"]
    assert cost["wrong class"] == pytest.approx(51 / 101 / 2)  # one of two dogs, though two were about it
    found = [(5, 2, MIDDLE, 0.5), (5, 1, MIDDLE, 0.9), (5, 1, LEFT, 0.4)]
    cost = error_types(match(*scene(objects, found)), 0.1)["cost"]
    assert cost["wrong class"] == pytest.approx(0.25)  # cat's AP from 1/2 to 1; the dog was found already


def test_a_class_of_which_all_was_missed_is_mended_whole_unless_it_also_errs():
    objects = [(5, 1, LEFT), (5, 2, MIDDLE)]
    assert error_types(match(*scene(objects, [(5, 1, LEFT, 0.9)])), 0.1)["cost"]["missed"] == pytest.approx(0.5)
    also = [(5, 1, LEFT, 0.9), (5, 2, FAR, 0.8)]
    assert error_types(match(*scene(objects, also)), 0.1)["cost"]["missed"] == 0
    assert error_types(match(*scene([], also)), 0.1)["cost"] == dict.fromkeys(KINDS)


def test_confusion_by_hand():
    found = confusion(match(*scene(OBJECTS, DETECTIONS)), NAMES, 0.3)
    assert found["names"] == ["cat", "dog", "background"] and found["iou"] == 0.5 and found["threshold"] == 0.3
    # Cats: one found, two missed. The dog was taken for a cat. Of the rest nothing was half on an object.
    assert found["matrix"] == [[1, 0, 2], [1, 0, 0], [2, 2, 0]]
    assert found["unlabelled"] == [0, 1]  # neither the duplicate nor the poor boxes, which are about something labelled
    assert confusion(match(*scene(OBJECTS, DETECTIONS)), NAMES, None)["matrix"] == [[0, 0, 3], [0, 0, 1], [0, 0, 0]]


def test_confusion_gives_an_object_to_the_best_that_is_left():
    objects = [(5, 1, LEFT), (5, 1, (3, 0, 10, 10))]
    detections = [(5, 2, LEFT, 0.5), (5, 2, (3, 0, 10, 10), 0.9), (5, 2, LEFT, 0.4)]
    found = confusion(match(*scene(objects, detections)), NAMES, 0.1)["matrix"]
    assert found == [[0, 2, 0], [0, 0, 0], [0, 1, 0]]


def test_a_thing_that_is_not_labelled_counts_once_however_often_it_is_found():
    twice, other = [(0, 80, 10, 9), (0, 81, 10, 10)], (3, 88, 10, 10)  # IoU 0.9 and 0.82 with FAR, and 0.08
    detections = [(5, 1, FAR, 0.9), *((5, 1, box, 0.8) for box in twice), (5, 1, other, 0.7), (5, 2, FAR, 0.6),
                  (6, 1, FAR, 0.5), (6, 1, FAR, 0.05)]  # fmt: skip
    found = confusion(match(*scene([(5, 1, LEFT)], detections)), NAMES, 0.3)
    assert found["unlabelled"] == [3, 1]  # cats: two in the first image and one in the other
    assert found["matrix"][-1] == [5, 1, 0]  # which are all detections


def random_scene(seed):
    random = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(12):
        for _ in range(random.integers(0, 6)):
            box = [*random.uniform(0, 120, 2), *random.uniform(20, 60, 2)]
            category = int(random.integers(1, 3))
            objects.append((image, category, box, *([True] if random.random() < 0.1 else [])))
            for _ in range(random.integers(0, 4)):
                moved = (np.array(box) + random.normal(0, 6, 4)).tolist()
                detections.append((image, category if random.random() < 0.7 else 3 - category, moved, random.random()))
    return scene(objects, detections, range(12))


@pytest.mark.parametrize("seed", range(8))
def test_everything_is_counted_once(seed):
    truth, detections = random_scene(seed)
    matches, metrics = match(truth, detections), coco_metrics(truth, detections)
    best = metrics["best_f1"]
    shown = matches.score >= best["threshold"]
    judged = matches.judged[0] & shown
    matrix = np.array(confusion(matches, NAMES, best["threshold"])["matrix"])
    assert matrix[:-1].sum(axis=1).tolist() == [c["truth"] for c in metrics["per_class"]]
    assert matrix[:, :-1].sum(axis=0).tolist() == [int((judged & (matches.label == at)).sum()) for at in range(2)]
    hits = np.trace(matrix[:-1, :-1])
    assert hits / matrix[:-1].sum() == pytest.approx(best["recall"])
    assert hits / matrix[:, :-1].sum() == pytest.approx(best["precision"])

    errors = error_types(matches, best["threshold"])
    assert sum(errors["counts"][kind] for kind in KINDS[:-1]) == judged.sum() - hits
    assert errors["counts"]["missed"] <= matrix[:-1].sum() - hits
    assert min(errors["cost"].values()) >= 0 and max(errors["cost"].values()) <= 1 - metrics["AP50"]


def test_scores_that_are_true_and_scores_that_boast():
    random = np.random.default_rng(0)

    def found(share):
        images, objects, detections = range(3000), [], []
        for image in images:
            score = random.uniform(0.02, 1)
            if random.random() < share(score):
                objects.append((image, 1, LEFT))
            detections.append((image, 1, LEFT, score))
        return calibration(match(*scene(objects, detections, images)))

    true, boasting = found(lambda score: score), found(lambda score: score / 2)
    assert true["error"] < 0.04 and boasting["error"] == pytest.approx(0.26, abs=0.04)  # half of the mean score
    for one in true["bins"]:
        assert one["low"] <= one["score"] <= one["high"] and one["precision"] == pytest.approx(one["score"], abs=0.12)
    assert sum(one["count"] for one in true["bins"]) == pytest.approx(3000 * 0.95 / 0.98, abs=60)
    assert [one["low"] for one in true["bins"]][:2] == [0.05, 0.1] and true["bins"][-1]["high"] == 1.0


def test_calibration_by_hand():
    detections = [(5, 1, LEFT, 0.95), (5, 1, FAR, 1.0), (5, 1, RIGHT, 0.62), (5, 1, MIDDLE, 0.01),
                  (6, 2, (60, 60, 9, 9), 0.4)]  # fmt: skip
    found = calibration(match(*scene(OBJECTS, detections)))
    bins = {one["low"]: one for one in found["bins"]}
    assert bins[0.9] == {"low": 0.9, "high": 1.0, "count": 2, "score": pytest.approx(0.975), "precision": 0.5}
    assert bins[0.6]["precision"] == 1.0 and bins[0.4]["count"] == 0 and bins[0.4]["score"] is None
    assert found["error"] == pytest.approx((2 * 0.475 + 0.38) / 3)
    assert calibration(match(*scene(OBJECTS, [])))["error"] is None
