"""Checkpoints come back as they were written, and say what is wrong with those that cannot."""
from __future__ import annotations

import argparse
import json
import urllib.error

import fill
import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from detr.checkpoint import (
    CheckpointError,
    init_from,
    load_backbone,
    load_checkpoint,
    load_official,
    read_weights,
    save_checkpoint,
)
from detr.coco_names import COCO_CATEGORIES, COCO_NAMES
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
            {**CONFIG.model_dump(), "queries": "learned", "two_stage": False, "denoising": {},
             "class_loss": "softmax", "position_embedding": "learned"}
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


def changed(**settings) -> ModelConfig:
    return ModelConfig.model_validate({**CONFIG.model_dump(), **settings})


SOFTMAX = {"queries": "learned", "two_stage": False, "denoising": {}, "class_loss": "softmax"}


def test_class_rows_go_where_the_names_agree_and_all_else_is_taken(folder):
    donor, _ = load_checkpoint(folder)
    model = make_model(2, changed(num_classes=4))
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    said = init_from(model, folder, ["Box", "kite", "GRÜN", "circle "])
    own, theirs = model.state_dict(), donor.state_dict()
    proposals = "decoder.proposals.class_embed."
    by_class = {"class_embed.weight", "class_embed.bias", "decoder.label_embed.weight", proposals + "weight",
                proposals + "bias"}  # fmt: skip
    for key in by_class:
        assert torch.equal(own[key][[0, 2]], theirs[key][[2, 1]]), key
        assert torch.equal(own[key][[1, 3]], fresh[key][[1, 3]]), key
    for key in own.keys() - by_class:
        assert torch.equal(own[key], theirs[key]), key
    assert "2 of 4 classes by name; new classes kite, circle " in said
    assert "anew" not in said and "not used" not in said and str(folder) in said


def test_the_row_of_no_object_moves_with_the_number_of_classes(tmp_path):
    donor = make_model(1, changed(**SOFTMAX))
    save_checkpoint(tmp_path, donor, CATEGORIES)
    model = make_model(2, changed(**SOFTMAX, num_classes=2))
    fresh = model.class_embed.weight.clone()
    init_from(model, tmp_path, ["box", "other"])
    assert torch.equal(model.class_embed.weight[[0, 2]], donor.class_embed.weight[[2, 3]])
    assert torch.equal(model.class_embed.bias[[0, 2]], donor.class_embed.bias[[2, 3]])
    assert torch.equal(model.class_embed.weight[1], fresh[1])


@pytest.mark.parametrize("number", [4, 9])
def test_learned_queries_are_cut_or_extended(tmp_path, number):
    donor = make_model(1, changed(**SOFTMAX))
    save_checkpoint(tmp_path, donor, CATEGORIES)
    model = make_model(2, changed(**SOFTMAX, num_queries=number))
    fresh = model.query_embed.weight.clone()
    said = init_from(model, tmp_path, ["box"] * 3)
    both = min(number, 6)
    assert torch.equal(model.query_embed.weight[:both], donor.query_embed.weight[:both])
    assert torch.equal(model.query_embed.weight[both:], fresh[both:])
    assert f"{both} of 6 queries for {number}" in said


def test_fewer_anchors_still_cover_the_image(tmp_path):
    """Anchors stand row by row: the first ones would leave the lower part of the image to nobody."""
    donor = make_model(1, changed(num_queries=60, two_stage=False))
    save_checkpoint(tmp_path, donor, CATEGORIES)
    model = make_model(2, changed(num_queries=20, two_stage=False))
    init_from(model, tmp_path, ["box"] * 3)
    rows = [next(i for i in range(60) if torch.equal(donor.decoder.anchors[i], a)) for a in model.decoder.anchors]
    assert torch.equal(model.decoder.content, donor.decoder.content[rows])
    y = model.decoder.anchors.sigmoid()[:, 1]
    assert y.min() < 0.2 and y.max() > 0.8 and len(set(rows)) == 20


def test_what_does_not_fit_is_left_and_named(folder):
    """Another class loss, another backbone, another kind of query: the rest is worth having."""
    donor, _ = load_checkpoint(folder)
    model = make_model(2, changed(**SOFTMAX, backbone="resnet18", norm="frozen"))
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    said = init_from(model, folder, ["box", "circle", "grün"])
    own, theirs = model.state_dict(), donor.state_dict()
    left = [k for k in own if torch.equal(own[k], fresh[k]) and not (k in theirs and torch.equal(own[k], theirs[k]))]
    assert {"class_embed.weight", "class_embed.bias", "query_embed.weight", "input_proj.weight"} <= set(left)
    assert all(torch.equal(own[k], fresh[k]) for k in own if k.startswith("backbone.0."))
    for key in ("bbox_embed.layers.0.weight", "transformer.encoder.layers.1.self_attn.in_proj_weight"):
        assert torch.equal(own[key], theirs[key])
    assert "initialised anew backbone.0.body.bn1.bias" in said and "not used backbone.0.stages" in said


