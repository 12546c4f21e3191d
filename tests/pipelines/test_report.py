import html
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.evaluate import DETECTIONS, coco_metrics, coco_truth, detections_to_coco
from pipelines.look import Finding
from pipelines.report import report
from pipelines.settings import UserError, load_settings
from pipelines.stage import write_json

EVIL, CAT, RARE = "<script>alert(1)</script>", "cat", "rare"
NAMES = [EVIL, CAT, RARE]
BOX, FAR = [20.0, 20.0, 60.0, 60.0], [100.0, 70.0, 130.0, 110.0]

CAPTION = r"<figcaption>([^<]+)<small>(\d+).png</small>"

# Per image: truth and detections as (box xyxy, label[, score]).
RIGHT = ([(BOX, 1)], [(BOX, 1, 0.6)])  # many with the lowest score put the best threshold below all others
CONFUSED = ([(BOX, 1)], [(BOX, 0, 0.91)])
BLIND = ([(BOX, 0), (FAR, 1)], [])
TWICE = ([(BOX, 1)], [(BOX, 1, 0.9), ([22.0, 20.0, 60.0, 60.0], 1, 0.7)])
GHOST = ([(BOX, 1)], [(BOX, 1, 0.9), (FAR, 1, 0.8)])
ASKEW = ([(BOX, 1)], [([40.0, 20.0, 80.0, 60.0], 1, 0.85)])


def make(folder, scenes, reject=None):
    """A dataset folder and an evaluation folder of its val split."""
    rows, found = [], []
    for image_id, (truth, detections) in enumerate(scenes, 1):
        data = io.BytesIO()
        Image.new("RGB", (160, 120), (60, 90, 120)).save(data, "PNG")
        annotations = [
            {"id": n, "category_id": label + 1, "area": (x2 - x1) * (y2 - y1), "iscrowd": False, "reject": reject,
             "bbox": [x1, y1, x2 - x1, y2 - y1]} for n, ((x1, y1, x2, y2), label) in enumerate(truth, 1)
        ]  # fmt: skip
        rows.append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "image": data.getvalue(), "width": 160,
             "height": 120, "boxes": [box for box, _ in truth], "labels": [label for _, label in truth],
             "annotations": annotations}
        )  # fmt: skip
        detections = sorted(detections, key=lambda d: -d[2])
        boxes, labels, scores = ([d[at] for d in detections] for at in range(3))
        found.append([image_id, f"{image_id}.png", boxes, scores, labels])
    dataset, evaluation = folder / "dataset", folder / "evaluation"
    dataset.mkdir(parents=True)
    evaluation.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), dataset / "val-00000.parquet")
    categories = [{"id": at, "name": name} for at, name in enumerate(NAMES, 1)]
    per_class = np.bincount([label for truth, _ in scenes for _, label in truth], minlength=3).tolist()
    split = {"digest": "5b1c", "images": len(rows), "boxes": sum(per_class), "per_class": per_class, "max_objects": 2,
             "shards": [{"path": "val-00000.parquet", "rows": len(rows), "bytes": 1}],
             "annotations_file": "instances_val.json"}  # fmt: skip
    write_json(
        dataset / "dataset.json",
        {"format": 1, "digest": "d1g35t", "name": "things", "categories": categories, "splits": {"val": split},
         "rejected_images": 0, "rejected_annotations": 0},
    )  # fmt: skip
    columns = zip(zip(*found, strict=True), DETECTIONS.types, strict=True)
    table = pa.table([pa.array(list(values), kind) for values, kind in columns], schema=DETECTIONS)
    pq.write_table(table, evaluation / "detections.parquet")
    metrics = coco_metrics(coco_truth(rows, categories), detections_to_coco(table, categories))
    head = {"format": 1, "split": "val", "images": len(rows), "dataset_digest": "d1g35t"}
    write_json(evaluation / "metrics.json", head | metrics)
    return dataset, evaluation


