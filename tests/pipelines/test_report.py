import base64
import hashlib
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from detr.checkpoint import save_checkpoint
from detr.config import ModelConfig
from detr.segmentation import build_model
from pipelines.errors import error_types
from pipelines.evaluate import DETECTIONS, coco_metrics, coco_truth, detections_to_coco
from pipelines.look import Finding
from pipelines.pictures import Scenes
from pipelines.report import report
from pipelines.settings import RunSettings, UserError, load_settings
from pipelines.stage import read_json, write_json
from pipelines.tracking import tracker
from pipelines.workflow import last_verdict, report_stage

EVIL, CAT, RARE = "<script>alert(1)</script>", "cat", "rare"
NAMES = [EVIL, CAT, RARE]
BOX, FAR = [20.0, 20.0, 60.0, 60.0], [100.0, 70.0, 130.0, 110.0]

ADVISED = ("missed", "background", "wrong class", "poor box", "wrong class and poor box", "duplicate")
PREDICTED = {
    "folder": "s3://bucket/found", "images": 1234, "ok": 1232, "rejected": 2, "rejects": {"it is empty": 2},
    "detections": {EVIL: 20, "cat": 30}, "scores": [5] * 10, "score_threshold": 0.5,
    "score_thresholds": {"1": 0.25, "2": 0.6}, "new": {"images": 234}, "images_here": 234, "reused_images": 1000,
    "seconds": 3.83, "images_per_second": 52.23, "cost_per_1000_images": 0.02, "input_digest": "in",
    "output_digest": "out", "drift": {"since": "2026-11-01T10:00:00+00:00", "version": "3", "words": ["Fewer cats."]},
}  # fmt: skip
CAPTION = r"<figcaption>([^<]+)<small>(\d+).png</small>"

# Per image: truth and detections as (box xyxy, label[, score]).
RIGHT = ([(BOX, 1)], [(BOX, 1, 0.6)])  # many with the lowest score put the best threshold below all others
CONFUSED = ([(BOX, 1)], [(BOX, 0, 0.91)])
BLIND = ([(BOX, 0), (FAR, 1)], [])
TWICE = ([(BOX, 1)], [(BOX, 1, 0.9), ([22.0, 20.0, 60.0, 60.0], 1, 0.7)])
GHOST = ([(BOX, 1)], [(BOX, 1, 0.9), (FAR, 1, 0.8)])
ASKEW = ([(BOX, 1)], [([40.0, 20.0, 80.0, 60.0], 1, 0.85)])


def make(folder, scenes, reject=None, names=NAMES):
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
    categories = [{"id": at, "name": name} for at, name in enumerate(names, 1)]
    labels = [label for truth, _ in scenes for _, label in truth]
    per_class = np.bincount(labels, minlength=len(names)).tolist()
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
    for row in metrics["per_class"]:  # of an older version
        for size in "sml":
            del row[f"AP{size}"]
    head = {"format": 1, "split": "val", "images": len(rows), "dataset_digest": "d1g35t"}
    write_json(evaluation / "metrics.json", head | metrics)
    return dataset, evaluation


def judged(evaluation, **changes):
    """The evaluation's metrics.json with what newer evaluations have in it."""
    metrics = read_json(evaluation / "metrics.json")
    names = [row["name"] for row in metrics["per_class"]]
    for row in metrics["per_class"]:
        row |= {"APs": None, "APm": row["AP"], "APl": None, "interval": row["AP"] and [row["AP"] - 0.1, row["AP"]]}
    nothing = {kind: 0 for kind in ADVISED}
    metrics |= {
        "format": 2,
        "intervals": {"AP": [0.4016, 0.501], "AP50": [0.6, 0.75]},
        "confusion": {"threshold": 0.6, "iou": 0.5, "names": [*names, "background"],
                      "matrix": np.zeros((len(names) + 1,) * 2, int).tolist(), "unlabelled": [0] * len(names)},
        "calibration": {"bins": [], "error": None},
        "errors": {"threshold": 0.6, "counts": nothing, "cost": dict.fromkeys(ADVISED)},
    }  # fmt: skip
    write_json(evaluation / "metrics.json", metrics | changes)