def test_half_a_backbone_is_not_taken(tmp_path):
    """A deeper ResNet shares names and shapes with a shallower one, and half of each is neither."""
    small = {**SOFTMAX, "norm": "frozen", "backbone": "resnet18"}
    save_checkpoint(tmp_path, make_model(1, changed(**small)), CATEGORIES)
    model = make_model(2, changed(**{**small, "backbone": "resnet34"}))
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    init_from(model, tmp_path, ["a", "b", "c"])
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


def test_official_weights_go_to_classes_by_their_names(tmp_path):
    donor = make_model(1, changed(**SOFTMAX, num_classes=91))
    inner = {f"detr.{k}": v for k, v in donor.state_dict().items()}  # as in a panoptic file
    torch.save({"model": {**inner, "mask_head.lay1.bias": torch.zeros(3)}}, tmp_path / "official.pth")
    model = make_model(2, changed(**SOFTMAX))
    said = init_from(model, tmp_path / "official.pth", ["Dog", "zebra crossing", "zebra"])
    assert torch.equal(model.class_embed.weight[[0, 2, 3]], donor.class_embed.weight[[18, 24, 91]])
    assert torch.equal(model.query_embed.weight, donor.query_embed.weight)
    assert "2 of 3 classes by name; new classes zebra crossing" in said and "not used mask_head.lay1.bias (1" in said


def test_settings_that_no_shape_shows_are_spoken_of(tmp_path):
    save_checkpoint(tmp_path, make_model(1, changed(**SOFTMAX)), CATEGORIES)
    names = [category["name"] for category in CATEGORIES]
    assert "careful" not in init_from(make_model(2, changed(**SOFTMAX)), tmp_path, names)
    other = make_model(2, changed(**SOFTMAX, nheads=2, pre_norm=True))
    said = init_from(other, tmp_path, names)
    assert "trained with model.nheads=4, and here it is 2" in said
    assert "trained with model.pre_norm=False, and here it is True" in said


def test_a_head_of_nameless_classes_is_taken_when_it_fits(tmp_path):
    donor = make_model(1, changed(**SOFTMAX))
    torch.save(donor.state_dict(), tmp_path / "own.pth")
    same, other = make_model(2, changed(**SOFTMAX)), make_model(2, changed(**SOFTMAX, num_classes=5))
    init_from(same, tmp_path / "own.pth", ["a", "b", "c"])
    assert torch.equal(same.class_embed.weight, donor.class_embed.weight)
    assert "anew class_embed.bias, class_embed.weight (2 in all)" in init_from(other, tmp_path / "own.pth", ["a"] * 5)


def test_a_checkpoint_of_which_nothing_fits_is_refused(tmp_path):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"nothing in .*x\.safetensors fits this model"):
        init_from(make_model(), tmp_path / "x.safetensors", ["a", "b", "c"])
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        init_from(make_model(), tmp_path, ["a", "b", "c"])


def test_the_named_map_of_official_labels():
    assert len(COCO_NAMES) == 80 and set(range(91)) - set(COCO_NAMES) == {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert COCO_NAMES[1] == "person" and COCO_NAMES[44] == "bottle" and COCO_NAMES[90] == "toothbrush"
    assert [c["id"] for c in COCO_CATEGORIES] == list(range(91)) and COCO_CATEGORIES[18]["name"] == "dog"
    assert len({c["name"] for c in COCO_CATEGORIES}) == 91


# ---------------------------------------------------------------- backbones


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(3)
    net = torchvision.models.resnet18()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.weight)
    return net.eval()


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_backbone_file_gives_the_features_of_its_network(tmp_path, classifier, norm, suffix):
    path = tmp_path / f"resnet18{suffix}"
    (torch.save if suffix == ".pth" else save_file)(classifier.state_dict(), path)
    model = make_model(1, changed(**SOFTMAX, backbone="resnet18", norm=norm))
    assert load_backbone(model, path) == f"backbone: 100 weights of {path}"
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(images))))
        want = classifier.layer4(classifier.layer3(classifier.layer2(classifier.layer1(x))))
        torch.testing.assert_close(model.backbone[0](images)[-1], want, rtol=1e-4, atol=1e-4)


