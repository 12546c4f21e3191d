"""What a training says of itself: a JSON-lines file, MLflow, and a bar for the person who started it."""
from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from pipelines.feed import Feed
from pipelines.metrics import count_images, took
from pipelines.progress import RECENT, console, progress
from pipelines.settings import UserError
from pipelines.storage import Folder, is_remote
from pipelines.tracking import Tracker
from pipelines.workers import gather_over_workers

LOG_EVERY = 20  # steps
AWAY = 60  # seconds until an MLflow that did not answer is asked again
PROGRESS, VALIDATIONS = "progress.jsonl", "validation-"
SENT_EVERY = 5.0  # seconds, to s3://


class _Lines:
    """A JSON-lines file that grows line by line; at s3:// it is written anew every few seconds, beside the training."""

    def __init__(self, path: Path | str):
        self.path, self.remote = path, is_remote(path)
        self.text: list[bytes] = []
        self.sent, self.sending, self.sent_at = 0, None, 0.0
        self.pool = ThreadPoolExecutor(1) if self.remote else None

    def go_on(self) -> None:
        """Take up what is there, without a line that was cut off, by a kill or a full disk."""
        if self.remote:
            folder, _, name = str(self.path).rpartition("/")
            self.text = (Folder(folder).get(name) or b"").splitlines(keepends=True)
            self.sent = len(self.text)
        elif Path(self.path).is_file():
            whole = Path(self.path).read_bytes()
            os.truncate(self.path, whole.rfind(b"\n") + 1)

    def add(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        if not self.remote:
            with Path(self.path).open("ab") as file:
                file.write(line)
            return
        self.text.append(line)
        busy = self.sending is not None and not self.sending.done()
        if not busy and time.monotonic() - self.sent_at > SENT_EVERY:
            self.sending, self.sent_at = self.pool.submit(self._send, list(self.text)), time.monotonic()

    def flush(self) -> None:
        """Await that all of it is there. Raises UserError."""
        if self.remote and self.sent < len(self.text):
            self.pool.submit(self._send, list(self.text)).result()

    def _send(self, text: list[bytes]) -> None:
        folder, _, name = str(self.path).rpartition("/")
        Folder(folder).put(name, b"".join(text))
        self.sent = len(text)


class TrainingLog:
    """Losses, rates and AP to a JSON-lines file, here or at s3://, and to MLflow.

    of_val: what AP is bound to in MLflow (see `Tracker.log_metrics`). active: false in workers but the first, who only
    tell it their losses.
    """

    def __init__(self, path: Path | str, tracker: Tracker, run_id: str, of_val: dict[str, str], active: bool = True):
        self.tracker, self.run_id, self.of_val, self.active = tracker, run_id, of_val, active
        self.lines = _Lines(path)
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.since = time.monotonic()
        self.rates: list[float] = []
        self.per_epoch = 1.0
        self.unsent: list[tuple[dict[str, float], int, dict[str, str]]] = []  # figures that MLflow did not take yet
        self.ask_from = 0.0

    def start(self, step: int, messages: list[str], parameters: tuple[int, int], workers: int, feed: Feed) -> None:
        self.per_epoch = feed.steps_per_epoch()
        if self.active:
            self.lines.go_on()
        self._write({"event": "start", "step": step, "messages": messages, "parameters": parameters[0],
                     "trainable": parameters[1], "workers": workers, "epoch_images": feed.images})  # fmt: skip

    def step(
        self, step: int, steps: int | None, share: float | None, losses: dict[str, Tensor], norm: Tensor, lr: float,
        images: int,
    ) -> None:  # fmt: skip
        """Add up on the device; one transfer every LOG_EVERY steps, when all workers' losses are brought together.

        images: of a step, of all workers.
        """
        for name, value in {**losses, "grad_norm": norm}.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        if step % LOG_EVERY and step != steps:
            return
        values = torch.stack([value.float() for value in self.sums.values()]).cpu() / self.count
        everyone = gather_over_workers(dict(zip(self.sums, values.tolist(), strict=True)))
        # A worker without a box has no loss of denoising; their mean is the loss of the step (detr.criterion.Window).
        names = dict.fromkeys(name for mine in everyone for name in mine)
        means = {name: sum(mine.get(name, 0.0) for mine in everyone) / len(everyone) for name in names}
        seconds = time.monotonic() - self.since
        rate = images * self.count / seconds
        self.rates.append(rate)
        if self.active:  # for all workers
            count_images("train", images * self.count)
            took("train", seconds / self.count)
        shown = {k: round(v, 5) for k, v in means.items() if k in ("loss", "loss_ce", "loss_bbox", "loss_giou")}
        memory = {}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            memory = {"gpu_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        self._write({"event": "step", "step": step, "steps": steps, "share": share,
                     "epoch": round(step / self.per_epoch, 3), **shown, "lr": lr,
                     "images_per_second": round(rate, 2), "seconds": round(seconds, 3), **memory})  # fmt: skip
        numbers = {f"train/{k}": v for k, v in means.items()}
        self._track({**numbers, "lr": lr, "images_per_second": rate, **memory}, step)
        self.sums, self.count, self.since = {}, 0, time.monotonic()

    def epoch(self, step: int, seen: dict[str, int]) -> None:
        """What came of an epoch that is over."""
        self._write({"event": "epoch", "step": step, **seen})
        self._track({"train/epoch_images": seen["images"], "train/epoch_boxes": seen["boxes"]}, step)

    def say(self, sentence: str) -> None:
        """A sentence for the person who started the training."""
        self._write({"event": "message", "text": sentence})

    def validation(
        self, step: int, metrics: dict[str, Any], picture: Image.Image | None = None, mark: int | None = None
    ) -> None:
        """What a validation found, and some of its images with truth and detections.

        mark: how many of the training's even parts were over, where the one who validates knows.
        """
        if not self.active:
            return
        self._write({"event": "validation", "step": step, "AP": metrics["AP"], "AP50": metrics["AP50"],
                     **({"mark": mark} if mark else {})})  # fmt: skip
        numbers = {f"val/{k}": v for k, v in metrics.items() if k.startswith("A") and v is not None}
        per_class = {f"val/AP/{c['name']}": c["AP"] for c in metrics["per_class"] if c["AP"] is not None}
        self._track({**numbers, **per_class}, step, **self.of_val)
        if picture is not None:
            with tempfile.TemporaryDirectory() as place:
                path = Path(place) / f"step_{step:06}.jpg"
                picture.save(path, quality=85)
                self._to_mlflow(partial(self.tracker.log_file, self.run_id, path, "predictions"))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no training, and does not count in images per second."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def images_per_second(self) -> float:
        return round(float(np.median(self.rates)), 2) if self.rates else 0.0

    def _write(self, record: dict[str, Any]) -> None:
        if self.active:
            self.lines.add({**record, "time": round(time.time(), 2)})

    def _track(self, metrics: dict[str, float], step: int, **bound: str) -> None:
        if self.active:
            self.unsent.append((metrics, step, bound))
            self.send()

    def send(self) -> None:
        """Hand MLflow the figures it has not got; a training outlasts a server that is away for a while."""
        while self.unsent:
            metrics, step, bound = self.unsent[0]
            if not self._to_mlflow(partial(self.tracker.log_metrics, self.run_id, metrics, step, **bound)):
                return
            self.unsent.pop(0)

    def finish(self) -> None:
        """Once more at the end, without waiting for a server that was away. Raises UserError."""
        self.ask_from = 0.0
        self.send()
        self.lines.flush()

    def _to_mlflow(self, work: Callable[[], None]) -> bool:
        """Whether MLflow took it; what is wrong is said once, until it answers again."""
        from mlflow.exceptions import MlflowException

        if time.monotonic() < self.ask_from:
            return False
        try:
            work()
        except (MlflowException, OSError, UserError) as error:  # away, or it does not know us any more
            if not self.ask_from:
                why = " ".join(str(error).split())[:200]
                self.say(f"MLflow does not take the figures, which are kept and sent later: {why}")
            self.ask_from = time.monotonic() + AWAY
            return False
        self.ask_from = 0.0
        return True