def against(champion, now, difference, low, high, name="AP"):
    """A row of a comparison."""
    return {"name": name, "id": 1, "first": champion, "second": now, "difference": difference, "low": low, "high": high}


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
        f"Run of {EVIL}", dataset, stages[1], {"val": evaluation}, folder / "history.json",
        load_settings(None, ["cluster.cost_per_hour=3.6"]), stages, registry, PREDICTED, folder,
        [Finding(what="2 classes hurt", which=(EVIL, CAT), change="Label more.", settings=("model=tiny",))],
    )  # fmt: skip
    return folder, result


def test_what_a_batch_of_images_gave_is_told_in_words(full):
    page = (full[0] / "report.html").read_text(encoding="utf-8")
    table = page[page.index('<h2 id="predictions"') : page.index('<h2 id="data"')]
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", table)]
    assert dict(zip(cells[::2], cells[1::2], strict=True)) == {
        "images": "1,234, of which 2 could not be used",
        "new": "234, the others from before",
        "rejected because": "it is empty: 2",
        "detections": "50",
        "of each class": f"cat: 30, {EVIL}: 20",
        "least score": "0.500, of single classes 0.250 to 0.600",
        "speed": "52.2 images/s, 3.8 s in all",
        "cost of 1,000 images": "0.0200",
        "changed since": "the run of 2026-11-01 10:00 UTC, by version 3: Fewer cats.",
        "table": "s3://bucket/found",
        "digest of the images": "in",
        "digest of the table": "out",
    }


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
    assert "ingest 12.0 s 0.01 reused" in text and "train 12 min 0.72" in text
    assert "12 min in this run, which cost 0.72" in text
    assert "d1g35t" in text and "key-of-train" in text and "parameters 1,816,330" in text
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
        6: "‘cat’ found at 0.85, but out of place (IoU 0.33)",
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


def test_every_section_is_in_the_navigation(full):
    page = (full[0] / "report.html").read_text(encoding="utf-8")
    (navigation,) = re.findall(r"<nav>(.*)</nav>", page)
    sections = re.findall(r'<h2 id="(\w+)">', page)
    assert re.findall(r'href="#(\w+)"', navigation) == sections and page.count("<h2") == len(sections)


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
    assert '<a href="#sweep">' in (tmp_path / "report.html").read_text(encoding="utf-8")
    report("t", dataset, None, {}, None, load_settings(), [], None, None, tmp_path, sweep=sweep | {"best": 0})
    text = words(tmp_path / "report.html")
    assert "failed: It <b>broke</b>." in text and "more trial" not in text and "None" not in text


def test_an_evaluation_of_another_dataset_is_refused(tmp_path):
    dataset, evaluation = make(tmp_path, [RIGHT])
    metrics = json.loads((evaluation / "metrics.json").read_text())
    write_json(evaluation / "metrics.json", metrics | {"dataset_digest": "other"})
    with pytest.raises(UserError, match="made on dataset other"):
        report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)


def test_how_sure_the_figures_are_is_said(tmp_path):
    dataset, evaluation = make(tmp_path, [RIGHT, BLIND])
    judged(evaluation)
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)
    text, ap = words(tmp_path / "report.html"), read_json(evaluation / "metrics.json")["AP"]
    sure = "95 % sure to be between 0.402 and 0.501 (AP50 between 0.600 and 0.750)"
    assert f"AP {ap:.3f} on the val split, {sure}" in text
    cat = next(row["AP"] for row in read_json(evaluation / "metrics.json")["per_class"] if row["name"] == CAT)
    assert f"cat {cat:.3f} {cat - 0.1:.3f} to {cat:.3f}" in text
    assert "small medium large" in text and "older version" not in text


