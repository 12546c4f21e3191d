"""AP over minutes of training, from random weights: ours, DETR R50 as published, torchvision's Faster R-CNN.

\b
    python benchmarks/learning.py --minutes 10 --seed 0 --seed 1 --seed 2 --plot learning.png
    python benchmarks/learning.py --data path/to/coco --preset tiny --minutes 30 --points 10
    python benchmarks/learning.py --ours-alone --with model.denoising.groups=0 --with 'train.ema_decay=0 train.lr=1e-3'

Without --data the images are the built-in ones, with ours as in configs/sample.yaml; a COCO folder holds images/,
instances_train.json and instances_val.json, and ours has its default settings.

Every side runs in a fresh process, one after the other, on the same images, with the same augmentation (ours), at the
same input size (that of the first --preset, fitted to the data, and smaller in a first part of the minutes where our
training does that). The schedule of each follows the share of the minutes that is spent, so that all train equally
long; AP is measured on val, 100 detections per image at the most, after equal shares of the minutes, and measuring it
does not count.

DETR R50 is the model and recipe of configs/detr_resnet50.yaml with 16 images per step, but for what would make a straw
man of it here: the input size, and what presumes a trained backbone (frozen norms, its tenth of the learning rate).

Faster R-CNN is fasterrcnn_resnet50_fpn with all layers and batch norms training, as many images per step as ours, and
the usual recipe: SGD with 0.02 per 16 images, momentum 0.9, weight decay 1e-4, a warm-up as long as ours, drops to a
tenth after 16/26 and 22/26 of the budget. All it finds counts, not only scores from 0.05 on.
"""
from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from common import machine, print_table, process_options, run_side, synchronize, write_result
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import box_convert

from detr.config import ModelConfig
from detr.model import count_parameters
from detr.transforms import input_size, resize_to, to_uint8
from pipelines.budget import lr_factor, to_steps
from pipelines.detect import Detector
from pipelines.feed import Feed, first_model, open_feed
from pipelines.fit import fit_to_data
from pipelines.settings import RunSettings, UserError, load_settings, override_settings
from pipelines.stage import read_json
from pipelines.train import set_up, to_device, train_step, update_average
from pipelines.validation import validate

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED, OURS, FASTER_RCNN = "published DETR R50", "ours, ", "Faster R-CNN R50"
LEVELS = (0.1, 0.3, 0.5)  # of AP, and the minutes until they are reached
DROPS = (16 / 26, 22 / 26)  # shares of torchvision's own 26 epochs


def make_settings(
    side: str, presets: tuple[str, ...], built_in: bool, seed: int, dataset: Path | None = None
) -> RunSettings:
    """The settings of a side; images, augmentation and input size are the same for all. Raises UserError.

    The size is that of the first preset, fitted to the ingested dataset where one is given. What follows our preset in
    a side's name is set besides.
    """
    config = CONFIGS / "sample.yaml" if built_in else None
    ours = load_settings(config, [f"model.preset={presets[0]}"])
    if dataset:
        ours, _ = fit_to_data(ours, dataset)
    size = {key: getattr(ours.model, key) for key in ("image_size", "image_max_size", "upscale")}
    same = [f"model.{key}={value}" for key, value in size.items()] + [f"seed={seed}"]
    if side == PUBLISHED:
        published = load_settings(CONFIGS / "detr_resnet50.yaml")
        settings = load_settings(CONFIGS / "detr_resnet50.yaml", [
            *same, "train.batch_size=16", "train.backbone_weights=none", "model.norm=batch",
            f"train.lr_backbone={published.train.lr}",
        ])  # fmt: skip
    else:  # Faster R-CNN takes its images, its batch size and its warm-up from ours
        preset, _, changes = (presets[0] if side == FASTER_RCNN else side.removeprefix(OURS)).partition(" ")
        settings = load_settings(config, [f"model.preset={preset}", *same])
    same_feed = {key: getattr(ours.train, key) for key in ("augment", "first_image_size", "first_share")}
    train = settings.train.model_copy(update=same_feed)
    settings = settings.model_copy(update={"train": train, "sample": ours.sample, "ingest": ours.ingest})
    if side in (PUBLISHED, FASTER_RCNN) or not changes:
        return settings
    try:
        told = {key: yaml.safe_load(value) for key, value in (change.split("=", 1) for change in changes.split())}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--with {changes!r} is not KEY=VALUE KEY=VALUE ...", 2) from error
    if {"model", "model.preset"} & told.keys():
        raise UserError("Another model is told with --preset, not with --with.", 2)
    return override_settings(settings, told)