def progress_of(path: str, step: int) -> str:
    """The progress file of the validation of a step, which is written beside the training's: an object has one writer.

    At s3:// alone; lines of several processes go into one local file.
    """
    return path.replace(PROGRESS, f"{VALIDATIONS}{step:08d}.jsonl") if is_remote(path) else path


def read_progress(path: Path | str) -> Iterator[dict[str, Any]]:
    """The complete lines of a progress file, and of those of validations beside it, in order of time."""
    if not is_remote(path):
        texts = [Path(path).read_bytes()] if Path(path).is_file() else []
    else:
        folder = Folder(str(path).rpartition("/")[0])
        texts = [folder.get(name) or b"" for name in (PROGRESS, *folder.names(VALIDATIONS))]
    records = []
    for line in b"\n".join(texts).decode().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one, while it is written
            records.append(json.loads(line))
    yield from sorted(records, key=lambda record: record["time"]) if len(texts) > 1 else records


def read_history(path: Path | str) -> dict[str, Any]:
    """Steps and validations of a run; those done again after an interruption count once."""
    steps, validations = {}, {}
    for record in read_progress(path):
        kind = record.pop("event")
        if kind == "step":
            steps[record["step"]] = record
        elif kind == "validation":
            validations[record["step"]] = record
    return {
        "format": 1,
        "steps": [steps[k] for k in sorted(steps)],
        "validations": [validations[k] for k in sorted(validations)],
    }


