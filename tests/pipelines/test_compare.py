import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_evaluate import random_case

from pipelines.compare import compare_evaluations, in_words
from pipelines.evaluate import DETECTIONS, coco_metrics, full_metrics
from pipelines.matching import Matches, match
from pipelines.resample import average_precision, image_weights, interval, mean_over_classes
from pipelines.settings import UserError, load_settings
from pipelines.stage import write_json


def without_ties(seed):
    truth, detections = random_case(seed)
    for at, score in enumerate(np.random.default_rng(seed).permutation(len(detections))):
        detections[at]["score"] = float(score + 1) / (len(detections) + 1)
    return truth, detections


@pytest.mark.parametrize("max_dets", [100, 3])
@pytest.mark.parametrize("seed", range(6))
def test_a_weight_is_an_image_so_many_times_in_the_data(seed, max_dets):
    """By COCO's own tool on truth and detections that hold the images again and again."""
    truth, detections = without_ties(seed)
    weights = image_weights(len(truth["images"]), 4, seed)
    found = average_precision(match(truth, detections, max_dets), weights)
    ids = sorted(image["id"] for image in truth["images"])
    for row, ap in zip(weights.tolist(), found, strict=True):
        copies = [(image, f * 100_000 + image) for image, times in zip(ids, row, strict=True) for f in range(times)]
        again = {"images": [{"id": new} for _, new in copies], "categories": truth["categories"], "annotations": []}
        given = []
        for old, new in copies:
            again["annotations"] += [{**a, "image_id": new} for a in truth["annotations"] if a["image_id"] == old]
            given += [{**d, "image_id": new} for d in detections if d["image_id"] == old]
        metrics = coco_metrics(again, given, max_dets)
        expected = [np.nan if c["AP"] is None else c["AP"] for c in metrics["per_class"]]
        np.testing.assert_allclose(ap.mean(axis=-1), expected, atol=1e-12)
        assert mean_over_classes(ap[None].mean(axis=-1))[0] == pytest.approx(metrics["AP"], abs=1e-12)
        assert mean_over_classes(ap[None, :, 0])[0] == pytest.approx(metrics["AP50"], abs=1e-12)


def test_images_are_drawn_with_replacement_and_the_seed_decides():
    weights = image_weights(50, 400, 1)
    assert (weights.sum(axis=1) == 50).all() and weights.max() > 1
    assert np.abs(weights.mean(axis=0) - 1).max() < 0.25
    assert (weights == image_weights(50, 400, 1)).all() and (weights != image_weights(50, 400, 2)).any()
    assert (weights[:7] == image_weights(50, 7, 1)).all()  # more resamples are the same and others
    assert image_weights(0, 3, 0).shape == (3, 0)


def test_an_interval_is_the_middle_of_what_is_known():
    values = np.r_[np.arange(1001.0), np.nan]
    assert interval(values) == pytest.approx([25.0, 975.0])
    assert interval(np.array([np.nan])) is None and interval(np.zeros(0)) is None


def test_a_class_of_which_nothing_was_drawn_is_left_out_of_the_mean():
    ap = np.array([[0.5, np.nan], [0.5, 0.1], [np.nan, np.nan]])
    np.testing.assert_equal(mean_over_classes(ap), [0.5, 0.3, np.nan])
    truth, detections = without_ties(1)
    (only,) = {a["image_id"] for a in truth["annotations"][:1]}
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != 7 or a["image_id"] == only]
    weights = image_weights(len(truth["images"]), 30, 0)
    found = average_precision(match(truth, detections), weights)[:, 2, 0]
    at = sorted(image["id"] for image in truth["images"]).index(only)
    assert not np.isnan(found).all() and (np.isnan(found) >= (weights[:, at] == 0)).all() and np.isnan(found).any()


