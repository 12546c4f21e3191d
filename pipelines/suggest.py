"""Which batch size, and with it which learning rate, suit the machine: measured on the steps to be trained."""
from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from pipelines.feed import open_feed
from pipelines.fit import fit_to_data
from pipelines.progress import console
from pipelines.settings import RunSettings, TrainSettings, UserError, override_settings
from pipelines.stage import read_json
from pipelines.train import find_weights, set_up, to_device, train_step, use_machine

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
WARM_UP, TIMED = 2, 4  # steps
LEAST = 8  # images that batch norms and a step's gradient want; fewer are proposed only where no more can be had
LONGEST = 30.0  # seconds a size may take before larger ones are left alone, and no more of its steps are timed
ENOUGH = 0.8  # of the best rate: a smaller batch takes more steps of a budget, which teaches more
MEMORY = 0.8  # of the machine's that may be used: later batches hold more objects
GAIN = 1.05  # a doubled batch that gives less than this ends the search
DROP = 0.8  # of the smaller batch's rate: what gives less is measured again, since a busy machine may have done it


def suggest(
    settings: RunSettings, dataset_folder: Path, use_gpu: bool, run: Callable[..., dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Train a few steps with one batch size after another, as one worker would.

    run: calls `measure`; by default in a fresh Ray worker for each size, where trainings run too.
    Returns {"rows": [{"batch_size", "images_per_second", "seconds_per_step", "memory_gb", "lr", "fits"}], "settings":
    the suggestion as key=value, "note": why it is a batch of fewer than LEAST, or None, "device", "image_size":
    [longer, shorter]}. Raises UserError where not even the smallest batch fits, and as `train`.
    """
    settings, _ = fit_to_data(find_weights(settings), dataset_folder)
    images = read_json(Path(dataset_folder) / "dataset.json")["splits"]["train"]["images"]
    rows: list[dict[str, Any]] = []
    device = ""
    for size in SIZES:
        if rows and size > images:
            break
        console.print(f"Measuring batches of {size}.")
        row = (run or _in_worker)(settings, dataset_folder, size, use_gpu)
        if rows and row["fits"] and row["images_per_second"] < DROP * rows[-1]["images_per_second"]:
            console.print("That was slower than a smaller batch; measuring it again.")
            again = (run or _in_worker)(settings, dataset_folder, size, use_gpu)
            row = max(row, again, key=lambda one: one["images_per_second"])
        device, memory = row.pop("device") or device, row.pop("machine_gb")
        row["lr"] = scaled_rate(settings.train.lr, settings.train.batch_size, size)
        rows.append(row)
        if not row["fits"]:
            break
        slow = row["seconds_per_step"] * 2 * (WARM_UP + TIMED) > LONGEST
        flat = len(rows) > 1 and row["images_per_second"] < GAIN * rows[-2]["images_per_second"]
        if (size >= LEAST and (slow or flat)) or 2 * row["memory_gb"] > MEMORY * memory:
            break
    best = choose(rows)
    if best is None:
        raise UserError(
            f"Not even {SIZES[0]} images fit in this machine's memory; take a smaller model.image_size or model."
        )
    return {
        "rows": rows,
        "settings": [f"train.batch_size={best['batch_size']}", f"train.lr={best['lr']:.2g}"],
        "note": _why_small(best["batch_size"], images),
        "device": device,
        "image_size": [settings.model.image_max_size, settings.model.image_size],
    }


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of LEAST images or more the smallest batch whose rate is near the best one's; else the largest that fits.

    None where none fits.
    """
    fitting = [row for row in rows if row["fits"]]
    fitting = [row for row in fitting if row["batch_size"] >= LEAST] or fitting[-1:]
    most = max((row["images_per_second"] for row in fitting), default=0.0)
    return next((row for row in fitting if row["images_per_second"] >= ENOUGH * most), None)


def _why_small(size: int, images: int) -> str | None:
    if size >= LEAST:
        return None
    if images < 2 * size:
        return f"A batch of {size} is small ({LEAST} or more train better): there are {images} images to train on."
    return (
        f"A batch of {size} is small ({LEAST} or more train better): this machine's memory does not hold more. "
        "train.recompute=true, a smaller model.image_size or model needs less."
    )


def scaled_rate(lr: float, of_batch: int, batch_size: int) -> float:
    """The learning rate for another batch size, with its square root (Malladi et al. 2022, for Adam)."""
    return lr * math.sqrt(batch_size / of_batch)


def suggestion_table(found: dict[str, Any]) -> Table:
    """What was measured, for a terminal."""
    wide, high = found["image_size"]
    title = f"{found['device']}, images of up to {wide}x{high} pixels"
    table = Table(title=title, title_justify="left")
    for column in ("batch size", "images/s", "s/step", "memory, GB", "train.lr"):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        if row["fits"]:
            cells = f"{row['images_per_second']:.1f}", f"{row['seconds_per_step']:.3f}", f"{row['memory_gb']:.1f}"
        else:
            cells = "does not fit", "", ""
        table.add_row(str(row["batch_size"]), *cells, f"{row['lr']:.2g}")
    return table


def measure(settings: RunSettings, dataset_folder: Path, size: int, use_gpu: bool) -> dict[str, Any]:
    """The rate of training steps with this batch size, without the time that images take to be prepared.

    A row as in `suggest`, with the "device" and the GB it has in all, "machine_gb". Memory is the device's, or on a CPU
    what the process grew by at its peak.
    """
    device = torch.device("cuda" if use_gpu else "cpu")
    use_machine()
    settings = override_settings(settings, {"train.batch_size": size})
    options: TrainSettings = settings.train
    names = [category["name"] for category in read_json(Path(dataset_folder) / "dataset.json")["categories"]]
    feed = open_feed(
        Path(dataset_folder), "train", settings.model, options.augment, settings.ingest.max_pixels, size, settings.seed
    )
    if use_gpu:
        name, whole = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        name, whole = f"{torch.get_num_threads()} CPU cores", psutil.virtual_memory().total
    row = does_not_fit(size) | {"device": name, "machine_gb": whole / 2**30}
    times, before = [], psutil.Process().memory_info().rss
    try:
        model, _, criterion, optimizer, _ = set_up(settings, names, device)
        for step in range(WARM_UP + TIMED):
            batch = to_device(feed.batch(step), device)
            began = time.perf_counter()
            train_step(model, criterion, optimizer, [batch], step, settings)
            if use_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
            if len(times) > 1 and sum(times) > LONGEST:
                break
    except RuntimeError as error:  # on a CPU it has no class of its own
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return row
        raise
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    memory = torch.cuda.max_memory_allocated(device) if use_gpu else peak
    seconds = statistics.median(times[WARM_UP:] or times[-1:])
    return row | {
        "images_per_second": round(size / seconds, 2), "seconds_per_step": round(seconds, 4),
        "memory_gb": round(memory / 2**30, 2), "fits": True,
    }  # fmt: skip


def does_not_fit(size: int) -> dict[str, Any]:
    return {"batch_size": size, "images_per_second": 0.0, "seconds_per_step": 0.0, "memory_gb": 0.0, "fits": False}


def _in_worker(settings: RunSettings, dataset_folder: Path, size: int, use_gpu: bool) -> dict[str, Any]:
    import ray

    if use_gpu and ray.cluster_resources().get("GPU", 0) < 1:
        raise UserError("train.use_gpu is true, and this Ray cluster has no GPU.", 2)
    task = ray.remote(max_calls=1, max_retries=0, num_gpus=int(use_gpu))(measure)
    try:
        return ray.get(task.remote(settings, dataset_folder, size, use_gpu))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):  # ended for its memory
        return does_not_fit(size) | {"device": "", "machine_gb": 0.0}
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
