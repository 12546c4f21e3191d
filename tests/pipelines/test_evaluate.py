import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.evaluate import (
    DETECTIONS,
    check_ids,
    coco_metrics,
    coco_truth,
    detections_to_coco,
    detects_on_gpus,
    evaluate,
    f1_at,
    full_metrics,
    places,
    split_shards,
)
from pipelines.matching import match
from pipelines.resample import average_precision
from pipelines.settings import UserError, load_settings
from pipelines.stage import write_json

TWELVE = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def pycocotools_numbers(truth, detections, max_dets=100):
    """The twelve numbers, and AP, APs, APm, APl per class, by the reference implementation; None where it says -1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps(truth))
        gt.createIndex()
        if detections:
            found = gt.loadRes(json.loads(json.dumps(detections)))
        else:
            found = COCO()
            found.dataset = {**gt.dataset, "annotations": []}
            found.createIndex()
        run = COCOeval(gt, found, "bbox")
        run.params.maxDets = [1, 10, max_dets]
        run.evaluate()
        run.accumulate()
        run.summarize()
        if max_dets != 100:  # its summary knows only 100 for the first number
            ap = run.eval["precision"][..., 0, 2]
            run.stats[0] = ap[ap > -1].mean() if (ap > -1).any() else -1
    numbers = dict(zip(TWELVE, (None if value == -1 else float(value) for value in run.stats), strict=True))
    per_class = {}
    for at, category in enumerate(sorted(category["id"] for category in truth["categories"])):
        for area, name in enumerate(("AP", "APs", "APm", "APl")):
            ap = run.eval["precision"][:, :, at, area, 2]
            per_class[category, name] = float(ap[ap > -1].mean()) if (ap > -1).any() else None
    return numbers, per_class


def our_numbers(metrics):
    """The same of what `coco_metrics` returns."""
    per_class = {(c["id"], name): c[name] for c in metrics["per_class"] for name in ("AP", "APs", "APm", "APl")}
    return {key: metrics[key] for key in TWELVE}, per_class


def random_case(seed):
    """Truth with crowds, gaps in ids, empty images, a class without truth; jittered detections, some tied."""
    random = np.random.default_rng(seed)
    categories = [{"id": i, "name": f"class {i}"} for i in (1, 3, 7, 90)]
    images = [{"id": int(i), "file_name": f"{i}.png", "width": 400, "height": 300}
              for i in random.choice(10_000, 12, replace=False)]  # fmt: skip
    annotations, detections = [], []
    for image in images:
        for _ in range(random.integers(0, 9)):
            box = [*random.uniform(0, 200, 2), *random.uniform(3, 160, 2)]
            category = int(random.choice([1, 3, 7]))
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": category,
                                "bbox": box, "area": box[2] * box[3] * random.uniform(0.5, 1),
                                "iscrowd": int(random.random() < 0.15)})  # fmt: skip
            for _ in range(random.integers(0, 4)):
                jitter = (np.array(box) + random.normal(0, 6, 4)).clip(0.5)
                detections.append({"image_id": image["id"], "bbox": jitter.tolist(),
                                   "category_id": category if random.random() < 0.8 else 90,
                                   "score": float(np.round(random.random(), 1 + seed % 3))})  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": categories}, detections


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("max_dets", [100, 12])
def test_numbers_equal_pycocotools(seed, max_dets):
    truth, detections = random_case(seed)
    ours, per_class = our_numbers(coco_metrics(truth, detections, max_dets))
    theirs, their_classes = pycocotools_numbers(truth, detections, max_dets)
    if max_dets == 100:
        assert ours == pytest.approx(theirs, abs=1e-12)
    assert ours["AP"] == pytest.approx(theirs["AP"], abs=1e-12)
    assert per_class == pytest.approx(their_classes, abs=1e-12)


def hard_case(seed):
    """What is on an edge: ids that are 0 or large, equal scores, areas of exactly 32² and 96², boxes of no area or that
    overlap by half, crowds upon objects, a class without truth or alone with it, images without anything, and more than
    100 detections of one class in an image."""
    random = np.random.default_rng(seed)
    categories = [{"id": i, "name": f"class {i}"} for i in random.permutation([0, 5, 2**40]).tolist()]
    images = [{"id": i, "file_name": f"{i}.png", "width": 400, "height": 300} for i in (0, 3, 2**52, 9, 4)]
    sizes = [(32, 32), (64, 16), (96, 96), (0, 20), (20, 10), (10, 10), (200, 150), (31.999, 32)]
    with_truth = random.choice([0, 5, 2**40], random.integers(1, 3), replace=False).tolist()
    annotations, detections = [], []

    def add(image, category, box):
        detections.append({"image_id": image, "category_id": category, "bbox": [float(value) for value in box],
                           "score": float(np.round(random.random(), 1))})  # fmt: skip

    for image in images[: random.integers(1, 5)]:
        for _ in range(random.integers(0, 6)):
            width, height = sizes[random.integers(len(sizes))]
            x, y = random.integers(0, 100, 2).tolist()
            category = with_truth[random.integers(len(with_truth))]
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": category,
                                "bbox": [x, y, width, height], "iscrowd": int(random.random() < 0.2),
                                "area": [width * height, 32**2, 96**2][random.integers(3)]})  # fmt: skip
            for box in ([x, y, width, height], [x, y, width / 2, height], [x + 1, y, width, height], [x, y, 32, 32]):
                for _ in range(random.integers(0, 3)):
                    add(image["id"], category if random.random() < 0.7 else categories[0]["id"], box)
    if seed % 4 == 0:
        for _ in range(130):
            add(images[0]["id"], with_truth[0], [*random.integers(0, 100, 2), *random.integers(0, 100, 2)])
    return {"images": images, "annotations": annotations, "categories": categories}, detections


@pytest.mark.parametrize("seed", range(60))
def test_numbers_equal_pycocotools_on_the_edges(seed):
    truth, detections = hard_case(seed)
    ours, per_class = our_numbers(coco_metrics(truth, detections))
    theirs, their_classes = pycocotools_numbers(truth, detections)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert per_class == pytest.approx(their_classes, abs=1e-12)


@pytest.mark.parametrize("max_dets", [100, 7])
@pytest.mark.parametrize("case", [random_case, hard_case])
@pytest.mark.parametrize("seed", range(16))
def test_average_precision_of_our_matching_is_cocos(case, seed, max_dets):
    truth, detections = case(seed)
    metrics = coco_metrics(truth, detections, max_dets)
    matches = match(truth, detections, max_dets)
    (ap,) = average_precision(matches, np.ones((1, len(truth["images"])), int))
    expected = [np.nan if c["AP"] is None else c["AP"] for c in metrics["per_class"]]
    np.testing.assert_allclose(ap.mean(axis=-1), expected, atol=1e-12)
    np.testing.assert_allclose(ap[:, 0], [np.nan if c["AP50"] is None else c["AP50"] for c in metrics["per_class"]],
                               atol=1e-12)  # fmt: skip


def test_a_hard_case_is_hard():
    cases = [hard_case(seed) for seed in range(60)]
    found = [coco_metrics(*case) for case in cases]
    assert sum(metrics["AP"] is not None and 0 < metrics["AP"] < 1 for metrics in found) > 40
    assert any(metrics["AP"] is None for metrics in found) and any(not detections for _, detections in cases)


@pytest.fixture(scope="module")
def bccd_val(shared_data):
    source = json.loads((shared_data / "bccd" / "instances_val.json").read_text())
    by_image = {image["id"]: [] for image in source["images"]}
    for annotation in source["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    rows = [{"image_id": i["id"], "annotations": by_image[i["id"]], **i} for i in source["images"]]
    return source, coco_truth(rows, source["categories"])


def as_detections(truth, jitter=0.0):
    random = np.random.default_rng(0)
    return [{"image_id": a["image_id"], "category_id": a["category_id"], "score": float(random.random()),
             "bbox": (np.array(a["bbox"]) + random.normal(0, 1, 4) * jitter).tolist()}
            for a in truth["annotations"]]  # fmt: skip


def test_perfect_detections_on_bccd(bccd_val):
    source, truth = bccd_val
    metrics = coco_metrics(truth, [{**found, "score": 1.0} for found in as_detections(truth)])
    assert metrics["AP"] == pytest.approx(0.997, abs=5e-4)  # one box of zero area can never be found
    assert metrics["APs"] is None or metrics["APs"] >= 0
    assert sum(c["truth"] for c in metrics["per_class"]) == len(source["annotations"]) == 1138


def test_jittered_bccd_equals_pycocotools_on_the_source_file(bccd_val):
    source, truth = bccd_val
    detections = as_detections(truth, jitter=8.0)
    ours, theirs = our_numbers(coco_metrics(truth, detections)), pycocotools_numbers(source, detections)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-12) and ours[1] == pytest.approx(theirs[1], abs=1e-12)
    assert 0.05 < ours[0]["AP"] < 0.95


@pytest.mark.parametrize("name", ["bccd/instances_val", "bccd/instances_test", "coco128/instances_train"])
def test_a_middling_model_on_real_truth_equals_pycocotools(shared_data, name):
    """Truth that is shifted, left out, found twice and found as something else, and boxes where nothing is."""
    source = json.loads((shared_data / f"{name}.json").read_text())
    random = np.random.default_rng(0)
    ids, detections = [c["id"] for c in source["categories"]], []

    def add(image, category, box, score):
        detections.append({"image_id": image, "category_id": int(category), "bbox": box.tolist(), "score": score})

    for annotation in source["annotations"]:
        for _ in range(random.choice(3, p=[0.15, 0.65, 0.2])):
            box = np.array(annotation["bbox"], float)
            box[:2] += random.normal(0, 0.08, 2) * box[2:]
            box[2:] *= np.exp(random.normal(0, 0.1, 2))
            category = annotation["category_id"] if random.random() < 0.9 else random.choice(ids)
            add(annotation["image_id"], category, box, float(np.round(random.beta(4, 2), 2)))
    for image in source["images"]:
        for _ in range(random.integers(0, 4)):
            add(image["id"], random.choice(ids), random.uniform(5, 150, 4), float(random.beta(2, 4)))
    by_image = {image["id"]: [] for image in source["images"]}
    for annotation in source["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    rows = [{"image_id": i["id"], "annotations": by_image[i["id"]], **i} for i in source["images"]]
    ours = our_numbers(coco_metrics(coco_truth(rows, source["categories"]), detections))
    theirs = pycocotools_numbers(source, detections)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-12) and ours[1] == pytest.approx(theirs[1], abs=1e-12)
    assert 0.1 < ours[0]["AP"] < 0.9


def test_order_of_images_and_detections_changes_nothing():
    truth, detections = random_case(3)
    random = np.random.default_rng(1)
    for at, detection in enumerate(detections):
        detection["score"] = at / len(detections)  # without ties
    shuffled = {key: [truth[key][i] for i in random.permutation(len(truth[key]))] for key in truth}
    shuffled["categories"] = truth["categories"]
    other = coco_metrics(shuffled, [detections[i] for i in random.permutation(len(detections))])
    assert other == coco_metrics(truth, detections)


def test_annotation_ids_do_not_matter():
    truth, detections = random_case(5)
    expected = coco_metrics(truth, detections)
    for annotation in truth["annotations"]:
        annotation["id"] = 0
    assert coco_metrics(truth, detections) == expected


def one_image(boxes, categories=(1, 2), crowd=()):
    return {
        "images": [{"id": 5, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": i, "name": f"class {i}"} for i in categories],
        "annotations": [{"id": n + 1, "image_id": 5, "category_id": 1, "bbox": box, "area": box[2] * box[3],
                         "iscrowd": int(n in crowd)} for n, box in enumerate(boxes)],
    }  # fmt: skip


def found(box, score, category=1):
    return {"image_id": 5, "category_id": category, "bbox": box, "score": score}


def test_best_f1_by_hand():
    # Three objects. By score: hit .9, hit .8, wrong .7, hit .6, wrong .5
    # F1: 2/4, 4/5, 4/6, 6/7, 6/8 -> keep from .6 on, with precision 3/4 and recall 1; cut in the middle to .5.
    truth = one_image([[0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10]])
    detections = [found([0, 0, 10, 10], 0.9), found([20, 0, 10, 10], 0.8), found([70, 70, 10, 10], 0.7),
                  found([40, 0, 10, 10], 0.6), found([80, 10, 10, 10], 0.5)]  # fmt: skip
    metrics = coco_metrics(truth, detections)
    best = {"threshold": 0.55, "f1": 6 / 7, "precision": 0.75, "recall": 1.0}
    assert metrics["best_f1"] == pytest.approx(best)
    assert metrics["per_class"][0]["best_f1"] == metrics["best_f1"]
    assert metrics["per_class"][1]["best_f1"] is None


def test_best_f1_cannot_cut_between_equal_scores():
    truth = one_image([[0, 0, 10, 10]])
    metrics = coco_metrics(truth, [found([0, 0, 10, 10], 0.5), found([70, 70, 10, 10], 0.5)])
    best = {"threshold": 0.25, "f1": 2 / 3, "precision": 0.5, "recall": 1.0}
    assert metrics["best_f1"] == pytest.approx(best)


def test_the_best_threshold_is_on_no_detection():
    truth = one_image([[0, 0, 10, 10], [50, 50, 40, 40]], crowd={1})
    right, wrong, on_the_crowd = found([0, 0, 10, 10], 0.9), found([70, 0, 9, 9], 0.5), found([52, 52, 8, 8], 0.7)
    best = coco_metrics(truth, [right, wrong, on_the_crowd])["best_f1"]
    assert best["threshold"] == pytest.approx(0.8) and best["f1"] == 1.0  # and not 0.7, half-way to the wrong one
    low = np.nextafter(0.9, 0)
    best = coco_metrics(truth, [right, {**wrong, "score": low}])["best_f1"]
    assert low < best["threshold"] <= 0.9 and best["f1"] == 1.0
    for seed in range(12):
        truth, detections = random_case(seed)
        best, scores = coco_metrics(truth, detections)["best_f1"], np.array([d["score"] for d in detections])
        matches = match(truth, [d for d in detections if d["score"] >= best["threshold"]]).found[0]
        crowd = np.array([a["iscrowd"] for a in truth["annotations"]], bool)
        judged = (matches < 0) | ~crowd[matches]
        assert np.abs(scores - best["threshold"]).min() > 1e-3
        assert best["precision"] == pytest.approx((matches[judged] >= 0).mean())


def test_crowds_are_neither_right_nor_wrong():
    truth = one_image([[0, 0, 10, 10], [50, 50, 40, 40]], crowd={1})
    on_the_crowd = [found([52, 52, 8, 8], 0.9), found([70, 70, 8, 8], 0.8)]
    metrics = coco_metrics(truth, [found([0, 0, 10, 10], 0.4), *on_the_crowd])
    assert metrics["AP"] == 1.0
    assert metrics["per_class"][0]["truth"] == 1
    assert metrics["best_f1"] == pytest.approx({"threshold": 0.2, "f1": 1.0, "precision": 1.0, "recall": 1.0})


def test_a_second_detection_of_an_object_matches_nothing():
    truth = one_image([[0, 0, 10, 10]])
    matches = match(truth, [found([0, 0, 10, 8], 0.9), found([0, 0, 10, 10], 0.8)])
    assert matches.score.tolist() == [0.9, 0.8]
    assert matches.found[0].tolist() == [0, -1]


@pytest.mark.parametrize("seed", range(6))
def test_f1_at_the_best_threshold_is_the_best_f1_and_no_other_is_better(seed):
    truth, detections = random_case(seed)
    best, matches = coco_metrics(truth, detections)["best_f1"], match(truth, detections)
    assert f1_at(matches, best["threshold"]) == pytest.approx(best)
    assert max(f1_at(matches, threshold)["f1"] for threshold in np.linspace(0, 1, 50)) <= best["f1"] + 1e-12


def test_f1_at_a_threshold_by_hand():
    truth = one_image([[0, 0, 10, 10], [30, 0, 10, 10], [60, 0, 20, 20]], crowd=[2])
    detections = [found([0, 0, 10, 10], 0.9), found([0, 80, 10, 10], 0.8), found([62, 2, 8, 8], 0.7),
                  found([30, 0, 10, 10], 0.3)]  # fmt: skip
    matches = match(truth, detections)
    assert f1_at(matches, 0.5) == {"threshold": 0.5, "f1": 0.5, "precision": 0.5, "recall": 0.5}  # crowds do not count
    assert f1_at(matches, 0.3)["recall"] == 1.0 and f1_at(matches, 0.3)["precision"] == pytest.approx(2 / 3)
    assert f1_at(matches, 0.95) == {"threshold": 0.95, "f1": 0.0, "precision": None, "recall": 0.0}
    assert f1_at(match(one_image([]), detections), 0.5) is None


def test_the_curve_ends_where_recall_ends():
    truth = one_image([[0, 0, 10, 10], [20, 0, 10, 10]])
    curve = coco_metrics(truth, [found([0, 0, 10, 10], 0.9)])["precision_recall"]
    assert curve["precision"] == [1.0] * 51 + [0.0] * 50
    assert curve["per_class"][1] is None and len(curve["recall"]) == 101


def test_no_detections_and_no_truth():
    truth = one_image([[0, 0, 50, 50]])
    nothing_found = coco_metrics(truth, [])
    assert nothing_found["AP"] == 0.0 and nothing_found["APs"] is None and nothing_found["APm"] == 0.0
    assert nothing_found["best_f1"] == {"threshold": None, "f1": 0.0, "precision": None, "recall": 0.0}
    no_truth = coco_metrics(one_image([]), [found([0, 0, 10, 10], 0.9)])
    assert all(no_truth[key] is None for key in TWELVE) and no_truth["best_f1"] is None
    assert no_truth["precision_recall"]["precision"] is None
    assert [c["detections"] for c in no_truth["per_class"]] == [1, 0]
    empty = coco_metrics({"images": [], "annotations": [], "categories": []}, [])
    assert all(empty[key] is None for key in TWELVE)
    json.dumps([nothing_found, no_truth, empty], allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_id": 6}, "image_id"), ({"category_id": 3}, "category_id"), ({"score": float("nan")}, "finite")],
)
def test_detections_of_other_images_or_classes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        coco_metrics(one_image([[0, 0, 10, 10]]), [found([0, 0, 10, 10], 0.9) | change])


def test_nothing_is_printed(capfd):
    truth, detections = random_case(0)
    coco_metrics(truth, detections)
    assert capfd.readouterr() == ("", "")


def test_truth_keeps_rejected_and_crowd_annotations():
    box = [1.1, 2.2, 0.0, 4.4]
    square = [0.0, 0.0, 3.0, 3.0]
    annotations = [
        {"id": 1, "category_id": 4, "bbox": box, "area": 7.5, "iscrowd": False, "reject": "zero area"},
        {"id": 2, "category_id": 4, "bbox": square, "area": None, "iscrowd": True, "reject": "crowd"},
        {"id": 3, "category_id": 5, "bbox": square, "area": 9.0, "iscrowd": False, "reject": "category"},
        {"id": 4, "category_id": 4, "bbox": [0.0, 0.0], "area": 9.0, "iscrowd": False, "reject": "box"},
    ]
    row = {"image_id": 9, "file_name": "x.jpg", "width": 10, "height": 10, "annotations": annotations}
    truth = coco_truth(pa.Table.from_pylist([row]), [{"id": 4, "name": "cat"}])
    assert [(a["id"], a["bbox"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [
        (1, box, 7.5, 0), (2, [0.0, 0.0, 3.0, 3.0], 9.0, 1)]  # fmt: skip


def test_detections_table_becomes_coco_arrays():
    boxes = [[[1, 2, 4, 8], [0, 0, 1, 1]], [], [[5, 5, 6, 7]]]
    columns = [[3, 4, 8], ["a", "b", "c"], boxes, [[0.5, 0.25], [], [0.75]], [[1, 0], [], [1]]]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, DETECTIONS.types, strict=True)]
    table = pa.table(arrays, schema=DETECTIONS)
    table = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    arrays = detections_to_coco(table, [{"id": 10, "name": "x"}, {"id": 20, "name": "y"}])
    assert arrays["image_id"].tolist() == [3, 3, 8]
    assert arrays["category_id"].tolist() == [20, 10, 20]
    assert arrays["bbox"].tolist() == [[1, 2, 3, 6], [0, 0, 1, 1], [5, 5, 1, 2]]
    assert arrays["score"].tolist() == [0.5, 0.25, 0.75]
    assert detections_to_coco(DETECTIONS.empty_table(), [])["bbox"].shape == (0, 4)


def test_every_image_is_scored_once():
    check_ids([3, 1, 2], [1, 2, 3], "val")
    with pytest.raises(RuntimeError, match="1 missing, 1 more than once, 1 unknown"):
        check_ids([1, 2, 2, 9], [1, 2, 3], "val")


def test_shards_are_those_the_dataset_names(tmp_path):
    shards = [{"path": f"val-{at}.parquet", "rows": 2, "bytes": 1} for at in range(2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 1, "splits": {"val": {"shards": shards}}}))
    assert split_shards(tmp_path, "val") == [str(tmp_path / "val-0.parquet"), str(tmp_path / "val-1.parquet")]
    with pytest.raises(UserError, match="no split 'test'"):
        split_shards(tmp_path, "test")
    with pytest.raises(UserError, match="no dataset"):
        split_shards(tmp_path / "elsewhere", "val")


CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory):
    """Five images of one size (so that none is padded in a batch) in two shards."""
    folder = tmp_path_factory.mktemp("dataset")
    random = np.random.default_rng(0)
    rows = []
    for image_id in range(11, 16):
        data = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(data, "PNG")
        annotation = {"id": image_id, "category_id": 3, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 400.0,
                      "iscrowd": False, "reject": None}  # fmt: skip
        rows.append({"image_id": image_id, "file_name": f"{image_id}.png", "image": data.getvalue(), "width": 64,
                     "height": 48, "annotations": [annotation]})  # fmt: skip
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.slice(0, 3), folder / "val-00000.parquet")
    pq.write_table(table.slice(3), folder / "val-00001.parquet")
    shards = [{"path": f"val-0000{at}.parquet", "rows": n, "bytes": 1} for at, n in enumerate((3, 2))]
    splits = {"val": {"digest": "v1", "images": 5, "shards": shards}}
    write_json(folder / "dataset.json", {"format": 1, "digest": "d1", "categories": CATEGORIES, "splits": splits})
    return folder, rows


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    import torch

    from detr.checkpoint import save_checkpoint
    from detr.config import ModelConfig
    from detr.model import DETR

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {"preset": "tiny", "num_classes": 2, "num_queries": 7, "image_size": 64, "image_max_size": 96}
    save_checkpoint(folder, DETR(ModelConfig.model_validate(config)), CATEGORIES)
    return folder


def test_an_actor_for_each_gpu_or_else_for_each_node():
    def node(alive=True, **resources):
        return {"Alive": alive, "Resources": {"memory": 1e9, **resources}}

    nodes = [node(), node(CPU=8.0, GPU=2.0), node(CPU=64.0), node(CPU=8.0, GPU=1.0), node(False, CPU=9.0, GPU=9.0)]
    assert places(nodes, use_gpu=True) == (3, 2)  # two of them share a node's cores
    assert places(nodes, use_gpu=False) == (3, 1)
    assert places([node(CPU=2.0)], use_gpu=False) == places([node(CPU=2.0)], use_gpu=True) == (1, 1)


def test_a_full_evaluation_says_more_and_the_same():
    truth, detections = random_case(2)
    short, full = coco_metrics(truth, detections), full_metrics(truth, detections, resamples=60, seed=3)
    assert full == full_metrics(truth, detections, resamples=60, seed=3)
    assert full["intervals"] != full_metrics(truth, detections, resamples=60, seed=4)["intervals"]
    assert all(full[key] == short[key] for key in short if key != "per_class")
    for name in ("AP", "AP50"):
        low, high = full["intervals"][name]
        assert 0 <= low < short[name] < high <= 1
    for one, before in zip(full["per_class"], short["per_class"], strict=True):
        assert {key: one[key] for key in before} == before
        mine = {a["image_id"] for a in truth["annotations"] if a["category_id"] == one["id"] and not a["iscrowd"]}
        assert (one["interval"] is None) == (len(mine) < 10)
    assert full["errors"]["threshold"] == full["confusion"]["threshold"] == short["best_f1"]["threshold"]
    without = full_metrics(truth, detections)
    assert without["intervals"] == {"AP": None, "AP50": None} and without["per_class"][0]["interval"] is None
    for nothing in (one_image([]), {"images": [], "annotations": [], "categories": []}):
        json.dumps(full_metrics(nothing, [], resamples=5), allow_nan=False)
    json.dumps([full, full_metrics(truth, [], resamples=5)], allow_nan=False)


def test_a_detector_has_a_threshold_for_each_label(small_checkpoint, tmp_path):
    from pipelines.detect import Detector

    detector = Detector.load(small_checkpoint)
    assert detector.thresholds.tolist() == [0.5, 0.5] and detector.score_threshold == 0.5
    config = json.loads((small_checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((small_checkpoint / "model.safetensors").read_bytes())
    write_json(tmp_path / "config.json", {**config, "score_threshold": 0.4, "score_thresholds": {"8": 0.25}})
    assert Detector.load(tmp_path).thresholds.tolist() == [0.4, 0.25]  # dog's own, and cat's from all


@pytest.mark.ray
def test_evaluate_scores_every_image_as_the_detector_does(ray_cluster, small_dataset, small_checkpoint, tmp_path):
    from detr.transforms import decode_image
    from pipelines.detect import Detector

    folder, rows = small_dataset
    result = evaluate(load_settings(None, ["evaluate.batch_size=2"]), folder, small_checkpoint, "val", tmp_path)
    table = pq.read_table(result["detections"])
    assert table.schema == DETECTIONS
    assert table["image_id"].to_pylist() == [11, 12, 13, 14, 15]
    detector = Detector.load(small_checkpoint)
    for row, found in zip(rows, table.to_pylist(), strict=True):
        expected = detector.detect([decode_image(row["image"], 10**6)])[0]
        assert found["file_name"] == row["file_name"] and found["labels"] == expected["labels"].tolist()
        np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-2)
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["format"] == 2 and kept["images"] == result["images"] == 5 and kept["dataset_digest"] == "d1"
    again = coco_metrics(coco_truth(rows, CATEGORIES), detections_to_coco(table, CATEGORIES))
    assert [kept[key] for key in TWELVE] == [result[key] for key in TWELVE] == [again[key] for key in TWELVE]
    assert result["AP"] is not None and result["split_digest"] == "v1"
    assert [c["AP"] is None for c in result["per_class"]] == [False, True]


@pytest.mark.ray
def test_every_node_of_a_cluster_takes_part_and_each_image_is_scored_once(small_dataset, small_checkpoint, tmp_path):
    script = Path(__file__).with_name("evaluate_on_nodes.py")
    command = [sys.executable, str(script), str(small_dataset[0]), str(small_checkpoint), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = pq.read_table(tmp_path / "detections.parquet")
    assert found["image_id"].to_pylist() == [11, 12, 13, 14, 15]
    assert len(list(tmp_path.glob("node-*"))) == 2


@pytest.mark.ray
def test_a_checkpoint_with_fewer_classes_is_judged_by_those_of_the_dataset(
    ray_cluster, small_dataset, small_checkpoint, tmp_path
):
    """A dataset that got a class in the middle since: an older model's labels are moved, and find none of it."""
    from pipelines.compare import compare_evaluations

    folder, _ = small_dataset
    grown, old, again = (tmp_path / name for name in ("grown", "old", "again"))
    for place in (grown, old, again):
        place.mkdir()
    for shard in folder.glob("*.parquet"):
        (grown / shard.name).write_bytes(shard.read_bytes())
    dataset = json.loads((folder / "dataset.json").read_text())
    categories = [CATEGORIES[0], {"id": 5, "name": "emu"}, CATEGORIES[1]]
    write_json(grown / "dataset.json", {**dataset, "digest": "d2", "categories": categories})
    settings = load_settings(None, ["evaluate.resamples=20"])
    before = evaluate(settings, folder, small_checkpoint, "val", old)
    after = evaluate(settings, grown, small_checkpoint, "val", again)
    assert after["AP"] == before["AP"] and [c["name"] for c in after["per_class"]] == ["cat", "emu", "dog"]
    moved = {0: 0, 1: 2}
    labels = [pq.read_table(result["detections"])["labels"].to_pylist() for result in (before, after)]
    assert [[moved[label] for label in image] for image in labels[0]] == labels[1]
    assert after["images_per_second"] > 0 and after["resamples"] == 20
    assert after["intervals"] == {"AP": None, "AP50": None}  # five images

    found = compare_evaluations(settings, grown, "val", again, again)
    assert found["AP"] == {"first": after["AP"], "second": after["AP"], "difference": 0.0, "low": None, "high": None}
    with pytest.raises(UserError, match="of dataset d1, not of 'val' of d2"):
        compare_evaluations(settings, grown, "val", old, again)