def test_of_too_few_images_it_is_not_said_how_sure(tmp_path):
    dataset, evaluation = make(tmp_path, [RIGHT, BLIND])
    judged(evaluation, resamples=100, intervals={"AP": None, "AP50": None})
    metrics = read_json(evaluation / "metrics.json")
    for row in metrics["per_class"]:
        row["interval"] = None
    write_json(evaluation / "metrics.json", metrics)
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)
    text = words(tmp_path / "report.html")
    cat = next(row["AP"] for row in metrics["per_class"] if row["name"] == CAT)
    assert "Fewer than 10 images of the val split have objects: too few images to say how sure AP is." in text
    assert f"cat {cat:.3f} too few images" in text and "sure to be between" not in text
    write_json(evaluation / "metrics.json", {**metrics, "resamples": 0})
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)
    assert "too few images" not in words(tmp_path / "report.html")


def test_an_older_evaluation_still_has_a_page(full):
    text = words(full[0] / "report.html")
    assert "This evaluation is of an older version, without kinds of errors, confusions and calibration" in text
    assert "% sure" not in text and "small medium large" not in text


def test_the_rules_of_the_gate_are_told_with_figures_and_words(tmp_path):
    dataset, _ = make(tmp_path, [RIGHT])
    rules = [{"rule": "files are those registered", "ok": True, "figure": None, "limit": None, "words": "they are"},
             {"rule": "AP reaches the floor", "ok": False, "figure": 0.04321, "limit": 0.1, "words": "it is too low"},
             {"rule": "was not rolled back", "ok": False, "figure": "it was bad", "limit": None}]  # fmt: skip
    verdict = {"promoted": False, "reason": "Refused.", "version": "2", "champion": None, "previous": None,
               "rules": rules, "comparison": None, "who": "anna", "when": "2026-01-02", "why": "Weekly."}  # fmt: skip
    report("t", dataset, None, {}, None, load_settings(), [], verdict, None, tmp_path)
    text = words(tmp_path / "report.html")
    assert "It broke 2 of the 3 rules of the gate." in text and "Asked by anna, 2026-01-02. Weekly." in text
    assert "✗ AP reaches the floor (broken) : it is too low found 0.04321, asked 0.1" in text
    assert "✗ was not rolled back (broken) found it was bad" in text
    assert "✓ files are those registered: they are Asked by anna" in text
    assert text.index("AP reaches") < text.index("files are those")
    assert "There was no other champion to compare with." in text


def test_the_champion_is_compared_with(tmp_path):
    dataset, _ = make(tmp_path, [RIGHT])
    comparison = {
        "images": 12, "resamples": 200, "confidence": 0.95, "split_digest": "5b1c",
        "AP": against(0.5, 0.52, 0.02, 0.004, 0.036), "AP50": against(0.8, 0.78, -0.02, -0.05, 0.01),
        "per_class": [against(0.5, 0.4, -0.1, -0.2, -0.01, EVIL), against(0.5, 0.64, 0.14, None, None, CAT),
                      against(None, None, None, None, None, RARE)],
    }  # fmt: skip
    verdict = {"promoted": True, "reason": "Better.", "version": "3", "champion": "3", "previous": "2", "rules": [],
               "comparison": comparison}  # fmt: skip
    report("t", dataset, None, {}, None, load_settings(), [], verdict, None, tmp_path)
    text = words(tmp_path / "report.html")
    assert "AP is 0.020 higher (+0.004 to +0.036, 95 %), 0.520 instead of 0.500: surely better." in text
    assert "AP50 is 0.020 lower (-0.050 to +0.010, 95 %), 0.780 instead of 0.800: no sure difference." in text
    assert "Of 1 classes 0 are surely better and 1 surely worse." in text
    assert "The champion here is version 2. Both were measured on the same 12 images of the val split." in text
    assert f"{EVIL} 0.500 0.400 -0.100 -0.200 to -0.010 surely worse" in text
    assert "cat 0.500 0.640 +0.140 too few images to say how sure" in text and f"{RARE} no ground truth" in text
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/svg+xml") == 1


