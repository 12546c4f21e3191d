"""Images per second of a training: what Ray Train and the feed cost beside a bare loop, and what two workers gain.

\b
    python benchmarks/ray_overhead.py --out ray_overhead.json
    python benchmarks/ray_overhead.py --parts b --preset tiny --size 192 --batch-size 8 --steps 100

\b
a: a bare PyTorch loop over batches that were decoded, resized and padded once and lie in memory, against the product:
   shards, feed and Ray Train with one worker. Both do the same steps (optimiser, clipping and moving average among
   them) on batches of the same shape with as many threads (--threads, or all cores). At most a tenth is to be lost.
b: the product with two workers against one, each with one thread and --batch-size images per step: two cores against
   one. At least 1.7 times the images per second are to come of it.

By default the model is DETR R50 as published, from random weights, at 512 pixels, which takes about half an hour on two
cores. The images are 640x480 photographs, resized and not augmented. The steps of the first epoch do not count, nor
does measuring AP. Every side runs in a fresh process, with a Ray of its own; a part begins and ends with the side that
it compares to, and every run of the other is compared to the mean of the two beside it, so that a machine that gets
slower or faster shows, and does not decide.
"""
from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import torch
from common import machine, print_table, process_options, run_side, synchronize, write_result
from feed import make_dataset, write_photographs
from joblib import cpu_count

from detr.config import PRESETS
from pipelines.feed import open_feed
from pipelines.fit import fit_to_data
from pipelines.settings import RunSettings, load_settings
from pipelines.stage import read_json
from pipelines.tracking import tracker
from pipelines.train import set_up, to_device, train, train_step, update_average
from pipelines.training_log import LOG_EVERY

CONFIGS = Path(__file__).parents[1] / "configs"
BARE, RAY, ONE, TWO = "bare loop, batches in memory", "shards, feed, Ray Train", "one worker", "two workers"
PARTS = {"a": (BARE, RAY), "b": (ONE, TWO)}  # what is compared to, and what is compared
TO_REACH = {"a": 0.9, "b": 1.7}
TRAINABLE = [name for name, preset in PRESETS.items() if not preset.get("masks")]


def make_settings(preset: str, size: int, batch_size: int, steps: int, workers: int, device: str) -> RunSettings:
    """The preset's own recipe, from random weights and without augmentation."""
    config = CONFIGS / f"{preset}.yaml"
    return load_settings(config if config.is_file() else None, [
        f"model.preset={preset}", f"model.image_size={size}", f"train.batch_size={batch_size}",
        f"train.budget={steps} steps", f"train.num_workers={workers}", f"train.use_gpu={device != 'cpu'}",
        "train.augment.recipe=none", "train.backbone_weights=none", "train.validations=1",
        "train.lr=1e-6", "train.lr_backbone=1e-6",  # no step is faster for it, and frozen norms explode otherwise
    ])  # fmt: skip


def first_epoch(images: int, batch_size: int, workers: int = 1) -> int:
    """The number of steps that have an image of the first epoch."""
    return math.ceil(images / (batch_size * workers))


def measure_bare(settings: RunSettings, dataset_folder: Path, steps: int, device: torch.device) -> dict[str, Any]:
    """{"images_per_second", "steps" that counted} of the bare loop."""
    torch.set_float32_matmul_precision("high")  # as in training
    settings, _ = fit_to_data(settings, dataset_folder)
    options, dataset = settings.train, read_json(dataset_folder / "dataset.json")
    names = [category["name"] for category in dataset["categories"]]
    model, ema, criterion, optimizer, _ = set_up(settings, names, device)
    feed = open_feed(
        dataset_folder, "train", settings.model, options.augment, settings.ingest.max_pixels, options.batch_size,
        settings.seed,
    )  # fmt: skip
    skipped = first_epoch(feed.images, options.batch_size)
    batches = itertools.cycle([feed.batch(step) for step in range(skipped)])
    for step in range(steps):
        if step == skipped:
            synchronize(device)
            began = time.perf_counter()
        train_step(model, criterion, optimizer, [to_device(next(batches), device)], step, settings)
        update_average(ema, model, options.ema_decay)
    synchronize(device)
    counted = steps - skipped
    return {"images_per_second": counted * options.batch_size / (time.perf_counter() - began), "steps": counted}


def measure_train(settings: RunSettings, dataset_folder: Path, folder: Path) -> dict[str, Any]:
    """The same of a training by Ray Train, by its own records; a Ray session is there."""
    options, dataset = settings.train, read_json(dataset_folder / "dataset.json")
    place = folder / "training"
    place.mkdir()
    train(settings, dataset_folder, place, tracker(settings, folder / "store", "benchmark"), "benchmark")
    records = [json.loads(line) for line in (place / "progress.jsonl").read_text().splitlines()]
    images = sum(shard["rows"] for shard in dataset["splits"]["train"]["shards"])
    skipped = first_epoch(images, options.batch_size, options.num_workers)
    return rate_of_records(records, options.batch_size * options.num_workers, skipped)


def rate_of_records(records: list[dict[str, Any]], images_per_step: int, skipped: int) -> dict[str, Any]:
    """{"images_per_second", "steps" that counted} of the records that begin after so many steps.

    A record tells the rate of the steps since the one before it.
    """
    before, counted, seconds = 0, 0, 0.0
    for record in records:
        if record["event"] != "step":
            continue
        steps = record["step"] - before
        if steps <= 0:
            raise RuntimeError("The training failed on its way and was started again; what it took is no measure.")
        if before >= skipped:
            counted += steps
            seconds += steps * images_per_step / record["images_per_second"]
        before = record["step"]
    if not counted:
        raise RuntimeError("No record of a step begins after the first epoch; train for more steps.")
    return {"images_per_second": counted * images_per_step / seconds, "steps": counted}


