"""Run pipelines, sweeps and other commands on cron times."""
from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from jobs.common import DONE, FAILED, GATE_REFUSED, INTERRUPTED, check_command, finish, one_sentence, table_text

SCHEDULABLE = ("pipeline", "sweep", "train", "evaluate", "predict", "ingest", "report")
# Given by the scheduler itself, or no run at all.
NOT_IN_COMMANDS = ("--store", "--json", "--print-settings", "--help")
PROGRAM = [sys.executable, "-P", "-m", "jobs.cli"]
SHOWN = 50  # lines of history in a table
WIDE = {"max_content_width": 100}


@click.group(
    epilog="Example: detr schedule add nightly '0 2 * * *' -- pipeline data.path=path/to/coco", context_settings=WIDE
)
def main() -> None:
    """Run pipelines, sweeps and other commands on cron times.

    `add` keeps a schedule in the store, `start` is the scheduler that runs what is due. Killed at any moment and
    started again, it takes up what was running, and runs or skips what was missed, as each schedule says.
    """


def _command(name: str, example: str) -> Callable:
    """Make a subcommand of `work(store, **own options) -> result`, as `job` makes commands."""

    def decorate(work: Callable[..., dict[str, Any]]) -> click.Command:
        @functools.wraps(work)
        def command(store, as_json, **own):
            from pipelines.mirror import open_store

            with one_sentence(as_json), redirect_stdout(sys.stderr):
                result = work(open_store(store), **own)
            finish(result, as_json)

        command = click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")(command)
        command = click.option("--store", default="store", show_default=True, metavar="FOLDER",
                               help="The store whose schedules are meant, and in which they run.")(command)  # fmt: skip
        return main.command(name, help=work.__doc__, epilog=f"Example: {example}", context_settings=WIDE)(command)

    return decorate


@_command("add", "detr schedule add nightly '0 2 * * *' --timezone Europe/Berlin -- pipeline data.path=path/to/coco")
@click.argument("name")
@click.argument("cron")
@click.argument("words", nargs=-1, required=True, metavar="-- COMMAND...")
@click.option("--timezone", default="UTC", show_default=True, metavar="ZONE", help="What the cron times are meant in.")
@click.option("--missed", type=click.Choice(["once", "skip"]), default="once", show_default=True,
              help="What becomes of times that pass while no scheduler runs, or the run before is not over: one run "
              "for all of them, or none.")  # fmt: skip
def add(store: Path, name: str, cron: str, words: tuple[str, ...], timezone: str, missed: str) -> dict:
    """Run COMMAND at the times of CRON.

    COMMAND is a command of detr with its settings; what is wrong with them is said now. It will run in the present
    folder. CRON is minute, hour, day of month, month and day of week: '0 2 * * *' is daily at 2:00.
    """
    from pipelines.schedule import add, next_time

    why = "a scheduled command runs in the schedule's store, with --json"
    check_command(words, SCHEDULABLE, "scheduled", NOT_IN_COMMANDS, why)
    made = add(store, name, cron, words, Path.cwd(), timezone, missed)
    at = next_time(made, datetime.now(UTC))
    text = f"{name} runs `detr {shlex.join(made.command)}`, next at {at:%Y-%m-%d %H:%M %Z}."
    return {**made.model_dump(mode="json"), "next": at.isoformat(), "text": text + _without_scheduler(store)}


@_command("list", "detr schedule list")
def show_list(store: Path) -> dict:
    """Show the schedules.

    With each, when it is next, and how its last run ended.
    """
    from rich.table import Table

    from pipelines.schedule import describe, history, is_running, next_time, read_schedules

    running, now = is_running(store), datetime.now(UTC)
    table = Table("schedule", "cron", "next", "last run (UTC)", "command")
    shown = []
    for schedule in read_schedules(store):
        entries = history(store, schedule.name, last=1)
        at = None if schedule.paused else next_time(schedule, max(now, schedule.since))
        last = f"{_utc(entries[0]['time'])} {describe({**entries[0], 'error': None}, running)}" if entries else ""
        cron = schedule.cron + (f" {schedule.timezone}" if schedule.timezone != "UTC" else "")
        when = "paused" if at is None else f"{at:%Y-%m-%d %H:%M %Z}"
        table.add_row(schedule.name, cron, when, last, shlex.join(schedule.command))
        last = {"last": {**entries[0], "text": describe(entries[0], running)}} if entries else {}
        shown.append({**schedule.model_dump(mode="json"), "next": at and at.isoformat(), **last})
    text = table_text(table) if shown else "There are no schedules; `detr schedule add` makes one."
    text += "" if not shown else _without_scheduler(store)
    return {"schedules": shown, "scheduler_runs": running, "page": text}


