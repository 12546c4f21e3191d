"""benchmarks/learning.py at a tiny size: every side trains on the same truth, for the same time, and is told alike."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torchvision.ops import box_convert

from detr.config import ModelConfig
from pipelines.evaluate import DETECTIONS
from pipelines.feed import open_feed
from pipelines.ingest import ingest, source
from pipelines.sample import write_sample
from pipelines.settings import AugmentSettings, RunSettings, SampleSettings, UserError, load_settings
from pipelines.stage import read_json
from pipelines.validation import validate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, no package

import learning

CPU = torch.device("cpu")
SIDES = [learning.PUBLISHED, "ours, tiny", learning.FASTER_RCNN]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_sample(SampleSettings(train=24, val=16, test=0), folder)
    return folder


@pytest.fixture(scope="module")
def dataset(images, tmp_path_factory, ray_cluster) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    ingest(RunSettings(), source(RunSettings(), images), folder)
    return folder


@pytest.mark.ray
def test_the_truth_given_to_faster_rcnn_comes_back_as_ap_1(dataset):
    config = ModelConfig.model_validate({"preset": "tiny", "image_size": 70, "image_max_size": 100})
    feed = open_feed(dataset, "val", config, AugmentSettings(recipe="none"), 10**6, 16, 0)
    batch = feed.batch(0)
    pixels, targets = learning.faster_rcnn_inputs(batch)
    counts = batch["counts"].tolist()
    assert 0 in counts and max(counts) > 1
    objects = zip(batch["boxes"].split(counts), batch["labels"].split(counts), strict=True)
    sizes = batch["sizes"].tolist()
    for image, target, size, (boxes, labels) in zip(pixels, targets, sizes, objects, strict=True):
        assert list(image.shape[1:]) == size and 0.5 < image.max() <= 1
        assert torch.equal(target["labels"], labels + 1)
        height, width = size
        back = box_convert(target["boxes"], "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        torch.testing.assert_close(back, boxes)

    def oracle(images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = []
        for image in images:  # resized by PIL, a grey level or two apart from the feed's
            same = [pixel.shape == image.shape and bool((pixel - image).abs().max() < 0.01) for pixel in pixels]
            assert sum(same) == 1
            found.append(targets[same.index(True)])
        return [{**target, "scores": torch.ones(len(target["labels"]))} for target in found]

    detector = learning.FasterRCNNDetector(oracle, config, 3, CPU)
    metrics = validate(detector, read_json(dataset / "dataset.json"), dataset, RunSettings())
    assert metrics["AP"] == pytest.approx(1) and metrics["AR100"] == pytest.approx(1)


def test_boxes_rounded_to_nothing_do_not_reach_faster_rcnn():
    boxes = torch.tensor([[0.5, 0.5, 1e-9, 0.2], [0.5, 0.5, 0.4, 0.2]])
    batch = {"images": torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "sizes": torch.tensor([[10, 16]]),
             "counts": torch.tensor([2]), "labels": torch.tensor([3, 4]), "boxes": boxes}  # fmt: skip
    (image,), (target,) = learning.faster_rcnn_inputs(batch)
    assert image.shape == (3, 10, 16) and target["labels"].tolist() == [5]
    torch.testing.assert_close(target["boxes"], torch.tensor([[4.8, 4.0, 11.2, 6.0]]))


@pytest.mark.ray
def test_faster_rcnn_trains_all_its_weights_on_images_of_the_size_of_ours(dataset):
    settings = learning.make_settings(learning.FASTER_RCNN, ("tiny",), True, 0)
    feed = open_feed(dataset, "train", settings.model, settings.train.augment, 10**6, 2, 0)
    learner = learning.FasterRCNNLearner(settings, read_json(dataset / "dataset.json")["categories"], CPU, feed)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    norm = learner.model.backbone.body.bn1
    seen = []
    learner.model.transform.register_forward_hook(lambda module, inputs, result: seen.append(result[0].image_sizes))
    learner.step(feed.batch(0), 0, 0.0)
    assert [list(size) for size in seen[0]] == feed.batch(0)["sizes"].tolist()
    still = [name for name, p in learner.model.named_parameters() if torch.equal(p, before[name])]
    assert [name for name in still if not name.startswith("roi_heads")] == []
    assert int(norm.num_batches_tracked) == 1 and norm.running_mean.any()
    rates = []
    for share in (0.6, 0.62, 0.85):
        learner.step(feed.batch(1), 1000, share)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.001, 0.0001])
    found = learner.detector().detect([Image.new("RGB", (120, 90), (200, 10, 10))])
    assert found[0]["boxes"].shape == (len(found[0]["labels"]), 4) and found[0]["labels"].min() >= 0


@pytest.mark.ray
@pytest.mark.parametrize(
    ("side", "shares", "factors"),
    [("ours, tiny", (0.5, 0.75, 1.0), [1.0, 0.51, 0.02]), (learning.PUBLISHED, (0.5, 1.0), [1.0, 0.1])],
)
def test_our_schedules_follow_the_share_of_the_time_and_the_average_is_what_is_judged(dataset, side, shares, factors):
    categories = read_json(dataset / "dataset.json")["categories"]
    settings = learning.make_settings(side, ("tiny",), True, 0)
    small = ModelConfig.model_validate({"preset": "tiny", "num_classes": len(categories)})
    feed = open_feed(dataset, "train", small, settings.train.augment, 10**6, 2, 0)
    learner = learning.OurLearner(settings.model_copy(update={"model": small}), categories, CPU, feed)
    batch = feed.batch(0)
    rates = []
    for step, share in enumerate(shares, 1000):
        learner.step(batch, step, share)
        rates.append(learner.optimizer.param_groups[0]["lr"] / settings.train.lr)
    assert rates == pytest.approx(factors)
    trained, judged = (model.class_embed.bias for model in (learner.model, learner.detector().model))
    assert torch.equal(trained, judged) == (side == learning.PUBLISHED)  # which has no average


def test_the_sides_see_the_same_images_and_keep_their_recipes():
    for built_in in (True, False):
        published, ours, other = (learning.make_settings(side, ("tiny",), built_in, 7) for side in SIDES)
        for key in ("image_size", "image_max_size", "upscale"):
            assert getattr(published.model, key) == getattr(ours.model, key) == getattr(other.model, key)
        assert published.train.augment == ours.train.augment == other.train.augment
        assert ours.train.augment.recipe == ("none" if built_in else "light")
        assert published.seed == ours.seed == 7
        assert published.model.backbone == "resnet50" and published.model.class_loss == "softmax"
        assert published.train.backbone_weights is None and published.loss.loss_ce == 1
        assert not ours.fit.image_size and ours.fit.num_queries == (not built_in)
    changed = learning.make_settings("ours, tiny model.dec_layers=1 train.augment.mosaic=0", ("tiny",), False, 7)
    assert changed.model == ours.model.model_copy(update={"dec_layers": 1}) and changed.train.augment.mosaic == 0
    second = learning.make_settings("ours, detr_resnet50", ("tiny", "detr_resnet50"), False, 0)
    assert second.model.backbone == "resnet50" and second.model.image_size == 192 and second.train.batch_size == 8


@pytest.mark.ray
def test_the_input_size_is_fitted_to_the_data_for_all_sides(dataset, monkeypatch):
    fitted = load_settings(None, ["model.image_size=300", "model.image_max_size=400"])
    monkeypatch.setattr(learning, "fit_to_data", lambda settings, folder: (fitted, []) if folder == dataset else 0 / 0)
    models = [learning.make_settings(side, ("tiny",), False, 0, dataset).model for side in SIDES]
    assert {(model.image_size, model.image_max_size) for model in models} == {(300, 400)}


class FakeLearner:
    """Steps of 10 ms; a detector that takes long to make and finds nothing."""

    breaks_at: int | None = None

    def __init__(self, settings, categories, device, feed):
        self.model, self.shares = torch.nn.Linear(2, 2), []
        FakeLearner.last = self

    def step(self, batch, step, share):
        if step == self.breaks_at:
            raise UserError("no longer finite")
        assert int(batch["step"]) == step
        self.shares.append(share)
        time.sleep(0.01)

    def detector(self):
        time.sleep(0.3)
        return self

    def detect(self, images):
        return [{name: [] for name in DETECTIONS.names[2:]} for _ in images]


@pytest.mark.ray
def test_the_time_is_spent_on_training_and_ap_measured_at_even_shares_of_it(dataset, monkeypatch):
    monkeypatch.setattr(learning, "OurLearner", FakeLearner)
    settings = learning.make_settings("ours, tiny", ("tiny",), True, 0)
    result = learning.measure("ours, tiny", settings, dataset, 0.6, 3, CPU)
    shares = FakeLearner.last.shares
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < 1
    assert result["steps"] == len(shares) == result["points"][-1]["step"]
    assert [60 * p["minutes"] for p in result["points"]] == pytest.approx([0.2, 0.4, 0.6], abs=0.15)
    assert 0 < result["points"][0]["step"] < result["steps"]
    assert result["images_per_second"] == pytest.approx(8 * len(shares) / (60 * result["points"][-1]["minutes"]))
    assert result["stopped"] is None and result["parameters"] == 6

    monkeypatch.setattr(FakeLearner, "breaks_at", 3)
    result = learning.measure("ours, tiny", settings, dataset, 30, 3, CPU)
    assert result["stopped"] == "no longer finite" and result["steps"] == 3
    assert [60 * p["minutes"] for p in result["points"]] == pytest.approx([10, 20, 30])


def test_figures_of_several_seeds_are_their_median_and_spread(tmp_path, monkeypatch):
    curves = {learning.PUBLISHED: ([0.0, 0.05], [0.0, 0.05]), "ours, tiny": ([0.2, 0.4], [0.4, 0.6]),
              learning.FASTER_RCNN: ([0.05, 0.3], [0.15, 0.1])}  # fmt: skip

    def run_side(side, folder, keep_blocks, arguments):
        assert keep_blocks
        curve = curves[side][int(arguments[arguments.index("--own-seed") + 1])]
        points = [{"minutes": i + 1.0, "step": i, "AP": ap, "AP50": ap} for i, ap in enumerate(curve)]
        stopped = "It stopped." if curve[-1] < curve[0] else None
        return {"parameters": 2_500_000, "steps": 9, "images_per_second": 8.0, "points": points, "stopped": stopped}

    monkeypatch.setattr(learning, "run_side", run_side)
    monkeypatch.setattr(learning, "make_dataset", lambda settings, data, folder: folder)
    monkeypatch.setattr(learning, "fit_to_data", lambda settings, folder: (settings, []))
    done = CliRunner().invoke(learning.main, ["--seed", "0", "--seed", "1", "--minutes", "2"], catch_exceptions=False)
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines()]
    medians = {line[0]: line[1:] for line in lines if line[0] in SIDES}
    spreads = {line[0]: after[1:] for line, after in pairwise(lines) if line[0] in SIDES}
    assert medians["ours, tiny"] == ["2.5 M", "8.0", "9", "0.500", "0.500", "0.500", "1.0", "1.5", "–"]
    assert spreads["ours, tiny"] == ["", "", "", *["0.400 to 0.600"] * 3, "", "1.0 to 2.0", "2.0 to –"]
    assert medians[learning.FASTER_RCNN][3:6] == ["0.200", "0.200", "0.225"]
    assert medians[learning.PUBLISHED][-3:] == ["–"] * 3
    assert f"{learning.FASTER_RCNN}, one run: It stopped." in done.stdout


def test_options_are_measured_beside_the_preset(monkeypatch):
    asked = []
    run = {"parameters": 1, "steps": 1, "images_per_second": 1.0, "stopped": None,
           "points": [{"minutes": 1, "step": 1, "AP": 0.5, "AP50": 0.5}]}  # fmt: skip
    monkeypatch.setattr(learning, "run_side", lambda side, *rest: asked.append(side) or run)
    monkeypatch.setattr(learning, "make_dataset", lambda settings, data, folder: folder)
    monkeypatch.setattr(learning, "fit_to_data", lambda settings, folder: (settings, []))
    told = ["--ours-alone", "--with", "train.ema_decay=0", "--with", "model.levels=1  model.two_stage=false"]
    CliRunner().invoke(learning.main, told, catch_exceptions=False)
    assert asked == ["ours, tiny", "ours, tiny train.ema_decay=0", "ours, tiny model.levels=1 model.two_stage=false"]


def test_what_is_no_preset_or_no_folder_is_told(tmp_path):
    done = CliRunner().invoke(learning.main, ["--preset", "tinny"])
    assert done.exit_code == 2 and "no model preset is named 'tinny'" in done.stderr
    for change in ("train.lrr=1", "train.lr", "train.lr=[1", "model.preset=small"):
        done = CliRunner().invoke(learning.main, ["--with", change])
        assert done.exit_code == 2 and change.split("=")[0].removesuffix(".preset") in done.stderr.lower()
    done = CliRunner().invoke(learning.main, ["--data", str(tmp_path / "nowhere")])
    assert done.exit_code == 2 and "nowhere" in done.stderr


# The others' steps and detections are tried above; their whole runs take a minute.
@pytest.mark.parametrize("sides", [SIDES[1:2], pytest.param(SIDES, marks=pytest.mark.long)], ids=["ours", "all"])
def test_sides_train_and_are_measured_and_drawn(sides, tmp_path):
    plot, data = tmp_path / "ap.png", tmp_path / "digits"
    write_sample(SampleSettings(train=24, val=4, test=0), data)
    done = subprocess.run(
        [sys.executable, learning.__file__, "--data", str(data), "--minutes", "0.02", "--points", "2",
         "--plot", str(plot), "--json", *(["--ours-alone"] if sides != SIDES else [])],
        env={**os.environ, "PYTHONPATH": str(Path(learning.__file__).parents[1])}, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert list(result["sides"]) == sides and (result["image_size"], result["upscale"]) == (192, False)
    for found in result["sides"].values():
        (run,) = found["runs"]
        assert run["stopped"] is None and run["steps"] >= 1 and len(run["points"]) == 2
        assert run["points"][-1]["minutes"] >= 0.02 and found["AP"]["median"] == run["points"][-1]["AP"]
    millions = {learning.PUBLISHED: (42,), "ours, tiny": range(5), learning.FASTER_RCNN: (41, 42)}
    assert all(round(found["parameters"] / 1e6) in millions[side] for side, found in result["sides"].items())
    with Image.open(plot) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(10**6)) > 50
