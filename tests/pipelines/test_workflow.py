"""What a stage's result depends on."""
from __future__ import annotations

import pytest

from pipelines.settings import RunSettings, UserError, override_settings
from pipelines.workflow import _training_inputs

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