def measure(
    side: str, settings: RunSettings, dataset_folder: Path, folder: Path, steps: int, threads: int, device: str
) -> dict[str, Any]:
    """One side, with so many threads to a worker."""
    if side == BARE:
        torch.set_num_threads(threads)
        return measure_bare(settings, dataset_folder, steps, torch.device(device))
    from jobs.common import ray_session

    # Workers share all cores there are, and this is how many they are told. Ray hands it on to them.
    os.environ["LOKY_MAX_CPU_COUNT"] = str(threads * settings.train.num_workers)
    with ray_session(settings):
        return measure_train(settings, dataset_folder, folder)


def compare(rates: list[float]) -> list[float]:
    """Rates of two sides in turn, the reference first and last -> the other's, each to the mean of its neighbours."""
    return [2 * rates[i] / (rates[i - 1] + rates[i + 1]) for i in range(1, len(rates), 2)]


def summarise(part: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs in the order of time -> the ratio, and how far apart runs of the side compared to are."""
    rates = [run["images_per_second"] for run in runs]
    ratios = compare(rates)
    return {
        "runs": runs,
        "images_per_second": {side: statistics.median(rates[i::2]) for i, side in enumerate(PARTS[part])},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "to_reach": TO_REACH[part],
        "drift": max(rates[::2]) / min(rates[::2]) - 1,
    }


def table_rows(found: dict[str, Any], batch_size: int) -> list[list[str]]:
    """A row for every run, in the order of time."""
    rows = []
    for i, run in enumerate(found["runs"]):
        rate = run["images_per_second"]
        seconds = batch_size * (2 if run["side"] == TWO else 1) / rate
        ratio = f"{found['ratios'][i // 2]:.3f}" if i % 2 else ""
        rows.append([run["side"], str(run["threads"]), str(run["steps"]), f"{seconds:.3f}", f"{rate:.3f}", ratio])
    return rows


@click.command(help=__doc__)
@click.option("--parts", type=click.Choice(["a,b", "a", "b"]), default="a,b", show_default=True)
@click.option("--preset", type=click.Choice(TRAINABLE), default="detr_resnet50", show_default=True,
              help="The model, with the recipe of configs/ of that name where there is one.")  # fmt: skip
@click.option("--size", type=click.IntRange(32), default=512, show_default=True, help="Pixels of the shorter side.")
@click.option("--images", type=click.IntRange(1), default=32, show_default=True, help="Of an epoch.")
@click.option("--batch-size", type=click.IntRange(1), default=2, show_default=True, help="Images per worker and step.")
@click.option("--steps", type=click.IntRange(1), default=60, show_default=True,
              help=f"Of every side, the first epoch's among them. A training tells its pace every {LOG_EVERY}, "
                   "so that those count that follow on the first multiple of it after the first epoch.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True,
              help="Runs of the side that is compared; of the other there is one more.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write the JSON here, too.")
@process_options
@click.option("--dataset", type=Path, hidden=True)
def main(
    parts, preset, size, images, batch_size, steps, rounds, out, device, threads, as_json, side, folder, dataset
):  # fmt: skip
    if side:
        own = 1 if side in PARTS["b"] else threads or cpu_count()
        settings = make_settings(preset, size, batch_size, steps, 2 if side == TWO else 1, device)
        result = measure(side, settings, dataset, folder, steps, own, device)
        write_result(folder, {"side": side, "threads": own, **result}, None)
        return
    parts = parts.split(",")
    least = LOG_EVERY * math.ceil(first_epoch(images, batch_size) / LOG_EVERY) + 1
    if steps < least:
        raise click.UsageError(f"So many images take --steps {least} or more, for some to count after the first epoch.")
    if threads and threads > cpu_count():
        raise click.UsageError(f"A training has at most a thread for every core, here {cpu_count()}.")
    if "b" in parts and (cpu_count() if device == "cpu" else torch.cuda.device_count()) < 2:
        raise click.UsageError("Part b needs two cores, or GPUs with --device cuda; there is --parts a.")
    result: dict[str, Any] = {
        "machine": machine(device), "preset": preset, "size": size, "images": images, "batch_size": batch_size,
        "steps": steps, "parts": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_photographs(place / "photographs", images)
        with redirect_stdout(sys.stderr):
            dataset = make_dataset(place / "photographs", place)
        for part in parts:
            reference, other = PARTS[part]
            runs = []
            for number, side in enumerate([reference, *[other, reference] * rounds]):
                click.echo(f"part {part}, run {number + 1} of {2 * rounds + 1}: {side}", err=True)
                own = place / part / str(number)
                runs.append(run_side(side, own, True, ["--dataset", str(dataset)]))
                shutil.rmtree(own)  # checkpoints take a gigabyte
            result["parts"][part] = summarise(part, runs)
    if out:
        out.write_text(json.dumps(result) + "\n")
    if as_json:
        click.echo(json.dumps(result))
        return
    columns = ["in the order of time", "threads each", "steps counted", "s/step", "images/s", "ratio"]
    for part, found in result["parts"].items():
        reference, other = PARTS[part]
        ratio, to_reach = found["ratio"], found["to_reach"]
        lost = f" ({1 - ratio:.1%} lost)" if part == "a" else ""
        notes = [
            f"{other} / {reference}: {ratio:.3f}{lost}; to reach: {to_reach}.",
            f"Runs of {reference!r} are {found['drift']:.1%} apart.",
        ]
        title = f"Part {part}: {preset}, {size} pixels, {batch_size} images per worker and step ({result['machine']})"
        print_table(title, columns, table_rows(found, batch_size), notes)


if __name__ == "__main__":
    main()