def test_of_many_classes_those_that_matter_come_first(tmp_path):
    names = [f"kind {number:02d}" for number in range(40)]
    scenes = [([(BOX, at)], [(BOX, at, 0.9)] if at != 7 else []) for at in range(39)]
    dataset, evaluation = make(tmp_path, scenes, names=names)
    matrix = np.eye(41, dtype=int)
    matrix[3, 5], matrix[8, 40], matrix[40, 9] = 4, 6, 5  # five detections of two things
    unlabelled = [0] * 40
    unlabelled[9] = 2
    judged(evaluation, confusion={"threshold": 0.5, "iou": 0.5, "names": [*names, "background"],
                                  "matrix": matrix.tolist(), "unlabelled": unlabelled})  # fmt: skip
    rows = [against(0.5, 0.5, 0.01 * at, -1.0, 1.0, name) for at, name in enumerate(names)]
    comparison = {"images": 39, "resamples": 9, "confidence": 0.95, "AP": rows[0], "AP50": rows[0], "per_class": rows}
    verdict = {"promoted": False, "reason": "No.", "version": "3", "champion": "2", "previous": "2", "rules": [],
               "comparison": comparison}  # fmt: skip
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], verdict, None, tmp_path)
    text, page = words(tmp_path / "report.html"), (tmp_path / "report.html").read_text(encoding="utf-8")
    first = text[text.index("The 20 classes that differ most") : text.index("All 40 classes")]
    assert [int(n) for n in re.findall(r"kind (\d\d)", first)] == list(range(39, 19, -1))
    weakest = text[text.index("The 10 weakest classes") :]
    assert weakest.index("kind 07") < weakest.index("kind 00")
    assert "‘kind 03’ taken for ‘kind 05’ 4 times, of 5 labelled" in text
    assert "Missed most: ‘kind 08’ 6 of 7." in text and "each thing counted once: ‘kind 09’ 2 times." in text
    assert "Confusion matrix" not in page and page.count("All 40 classes") == 2
    assert "kind 39 no ground truth in this split" in text


