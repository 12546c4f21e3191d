"""Checkpoints come back as they were written, and say what is wrong with those that cannot."""
from __future__ import annotations

import json

import fill
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from detr.checkpoint import CheckpointError, fit_weights, load_checkpoint, load_official, read_pth, save_checkpoint
from detr.config import ModelConfig
from detr.model import DETR

CONFIG = ModelConfig(
    preset="tiny", hidden_dim=32, nheads=4, dim_feedforward=64, num_queries=6, num_classes=3, dec_layers=2
)
CATEGORIES = [{"id": 4, "name": "circle"}, {"id": 9, "name": "grün"}, {"id": 11, "name": "box"}]


def make_model(seed: int = 0, config: ModelConfig = CONFIG) -> DETR:
    torch.manual_seed(seed)
    return DETR(config).eval()


def outputs(model: DETR) -> dict:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images, torch.zeros(1, 64, 64, dtype=torch.bool))


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "best", make_model(), CATEGORIES)
    return tmp_path / "best"


def rewrite(folder, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


# ---------------------------------------------------------------- own folders


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ModelConfig.model_validate(
            {**CONFIG.model_dump(), "queries": "learned", "denoising": {}, "class_loss": "softmax",
             "position_embedding": "learned"}
        ),
        CONFIG.model_copy(update={"backbone": "resnet18", "norm": "frozen"}),
    ],
    ids=["tiny", "learned", "resnet18"],
)
def test_a_model_comes_back_as_it_was_saved(tmp_path, config):
    model = make_model(1, config).train()
    model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))  # moves the norms' statistics
    model.eval()
    save_checkpoint(tmp_path, model, CATEGORIES)
    torch.manual_seed(99)
    loaded, _ = load_checkpoint(tmp_path)
    assert not loaded.training and loaded.config == config
    want, got = outputs(model), outputs(loaded)
    assert torch.equal(got["pred_logits"], want["pred_logits"]) and torch.equal(got["pred_boxes"], want["pred_boxes"])
    assert list(loaded.state_dict()) == list(model.state_dict())


def test_config_holds_what_is_needed_to_use_the_model(tmp_path):
    save_checkpoint(
        tmp_path / "a" / "b", make_model(), CATEGORIES, score_threshold=0.3, dataset_digest="abc",
        trained={"steps": 7}, metrics={"AP": 0.25},
    )  # fmt: skip
    written = json.loads((tmp_path / "a" / "b" / "config.json").read_text(encoding="utf-8"))
    assert written == load_checkpoint(tmp_path / "a" / "b")[1]
    assert written["format"] == 1 and written["categories"] == CATEGORIES
    assert written["score_threshold"] == 0.3 and written["dataset_digest"] == "abc"
    assert written["trained"] == {"steps": 7}
    assert ModelConfig.model_validate(written["model"]) == CONFIG
    assert json.loads((tmp_path / "a" / "b" / "metrics.json").read_text()) == {"format": 1, "AP": 0.25}
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "config.json", "metrics.json", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"best is not a checkpoint folder: it has no {name}"):
        load_checkpoint(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint folder"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": "x"}', '{"format": 1}', '{"format": 1, "model": {"hidden_dim": -1}}'],
)
def test_a_damaged_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="best is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_damaged_weights_are_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="best is damaged"):
        load_checkpoint(folder)


def test_a_later_format_says_so_before_anything_else(folder):
    rewrite(folder, format=2, model={"of the": "future"})
    with pytest.raises(CheckpointError, match=r"best was written by a later version \(format 2\)"):
        load_checkpoint(folder)