def population(random, images, noise=0.3):
    """Images with 0 to 3 objects of one class each, found or not with scores that tell right from wrong, as Matches."""
    rows, object_image, found, score, image = 0, [], [], [], []
    for at in range(images):
        for _ in range(random.integers(0, 4)):
            object_image.append(at)
            if random.random() < 0.75:
                image.append(at)
                found.append(len(object_image) - 1)
                score.append(0.6 + noise * random.normal())
        for _ in range(random.integers(0, 3)):
            image.append(at)
            found.append(-1)
            score.append(0.4 + noise * random.normal())
        rows += 1
    return Matches(
        images=np.arange(rows), categories=np.array([1]), image=np.array(image), label=np.zeros(len(image), int),
        score=np.array(score), box=np.zeros((len(image), 4)), object_image=np.array(object_image),
        object_label=np.zeros(len(object_image), int), object_box=np.zeros((len(object_image), 4)),
        crowd=np.zeros(len(object_image), bool), found=np.array(found)[None],
    )  # fmt: skip


def test_the_interval_holds_the_true_ap_about_as_often_as_it_says():
    random = np.random.default_rng(0)

    def ap(matches, weights):
        return average_precision(matches, weights)[:, 0, 0]

    true = float(ap(population(random, 30_000), np.ones((1, 30_000), int))[0])
    inside = 0
    for seed in range(100):
        low, high = interval(ap(population(random, 150), image_weights(150, 200, seed)))
        inside += low <= true <= high
    assert 87 <= inside <= 99
    assert 0.5 < true < 0.8


def folder_of(place, detections, truth, split="val", digest="d1"):
    """An evaluation's folder as far as a comparison reads it."""
    place.mkdir()
    order = {category["id"]: at for at, category in enumerate(truth["categories"])}
    rows = []
    for image in sorted(truth["images"], key=lambda image: image["id"]):
        mine = [d for d in detections if d["image_id"] == image["id"]]
        boxes = [[d["bbox"][0], d["bbox"][1], d["bbox"][0] + d["bbox"][2], d["bbox"][1] + d["bbox"][3]] for d in mine]
        rows.append({"image_id": image["id"], "file_name": image["file_name"], "boxes": boxes,
                     "scores": [d["score"] for d in mine], "labels": [order[d["category_id"]] for d in mine]})
    pq.write_table(pa.Table.from_pylist(rows, DETECTIONS), place / "detections.parquet")
    write_json(place / "metrics.json", {"format": 2, "split": split, "dataset_digest": digest})
    return place


@pytest.fixture
def evaluations(tmp_path):
    """A dataset of 60 images in which a good model finds nearly everything and a poor one half of it."""
    truth, _ = random_case(0)
    random = np.random.default_rng(5)
    truth["images"] = [{"id": i, "file_name": f"{i}.png", "width": 400, "height": 300} for i in range(60)]
    truth["annotations"], good = [], []
    for image in range(60):
        for _ in range(random.integers(0, 4)):
            box = [*random.integers(0, 200, 2).tolist(), *random.integers(40, 160, 2).tolist()]
            category = int(random.choice([1, 3, 7]))
            truth["annotations"].append({"id": len(good), "image_id": image, "category_id": category, "area": 900.0,
                                         "bbox": [float(value) for value in box], "iscrowd": False, "reject": None})
            good.append({"image_id": image, "category_id": category, "bbox": (np.array(box) + 1).tolist(),
                         "score": float(random.uniform(0.3, 1))})
    poor = [d for d in good if random.random() < 0.5]
    rows = [{"image_id": i["id"], "file_name": i["file_name"], "width": 400, "height": 300,
             "annotations": [a for a in truth["annotations"] if a["image_id"] == i["id"]]} for i in truth["images"]]
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    kind = pa.list_(pa.struct([("id", pa.int64()), ("image_id", pa.int64()), ("category_id", pa.int64()),
                               ("area", pa.float64()), ("bbox", pa.list_(pa.float64())), ("iscrowd", pa.bool_()),
                               ("reject", pa.string())]))  # fmt: skip
    schema = pa.schema([("image_id", pa.int64()), ("file_name", pa.string()), ("width", pa.int64()),
                        ("height", pa.int64()), ("annotations", kind)])
    pq.write_table(pa.Table.from_pylist(rows, schema), dataset / "val-0.parquet")
    shards = [{"path": "val-0.parquet", "rows": 60, "bytes": 1}]
    write_json(dataset / "dataset.json", {"format": 1, "digest": "d1", "categories": truth["categories"],
                                          "splits": {"val": {"digest": "v1", "images": 60, "shards": shards}}})
    places = [folder_of(tmp_path / name, found, truth) for name, found in (("good", good), ("poor", poor))]
    return dataset, *places, truth, poor