def test_confusions_and_kinds_of_errors_are_told(tmp_path):
    dataset, evaluation = make(tmp_path, [RIGHT, BLIND])
    counts = dict(zip(ADVISED, (5, 3, 2, 1, 0, 0), strict=True))
    cost = dict(zip(ADVISED, (0.01, 0.001, 0.2, None, 0.0, 0.0), strict=True))
    matrix = [[3, 1, 0, 0], [0, 9, 0, 5], [0, 0, 0, 0], [0, 1, 0, 0]]
    judged(
        evaluation,
        errors={"threshold": 0.6, "counts": counts, "cost": cost},
        confusion={"threshold": 0.6, "iou": 0.5, "names": [*NAMES, "background"], "matrix": matrix},
    )
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)
    text, page = words(tmp_path / "report.html"), (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "11 errors at a score of 0.60" in text
    told = [text.index(f" {kind} {counts[kind]}") for kind in ("wrong class", "missed", "background", "poor box")]
    assert told == sorted(told) and "wrong class 2, AP50 +0.200 Found in place" in text
    assert "One object found more than once" not in text  # no advice where there is no such error
    assert f"‘{EVIL}’ taken for ‘cat’ once, of 4 labelled" in text and "Missed most: ‘cat’ 5 of 14." in text
    assert 'alt="Confusion matrix' in page and "<script" not in page


def test_the_test_split_is_judged_at_the_threshold_of_val_and_not_looked_at(tmp_path):
    """On val a score from 0.5 is best; on test it would be one of 0.2, with which nothing is wrong."""
    low, wrong = ([(BOX, 1)], [(BOX, 1, 0.2)]), ([(BOX, 1)], [(BOX, 1, 0.6), (FAR, 1, 0.4)])
    dataset, val = make(tmp_path, [wrong] * 3)
    other, test = make(tmp_path / "test", [low] * 3 + [RIGHT])
    (other / "val-00000.parquet").rename(dataset / "test-00000.parquet")
    split = read_json(other / "dataset.json")["splits"]["val"]
    split["shards"][0]["path"] = "test-00000.parquet"
    said = read_json(dataset / "dataset.json")
    write_json(dataset / "dataset.json", {**said, "splits": {**said["splits"], "test": split}})
    taken = {"threshold": 0.5, "iou": 0.5, "names": [*NAMES, "background"], "matrix": np.zeros((4, 4), int).tolist()}
    taken["matrix"][0][1] = 7
    judged(val, confusion=taken, errors={"threshold": 0.5, "counts": {k: 8 for k in ADVISED},
                                         "cost": dict.fromkeys(ADVISED)})  # fmt: skip
    judged(test, split="test")
    best = read_json(test / "metrics.json")["best_f1"]
    assert best["threshold"] < 0.2 and best["recall"] == 1.0
    report("t", dataset, None, {"val": val, "test": test}, None, load_settings(), [], None, None, tmp_path)
    text = words(tmp_path / "report.html")
    assert "on the test split" in text
    sentence = "At the threshold chosen on the val split, a score of 0.50, it finds 25% of the objects in the 4 images"
    assert f"{sentence}, and 100% of what it finds is right." in text
    assert "F1 0.400 at score 0.50, chosen on val" in text and "At its best threshold" not in text
    assert "Kinds of errors, val split 48 errors" in text and "What is taken for what, val split" in text
    assert f"‘{EVIL}’ taken for ‘cat’ 7 times" in text and "Kinds of errors, test split" not in text
    report("t", dataset, None, {"test": test}, None, load_settings(), [], None, None, tmp_path)
    text = words(tmp_path / "report.html")
    assert "At its best threshold, a score of 0.10, it finds 100%" in text and "Kinds of errors, test split" in text


@pytest.mark.parametrize(
    ("scores", "right", "error", "sentence"),
    [
        ((0.2, 0.8), (0.2, 0.8), 0.0, "they can be read as probabilities"),
        ((0.4, 0.9), (0.2, 0.7), 0.2, "they are too high, and no probabilities"),
        ((0.2, 0.6), (0.4, 0.8), 0.2, "they are too low, and no probabilities"),
        ((0.3, 0.7), (0.1, 0.9), 0.2, "some are too high and others too low"),
    ],
)
def test_what_a_score_means(tmp_path, scores, right, error, sentence):
    dataset, evaluation = make(tmp_path, [RIGHT])
    bins = [{"low": s - 0.05, "high": s + 0.05, "count": 10, "score": s, "precision": p}
            for s, p in zip(scores, right, strict=True)]  # fmt: skip
    bins.append({"low": 0.95, "high": 1.0, "count": 0, "score": None, "precision": None})
    judged(evaluation, calibration={"bins": bins, "error": error})
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)
    assert f"A score is wrong by {error:.3f} on average (expected calibration error): {sentence}" in words(
        tmp_path / "report.html"
    )


def test_best_typical_and_worst_images(tmp_path):
    off = ([(BOX, 1)], [([20.0, 20.0, 60.0, 52.0], 1, 0.9)])  # IoU 0.8
    empty = ([], [])
    scenes = [off] * 9 + [RIGHT] * 9 + [GHOST, CONFUSED] + [empty] * 30
    dataset, evaluation = make(tmp_path, scenes)
    categories = read_json(dataset / "dataset.json")["categories"]
    grids = Scenes(dataset, "val", categories, evaluation, 0.5, 100).grids()
    ids = {name: [scene["id"] for scene in grid] for name, grid in grids.items()}
    assert ids == {"worst": [20, 19], "best": [10, 11, 12, 13, 14, 15], "typical": [1, 2, 3, 4, 5, 6]}
    quality = [grids[name][0]["quality"] for name in ("worst", "best", "typical")]
    np.testing.assert_allclose(quality, [0, 1, 0.8], atol=1e-6)
    np.testing.assert_allclose(grids["worst"][1]["quality"], 2 / 3, atol=1e-6)  # one of two found is right, none missed
    assert grids["best"][0]["caption"] == "its one object found"


