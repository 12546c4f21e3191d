"""What is set from the data: shown to the user, kept out of the way of what the user sets."""
from __future__ import annotations

import pytest
import yaml
from test_look import dataset

from pipelines.feed import first_model
from pipelines.fit import fit_to_data
from pipelines.settings import FitSettings, RunSettings, UserError, load_settings, override_settings
from pipelines.workflow import _training_settings


def boxes_of(side: float, number: int = 1) -> tuple:
    """An image of 640x480 with boxes so wide and high."""
    return (640, 480), [([0.0, 0.0, side, side], 0)] * number


def fitted(tmp_path, images, *overrides):
    folder = dataset(tmp_path, ["cat", "dog"], train=images, val=images[:1])
    settings, said = fit_to_data(load_settings(None, overrides), folder)
    return settings.model, said


def test_small_boxes_enlarge_the_images_until_they_fill_a_cell(tmp_path):
    """Proposals of the tiny preset have cells of 8 pixels: 16 of 640 want 320, 4 of 640 more than is allowed."""
    sides = {16.0: (320, 240), 64.0: (256, 192), 4.0: (640, 480)}
    for side, (long, short) in sides.items():
        model, said = fitted(tmp_path, [boxes_of(side)] * 10)
        assert (model.image_max_size, model.image_size, model.num_classes) == (long, short, 2)
        assert f"images of up to {long}x{short} pixels" in said[1]
    model, _ = fitted(tmp_path, [boxes_of(64.0)] * 19 + [boxes_of(4.0)])  # one box in twenty
    assert model.image_max_size == 256
    square = [((640, 640), [([0.0, 0.0, 20.0, 20.0], 0)])]  # seen at image_size, not at image_max_size
    assert fitted(tmp_path, square)[0].image_size == 264
    small = [((300, 200), [([0.0, 0.0, 4.0, 4.0], 0)])]
    assert fitted(tmp_path, small)[0].image_max_size == 320  # no more than there is: nothing is enlarged


def test_the_data_decide_the_number_of_classes_whatever_is_set(tmp_path):
    """As the description of model.num_classes says."""
    assert fitted(tmp_path, [boxes_of(64.0)], "model.num_classes=7")[0].num_classes == 2


def test_enlarged_images_are_small_at_first_unless_told(tmp_path):
    folder = dataset(tmp_path, ["cat"], train=[boxes_of(16.0)], val=[boxes_of(16.0)])
    settings, said = fit_to_data(RunSettings(), folder)
    assert (settings.train.first_image_size, settings.model.image_size) == (192, 240)
    assert "256x192 for 60% of the time" in said[1]
    told, _ = fit_to_data(load_settings(None, ["train.first_image_size=100"]), folder)
    assert told.train.first_image_size == 100
    other = override_settings(settings, {"model": "small"})  # as a sweep does
    assert fit_to_data(other, folder)[0].train.first_image_size is None and other.model.image_size == 288
    off, said = fit_to_data(load_settings(None, ["train.first_share=0"]), folder)
    assert "of the time" not in said[1] and first_model(off.model, off.train) is None
    (tmp_path / "large").mkdir()
    large = dataset(tmp_path / "large", ["cat"], train=[boxes_of(64.0)], val=[boxes_of(64.0)])
    assert fit_to_data(RunSettings(), large)[0].train.first_image_size is None


def test_two_queries_to_each_object_of_the_fullest_image(tmp_path):
    for number, queries in ((1, 30), (31, 70), (400, 500)):
        model, said = fitted(tmp_path, [boxes_of(64.0), boxes_of(64.0, number)])
        assert model.num_queries == queries and f"{number} objects in the fullest" in said[0]


@pytest.mark.parametrize("told", ["model.image_size=200", "model.image_max_size=300", "fit.image_size=false"])
def test_what_the_user_sets_stays(tmp_path, told):
    model, said = fitted(tmp_path, [boxes_of(4.0)] * 3, told, "model.num_queries=7")
    sizes = {"model.image_size=200": (200, 267), "model.image_max_size=300": (225, 300)}  # the other in proportion
    assert (model.image_size, model.image_max_size) == sizes.get(told, (192, 256))
    assert model.num_queries == 7 and said == []


def test_published_models_are_as_published(tmp_path):
    model, said = fitted(tmp_path, [boxes_of(4.0)] * 3, "model.preset=detr_resnet50")
    assert (model.image_size, model.image_max_size, model.num_queries, said) == (800, 1333, 100, [])


def test_fitted_once_a_sweep_may_try_other_sizes(tmp_path):
    folder = dataset(tmp_path, ["cat"], train=[boxes_of(16.0)], val=[boxes_of(16.0)])
    settings, _ = fit_to_data(RunSettings(), folder)
    trial, said = fit_to_data(override_settings(settings, {"model.image_size": 100, "model.num_queries": 3}), folder)
    assert (trial.model.image_size, trial.model.num_queries, said) == (100, 3, [])


def test_images_without_boxes_and_an_unknown_backbone(tmp_path):
    model, said = fitted(tmp_path, [[], []])
    assert model.image_max_size == 256 and said[1] == "images of up to 256x192 pixels"
    with pytest.raises(UserError, match="backbone"):
        fitted(tmp_path, [[]], "model.backbone=vgg16")


def test_a_printed_file_and_an_override_are_not_fitted_over(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RunSettings().model_dump(mode="json")))
    assert load_settings(path).fit == RunSettings().fit == FitSettings(image_size=True, num_queries=True)
    told = load_settings(path, ["model.num_queries=7", "model.image_size=100"])
    assert told.fit == FitSettings(image_size=False, num_queries=False) and told.model.num_queries == 7
    assert load_settings(path, ["model.num_queries=7", "fit.num_queries=true"]).fit.num_queries
    assert not override_settings(RunSettings(), {"model": "detr_resnet50"}).fit.image_size


def test_what_is_fitted_is_part_of_what_a_training_depends_on():
    keys = {
        str(_training_settings(load_settings(None, told)))
        for told in ([], ["fit.image_size=false"], ["model.num_queries=60"], ["model.image_size=256"])
    }
    assert len(keys) == 4