class _TimeLeft:
    """How long a training still takes, by the rate of its recent steps and what its last validation took."""

    def __init__(self, validations: int):
        self.validations = validations
        self.start()

    def start(self) -> None:
        """Forget what was measured: the training started, again or for the first time."""
        self.seconds = self.pause = 0.0  # that steps took, all together; that a validation takes
        self.written: float | None = None  # when the last steps were
        self.validated = False  # since then
        self.rate = Progress(disable=True, get_time=lambda: self.seconds, speed_estimate_period=RECENT)
        self.task = self.rate.add_task("", total=None)

    def step(self, record: dict[str, Any]) -> float | None:
        """Seconds, or None while there is nothing to measure them by: the first steps are slower than all others."""
        self.seconds += record["seconds"]
        if self.validated and self.written is not None:
            self.pause = max(0.0, record["time"] - self.written - record["seconds"])
        self.written, self.validated = record["time"], False
        share, steps = record["share"], record["steps"]
        if share is None:
            return None
        # In steps, weighted by the time they take; where their number changes rich measures anew.
        self.rate.update(self.task, total=steps, completed=share * steps)
        left = self.rate.tasks[0].time_remaining
        if left is None:
            return None
        return left + round(self.pause * (self.validations - math.floor(share * self.validations)))


def follow(stop: threading.Event, path: Path | str, validations: int) -> None:
    """Show what comes to a progress file on stderr, while the training, which validates so often, runs elsewhere."""
    seen = {json.dumps(record) for record in read_progress(path)}
    with progress() as bar:
        task = bar.add_task("train", total=None, note="starting", left=None)
        time_left = _TimeLeft(validations)
        ap, now, done = "", "first steps", False
        while not done:
            done = stop.wait(SENT_EVERY if is_remote(path) else 1.0)
            for record in read_progress(path):
                if (line := json.dumps(record)) in seen:
                    continue
                seen.add(line)
                if record["event"] == "start":
                    went_on = f", going on from step {record['step']}" if record["step"] else ""
                    console.print(
                        f"Training {record['trainable'] / 1e6:.1f} M of {record['parameters'] / 1e6:.1f} M "
                        f"parameters on {record['epoch_images']} images, {record['workers']} worker(s){went_on}."
                    )
                    for message in record["messages"]:
                        console.print(f"  {message}")
                    time_left.start()
                    bar.update(task, completed=record["step"], note=f"{ap}{now}", left=None)
                elif record["event"] == "message":
                    console.print(f"  {record['text']}")
                elif record["event"] == "validation":
                    ap = f"AP {record['AP']:.3f}  "
                    console.print(f"  step {record['step']}: AP {record['AP']:.3f}, AP50 {record['AP50']:.3f} on val")
                    time_left.validated = True
                    reached = max(bar.tasks[task].completed, record["step"])  # one beside the training is of before
                    bar.update(task, completed=reached, note=f"{ap}{now}")
                elif record["event"] == "epoch":  # small data have many before the first losses are known
                    bar.update(task, completed=record["step"])
                elif record["event"] == "step":
                    now = f"epoch {record['epoch']:.1f}, loss {record['loss']:.2f}, "
                    now += f"{record['images_per_second']:.0f} images/s"
                    if "gpu_memory_gb" in record:
                        now += f", {record['gpu_memory_gb']:.1f} GB"
                    bar.update(
                        task, completed=record["step"], total=record["steps"], note=f"{ap}{now}",
                        left=time_left.step(record),
                    )  # fmt: skip