def words(path):
    """What a reader sees of a page."""
    body = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    dataset, evaluation = make(folder, [RIGHT, CONFUSED, BLIND, GHOST, TWICE, ASKEW] + [RIGHT] * 20)
    rejects = {"split": ["val"] * 2, "file_name": ["a", "b"], "annotation_id": pa.array([None, 4], pa.int64()),
               "reason": ["it is <b>broken</b>", "its box has no area"]}  # fmt: skip
    pq.write_table(pa.table(rejects), dataset / "rejects.parquet")
    steps = [{"step": s, "epoch": s / 10, "loss": 5 / s, "loss_ce": 1 / s, "loss_bbox": 2 / s, "loss_giou": 2 / s,
              "lr": 1e-4, "images_per_second": 9.0} for s in range(1, 50)]  # fmt: skip
    validations = [{"step": 25, "AP": None, "AP50": None}, {"step": 49, "AP": 0.4, "AP50": 0.6}]
    write_json(folder / "history.json", {"format": 1, "steps": steps, "validations": validations})
    stages = [{"stage": name, "version": 1, "key": f"key-of-{name}", "seconds": seconds, "reused": reused,
               "result": {"parameters": 1816330}}
              for name, seconds, reused in (("ingest", 12.0, True), ("train", 724.0, False))]  # fmt: skip
    rule = {"rule": "AP is above the champion's", "ok": False, "figure": 0.4, "limit": 0.5}
    registry = {"promoted": False, "reason": "AP 0.4 is not above 0.5.", "version": "3", "previous": "2",
                "champion": "2", "rules": [rule]}  # fmt: skip
    result = report(
        f"Run of {EVIL}", dataset, stages[1], {"val": evaluation}, folder / "history.json", load_settings(), stages,
        registry, {"images": 1234, "rejects": {"it is empty": 2}}, folder,
        [Finding(what="2 classes hurt", which=(EVIL, CAT), change="Label more.", settings=("model=tiny",))],
    )  # fmt: skip
    return folder, result


def test_the_page_fetches_nothing_and_runs_nothing(full):
    page = (full[0] / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) > 12 and all(source.startswith("data:image/") for source in sources)
    links = re.findall(r'href="([^"]*)"', page)
    assert links and all(f'id="{link[1:]}"' in page for link in links if link[0] == "#") and "href=\"h" not in page
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)
    assert "<script" not in page and "<b>broken" not in page and "@import" not in page and "url(" not in page
    assert EVIL in words(full[0] / "report.html")


def test_the_page_says_what_a_reader_came_for(full):
    text = words(full[0] / "report.html")
    metrics = json.loads((full[0] / "evaluation" / "metrics.json").read_text())
    assert f"AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} on the val split" in text
    assert "Not promoted. AP 0.4 is not above 0.5. The champion stays version 2." in text
    assert f"{RARE} no ground truth in this split" in text
    assert "it is <b>broken</b> 1" in text
    assert "ingest 12.0 s reused" in text and "train 12 min" in text and "12 min in this run" in text
    assert "d1g35t" in text and "key-of-train" in text and "parameters 1,816,330" in text
    assert "images 1,234" in text and "it is empty 2" in text
    assert "budget: 12 minutes" in text
    assert f"2 classes hurt {EVIL}; cat Label more. model=tiny" in text


def test_mistakes_are_told_in_words_and_right_images_are_none(full):
    page = (full[0] / "report.html").read_text(encoding="utf-8")
    worst = re.findall(CAPTION, page[page.index('id="errs"') : page.index('id="looks"')])
    captions = {int(number): html.unescape(text) for text, number in worst}
    assert captions == {
        2: f"‘{EVIL}’ found at 0.91 where there is a ‘cat’",
        3: "found nothing here, where there are 2 objects",
        4: "‘cat’ found at 0.80 where nothing is labelled",
        5: "‘cat’ found a second time at 0.70",
        6: "missed ‘cat’; ‘cat’ found at 0.85, but out of place (IoU 0.33)",
    }
    assert [int(number) for _, number in worst] == [3, 2, 6, 4, 5]  # 2 missed; 1 and .91; 1 and .85; .8; .7


def test_pictures_are_exported(full):
    folder, result = full
    with Image.open(result["validation_grid"]) as grid:
        assert grid.width == 1200 and 1100 < grid.height < 1300  # twelve images of 4 by 3, three in a row
        colours = np.asarray(grid.convert("RGB")).reshape(-1, 3)
    assert (colours == (60, 90, 120)).all(axis=1).mean() > 0.5
    with Image.open(result["curves"]) as curves:
        assert curves.width > 1000
    assert sorted(path.name for path in folder.glob("*.png")) == ["curves.png", "validation_grid.png"]


