"""Batch inference, files to detections: `predict` on Ray beside plain loops, and its memory as the images grow more.

    python benchmarks/predict.py
    python benchmarks/predict.py --preset tiny --images 2000
    python benchmarks/predict.py --memory 1000 --memory 20000
"""
from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from common import has_transformers, machine, make_model, median, print_table, process_options, run_side, write_result
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from detr.checkpoint import save_checkpoint
from detr.config import ModelConfig

PRESETS = {"r50": "detr_resnet50", "tiny": "tiny"}
SIZES = ((640, 480), (640, 480), (640, 427), (480, 640), (500, 375))  # of photographs, as they are mixed in COCO
THRESHOLD = 0.5
BATCHES = {"r50": 4, "tiny": 16}
OURS, LOOP, LIBRARY = "predict", "plain loop", "transformers"


def sides_of(preset: str) -> list[str]:
    both = [f"{side}, {precision}" for precision in ("float32", "bfloat16") for side in (OURS, LOOP)]
    if preset == "r50" and has_transformers():
        both += [f"{LIBRARY} batch {size}, float32" for size in (1, BATCHES["r50"])]
    return both


def write_images(folder: Path, number: int, preset: str) -> None:
    """So many JPEGs cut from scikit-learn's photographs; for the tiny preset of 128 pixels. After 500 they repeat."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True)
    photographs = [Image.fromarray(photo).resize((1280, 854)) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    encoded = []
    for n in range(min(number, 500)):
        width, height = SIZES[n % len(SIZES)]
        x, y = int(rng.integers(0, 1280 - width)), int(rng.integers(0, 854 - height))
        photo = photographs[n % len(photographs)].crop((x, y, x + width, y + height))
        if preset == "tiny":
            photo = photo.resize((width // 4, height // 4))
        data = io.BytesIO()
        photo.save(data, "JPEG", quality=90)
        encoded.append(data.getvalue())
    for n in range(number):
        (folder / f"{n:06d}.jpg").write_bytes(encoded[n % len(encoded)])


def write_checkpoint(folder: Path, preset: str) -> None:
    config = ModelConfig.model_validate({"preset": PRESETS[preset]})
    if preset == "r50":
        model = make_model(config)
    else:
        from detr.model import DETR

        torch.manual_seed(0)
        model = DETR(config)
    classes = [{"id": n, "name": f"class {n}"} for n in range(config.num_classes)]
    save_checkpoint(folder, model, classes, score_threshold=THRESHOLD)


class Files(Dataset):
    """Decoded images, for a DataLoader."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(self.files[index]).convert("RGB")


def library_loop(files: list[Path], batch: int) -> Iterator[int]:
    """The transformers library's DETR over a DataLoader."""
    from library import library_model
    from transformers import DetrImageProcessor

    processor = DetrImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333})
    model = library_model(make_model(ModelConfig())).eval()
    model.config.auxiliary_loss = False

    def collate(images):  # in the loader's processes
        return processor(images=images, return_tensors="pt"), torch.tensor([(i.height, i.width) for i in images])

    loader = DataLoader(Files(files), batch_size=batch, num_workers=os.cpu_count(), collate_fn=collate)
    with torch.inference_mode():
        for made, sizes in loader:
            outputs = model(made["pixel_values"], pixel_mask=made["pixel_mask"])
            found = processor.post_process_object_detection(outputs, THRESHOLD, sizes)
            yield len(found)


def plain_loop(files: list[Path], checkpoint: Path, preset: str, precision: str) -> Iterator[int]:
    """Our model over one image file after another, so many at a time."""
    from detr.transforms import decode_image
    from pipelines.detect import Detector

    batch = BATCHES[preset]
    detector = Detector.load(checkpoint, batch, precision=precision)
    for start in range(0, len(files), 4 * batch):
        images = [decode_image(path.read_bytes(), 10**8) for path in files[start : start + 4 * batch]]
        detector.detect(images, detector.thresholds)
        yield len(images)


