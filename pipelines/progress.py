"""Progress a person can read, on stderr; stdout belongs to results."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False, markup=False)  # names may hold brackets
T = TypeVar("T")


class RateColumn(ProgressColumn):
    """Items per second, or per minute where they are slow."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if task.finished_speed and task.finished_time:  # of all of it, where the last of it came at one blow
            speed = min(task.finished_speed, task.completed / task.finished_time)
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 0.5 else f"{60 * speed:.1f}/min")


class TimeLeftColumn(TimeRemainingColumn):
    """The seconds in the task's field `left` where there is one, else by its rate."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return super().render(task) if left is None else Text(duration(left), style="progress.remaining")


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def progress(**options) -> Progress:
    """A rich Progress with count, rate and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        RateColumn(),
        TimeLeftColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        **options,
    )


@contextmanager
def alongside(show: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Run show(stop, *arguments) in a thread while the block runs; it is to end soon after the event `stop` is set."""
    stop = threading.Event()
    thread = threading.Thread(target=show, args=(stop, *arguments), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield items while a bar on stderr shows how many, how fast and how long still."""
    with progress() as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)