def test_a_backbone_file_that_does_not_fit_is_refused(tmp_path, classifier):
    torch.save(classifier.state_dict(), tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match=r"r18\.pth do not fit: missing layer1.2.bn1.bias"):
        load_backbone(make_model(1, changed(**SOFTMAX, backbone="resnet34", norm="frozen")), tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match="'small' has no weights of ImageNet"):
        load_backbone(make_model(), "imagenet")


def test_torchvisions_weights_come_by_the_backbones_name(monkeypatch, tmp_path, classifier):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    model = make_model(1, changed(**SOFTMAX, backbone="resnet18", norm="frozen"))
    torch.save(classifier.state_dict(), place / "resnet18-f37072fd.pth")  # as if it had been downloaded before
    assert load_backbone(model, "imagenet") == "backbone: 100 weights of resnet18 of torchvision"
    assert torch.equal(model.backbone[0].body.layer4[1].bn2.running_mean, classifier.layer4[1].bn2.running_mean)


def test_without_a_network_it_is_said_how_to_give_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(make_model(1, changed(**SOFTMAX, backbone="resnet18", norm="frozen")), "imagenet")
    for part in ("resnet18 could not be downloaded", "Name or service", "https://", "=path/to/resnet18-"):
        assert part in str(caught.value)


# ---------------------------------------------------------------- official files


def official_state(config: ModelConfig, salt: str = "official") -> dict[str, torch.Tensor]:
    """Weights under the official keys, by the reference's formula."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in DETR(config).state_dict().items()}
    return {k: torch.from_numpy(v) for k, v in fill.fill_state_dict(shapes.items(), salt).items()}


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


def test_what_weights_do_not_show_can_be_told(official):
    path, _ = official
    plain, dilated = load_official(path), load_official(path, dilation=True, dropout=0.0)
    assert dilated.config == ModelConfig(preset="detr_resnet50_dc5", dropout=0.0)
    assert not torch.equal(outputs(plain)["pred_logits"], outputs(dilated)["pred_logits"])
    with pytest.raises(CheckpointError, match=r"detr-r50\.pth does not make a DETR: nhead Extra inputs"):
        load_official(path, nhead=4)
    with pytest.raises(CheckpointError, match=r"unexpected transformer.encoder.layers.4"):
        load_official(path, enc_layers=4)


def test_a_published_resnet101_is_recognised(tmp_path):
    state = {k: torch.zeros(shape) for k, shape, _ in fill.load_json("state_dict_keys")["detr_resnet101"]}
    torch.save({"model": state}, tmp_path / "r101.pth")
    assert load_official(tmp_path / "r101.pth").config == ModelConfig(preset="detr_resnet101")


SMALL_OFFICIAL = {"hidden_dim": 32, "dim_feedforward": 48, "enc_layers": 1, "dec_layers": 2, "num_queries": 5}


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "resnet18"},
        {"backbone": "resnet34", "pre_norm": True},
        {"backbone": "resnet18", "position_embedding": "learned", "num_classes": 3},
        {"backbone": "resnet18", "enc_layers": 0},
        {"backbone": "resnext50_32x4d"},
    ],
    ids=str,
)
def test_every_variant_is_recognised_by_its_weights(tmp_path, settings):
    config = ModelConfig(**{**SMALL_OFFICIAL, **settings})
    state = official_state(config)
    torch.save({"model": state}, tmp_path / "x.pth")
    model = load_official(tmp_path / "x.pth")
    assert model.config == config
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_options_stored_by_the_training_script_are_heeded(tmp_path):
    config = ModelConfig(**SMALL_OFFICIAL, backbone="resnet18", nheads=2, dropout=0.3)
    options = argparse.Namespace(nheads=2, dropout=0.3, dilation=False, aux_loss=True, lr=1e-4, device="cuda")
    torch.save({"model": official_state(config), "args": options, "epoch": 3}, tmp_path / "x.pth")
    assert load_official(tmp_path / "x.pth").config == config
    assert load_official(tmp_path / "x.pth", nheads=4).config.nheads == 4


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
            r"does not make a DETR: hidden_dim 7 is not a multiple of nheads 8",
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
        read_weights(tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"there is no file .*absent\.pth"):
        read_weights(tmp_path / "absent.pth")


def test_counters_of_batch_norms_are_left_out(tmp_path):
    torch.save({"bn.weight": torch.ones(2), "bn.num_batches_tracked": torch.tensor(5)}, tmp_path / "bn.pth")
    assert list(read_weights(tmp_path / "bn.pth")) == ["bn.weight"]