class OurLearner:
    """A model of this project, trained as pipelines/train.py does."""

    def __init__(self, settings: RunSettings, categories: list[dict[str, Any]], device: torch.device, feed: Feed):
        self.settings, self.categories, self.device, self.feed = settings, categories, device, feed
        names = [category["name"] for category in categories]
        self.model, self.ema, self.criterion, self.optimizer, _ = set_up(settings, names, device)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        torch.manual_seed(settings.seed * 1000)

    def step(self, batch: dict[str, Tensor], step: int, share: float) -> None:
        """One step, when this share of the time is spent. Raises UserError where the numbers stop being finite."""
        options = self.settings.train
        batch = to_device(batch, self.device)
        factor = lr_factor(step, share, options, self.feed)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        train_step(self.model, self.criterion, self.optimizer, [batch], step, self.settings)
        update_average(self.ema, self.model, options.ema_decay)

    def detector(self) -> Detector:
        size = self.settings.evaluate.batch_size
        return Detector(self.ema.module, self.categories, batch_size=size, device=self.device)


class FasterRCNNLearner:
    """torchvision's Faster R-CNN from random weights, with its usual recipe."""

    def __init__(self, settings: RunSettings, categories: list[dict[str, Any]], device: torch.device, feed: Feed):
        self.settings, self.device, self.feed = settings, device, feed
        torch.manual_seed(settings.seed)
        # Without weights all layers train, and their norms. The feed has resized the images already.
        self.model = fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=len(categories) + 1, _skip_resize=True,
            min_size=settings.model.image_size, max_size=settings.model.image_max_size,
            box_score_thresh=0.0, box_detections_per_img=settings.evaluate.max_dets,
        ).to(device)  # fmt: skip
        self.rate = 0.02 * settings.train.batch_size / 16
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)

    def step(self, batch: dict[str, Tensor], step: int, share: float) -> None:
        """As `OurLearner.step`."""
        images, targets = faster_rcnn_inputs(batch)
        images = [image.to(self.device) for image in images]
        targets = [{key: value.to(self.device) for key, value in target.items()} for target in targets]
        warmup = min(1.0, (step + 1) / max(1, to_steps(self.settings.train.warmup, self.feed)))
        self.optimizer.param_groups[0]["lr"] = self.rate * warmup * 0.1 ** sum(share >= drop for drop in DROPS)
        self.model.train()
        loss = sum(self.model(images, targets).values())
        if not loss.isfinite():
            raise UserError(f"Faster R-CNN's loss stopped being finite at step {step}.")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def detector(self) -> FasterRCNNDetector:
        self.model.eval()
        return FasterRCNNDetector(self.model, self.settings.model, self.settings.evaluate.batch_size, self.device)


