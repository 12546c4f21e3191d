"""Settings: one source of defaults, errors that name the right key, overrides that win."""
from __future__ import annotations

import pytest
import yaml

from detr.config import PRESETS, ModelConfig
from pipelines.settings import (
    RunSettings,
    UserError,
    digest,
    load_settings,
    override_settings,
    parse_budget,
    parse_length,
)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "did you mean 'train.lr'"),
        ("trian.lr=1", "did you mean 'train'"),
        ("model.num_querys=5", "did you mean 'model.num_queries'"),
        ("train.budget=soon", "'12 minutes'"),
        ("train.budget=300", "'300 epochs'"),
        ("train.warmup_steps=100", "did you mean 'train.warmup'"),
        ("train.warmup=100", "'100 steps'"),
        ("train.warmup=5 minutes", "'100 steps'"),
        ("train.lr_drop=200", "'train.lr_drop' in the settings: 200 is neither a share of the training such as 0.8"),
        ("train.lr_drop=0", "'200 epochs'"),
        ("train.lr_drop=0 epochs", "'200 epochs'"),
        ("train.lr_drop=5 minutes", "'200 epochs'"),
        ("train.lr_scaling=root", "'sqrt'"),
        ("train.lr=fast", "train.lr"),
        ("model.preset=detr_resnet5", "detr_resnet50"),
        ("nothing", "key=value"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_exit_code_2(override, words):
    with pytest.raises(UserError) as caught:
        load_settings(None, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_misspelt_key_in_a_file_names_file_and_key(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  batchsize: 4\n")
    with pytest.raises(UserError, match=r"train\.batchsize.*mine\.yaml.*train\.batch_size"):
        load_settings(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_a_file_that_holds_no_settings_is_one_sentence(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load_settings(path)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 1.0e-3\n  batch_size: 4\n")
    settings = load_settings(path, ["train.lr=2e-4"])
    assert (settings.train.lr, settings.train.batch_size) == (2e-4, 4)
    assert settings.train.weight_decay == RunSettings().train.weight_decay


def test_what_is_printed_is_read_back_as_the_same_settings(tmp_path):
    settings = load_settings(None, ["model.preset=detr_resnet50", "loss.cost_giou=3"])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_settings(path) == settings


def test_a_model_told_in_part_keeps_the_default_presets_rest():
    settings = load_settings(None, ["model.num_queries=7"])
    assert settings.model == ModelConfig.model_validate({"preset": "tiny", "num_queries": 7})
    denoising = load_settings(None, ["model.denoising.box_noise=0.2"]).model.denoising
    assert denoising == ModelConfig(preset="tiny").denoising.model_copy(update={"box_noise": 0.2})


def test_the_focal_losses_weights_follow_the_model_and_yield_to_what_is_told():
    assert load_settings().loss.cost_class == 2
    assert load_settings(None, ["model.preset=detr_resnet50"]).loss.cost_class == 1
    assert load_settings(None, ["loss.cost_class=5"]).loss.cost_class == 5


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    ModelConfig.model_validate(name)


def test_another_model_than_a_files_is_not_fitted_as_that_was(tmp_path):
    path = tmp_path / "best.yaml"  # as a sweep leaves it
    path.write_text("model: tiny\nfit: {image_size: false, num_queries: false}\ntrain: {first_image_size: 192, lr: 1}")
    assert load_settings(path).train.first_image_size == 192 and not load_settings(path).fit.image_size
    other = load_settings(path, ["model=small"])
    assert other.fit.image_size and other.train.first_image_size is None and other.train.lr == 1
    assert load_settings(path, ["model=small", "train.first_image_size=100"]).train.first_image_size == 100


def test_another_preset_replaces_a_model_that_was_told_completely(tmp_path):
    path = tmp_path / "printed.yaml"
    path.write_text(yaml.safe_dump(RunSettings().model_dump(mode="json")))
    small = ModelConfig(preset="small")
    for told in (["model.preset=small"], ["model=small"]):
        assert load_settings(path, told).model == small
    assert load_settings(path, ["model.preset=small", "model.num_queries=7"]).model.num_queries == 7
    assert override_settings(RunSettings(), {"model.preset": "small"}).model == small
    both = override_settings(RunSettings(), {"model.num_queries": 7, "model.preset": "small"}).model
    assert both == small.model_copy(update={"num_queries": 7})
    path.write_text("model: {num_queries: 9}")
    assert load_settings(path, ["model.preset=small"]).model == small.model_copy(update={"num_queries": 9})


def test_a_run_with_masks_is_refused():
    with pytest.raises(UserError, match=r"model\.masks: a run trains on boxes alone"):
        load_settings(None, ["model.preset=detr_resnet50_panoptic"])


def test_shipped_settings_files_are_valid():
    from pathlib import Path

    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        load_settings(file)


def test_settings_cannot_be_changed_in_place():
    settings = RunSettings()
    with pytest.raises(ValueError, match="frozen"):
        settings.train.lr = 1.0
    changed = override_settings(settings, {"train.lr": 1e-3})
    assert changed.train.lr == 1e-3 and settings.train.lr != 1e-3


def test_budgets():
    assert parse_budget("300 epochs") == (300, "epochs")
    assert parse_budget("5000 steps") == (5000, "steps")
    assert parse_budget("20000 images") == (20000, "images")
    assert parse_budget("1.5 minutes") == (90, "seconds")
    assert parse_budget("2h") == (7200, "seconds")
    for wrong in ("0 steps", "-1 epochs", "12", "12 parsecs", ""):
        with pytest.raises(ValueError, match="length"):
            parse_budget(wrong)


def test_lengths_have_no_times_and_may_be_nothing():
    assert parse_length("1 epoch") == (1, "epochs")
    assert parse_length("2000 images") == (2000, "images")
    assert parse_length("0 steps") == (0, "steps")
    for wrong in ("1 minute", "2h", "-1 epochs", "100", "1 parsec", ""):
        with pytest.raises(ValueError, match="length"):
            parse_length(wrong)


def test_the_drop_of_the_rate_is_a_share_or_a_length(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr_drop: 200 epochs, warmup: 1 epoch}")
    assert (load_settings(path).train.lr_drop, load_settings(path).train.warmup) == ("200 epochs", "1 epoch")
    assert load_settings(path, ["train.lr_drop=0.5"]).train.lr_drop == 0.5
    path.write_text(yaml.safe_dump(load_settings(path).model_dump(mode="json")))
    assert load_settings(path).train.lr_drop == "200 epochs"


def test_the_rate_is_scaled_with_the_workers_as_told():
    assert load_settings(None, ["train.num_workers=4"]).train.rate_factor() == 1
    for scaling, factor in (("none", 1), ("sqrt", 3), ("linear", 9)):
        told = ["train.num_workers=9", f"train.lr_scaling={scaling}"]
        assert load_settings(None, told).train.rate_factor() == pytest.approx(factor)


def test_the_digest_ignores_key_order_and_nothing_else():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest([1, 2]) != digest([2, 1])