def test_captions_tell_the_kinds_of_errors_that_are_counted(tmp_path):
    """An own-class overlap of 0.25 comes before another class at 1; near another class is not on nothing."""
    inner = [20.0, 20.0, 60.0, 52.0]  # IoU 0.8 with BOX
    own = [20.0, 20.0, 36.0, 40.0]  # IoU 0.25 with inner
    both = ([(inner, 0), (own, 1)], [(inner, 1, 0.9)])
    near = ([(BOX, 0)], [([40.0, 20.0, 80.0, 60.0], 1, 0.8)])
    dataset, evaluation = make(tmp_path, [both, near])
    categories = read_json(dataset / "dataset.json")["categories"]
    scenes = Scenes(dataset, "val", categories, evaluation, 0.5, 100)
    captions = {scene["id"]: scene["caption"] for grid in scenes.grids().values() for scene in grid}
    assert captions == {
        1: f"missed ‘{EVIL}’; ‘cat’ found at 0.90, but out of place (IoU 0.25)",
        2: f"missed ‘{EVIL}’; ‘cat’ found at 0.80, near something else",
    }
    counts = error_types(scenes.matches, 0.5)["counts"]
    assert {kind: count for kind, count in counts.items() if count} == {
        "poor box": 1, "wrong class and poor box": 1, "missed": 2
    }  # fmt: skip


def test_a_page_of_few_images_shows_none_twice(tmp_path):
    dataset, evaluation = make(tmp_path, [GHOST, TWICE, ASKEW])
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(int(number) for _, number in re.findall(CAPTION, page)) == [1, 2, 3]


@pytest.mark.parametrize("queries", ["anchors", "learned"])
def test_where_it_looks_is_drawn(tmp_path, queries):
    dataset, evaluation = make(tmp_path, [RIGHT] * 4 + [CONFUSED, BLIND])
    sizes = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 1, "dim_feedforward": 32, "num_queries": 5}
    preset = {"preset": "tiny"} if queries == "anchors" else {"backbone": "small", "image_size": 96}
    model = build_model(ModelConfig.model_validate({**preset, **sizes, "num_classes": 3}))
    save_checkpoint(tmp_path / "checkpoint", model, read_json(dataset / "dataset.json")["categories"])
    report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path,
           checkpoint=tmp_path / "checkpoint")  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    looks = page[page.index('id="looks"') : page.index('id="good"')]
    captions = [caption.split(":")[0] for caption, _ in re.findall(CAPTION, looks)]
    assert captions == ["one of the best", "one of the typical", "one of the worst"]
    for source in re.findall(r'src="data:image/jpeg;base64,([^"]*)"', looks):
        with Image.open(io.BytesIO(base64.b64decode(source))) as picture:
            assert np.ptp(np.asarray(picture).reshape(-1, 3), axis=0).max() > 50  # the image itself has one colour


def test_where_it_looks_is_not_known_without_a_checkpoint(tmp_path):
    dataset, evaluation = make(tmp_path, [RIGHT])
    place = tmp_path / "checkpoint"
    for sentence in ("The checkpoint is not here", "The checkpoint cannot be read: "):
        report("t", dataset, None, {"val": evaluation}, None, load_settings(), [], None, None, tmp_path,
               checkpoint=place)  # fmt: skip
        assert sentence in words(tmp_path / "report.html")
        place.mkdir(exist_ok=True)
        (place / "model.safetensors").write_bytes(b"broken")