def test_what_is_absent_is_said(tmp_path):
    dataset, _ = make(tmp_path, [RIGHT])
    result = report("bare", dataset, None, {}, None, load_settings(), [], None, None, tmp_path)
    text = words(tmp_path / "report.html")
    for sentence in (
        "Not measured",
        "No evaluation was given, so nothing is known about its quality.",
        "No verdict on promotion: nothing was registered in this run.",
        "No history of the training was given",
        "No record of a training was given.",
        "No batch of images was predicted in this run.",
        "No record of the stages was given.",
        "No image and no annotation was left out.",
    ):
        assert sentence in text
    assert "What in it hurts" not in text and "Sweep" not in text
    assert "None" not in text and "nan" not in text
    assert result["validation_grid"] is None and result["curves"] is None


@pytest.mark.parametrize(
    ("scenes", "sentence"),
    [
        ([([], [(BOX, 1, 0.9)])], "The val split has no ground truth to measure against."),
        ([BLIND], "It finds nothing at all in the 1 images of the val split."),
        ([RIGHT], "There is no mistake in the val split at this threshold."),
    ],
)
def test_extremes(tmp_path, scenes, sentence):
    dataset, evaluation = make(tmp_path, scenes)
    promoted = {"promoted": True, "reason": "It is the first.", "version": "1", "champion": "1", "previous": None}
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], promoted, None, tmp_path)
    text = words(tmp_path / "report.html")
    assert sentence in text and "Promoted. It is the first. Champion: version 1." in text
    assert "nan" not in text


def test_a_rejected_annotation_is_no_mistake(tmp_path):
    dataset, evaluation = make(tmp_path, [([(BOX, 1)], [])], reject="its box has no area")
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)
    assert "There is no mistake" in words(tmp_path / "report.html")


def test_a_sweep_has_a_section(tmp_path):
    dataset, _ = make(tmp_path, [RIGHT])
    trials = []
    for number in range(33):
        curve = [{"validation": at, "step": at, "AP": (0.1 + 0.01 * number) * at / 2, "AP50": 0.5} for at in (1, 2)]
        rate = round(0.001 * (1 + number), 4)
        trials.append(
            {"number": number, "values": {"train.lr": rate, "train.note": EVIL},
             "changes": {"train.lr": rate, "train.note": EVIL} if number else {}, "status": "finished",
             "AP": curve[-1]["AP"], "AP50": 0.5, "curve": curve, "steps": 2, "images_per_second": 9.0, "seconds": 61.0,
             "device_hours": 0.02, "run_id": "r", "error": None}
        )  # fmt: skip
    trials[5] |= {"status": "failed", "AP": None, "AP50": None, "curve": [], "error": "It <b>broke</b>."}
    sweep = {"format": 2, "search": "grid", "scheduler": "none", "budget": "1 minute", "validations": 2,
             "device": "GPU", "min_gain": 0.01, "present": {"train.lr": 0.001, "train.note": EVIL}, "trials": trials,
             "space": {"train.lr": {"low": 0.001, "high": 0.033, "log": False}, "train.note": [EVIL]},
             "best": 32}  # fmt: skip
    report("t", dataset, None, {}, None, load_settings(), [], None, None, tmp_path, sweep=sweep)
    text, page = words(tmp_path / "report.html"), (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "33 trials of 1 minute, searched over a grid: 32 finished, 1 failed." in text
    assert f"Trial 32 is best, with AP 0.420 on val: train.lr=0.033, train.note={EVIL}." in text
    assert "GPU-hours in all" in text and "Kendall's tau 1.00" in text
    assert f"32 train.lr=0.033, train.note={EVIL} 0.420 0.500 finished, chosen 1 min 01 s 0.0200" in text
    assert text.count(f"train.note={EVIL} 0.") == 30 and "and 3 more trials, in trials.json of the sweep." in text
    assert page.count("data:image/svg+xml") == 2 and "<script" not in page  # the ranking and AP over the rate
    trials[2:] = [trials[5]]
    report("t", dataset, None, {}, None, load_settings(), [], None, None, tmp_path, sweep=sweep | {"best": 0})
    text = words(tmp_path / "report.html")
    assert "failed: It <b>broke</b>." in text and "more trial" not in text and "None" not in text


def test_an_evaluation_of_another_dataset_is_refused(tmp_path):
    dataset, evaluation = make(tmp_path, [RIGHT])
    metrics = json.loads((evaluation / "metrics.json").read_text())
    write_json(evaluation / "metrics.json", metrics | {"dataset_digest": "other"})
    with pytest.raises(UserError, match="made on dataset other"):
        report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)