def test_a_checkpoint_for_other_categories_is_refused(small_dataset, tmp_path):
    write_json(tmp_path / "config.json", {"categories": [CATEGORIES[0], {"id": 8, "name": "wolf"}]})
    with pytest.raises(UserError, match=r"'wolf' with the id 8, which .* does not have \(id 8 is 'dog' there\)"):
        evaluate(load_settings(), small_dataset[0], tmp_path, "val", tmp_path)
    write_json(tmp_path / "config.json", {"categories": [*CATEGORIES, {"id": 9, "name": "ox"}]})
    with pytest.raises(UserError, match=r"'ox' with the id 9, which the dataset in .* does not have; evaluate"):
        evaluate(load_settings(), small_dataset[0], tmp_path, "val", tmp_path)
    with pytest.raises(UserError, match="there is no config"):
        evaluate(load_settings(), small_dataset[0], tmp_path / "elsewhere", "val", tmp_path)


def test_gpus_are_used_where_there_are_some_and_missed_where_they_are_asked_for(monkeypatch):
    import ray

    def settled(told: bool | None, gpus: int) -> bool:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {}))
        return detects_on_gpus(load_settings(None, [] if told is None else [f"train.use_gpu={told}"]))

    assert [settled(None, 2), settled(None, 0), settled(False, 2), settled(True, 1)] == [True, False, False, True]
    with pytest.raises(UserError, match="Ray has no GPU"):
        settled(True, 0)