def test_an_unknown_setting_of_the_model_is_named(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rewrite(folder, model={**config["model"], "wings": 2})
    with pytest.raises(CheckpointError, match="wings"):
        load_checkpoint(folder)


def test_weights_that_do_not_fit_are_named(folder):
    state = load_file(folder / "model.safetensors")
    del state["class_embed.bias"]
    state["surplus.weight"] = torch.zeros(1)
    state["input_proj.bias"] = torch.zeros(5)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    for part in ("best", "missing class_embed.bias", "unexpected surplus.weight", "of another shape input_proj.bias"):
        assert part in str(caught.value)


# ---------------------------------------------------------------- fine-tuning


def test_fitting_weights_are_taken_and_the_others_listed():
    donor, model = make_model(1), make_model(2, CONFIG.model_copy(update={"num_classes": 8}))
    head = model.class_embed.weight.clone()
    left_out = fit_weights(model, donor.state_dict())
    assert left_out == ["class_embed.bias", "class_embed.weight", "decoder.label_embed.weight"]
    assert torch.equal(model.class_embed.weight, head)
    assert torch.equal(model.input_proj.weight, donor.input_proj.weight)


# ---------------------------------------------------------------- official files


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A detr_resnet50 as published, with the reference's weights."""
    check = fill.load_json("fill_check")
    keys = fill.load_json("state_dict_keys")["detr_resnet50"]
    state = {
        key: torch.from_numpy(np.ascontiguousarray(fill.fill_array(check["salt"], key, shape)))
        for key, shape, _ in keys
    }
    path = tmp_path_factory.mktemp("official") / "detr-r50.pth"
    torch.save({"model": state}, path)
    return path, state


def test_an_official_file_is_loaded_and_gives_what_its_weights_give(official):
    path, state = official
    model = load_official(path)
    assert not model.training and model.config == ModelConfig(preset="detr_resnet50")
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    found = outputs(model)
    assert found["pred_logits"].shape == (1, 100, 92) and torch.isfinite(found["pred_logits"]).all()


def test_missing_unexpected_and_misshapen_weights_are_named(official, tmp_path):
    _, state = official
    changed = dict(state)
    del changed["transformer.decoder.norm.weight"]
    changed["mask_head.lay1.weight"] = torch.zeros(1)
    changed["bbox_embed.layers.2.bias"] = torch.zeros(5)
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as caught:
        load_official(tmp_path / "other.pth")
    for part in (
        "other.pth",
        "missing transformer.decoder.norm.weight (1 in all)",
        "unexpected mask_head.lay1.weight (1 in all)",
        "of another shape bbox_embed.layers.2.bias (1 in all)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": {"class_embed.weight": torch.zeros(92, 256)}}, "holds no DETR: it has no query_embed.weight"),
        ({"model": {"fc.weight": torch.zeros(2, 2)}}, "holds no DETR: it has no class_embed.weight"),
        (
            {"class_embed.weight": torch.zeros(92), "query_embed.weight": torch.zeros(9, 8)},
            r"holds no DETR: class_embed.weight has the shape \[92\], query_embed.weight \[9, 8\]",
        ),
        (
            {"class_embed.weight": torch.zeros(92, 7), "query_embed.weight": torch.zeros(9, 7)},
            r"holds no DETR: class_embed.weight has the shape \[92, 7\]",
        ),
        ({"model": [1, 2]}, "holds no weights"),
        ([1, 2], "holds no weights"),
        (ValueError, "it is damaged, or holds more than tensors$"),
    ],
)
def test_a_file_that_is_no_official_checkpoint_says_why(tmp_path, content, reason):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_official(tmp_path / "x.pth")
    assert "x.pth" in str(caught.value)


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth cannot be read safely"):
        load_official(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_absent_files_are_named(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not more")
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        read_pth(tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"there is no file .*absent\.pth"):
        read_pth(tmp_path / "absent.pth")


def test_counters_of_batch_norms_are_left_out(tmp_path):
    torch.save({"bn.weight": torch.ones(2), "bn.num_batches_tracked": torch.tensor(5)}, tmp_path / "bn.pth")
    assert list(read_pth(tmp_path / "bn.pth")) == ["bn.weight"]