def test_a_model_is_exactly_as_good_as_itself(evaluations):
    dataset, good, _, _, _ = evaluations
    found = compare_evaluations(load_settings(), dataset, "val", good, good)
    for figures in (found["AP"], found["AP50"], *found["per_class"][:3]):
        assert figures["difference"] == figures["low"] == figures["high"] == 0.0
        assert figures["first"] == figures["second"] > 0.5
    ap = f"{found['AP']['first']:.3f}"
    said = f"AP is the same (+0.000 to +0.000, 95 %), {ap} instead of {ap}: no sure difference"
    assert in_words("AP", found["AP"], 1000) == said


def test_a_clearly_worse_model_is_surely_worse(evaluations):
    dataset, good, poor, truth, detections = evaluations
    found = compare_evaluations(load_settings(), dataset, "val", good, poor)
    assert found["images"] == 60 and found["resamples"] == 1000 and found["confidence"] == 0.95
    for figures in (found["AP"], found["AP50"], *found["per_class"][:3]):
        assert figures["low"] < figures["difference"] < figures["high"] < 0
        assert figures["difference"] == figures["second"] - figures["first"]
    assert found["AP"]["second"] == pytest.approx(coco_metrics(truth, detections)["AP"], abs=0.02)
    assert [c["name"] for c in found["per_class"]] == [c["name"] for c in truth["categories"]]
    nothing = found["per_class"][3]
    assert nothing == {"name": "class 90", "id": 90, **dict.fromkeys(("first", "second", "difference", "low", "high"))}
    json.dumps(found, allow_nan=False)
    again = compare_evaluations(load_settings(), dataset, "val", poor, good)
    assert [-again["AP"]["high"], -again["AP"]["low"]] == pytest.approx([found["AP"]["low"], found["AP"]["high"]])
    worse, better = (in_words("AP", figures["AP"], 1000) for figures in (found, again))
    assert worse.startswith("AP is 0.") and " lower (-0." in worse and worse.endswith("surely worse")
    assert better.endswith("surely better") and " higher (+0." in better
    assert in_words("class 90: AP", nothing, 1000) == "class 90: AP: no ground truth"


def test_the_same_images_for_both_make_the_difference_surer(evaluations):
    dataset, good, poor, _, _ = evaluations
    matched = compare_evaluations(load_settings(), dataset, "val", good, poor)["AP"]
    other = compare_evaluations(load_settings(None, ["seed=1"]), dataset, "val", good, poor)["AP"]
    assert other["difference"] == matched["difference"] and other["low"] != matched["low"]
    assert other["low"] == pytest.approx(matched["low"], abs=0.03)


def test_without_resamples_there_is_a_difference_and_no_word_on_how_sure_it_is(evaluations):
    dataset, good, poor, _, _ = evaluations
    found = compare_evaluations(load_settings(None, ["evaluate.resamples=0"]), dataset, "val", good, poor)["AP"]
    assert found["difference"] < 0 and found["low"] is found["high"] is None
    assert "not known without evaluate.resamples" in in_words("AP", found, 0)


