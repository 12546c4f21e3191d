"""Images per second from files to batches in the training process, through the published augmentation.

\b
    python benchmarks/feed.py --rounds 3
    python benchmarks/feed.py --data path/to/coco --epochs 20

Without --data the images are 640x480 JPEGs cut from two photographs, with boxes. Ours reads its shards, and its batches
are uint8 when they arrive, to be normalised on the device; where that is this CPU, it takes of the same cores, which is
measured, too. The other sides are torch's DataLoader over the same files:

\b
- PIL: the published transforms on PIL images, float32 batches normalised and padded in the workers, as published
- uint8: ours from transforms to batch, so that what differs is how batches are prepared ahead

Every side runs in a fresh process, in turn; timing starts when the first batches have come. With --epochs, ours alone
goes through the data so many times and tells the memory of all its processes after each.
"""
from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from common import machine, median, print_table, run_side, write_result
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr.batch import MEAN, STD, normalise
from detr.config import ModelConfig
from detr.transforms import augment_detr, boxes_to_targets
from pipelines.feed import open_feed
from pipelines.settings import AugmentSettings, RunSettings

OURS, HERE, PIL, UINT8 = "ours", "ours, normalised here", "DataLoader, PIL", "DataLoader, uint8"
SKIP = 6  # batches before timing starts
BATCH = 4
MODEL = ModelConfig()  # as published
AUGMENT = AugmentSettings(recipe="detr")


def write_photographs(folder: Path, images: int) -> None:
    """A COCO folder of 640x480 JPEGs cut from scikit-learn's photographs, five boxes in each."""
    from sklearn.datasets import load_sample_images

    (folder / "images").mkdir(parents=True)
    photographs = [Image.fromarray(photo).resize((1280, 854)) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    for split, number in (("train", images), ("val", 2)):
        records, annotations = [], []
        for n in range(number):
            x, y = int(rng.integers(0, 640)), int(rng.integers(0, 374))
            photo = photographs[n % len(photographs)].crop((x, y, x + 640, y + 480))
            data = io.BytesIO()
            photo.save(data, "JPEG", quality=90)
            name = f"{split}{n}.jpg"
            (folder / "images" / name).write_bytes(data.getvalue())
            records.append({"id": n, "file_name": name, "width": 640, "height": 480})
            for left, top, width, height in rng.uniform(10, 300, (5, 4)).round().tolist():
                box = [left, top, width, min(height, 470 - top)]
                annotations.append({"id": len(annotations), "image_id": n, "category_id": 1, "bbox": box, "area": 1})
        content = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))


class Published(Dataset):
    """The files of a COCO folder through the published transforms: float32 image [3, h, w], boxes and labels."""

    def __init__(self, data: Path):
        content = json.loads((data / "instances_train.json").read_text())
        self.images, self.folder = content["images"], data / "images"
        self.boxes: dict[int, list] = {image["id"]: [] for image in self.images}
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            if not annotation.get("iscrowd") and min(w, h) > 0:
                self.boxes[annotation["image_id"]].append(([x, y, x + w, y + h], annotation["category_id"]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.images[index]
        image = Image.open(self.folder / record["file_name"]).convert("RGB")
        objects = self.boxes[record["id"]]
        target = {
            "boxes": torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label in objects], dtype=torch.int64),
        }
        image, target = augment_detr(image, target, np.random.default_rng(), MODEL.image_max_size)
        target["boxes"] = boxes_to_targets(target["boxes"], *image.size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], target

    @staticmethod
    def collate(items: list) -> tuple[Tensor, Tensor, list]:
        """As published: padded to the largest, with a mask that is true there."""
        height, width = (max(image.shape[side] for image, _ in items) for side in (1, 2))
        batch = torch.zeros(len(items), 3, height, width)
        mask = torch.ones(len(items), height, width, dtype=torch.bool)
        for slot, hidden, (image, _) in zip(batch, mask, items, strict=True):
            slot[:, : image.shape[1], : image.shape[2]] = image
            hidden[: image.shape[1], : image.shape[2]] = False
        return batch, mask, [target for _, target in items]


class Prepared(Dataset):
    """Our feed's batches by step."""

    def __init__(self, feed):
        self.feed = feed

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.feed.batch(step)


def batches(side: str, data: Path, dataset: Path, workers: int) -> Iterator[Any]:
    """Batches without end, as they reach the training process."""
    feed = open_feed(dataset, "train", MODEL, AUGMENT, 10**8, BATCH, 0, preparing=workers)
    if side in (OURS, HERE):
        for batch in feed.stream(0):
            yield normalise(batch["images"], batch["sizes"]) if side == HERE else batch
    elif side == UINT8:
        yield from DataLoader(Prepared(feed), batch_size=None, sampler=range(10**9), num_workers=workers)
    else:
        loader = DataLoader(
            Published(data), batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True,
            collate_fn=Published.collate, persistent_workers=True,
        )  # fmt: skip
        while True:
            yield from loader


