"""What `detr evaluate` prints; the stages it runs have tests of their own."""
from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from click.testing import CliRunner

from jobs.evaluate import main, table
from pipelines.evaluate import full_metrics


@pytest.fixture
def evaluation():
    """A finished evaluation of twenty images with cats, dogs that are not found, and no ox."""
    random = np.random.default_rng(0)
    names = ["cat", "dog", "ox"]
    truth = {"images": [{"id": i} for i in range(20)], "annotations": [],
             "categories": [{"id": at, "name": name} for at, name in enumerate(names, 1)]}  # fmt: skip
    found = []
    for n in range(60):
        box = [*random.uniform(0, 200, 2).tolist(), 40.0, 40.0]
        truth["annotations"].append({"id": n + 1, "image_id": n % 20, "category_id": 1 + (n % 3 == 0), "bbox": box,
                                     "area": 1600.0, "iscrowd": 0})  # fmt: skip
        if n % 3 and n % 5:
            box = [box[0] + 3, *box[1:]]
            found.append({"image_id": n % 20, "category_id": 1, "bbox": box, "score": float(random.uniform(0.2, 1))})
    return {**full_metrics(truth, found, resamples=50), "images": 20, "split": "val", "resamples": 50}


def test_the_table_says_how_sure_where_it_cuts_and_where_it_errs(evaluation):
    lines = table(evaluation, evaluation["errors"]).splitlines()
    ap, (low, high) = evaluation["AP"], evaluation["intervals"]["AP"]
    assert lines[:2] == ["20 images of val", f"AP     {ap:.3f} ({low:.3f} to {high:.3f})"] and low < ap < high
    assert "APs    no ground truth" in lines and "ox   no ground truth" in lines
    assert any(line.startswith("dog  AP 0.000") and line.endswith("nothing found") for line in lines)
    best = evaluation["per_class"][0]["best_f1"]
    assert any(line.endswith(f"best F1 {best['f1']:.3f} at score {best['threshold']:.3f}") for line in lines)
    kinds = dict(line.rsplit(maxsplit=2)[::2] for line in lines[-6:])
    assert lines[-1].split() == ["missed", "28", f"{evaluation['errors']['cost']['missed']:+.3f}"]
    assert set(kinds) == set(evaluation["errors"]["counts"])
    assert "-1" not in "\n".join(lines)


def test_the_table_says_where_too_few_images_are_to_say_how_sure(evaluation):
    cat = evaluation["per_class"][0]
    cat["interval"], evaluation["intervals"]["AP"] = None, None
    lines = table(evaluation, evaluation["errors"]).splitlines()
    assert f"AP     {evaluation['AP']:.3f} (too few images to say how sure)" in lines
    assert any(line.startswith(f"cat  AP {cat['AP']:.3f} (too few images to say how sure)  AP50") for line in lines)
    assert f"AP75   {evaluation['AP75']:.3f}" in lines
    assert "too few" not in table({**evaluation, "resamples": 0}, evaluation["errors"])


def test_against_another_model_there_is_an_answer_in_words(evaluation, monkeypatch, tmp_path):
    import pipelines.compare
    import pipelines.workflow

    asked = []

    def stage(settings, store, data, checkpoint, split):
        asked.append((str(checkpoint), split))
        folder = tmp_path / f"of-{checkpoint}"
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(evaluation))
        result = {k: v for k, v in evaluation.items() if k not in ("errors", "confusion", "calibration")}
        return {"folder": str(folder), "result": result, "reused": False}

    def compare(settings, dataset_folder, split, first, second):
        assert (dataset_folder.name, split, first.name, second.name) == ("data", "test", "of-theirs", "of-mine")
        higher = {"first": 0.5, "second": 0.521, "difference": 0.021, "low": 0.004, "high": 0.037}
        unsure = {**higher, "low": -0.01}
        per_class = [{"name": "cat", "id": 1, **unsure}, {"name": "ox", "id": 3, **dict.fromkeys(higher)}]
        return {"images": 20, "resamples": 50, "AP": higher, "AP50": unsure, "per_class": per_class}

    monkeypatch.setattr("jobs.evaluate.ray_session", lambda settings: contextlib.nullcontext())
    monkeypatch.setattr("jobs.evaluate.find_checkpoint", lambda *given: lambda data: ("mine", None))
    monkeypatch.setattr(pipelines.workflow, "find_data", lambda *given: lambda: {"folder": "data"})
    monkeypatch.setattr(pipelines.workflow, "download_model", lambda *given: ("theirs", "m", "1"))
    monkeypatch.setattr(pipelines.workflow, "evaluate_stage", stage)
    monkeypatch.setattr(pipelines.compare, "compare_evaluations", compare)
    told = ["--split", "test", "--against", "models:/cells@champion"]
    lines = CliRunner().invoke(main, told).output.splitlines()
    assert asked == [("theirs", "test"), ("mine", "test")]  # the store's last evaluation is one's own
    assert lines[lines.index("Against models:/cells@champion:") + 1 :] == [
        "AP is 0.021 higher (+0.004 to +0.037, 95 %), 0.521 instead of 0.500: surely better",
        "AP50 is 0.021 higher (-0.010 to +0.037, 95 %), 0.521 instead of 0.500: no sure difference",
        "cat: AP is 0.021 higher (-0.010 to +0.037, 95 %), 0.521 instead of 0.500: no sure difference",
        "ox: AP: no ground truth",
    ]
    said = json.loads(CliRunner().invoke(main, [*told, "--json"]).output.splitlines()[-1])
    assert said["comparison"]["AP"]["low"] == 0.004 and said["per_class"][2]["AP"] is None
    alone = json.loads(CliRunner().invoke(main, ["--json"]).output.splitlines()[-1])
    assert alone["comparison"] is None and alone["errors"]["counts"]["missed"] == 28
