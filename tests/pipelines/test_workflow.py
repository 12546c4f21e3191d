"""What a stage's result depends on."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipelines.look import Finding
from pipelines.settings import RunSettings, UserError, override_settings
from pipelines.stage import run_stage, write_json
from pipelines.workflow import _look, _training_inputs, _trials, evaluate_stage, pipeline

DATA = {"result": {"digest": "d"}}


def test_other_weights_at_the_same_path_are_another_training(tmp_path):
    file, folder = tmp_path / "backbone.pth", tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    file.write_bytes(b"one")
    given = {"train.backbone_weights": str(file), "train.init_from": str(folder)}
    settings = override_settings(RunSettings(), given)
    before = _training_inputs(settings, DATA)
    assert before == _training_inputs(settings, DATA) and before != _training_inputs(RunSettings(), DATA)
    file.write_bytes(b"two")
    after = _training_inputs(settings, DATA)
    assert before["backbone_weights"] != after["backbone_weights"] and before["init_from"] == after["init_from"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        _training_inputs(settings, DATA)


def test_the_same_weights_read_in_another_way_are_measured_anew(tmp_path, monkeypatch):
    """With labels in another order each class is another one; its thresholds alone change nothing."""
    measured = []
    monkeypatch.setattr("pipelines.evaluate.evaluate", lambda *arguments: measured.append(arguments) or {"AP": 0.5})
    data, checkpoint = tmp_path / "data", tmp_path / "checkpoint"
    data.mkdir()
    checkpoint.mkdir()
    write_json(data / "dataset.json", {"digest": "d", "splits": {"val": {"digest": "v"}}})
    (checkpoint / "model.safetensors").write_bytes(b"one")
    cat, dog = {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}
    for config, times in (
        ({"categories": [cat, dog], "score_threshold": 0.5}, 1),
        ({"categories": [cat, dog], "score_threshold": 0.4, "score_thresholds": {"3": 0.3}}, 1),
        ({"categories": [dog, cat]}, 2),
        ({"categories": [cat, dog], "model": {"image_size": 64}}, 3),
    ):
        write_json(checkpoint / "config.json", config)
        evaluate_stage(RunSettings(), tmp_path / "store", {"folder": str(data)}, checkpoint, "val")
        assert len(measured) == times


def test_what_will_hurt_is_said_once_and_stops_nothing(monkeypatch, capsys):
    seen = []
    finding = Finding(what="1 class", which=("emu",), change="Label more.")
    monkeypatch.setattr("pipelines.look.look_at_data", lambda folder, settings: seen.append(folder) or [finding])
    for key in ("one", "one", "two"):
        _look(RunSettings(), {"key": key, "folder": "somewhere"})
    assert len(seen) == 2
    said = capsys.readouterr()
    assert said.err.count("emu") == 2 and not said.out


def test_the_report_takes_the_trials_of_this_version_only(tmp_path):
    stages = [{"stage": "ingest", "folder": str(tmp_path)}, {"stage": "sweep", "folder": str(tmp_path / "sweep")}]
    (tmp_path / "sweep").mkdir()
    assert _trials(stages) is None
    for number, taken in ((1, False), (2, True)):
        write_json(tmp_path / "sweep" / "trials.json", {"format": number, "trials": []})
        assert (_trials(stages) is not None) == taken
    assert _trials(stages[:1]) is None


def test_a_ledger_that_does_not_answer_is_one_sentence(tmp_path, capfd):
    settings = override_settings(RunSettings(), {"workflow.database": "postgresql://me@127.0.0.1:9/ledger"})
    with pytest.raises(UserError, match=r"ledger at postgresql://127\.0\.0\.1:9/ledger cannot be used: .*refused"):
        pipeline(settings, tmp_path / "store", SimpleNamespace(inputs={}))
    assert "Traceback" not in capfd.readouterr().err


def test_a_store_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        pipeline(RunSettings(), tmp_path / "file" / "store", SimpleNamespace(inputs={}))
    with pytest.raises(UserError, match="cannot be made"):
        run_stage(tmp_path / "file", "train", 1, {}, {}, lambda folder: {})
