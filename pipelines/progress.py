"""What is said while something runs, on stderr; stdout belongs to results.

A terminal sees bars. A file, or a cluster's log, gets a line of each bar twice a minute. With DETR_LOG=json in the
environment every sentence and every such line is a JSON object that says what it is about, for whoever collects logs.
"""
from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
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
from rich.table import Table
from rich.text import Text

LOG = "DETR_LOG"  # the environment variable
JOB = "DETR_JOB"  # another, of a job on a cluster: its id
EVERY = 30.0  # seconds from one line of a bar to the next, where there is no terminal
RECENT = 1800.0  # seconds back that the rate of a training or sweep is measured by: slow machines log every few minutes
T = TypeVar("T")
_about: dict[str, str | None] = {}  # one command runs in a process, and one stage of it at a time


def as_records() -> bool:
    """Whether what is said is JSON."""
    return os.environ.get(LOG) == "json"


@contextmanager
def about(**what: str | None) -> Iterator[None]:
    """What the records of the log are about while the block runs, such as a command, a stage and its key."""
    before = {name: _about.get(name) for name in what}
    _about.update(what)
    try:
        yield
    finally:
        _about.update(before)


def record(message: str, level: str = "info", **numbers: Any) -> None:
    """Write a line of JSON: {"time" (UTC), "level", "message", what it is about, "run_id" (MLflow's), the numbers}."""
    from pipelines.tracking import open_run

    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "message": message}
    line |= {**_about, "run_id": open_run(), **numbers}
    line = {name: value for name, value in line.items() if value is not None}
    sys.stderr.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")  # at one blow: threads say things, too
    sys.stderr.flush()


def message_of(line: str) -> str:
    """What a line of a log says to a person: a record's message with its rows, or traceback; another is as it is."""
    try:
        said = json.loads(line) if line.startswith('{"time": ') else {}
    except ValueError:
        return line
    rows = (", ".join(f"{name} {cell}" for name, cell in row.items() if cell) for row in said.get("rows", []))
    return said.get("traceback") or "\n".join([said.get("message", ""), *rows]).strip() or line


def say_all_as_records() -> None:
    """Have what libraries log or warn of, and a crash, be records, too."""

    class Handler(logging.Handler):
        def emit(self, said: logging.LogRecord) -> None:
            record(said.getMessage(), said.levelname.lower(), logger=said.name)

    def crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        import traceback

        text = "".join(traceback.format_exception(kind, error, trace))
        record(f"{kind.__name__}: {error}", "critical", traceback=text)

    logging.basicConfig(handlers=[Handler()], level=logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = crash


def _rows(table: Table) -> list[dict[str, str]]:
    """A table's rows, each its cells by the names of the columns."""
    names = [str(column.header) for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [dict(zip(names, map(str, cells), strict=True)) for cells in rows]


class _Stderr(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        if not as_records():
            if not self.is_terminal and not any(isinstance(one, Table) for one in objects):
                options = {"soft_wrap": True} | options  # a file has no width, and paths are looked for in one piece
            super().print(*objects, **options)
            return
        if objects and isinstance(objects[0], Table):
            record(str(objects[0].title), rows=_rows(objects[0]))
            return
        page = Console(file=io.StringIO(), highlight=False, markup=False, width=self.width)
        page.print(*objects, soft_wrap=True)
        if message := page.file.getvalue().strip():
            record(message)


console = _Stderr(stderr=True, highlight=False, markup=False)  # names may hold brackets


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
    """The seconds in the task's field `left` where there is one, and nothing where that is None; else by its rate."""

    def render(self, task: Task) -> Text:
        if "left" not in task.fields:
            return super().render(task)
        left = task.fields["left"]
        return Text("" if left is None else duration(left), style="progress.remaining")


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def _number(value: float) -> str:
    value = round(value, 1)
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


class _Lines(Progress):
    """For where no terminal is: a line for each task twice a minute, and in the end."""

    def __init__(self, *columns: ProgressColumn, **options: Any):
        super().__init__(*columns, disable=True, **options)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._say_again, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        if not self.live.transient:
            self._say()

    def _say_again(self) -> None:
        while not self._end.wait(EVERY):
            self._say()

    def _say(self) -> None:
        for task in self.tasks:
            rate, left = RateColumn().render(task).plain, task.fields.get("left", task.time_remaining)
            words = [
                _number(task.completed) + (f" of {_number(task.total)}" if task.total is not None else ""), rate,
                f"{duration(left)} left" if left and not task.finished else "", task.fields["note"],
            ]  # fmt: skip
            line = f"  {task.description}: {', '.join(word for word in words if word)}"
            if as_records():
                record(line.strip(), done=task.completed, total=task.total, seconds_left=left)
            else:
                self.console.print(line)


def progress(**options: Any) -> Progress:
    """A rich Progress with count, rate and time left; each task has a field `note`."""
    return (Progress if console.is_terminal and not as_records() else _Lines)(
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