def measure(side: str, data: Path, dataset: Path, seconds: float, workers: int) -> dict[str, Any]:
    """Images per second of wall time, and per second of CPU of all processes."""
    stream = batches(side, data, dataset, workers)
    for _ in range(SKIP):
        next(stream)
    images, began, used = 0, time.perf_counter(), _cpu_seconds()
    while (spent := time.perf_counter() - began) < seconds:
        next(stream)
        images += BATCH
    return {"images_per_second": images / spent, "images_per_cpu_second": images / (_cpu_seconds() - used)}


def memory_over_epochs(dataset: Path, epochs: int, workers: int) -> list[float]:
    """MiB of this process and all it started, their own alone, after every epoch of ours."""
    feed = open_feed(dataset, "train", MODEL, AUGMENT, 10**8, BATCH, 0, preparing=workers)
    stream, found, step = feed.stream(0), [], 0
    for epoch in range(1, epochs + 1):
        while step < epoch * feed.steps_per_epoch():
            next(stream)
            step += 1
        found.append(sum(_own_memory(process) for process in _family()) / 2**20)
        click.echo(f"  epoch {epoch}: {found[-1]:.0f} MiB", err=True)
    return found


def _family() -> list[psutil.Process]:
    """This process, and Ray's processes or the loader's workers."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def _cpu_seconds() -> float:
    """Of all processes, those that have ended among them as far as their parents know."""
    total = 0.0
    for process in _family():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _own_memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def make_dataset(data: Path, folder: Path) -> Path:
    from jobs.common import ray_session
    from pipelines.ingest import ingest, source

    dataset = folder / "dataset"
    dataset.mkdir()
    settings = RunSettings()
    with ray_session(settings):
        ingest(settings, source(settings, data), dataset)
    return dataset


@click.command(help=__doc__)
@click.option("--data", type=Path, help="A COCO folder; 640x480 photographs by default.")
@click.option("--images", type=click.IntRange(BATCH), default=256, show_default=True, help="Of the photographs.")
@click.option("--rounds", default=3, show_default=True, help="Every side once per round, in a fresh process.")
@click.option("--seconds", default=20.0, show_default=True, help="Timed seconds of every side.")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count(), show_default="one per core",
              help="Processes that prepare, on every side.")  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), help="Ours alone, so many epochs, and its memory.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@click.option("--side", hidden=True)
@click.option("--folder", type=Path, hidden=True)
@click.option("--dataset", type=Path, hidden=True)
@click.option("--files", type=Path, hidden=True)
def main(data, images, rounds, seconds, workers, epochs, as_json, side, folder, dataset, files):
    if side:
        from jobs.common import ray_session

        torch.set_num_threads(1)
        with ray_session(RunSettings()) if side in (OURS, HERE) else nullcontext():
            if epochs:
                result = {"mebibytes": memory_over_epochs(dataset, epochs, workers)}
            else:
                result = measure(side, files, dataset, seconds, workers)
        write_result(folder, result, None)
        return
    sides = [OURS] if epochs else [OURS, HERE, PIL, UINT8]
    runs: dict[str, list] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as place:
        if data is None:
            data = Path(place) / "photographs"
            write_photographs(data, images)
        with redirect_stdout(sys.stderr):
            dataset = make_dataset(data, Path(place))
        for number in range(1 if epochs else rounds):
            for name in sides if number % 2 == 0 else sides[::-1]:
                click.echo(f"round {number + 1}: {name}", err=True)
                given = ["--dataset", str(dataset), "--files", str(data)]
                runs[name].append(run_side(name, Path(place) / str(number) / name, True, given))
    result: dict[str, Any] = {"machine": machine("cpu"), "workers": workers, "sides": runs}
    if epochs:
        memory = runs[OURS][0]["mebibytes"]
        most = max(memory[1:], default=0)
        said = f"{memory[0]:.0f} MiB after the first epoch, {most:.0f} at most later, {memory[-1]:.0f} in the end"
        click.echo(json.dumps(result) if as_json else said)
        return
    rates = {name: median(runs[name], "images_per_second") for name in sides}
    result["ratio_to_PIL"] = rates[OURS] / rates[PIL]
    if as_json:
        click.echo(json.dumps(result))
        return
    per_core = {name: median(runs[name], "images_per_cpu_second") for name in sides}
    rows = [[n, f"{rates[n]:.0f}", f"{per_core[n]:.0f}", f"{rates[n] / rates[PIL]:.2f}"] for n in sides]
    notes = [f"Batches of {BATCH}, the published augmentation, {workers} processes that prepare."]
    print_table(f"Files to batches ({machine('cpu')})", ["side", "images/s", "per CPU second", "/ PIL"], rows, notes)


if __name__ == "__main__":
    main()