def test_of_too_few_images_nothing_is_sure(tmp_path):
    """Objects of the cat are in 9 images and those of the dog in 10: resamples say of the dog how sure it is."""
    truth = {"images": [{"id": i, "file_name": f"{i}.png", "width": 90, "height": 90} for i in range(30)],
             "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], "annotations": []}  # fmt: skip
    found = []
    for image in range(20):
        for n in range(3):
            box = [30.0 * n, 10.0, 20.0, 20.0]
            category = 1 if image < 9 else 2
            if image < 19:
                truth["annotations"].append(
                    {"id": 3 * image + n, "image_id": image, "category_id": category, "bbox": box, "area": 400.0,
                     "iscrowd": 0}
                )  # fmt: skip
            if (image + n) % 2:
                found.append({"image_id": image, "category_id": category, "bbox": box, "score": 0.5 + image / 50})
    metrics = full_metrics(truth, found, resamples=200)
    cat, dog = metrics["per_class"]
    assert cat["AP"] is not None and cat["interval"] is None and dog["interval"][0] < dog["interval"][1]
    assert all(metrics["intervals"].values())
    few = {**truth, "annotations": truth["annotations"][:27]}
    assert full_metrics(few, found, resamples=200)["intervals"] == {"AP": None, "AP50": None}
    truth["annotations"][-3:] = []  # as many dogs are in nine images, too
    assert full_metrics(truth, found, resamples=200)["per_class"][1]["interval"] is None
    crowds = [{**a, "iscrowd": 1} for a in few["annotations"]]
    assert full_metrics({**few, "annotations": crowds}, found, resamples=9)["intervals"]["AP"] is None


def test_a_difference_on_too_few_images_is_not_called_sure(evaluations, tmp_path):
    dataset, _, _, truth, _ = evaluations
    split = pq.read_table(dataset / "val-0.parquet")
    first = sorted({a["image_id"] for a in truth["annotations"]})[:9]
    rows = [{**row, "annotations": row["annotations"] if row["image_id"] in first else []} for row in split.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, split.schema), dataset / "val-0.parquet")
    right = [{**a, "score": 0.9} for a in truth["annotations"] if a["image_id"] in first]
    all_found, nothing = folder_of(tmp_path / "all", right, truth), folder_of(tmp_path / "nothing", [], truth)
    found = compare_evaluations(load_settings(), dataset, "val", nothing, all_found)
    for figures in (found["AP"], found["AP50"]):
        assert figures["difference"] == pytest.approx(1.0) and figures["low"] is figures["high"] is None
    assert in_words("AP", found["AP"], found["resamples"]).endswith(": too few images to say how sure")


def test_evaluations_of_other_images_are_refused(evaluations, tmp_path):
    dataset, good, _, truth, detections = evaluations
    for name, change in (("split", {"split": "test"}), ("data", {"digest": "d2"})):
        other = folder_of(tmp_path / name, detections, truth, **change)
        with pytest.raises(UserError, match="evaluate both on the same images"):
            compare_evaluations(load_settings(), dataset, "val", good, other)
    fewer = folder_of(tmp_path / "fewer", [], {**truth, "images": truth["images"][1:]})
    with pytest.raises(RuntimeError, match="1 missing"):
        compare_evaluations(load_settings(), dataset, "val", fewer, good)


def test_memory_of_many_resamples_of_many_detections_stays_small():
    random = np.random.default_rng(0)
    detections, images = 400_000, 4000
    found = np.where(random.random(detections) < 0.05, np.arange(detections) % 20_000, -1)
    matches = Matches(
        images=np.arange(images), categories=np.array([1]), image=np.repeat(np.arange(images), 100),
        label=np.zeros(detections, int), score=random.random(detections), box=np.zeros((detections, 4)),
        object_image=np.arange(20_000) % images, object_label=np.zeros(20_000, int), object_box=np.zeros((20_000, 4)),
        crowd=np.zeros(20_000, bool), found=found[None],
    )  # fmt: skip
    weights = image_weights(images, 40, 0)
    tracemalloc.start()
    average_precision(matches, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * 2**20