def test_the_way_from_the_data_to_the_predictions(tmp_path):
    dataset, evaluation = make(tmp_path, [RIGHT])
    weights, other = "ab" * 32, "cd" * 32
    train = {"stage": "train", "version": 7, "key": "train-key", "seconds": 1.0, "result": {"run_id": "the-run"},
             "settings": {"seed": 0, "train": {"lr": 0.5}}}  # fmt: skip
    measured = {"stage": "evaluate", "version": 2, "key": "evaluate-key", "seconds": 1.0,
                "inputs": {"weights": weights}, "result": {"split": "val", "images": 1}}  # fmt: skip
    registered = {"stage": "register", "version": 1, "key": "register-key", "seconds": 1.0,
                  "result": {"name": "things", "version": "4", "weights_sha256": weights}}  # fmt: skip
    verdict = {"promoted": False, "reason": "No.", "version": "4", "champion": "3", "previous": "3", "rules": []}

    def text(predicted_by):
        version = "4" if predicted_by == weights else "3"
        predicted = {"stage": "predict", "version": 1, "key": "predict-key", "seconds": 1.0, "result": {"images": 1234},
                     "inputs": {"weights": predicted_by, "model": ["things", version]}}  # fmt: skip
        stages = [train, measured, registered, predicted]
        report("t", dataset, train, {"val": evaluation}, None, load_settings(), stages, verdict, None, tmp_path)
        found = words(tmp_path / "report.html")
        return found[found.index("Where it came from dataset") :]

    found = text(weights)
    steps = ["dataset things d1g35t", "val split 1 images, from instances_val.json 5b1c",
             "training run the-run in MLflow train-key", f"weights sha256 of model.safetensors {weights}",
             "evaluation of the val split, on 1 images evaluate-key", "model things version 4, not champion",
             "predictions 1,234 images, by things version 4 predict-key"]  # fmt: skip
    assert [found.index(step) for step in steps] == sorted(found.index(step) for step in steps)
    assert "train.lr 0.002 0.5" in found
    assert f"by things version 3, another model (weights {other[:12]}…) predict-key" in text(other)


def test_what_is_not_known_of_the_way_is_said(tmp_path):
    dataset, _ = make(tmp_path, [RIGHT])
    report("t", dataset, None, {}, None, load_settings(), [], None, None, tmp_path)
    text = words(tmp_path / "report.html")
    for step in ("training", "weights", "model", "predictions"):
        assert f"{step} not known here" in text