class FasterRCNNDetector:
    """As pipelines.detect.Detector, for a model that takes and gives what torchvision's detectors do."""

    def __init__(self, model, config: ModelConfig, batch_size: int, device: torch.device):
        self.model, self.config, self.batch_size, self.device = model, config, batch_size, device

    @torch.inference_mode()
    def detect(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        """RGB images -> per image boxes [N, 4] (xyxy, pixels of the image), scores [N], labels [N] from 0 on."""
        results = []
        for start in range(0, len(images), self.batch_size):
            some = images[start : start + self.batch_size]
            sizes = [input_size(self.config, *image.size) for image in some]
            pixels = [to_uint8(resize_to(i, {}, s)[0]).to(self.device) / 255 for i, s in zip(some, sizes, strict=True)]
            for image, (width, height), found in zip(some, sizes, self.model(pixels), strict=True):
                scale = np.float32([image.width / width, image.height / height] * 2)
                results.append({
                    "boxes": found["boxes"].cpu().numpy() * scale,
                    "scores": found["scores"].cpu().numpy(),
                    "labels": found["labels"].cpu().numpy() - 1,
                })  # fmt: skip
        return results


def faster_rcnn_inputs(batch: dict[str, Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch of the feed -> images float32 in 0..1 [3, h, w] without padding, and per image boxes (xyxy, pixels)
    and labels from 1 on, 0 being the background."""
    images, targets = [], []
    counts = batch["counts"].tolist()
    objects = zip(batch["boxes"].split(counts), batch["labels"].split(counts), strict=True)
    sizes = batch["sizes"].tolist()
    for image, (height, width), (boxes, labels) in zip(batch["images"], sizes, objects, strict=True):
        boxes = box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)  # another box, rounded to nothing, would be an error there
        images.append(image[:, :height, :width] / 255)
        targets.append({"boxes": boxes[keep], "labels": labels[keep] + 1})
    return images, targets


class _Steps(Dataset):
    """The feed's batches by step, for a loader to prepare ahead; small until this share of the time is spent."""

    def __init__(self, feed: Feed, first_share: float):
        self.feed, self.first_share = feed, first_share
        self.share = multiprocessing.Value("d", 0.0)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.feed.batch(step, self.share.value < self.first_share)


def measure(
    side: str, settings: RunSettings, dataset_folder: Path, seconds: float, points: int, device: torch.device
) -> dict[str, Any]:
    """Train a side for so many seconds -> {"parameters", "steps", "images_per_second", "points": [{"minutes",
    "step", "AP", "AP50"}], "stopped": why it could not go on, or None}; AP is 0 from then on."""
    torch.set_float32_matmul_precision("high")  # as in training
    dataset = read_json(dataset_folder / "dataset.json")
    settings, _ = fit_to_data(settings, dataset_folder)
    model, options = settings.model, settings.train
    make = FasterRCNNLearner if side == FASTER_RCNN else OurLearner
    feed = open_feed(
        dataset_folder, "train", model, options.augment, settings.ingest.max_pixels, options.batch_size, settings.seed,
        first=first_model(model, options),
    )  # fmt: skip
    learner = make(settings, dataset["categories"], device, feed)
    ahead = _Steps(feed, options.first_share)
    # One process, two batches ahead: so little is prepared while AP is measured that it is no head start.
    batches = iter(DataLoader(ahead, batch_size=None, sampler=itertools.count(), num_workers=1))
    batch = next(batches)
    spent, step, found, stopped = 0.0, 0, [], None
    for point in range(1, points + 1):
        due = seconds * point / points
        synchronize(device)
        began = time.perf_counter() - spent
        while spent < due and not stopped:
            try:
                learner.step(batch, step, spent / seconds)
            except UserError as error:
                stopped = str(error)
                break
            step += 1
            batch = next(batches)
            spent = time.perf_counter() - began
            ahead.share.value = spent / seconds
        synchronize(device)
        spent = spent if stopped else time.perf_counter() - began
        numbers = {"AP": 0.0, "AP50": 0.0}
        if not stopped:
            numbers = validate(learner.detector(), dataset, dataset_folder, settings)
        minutes = (due if stopped else spent) / 60
        found.append({"minutes": minutes, "step": step, "AP": numbers["AP"], "AP50": numbers["AP50"]})
        click.echo(f"  {minutes:.2f} minutes, step {step}: AP {numbers['AP']:.3f} {stopped or ''}", err=True)
    return {
        "parameters": count_parameters(learner.model)[0],
        "steps": step,
        "images_per_second": step * options.batch_size / max(spent, 1e-9),
        "points": found,
        "stopped": stopped,
    }


def make_dataset(settings: RunSettings, data: Path | None, folder: Path) -> Path:
    """The built-in images, or those of a COCO folder, ingested into a folder -> where. Raises UserError."""
    from jobs.common import ray_session
    from pipelines.ingest import ingest, source
    from pipelines.sample import write_sample

    if data is None:
        data = folder / "images"
        write_sample(settings.sample.model_copy(update={"test": 0}), data)
    found = source(settings, data)
    dataset = folder / "dataset"
    dataset.mkdir()
    with ray_session(settings):
        ingest(settings, found, dataset)
    return dataset


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's runs, one per seed -> every figure as {"median", "low", "high"}, None where AP never came so far."""
    figures = {
        "images_per_second": [run["images_per_second"] for run in runs],
        "steps": [run["steps"] for run in runs],
        "AP": [run["points"][-1]["AP"] for run in runs],
        "AP50": [run["points"][-1]["AP50"] for run in runs],
        "best_AP": [max(point["AP"] for point in run["points"]) for run in runs],
    }
    for level in LEVELS:
        figures[f"minutes_to_AP_{level}"] = [
            next((p["minutes"] for p in run["points"] if p["AP"] >= level), math.inf) for run in runs
        ]
    spread = {
        name: {
            key: value if math.isfinite(value := choose(values)) else None
            for key, choose in (("median", statistics.median), ("low", min), ("high", max))
        }
        for name, values in figures.items()
    }
    return {"parameters": runs[0]["parameters"], **spread, "runs": runs}


def format_figure(figure: dict[str, float | None], pattern: str) -> str:
    """The median, and below it the spread where seeds differ; – for what was not reached."""
    middle, low, high = ("–" if figure[k] is None else format(figure[k], pattern) for k in ("median", "low", "high"))
    return middle if low == high else f"{middle}\n{low} to {high}"


def plot_runs(sides: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """AP over minutes: a line per side, of the median where there are several seeds, in the band of all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for side, found in sides.items():
        minutes, ap = (
            np.array([[point[key] for point in run["points"]] for run in found["runs"]]) for key in ("minutes", "AP")
        )
        x = np.median(minutes, 0)
        axes.plot(x, np.median(ap, 0), marker="o", label=f"{side} ({found['parameters'] / 1e6:.1f} M parameters)")
        axes.fill_between(x, ap.min(0), ap.max(0), alpha=0.2)
    axes.set(xlabel="minutes of training", ylabel="AP on val", title=title, xlim=(0, None))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@click.command(help=__doc__)
@click.option("--data", type=Path, help="A COCO folder; the built-in images by default.")
@click.option("--preset", "presets", multiple=True, default=["tiny"], show_default=True, help="Ours; may be repeated.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True,
              help="Training time of every side.")  # fmt: skip
@click.option("--points", type=click.IntRange(1), default=6, show_default=True, help="How often AP is measured.")
@click.option("--seed", "seeds", type=int, multiple=True, default=[0], show_default=True, help="May be repeated.")
@click.option("--with", "changes", multiple=True, metavar="'KEY=VALUE ...'",
              help="The first preset once more with these settings; may be repeated.")  # fmt: skip
@click.option("--ours-alone", is_flag=True, help="Without the published DETR and Faster R-CNN.")
@click.option("--plot", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Draw AP over minutes.")
@process_options
@click.option("--dataset", type=Path, hidden=True)
@click.option("--own-seed", type=int, hidden=True)
def main(
    data, presets, minutes, points, seeds, changes, ours_alone, plot, device, threads, as_json, side, folder, dataset,
    own_seed,
):  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    if side:
        settings = make_settings(side, presets, data is None, own_seed, dataset)
        write_result(folder, measure(side, settings, dataset, 60 * minutes, points, torch.device(device)), None)
        return
    ours_as = dict.fromkeys([*presets, *(f"{presets[0]} {' '.join(change.split())}" for change in changes)])
    sides = [OURS + name for name in ours_as]
    if not ours_alone:
        sides = [PUBLISHED, *sides, FASTER_RCNN]
    runs: dict[str, list] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as place:
        try:
            for name in sides:  # what is wrong is said before anything starts
                make_settings(name, presets, data is None, 0)
            plain = make_settings(OURS + presets[0], presets, data is None, 0)
            with redirect_stdout(sys.stderr):
                dataset = make_dataset(plain, data, Path(place))
            ours = make_settings(OURS + presets[0], presets, data is None, 0, dataset)
            model, first = ours.model, first_model(ours.model, ours.train)
        except UserError as error:
            failure = click.ClickException(str(error))
            failure.exit_code = error.exit_code
            raise failure from error
        for seed in dict.fromkeys(seeds):
            for name in sides:
                click.echo(f"seed {seed}: {name}", err=True)
                given = ["--dataset", str(dataset), "--own-seed", str(seed)]
                runs[name].append(run_side(name, Path(place) / str(seed) / name, True, given))
    found = {name: summarise(results) for name, results in runs.items()}
    images = "built-in images" if data is None else data.resolve().name
    title = f"{minutes:g} minutes from random weights, {images}"
    if plot:
        plot_runs(found, plot, f"{title}\n{machine(device)}")
    if as_json:
        click.echo(json.dumps({
            "machine": machine(device), "images": images, "minutes": minutes, "seeds": list(dict.fromkeys(seeds)),
            "image_size": model.image_size, "image_max_size": model.image_max_size, "upscale": model.upscale,
            "sides": found,
        }))  # fmt: skip
        return
    rows = [
        [name, f"{figures['parameters'] / 1e6:.1f} M", format_figure(figures["images_per_second"], ".1f"),
         format_figure(figures["steps"], ".0f"), *(format_figure(figures[k], ".3f") for k in ("AP", "AP50", "best_AP")),
         *(format_figure(figures[f"minutes_to_AP_{level}"], ".1f") for level in LEVELS)]
        for name, figures in found.items()
    ]  # fmt: skip
    notes = [
        f"Shorter side {model.image_size} pixels, longer {model.image_max_size} at the most"
        + ("" if model.upscale else ", small images as they are")
        + (f" ({first.image_size} and {first.image_max_size} for {ours.train.first_share:.0%} of the minutes)"
           if first else "")
        + ", on every side; so is the augmentation.",
        "Minutes until AP: the first measurement that reached it.",
        *([f"Median of {len(seeds)} seeds, below it lowest and highest."] if len(seeds) > 1 else []),
        *(f"{name}, one run: {run['stopped']}" for name in sides for run in runs[name] if run["stopped"]),
    ]  # fmt: skip
    print_table(
        f"{title} ({machine(device)})",
        ["side", "parameters", "images/s", "steps", "AP", "AP50", "best AP", *(f"min to {x}" for x in LEVELS)],
        rows, notes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