def measure_predict(folder: Path, checkpoint: Path, preset: str, precision: str, output: Path) -> dict[str, Any]:
    """All of `predict`: images/s from the first answers on, seconds until them, memory of driver and workers."""
    from jobs.common import ray_session
    from pipelines import predict as module
    from pipelines.settings import load_settings

    batch = BATCHES[preset]
    settings = load_settings(None, [
        f"predict.batch_size={batch}", f"predict.images_per_shard={4 * batch if preset == 'r50' else 256}",
        f"predict.precision={precision}",
    ])  # fmt: skip
    stamps: list[tuple[float, int]] = []
    stream = module._stream

    def timed(*args):
        for row in stream(*args):
            stamps.append((time.perf_counter(), len(row["image"] or ())))
            yield row

    module._stream = timed
    started = time.perf_counter()
    with peak_memory() as peak, redirect_stdout(sys.stderr):
        result = module.predict(
            settings, str(folder), checkpoint, "benchmark", "1", output, session=lambda: ray_session(settings)
        )
    spent = time.perf_counter() - started
    (first, _), (last, _) = stamps[0], stamps[-1]
    assert result["ok"] == result["images"] == sum(number for _, number in stamps)
    later = sum(number for at, number in stamps if at - first > 0.1)  # what came with the first block does not count
    return {
        "images_per_second": later / (last - first) if later else result["images"] / spent,
        "seconds": spent,
        "until_first": first - started,
        "images": result["images"],
        **peak,
    }


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """MiB while the block runs, at most: own memory of this process, of one worker, of all of them and Ray's own; and
    of the object store, whose pages are no process's own, though they look so while only one has touched them.
    """
    shared = Path("/dev/shm")  # where Ray's object store lies
    before = psutil.disk_usage(str(shared)).used
    peak = {"driver_MiB": 0.0, "worker_MiB": 0.0, "all_MiB": 0.0, "objects_MiB": 0.0}
    stop = threading.Event()

    def own_memory(process: psutil.Process) -> float:
        maps = process.memory_maps(grouped=False)
        return sum(m.private_clean + m.private_dirty for m in maps if not m.path.startswith(str(shared))) / 2**20

    def look() -> None:
        while not stop.wait(1):
            own, others = 0.0, [0.0]
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    used = own_memory(process)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                if process.pid == os.getpid():
                    own = used
                else:
                    others.append(used)
            found = {"driver_MiB": own, "worker_MiB": max(others), "all_MiB": own + sum(others),
                     "objects_MiB": (psutil.disk_usage(str(shared)).used - before) / 2**20}
            peak.update({key: max(peak[key], found[key]) for key in peak})

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def measure(side: str, images: Path, checkpoint: Path, preset: str, folder: Path) -> dict[str, Any]:
    kind, precision = side.split(", ")
    if kind == OURS:
        return measure_predict(images, checkpoint, preset, precision, folder / "output")
    files = sorted(images.iterdir())
    if kind == LOOP:
        loop = plain_loop(files, checkpoint, preset, precision)
    else:
        loop = library_loop(files, int(kind.rpartition(" ")[2]))
    started = time.perf_counter()
    skipped, first, done = next(loop), time.perf_counter(), 0  # what is slow at the start is on no side
    for number in loop:
        done += number
    ended = time.perf_counter()
    return {
        "images_per_second": done / (ended - first) if done else skipped / (ended - started),
        "seconds": ended - started,
        "until_first": first - started, "images": done + skipped,
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="r50", show_default=True)
@click.option("--images", type=click.IntRange(1), default=64, show_default=True)
@click.option("--rounds", default=2, show_default=True, help="Every side once per round, in a fresh process.")
@click.option("--memory", type=click.IntRange(1), multiple=True, help="Ours alone, on so many images, and its memory.")
@click.option("--only", multiple=True, help="These sides alone, such as 'predict, float32'.")
@click.option("--checkpoint", type=Path, hidden=True)
@click.option("--given", type=Path, hidden=True)
@process_options
def main(preset, images, rounds, memory, only, checkpoint, given, device, threads, as_json, side, folder):
    if side:
        if threads:
            torch.set_num_threads(threads)
        write_result(folder, measure(side, given, checkpoint, preset, folder), None)
        return
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        preset = "tiny" if memory else preset
        write_checkpoint(place / "checkpoint", preset)
        if memory:
            _memory(place, memory, as_json)
            return
        write_images(place / "images", images, preset)
        sides = list(only) or sides_of(preset)
        runs: dict[str, list] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sides if number % 2 == 0 else sides[::-1]:
                click.echo(f"round {number + 1} of {rounds}: {name}", err=True)
                arguments = ["--given", str(place / "images"), "--checkpoint", str(place / "checkpoint")]
                # A plain loop is what one writes: with the system's own allocator.
                runs[name].append(run_side(name, place / str(number) / name, name.startswith(OURS), arguments))
                click.echo(f"  {runs[name][-1]['images_per_second']:.2f} images/s", err=True)
    rates = {name: median(runs[name], "images_per_second") for name in sides}
    libraries = [rates[name] for name in sides if name.startswith(LIBRARY)]
    result: dict[str, Any] = {"machine": machine("cpu"), "preset": preset, "images": images, "sides": runs,
                              "rates": rates}  # fmt: skip
    rows = []
    for name in sides:
        precision = name.split(", ")[1]
        loop = rates.get(f"{LOOP}, {precision}")
        to_library = rates[name] / max(libraries) if libraries else None
        rows.append([
            name, f"{rates[name]:.2f}", f"{median(runs[name], 'until_first'):.1f}",
            f"{rates[name] / loop:.2f}" if loop else "", f"{to_library:.2f}" if to_library else "",
        ])  # fmt: skip
        result.setdefault("to_loop", {})[name] = loop and rates[name] / loop
        result.setdefault("to_library", {})[name] = to_library
    if as_json:
        click.echo(json.dumps(result))
        return
    print_table(
        f"Files to detections, {PRESETS[preset]}, {images} images ({machine('cpu')})",
        ["side", "images/s", "seconds to the first", "to the plain loop", "to transformers"], rows,
        ["images/s: once the first are done; for transformers the better of its batch sizes counts.",
         f"predict and the plain loop in batches of {BATCHES[preset]} of one shape."],
    )  # fmt: skip


def _memory(place: Path, numbers: tuple[int, ...], as_json: bool) -> None:
    found = []
    for number in numbers:
        write_images(place / f"images{number}", number, "tiny")
        arguments = ["--preset", "tiny", "--given", str(place / f"images{number}"), "--checkpoint",
                     str(place / "checkpoint")]  # fmt: skip
        found.append(run_side(f"{OURS}, float32", place / str(number), True, arguments))
    if as_json:
        click.echo(json.dumps({"machine": machine("cpu"), "runs": found}))
        return
    columns = ("images", "seconds", "images_per_second", "driver_MiB", "worker_MiB", "all_MiB", "objects_MiB")
    rows = [[f"{one[key] or 0:,.0f}" for key in columns] for one in found]
    print_table(f"Memory of predict, tiny preset ({machine('cpu')})", [c.replace("_", " ") for c in columns], rows, [
        "driver: the process of the command; worker: the largest of Ray's; all: these and Ray's own. Their own "
        "memory (USS), at most, without the object store's pages; objects: the object store."])  # fmt: skip


if __name__ == "__main__":
    main()