def test_the_stage_logs_the_page_and_finds_the_last_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.look.look_at_data", lambda folder, settings: [])
    dataset, evaluation = make(tmp_path, [RIGHT, BLIND])
    store, settings = tmp_path / "store", RunSettings()
    (store / "train" / "checkpoint").mkdir(parents=True)
    (store / "train" / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    write_json(store / "train" / "history.json", {"steps": [], "validations": [{"step": 1, "AP": 0.1, "AP50": 0.2}]})
    data = {"stage": "ingest", "version": 1, "key": "i", "seconds": 1.0, "folder": str(dataset),
            "result": {"name": "things", "digest": "d1g35t"}}  # fmt: skip
    tracked = tracker(settings, store, "things")
    run = tracked.start_run("train")
    training = {"stage": "train", "version": 1, "key": "t", "seconds": 1.0, "folder": str(store / "train"),
                "result": {"run_id": run}}  # fmt: skip
    metrics = read_json(evaluation / "metrics.json")
    measured = {"stage": "evaluate", "version": 1, "key": "e", "seconds": 1.0, "folder": str(evaluation),
                "result": {key: metrics[key] for key in ("AP", "AP50", "AP75", "split", "images")}}  # fmt: skip

    checkpoint = store / "train" / "checkpoint"
    assert last_verdict(settings, store, data, checkpoint) is None
    client = tracked.client()
    client.create_registered_model("things")
    for weights in (b"others", b"weights"):
        tags = {"model.safetensors_sha256": hashlib.sha256(weights).hexdigest()}
        client.create_model_version("things", str(checkpoint), run, tags=tags)
    assert last_verdict(settings, store, data, checkpoint) is None  # registered, but never judged
    for version, promoted in (("1", False), ("2", True)):
        folder = store / "promote" / f"things-{version}"
        folder.mkdir(parents=True)
        verdict = {"promoted": promoted, "reason": f"Since {version}.", "version": version, "champion": "2",
                   "previous": None, "rules": []}  # fmt: skip
        write_json(folder / "verdict.json", verdict)
    client.set_registered_model_alias("things", "champion", "2")
    verdict = last_verdict(settings, store, data, checkpoint)
    assert verdict["result"]["version"] == verdict["result"]["champion"] == "2"

    record = report_stage(settings, store, data, [data, training, measured], training, [measured], verdict, None)
    assert "Promoted. Since 2." in words(Path(record["result"]["report"]))
    assert "The checkpoint cannot be read" in words(Path(record["result"]["report"]))
    logged = {file.path for file in client.list_artifacts(run, "report")}
    assert logged == {"report/report.html", "report/validation_grid.png", "report/curves.png"}
    assert client.get_run(run).data.metrics["val/final/AP"] == pytest.approx(metrics["AP"])

    # Asked again about the standing champion: the same page. Taken back, or told otherwise: another.
    def page(**changes):
        told = {**verdict, "result": {**verdict["result"], **changes}}
        return report_stage(settings, store, data, [data, training, measured], training, [measured], told, None)

    again = page(reason="It already is the champion.", previous="2", who="somebody", when="later")
    assert again["reused"] and again["folder"] == record["folder"]
    broken = {"rule": "AP reaches the floor", "ok": False, "figure": 0.1, "limit": 0.5, "words": "it is low"}
    refused = page(promoted=False, rules=[broken])
    other = page(promoted=False, rules=[{**broken, "words": "it is lower"}])
    same = against(0.5, 0.5, 0.0, 0.0, 0.0)
    found = {"images": 9, "resamples": 9, "confidence": 0.95, "AP": same, "AP50": same, "per_class": []}
    compared, because = page(comparison=found), page(why="weekly")
    assert len({each["folder"] for each in (record, refused, other, compared, because)}) == 5

    client.set_registered_model_alias("things", "champion", "1")
    client.set_model_version_tag("things", "2", "rolled_back", "misses cats")
    verdict = last_verdict(settings, store, data, checkpoint)
    record = page()
    text = words(Path(record["result"]["report"]))
    assert not record["reused"] and "Champion: version 2" not in text
    assert "Promoted, but no longer champion. It was rolled back: misses cats. The champion now is version 1." in text
    client.delete_registered_model_alias("things", "champion")
    verdict = last_verdict(settings, store, data, checkpoint)
    assert "There is no champion now." in words(Path(page()["result"]["report"]))


def test_the_way_and_the_rules_do_not_claim_a_title_that_was_taken_back(tmp_path):
    dataset, _ = make(tmp_path, [RIGHT])
    rule = {"rule": "AP reaches the floor", "ok": True, "figure": 0.3, "limit": 0.1, "words": "it does"}
    promoted = {"promoted": True, "reason": "Better.", "version": "2", "champion": "2", "previous": "1",
                "rules": [rule]}  # fmt: skip

    def text(**changes):
        verdict = {**promoted, **changes}
        report("t", dataset, None, {}, None, load_settings(), [], verdict, None, tmp_path)
        return words(tmp_path / "report.html")

    assert "registered version 2, champion" in text() and "It passed every rule of the gate." in text()
    since = text(champion="1", rolled_back=None)
    assert "registered version 2, not champion" in since and "The champion now is version 1." in since
    assert "It passed every rule of the gate, but is no longer champion." in since and "rolled back" not in since
    later = text(promoted=False, champion="3")
    assert "Not promoted. Better. The champion now is version 3." in later and "stays" not in later