@_command("pause", "detr schedule pause nightly")
@click.argument("name")
def pause(store: Path, name: str) -> dict:
    """Start no more runs until `resume`.

    A run that is going ends as it would.
    """
    from pipelines.schedule import change

    change(store, name, paused=True)
    return {"name": name, "text": f"{name} is paused."}


@_command("resume", "detr schedule resume nightly")
@click.argument("name")
def resume(store: Path, name: str) -> dict:
    """Go on after `pause`.

    What was due meanwhile is not made up for.
    """
    from pipelines.schedule import next_time, resume

    at = next_time(resume(store, name), datetime.now(UTC))
    return {"name": name, "next": at.isoformat(), "text": f"{name} is next at {at:%Y-%m-%d %H:%M %Z}."}


@_command("remove", "detr schedule remove nightly")
@click.argument("name")
def remove(store: Path, name: str) -> dict:
    """Forget a schedule.

    A run that is going ends as it would, and the history stays.
    """
    from pipelines.schedule import remove

    remove(store, name)
    return {"name": name, "text": f"{name} is removed; `detr schedule history {name}` still shows its runs."}


@_command("run", "detr schedule run nightly")
@click.argument("name")
def run(store: Path, name: str) -> dict:
    """Run a schedule's command now.

    The scheduler does it, if one runs; else it is done here, with whatever a stopped scheduler left unfinished, and the
    exit code is the command's.
    """
    from pipelines.schedule import SchedulerRuns, change, describe

    asked = change(store, name, asked=datetime.now(UTC)).asked
    try:
        ended = _serve(store, once=True, only=name)
    except SchedulerRuns:
        return {"name": name, "text": f"The scheduler runs it; `detr schedule history {name}` shows how it ends."}
    (mine,) = (e for e in ended if e["schedule"] == name and e["asked"] and e["time"] == asked.isoformat())
    return {**mine, "text": f"{name}: {describe(mine)}."}


@_command("history", "detr schedule history nightly")
@click.argument("name", required=False)
def history(store: Path, name: str | None) -> dict:
    """Show what ran and how it ended.

    And what was skipped and why; of one schedule or of all.
    """
    from rich.table import Column, Table

    from pipelines.schedule import describe, history, is_running

    running = is_running(store)
    entries = history(store, name)
    table = Table("schedule", "time (UTC)", "started (UTC)", "how it ended",
                  Column("log", overflow="fold"))  # fmt: skip
    for entry in entries[-SHOWN:]:
        by_hand = " by hand" if entry["asked"] else ""
        table.add_row(entry["schedule"], _utc(entry["time"]) + by_hand, _utc(entry.get("started")),
                      describe(entry, running), os.path.relpath(entry["log"]) if "log" in entry else "")  # fmt: skip
    text = table_text(table) if entries else "Nothing ran yet."
    if len(entries) > SHOWN:
        text += f"\nThe last {SHOWN} of {len(entries)}; --json prints all."
    return {"history": [{**e, "text": describe(e, running)} for e in entries], "page": text}


@_command("start", "detr schedule start")
@click.option("--once", is_flag=True, help="Run what is due now and leave, for a system that has a cron of its own.")
def start(store: Path, once: bool) -> dict:
    """Run the schedules until Ctrl-C.

    It says what runs and what is next; what the commands print goes to store/schedule/NAME/. Runs of different
    schedules may be side by side, those of one are not. Ctrl-C stops them, and the next start goes on with them. With
    --once the exit code is 1 if a run failed, else 3 if a gate refused.
    """
    ended = _serve(store, once=once)
    codes = {entry["exit_code"] for entry in ended if entry["state"] == "ended"}
    code = FAILED if codes - {DONE, GATE_REFUSED} else max(codes, default=DONE)
    return {"exit_code": code, "runs": ended}


def _serve(store: Path, once: bool, only: str | None = None) -> list[dict[str, Any]]:
    from pipelines.schedule import serve

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first; both are a clean stop
        signal.signal(number, signal.default_int_handler)
    try:
        return serve(store, PROGRAM, once=once, only=only)
    except KeyboardInterrupt:
        click.echo("Stopped. The next `detr schedule start` goes on from here.", err=True)
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # the runs' threads wait for ever


def _without_scheduler(store: Path) -> str:
    from pipelines.schedule import is_running

    if is_running(store):
        return ""
    where = "" if str(store) == "store" else f" --store {shlex.quote(str(store))}"
    return f"\nNo scheduler runs on this store now; this starts one: detr schedule start{where}"


def _utc(time: str | None) -> str:
    return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M:%S}" if time else ""


if __name__ == "__main__":
    main()
