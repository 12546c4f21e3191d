"""What is due, and that a scheduler runs exactly that, whatever happens to it."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.schedule import GRACE, Schedule, SchedulerRuns, add, change, due, history, next_time, remove, serve
from pipelines.settings import UserError

MINUTE = timedelta(minutes=1)
# The command of the tests: notes that it starts, waits for a file if it is told to, and ends as detr's commands do.
COMMAND = """
import json, os, sys, time
what, ended = sys.argv[1], 0
with open("started", "a") as file:
    file.write(f"{os.getpid()}\\n")
if what == "wait":
    while not os.path.exists("go"):
        time.sleep(0.01)
if what == "ctrl-c":
    try:
        while not os.path.exists("go"):
            time.sleep(0.01)
    except KeyboardInterrupt:
        ended = 130
if what.isdigit():
    ended = int(what)
print("some progress", file=sys.stderr)
print(json.dumps({"exit_code": ended}))
sys.exit(ended)
"""
# The real scheduler on a clock that is a file.
SCHEDULER = """
import os, sys, time
from datetime import datetime
from pathlib import Path
from pipelines.schedule import serve
store, program = sys.argv[1:]
clock = lambda: datetime.fromisoformat(Path(store, "clock").read_text())
try:
    serve(store, [sys.executable, program], clock=clock, wait=lambda seconds: time.sleep(0.02))
except KeyboardInterrupt:
    os._exit(130)
"""


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def schedule(cron: str, timezone: str = "UTC", missed: str = "once", since: str = "2026-01-01", **more) -> Schedule:
    return Schedule(name="s", cron=cron, timezone=timezone, command=("train",), folder="/", missed=missed,
                    since=at(since), **more)  # fmt: skip


DAILY = "0 2 * * *"


@pytest.mark.parametrize(
    ("cron", "missed", "handled", "now", "run", "passed"),
    [
        (DAILY, "once", "2026-03-01T02:00", "2026-03-02T01:59:59", None, None),
        (DAILY, "once", "2026-03-01T02:00", "2026-03-02T02:00", "2026-03-02T02:00", None),
        (DAILY, "once", "2026-03-01T02:00", "2026-03-02T14:00", "2026-03-02T02:00", None),
        (DAILY, "once", "2026-03-01T02:00", "2026-03-05T14:00", "2026-03-05T02:00",
         ("2026-03-02T02:00", "2026-03-04T02:00")),
        (DAILY, "skip", "2026-03-01T02:00", "2026-03-02T02:00:59", "2026-03-02T02:00", None),
        (DAILY, "skip", "2026-03-01T02:00", "2026-03-02T02:01", None, ("2026-03-02T02:00", "2026-03-02T02:00")),
        (DAILY, "skip", "2026-03-01T02:00", "2026-03-05T02:00", "2026-03-05T02:00",
         ("2026-03-02T02:00", "2026-03-04T02:00")),
        (DAILY, "once", "2026-03-02T02:00", "2026-03-01T12:00", None, None),  # the clock was set back
        (DAILY, "once", None, "2026-01-01T02:00", "2026-01-01T02:00", None),
        ("0 0 29 2 *", "once", None, "2027-12-31", None, None),
        ("0 0 29 2 *", "once", None, "2028-03-01", "2028-02-29", None),
        ("*/15 * * * *", "skip", "2026-03-01T02:00", "2027-03-01T02:00", "2027-03-01T02:00",
         ("2026-03-01T02:15", "2027-03-01T01:45")),
    ],
)  # fmt: skip
def test_what_is_due(cron, missed, handled, now, run, passed):
    found = due(schedule(cron, missed=missed), handled and at(handled), at(now))
    if run is None and passed is None:
        assert found is None
    else:
        assert found.run == (run and at(run))
        assert found.missed == (passed and (at(passed[0]), at(passed[1])))


def test_nothing_is_due_while_paused_or_before_it_was_added():
    assert due(schedule(DAILY, paused=True), None, at("2026-05-01")) is None
    assert due(schedule(DAILY, since="2026-05-01"), at("2026-03-01"), at("2026-05-01T01:00")) is None


@pytest.mark.parametrize(
    ("cron", "after", "times"),
    [
        # Clocks go from 2:00 to 3:00 on 29 March, and from 3:00 back to 2:00 on 25 October.
        ("30 2 * * *", "2026-03-28T20:00", ["03-29T01:00", "03-30T00:30"]),
        ("30 2 * * *", "2026-10-24T20:00", ["10-25T00:30", "10-26T01:30"]),
        ("*/30 * * * *", "2026-03-29T00:30", ["03-29T01:00", "03-29T01:30", "03-29T02:00"]),
        ("*/30 * * * *", "2026-10-25T00:00", ["10-25T00:30", "10-25T01:00", "10-25T01:30", "10-25T02:00"]),
    ],
)
def test_a_wall_clock_time_that_comes_twice_or_never(cron, after, times):
    found, berlin = at(after), schedule(cron, "Europe/Berlin")
    for expected in times:
        found = next_time(berlin, found)
        assert found.astimezone(UTC) == at(f"2026-{expected}")


@settings(max_examples=60, deadline=None)
@given(
    cron=st.sampled_from(["*/7 * * * *", "30 2 * * *", "0 */2 * * *", "15,45 1-3 * * *"]),
    missed=st.sampled_from(["once", "skip"]),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe"]),
    day=st.sampled_from(["2026-03-28", "2026-10-24", "2026-04-04", "2026-10-03"]),  # a change of clocks follows
    steps=st.lists(st.integers(-40 * 60, 300 * 60), min_size=1, max_size=25),
)
def test_no_time_is_run_twice_and_none_is_lost(cron, missed, zone, day, steps):
    """A scheduler looks at a clock that leaps, stands, and is set back."""
    plan = schedule(cron, zone, missed, since=day)
    now = latest = at(day)
    handled, runs, skipped = [], [], []
    for step in steps:
        now += timedelta(seconds=step)
        latest = max(latest, now)
        found = due(plan, max((t for t in handled if t <= now), default=None), now)
        if found is None:
            continue
        if found.run is not None:
            assert missed == "once" or now - found.run < GRACE
            runs.append(found.run)
        if found.missed:
            skipped.append(found.missed)
        handled.append(found.run or found.missed[1])
    assert len(runs) == len(set(runs))
    expected, time_ = [], next_time(plan, at(day)).astimezone(UTC)
    while time_ <= latest:
        expected.append(time_)
        time_ = next_time(plan, time_).astimezone(UTC)
    assert set(runs) <= set(expected)
    covered = [t for t in expected if t in runs or any(first <= t <= last for first, last in skipped)]
    assert covered == [t for t in expected if handled and t <= max(handled)]
    last = due(plan, max((t for t in handled if t <= latest), default=None), latest)
    assert (last is not None) == (covered != expected)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"cron": "0 2 * *"}, "not a cron time"),
        ({"cron": "61 2 * * *"}, "not a cron time"),
        ({"cron": "* * * * * *"}, "not a cron time"),  # seconds
        ({"cron": "@reboot"}, "not a cron time"),
        ({"cron": "0 2 31 2 *"}, "never comes"),
        ({"cron": "R 2 * * *"}, "random"),
        ({"timezone": "Europe/Atlantis"}, "Europe/Atlantis"),
        ({"timezone": "../../etc/passwd"}, "time zone"),
        ({"name": "../up"}, "not a name"),
        ({"command": ["train", "tracking.uri=https://me:secret@host"]}, "password"),
    ],
)
def test_what_cannot_be_scheduled_is_one_sentence(tmp_path, values, word):
    given = {"name": "s", "cron": DAILY, "command": ["train"], "folder": tmp_path, **values}
    with pytest.raises(UserError, match=word) as caught:
        add(tmp_path, **given)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not (tmp_path / "schedules.json").exists()


def test_a_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / "schedules.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        add(tmp_path, "s", DAILY, ["train"], tmp_path)
    (tmp_path / "schedules.json").write_text('{"format": 99, "schedules": []}')
    with pytest.raises(UserError, match="format 99"):
        add(tmp_path, "s", DAILY, ["train"], tmp_path)


class Machine:
    """A store, a clock, a command to run, and schedulers that can be killed."""

    def __init__(self, folder: Path):
        self.store, self.program, self.schedulers = folder / "store", folder / "command.py", []
        self.store.mkdir()
        self.program.write_text(COMMAND)
        self.set_clock("2030-01-01T00:00")

    def set_clock(self, text: str) -> None:
        self.now = at(text)
        (self.store / "clock.part").write_text(self.now.isoformat())
        os.replace(self.store / "clock.part", self.store / "clock")

    def add(self, name: str, cron: str, what: str, missed: str = "once") -> None:
        folder = self.store / f"{name}.work"
        folder.mkdir()
        add(self.store, name, cron, [what], folder, missed=missed)
        change(self.store, name, since=self.now)

    def start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.schedulers.append(
            subprocess.Popen([sys.executable, "-c", SCHEDULER, str(self.store), str(self.program)], env=environment,
                             stderr=(self.store / "said").open("a"))
        )  # fmt: skip
        return self.schedulers[-1]

    def once(self) -> list[dict]:
        return serve(self.store, [sys.executable, str(self.program)], clock=lambda: self.now,
                     wait=lambda seconds: time.sleep(0.02), once=True)  # fmt: skip

    def started(self, name: str) -> list[int]:
        file = self.store / f"{name}.work" / "started"
        return [int(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def go(self, name: str) -> None:
        (self.store / f"{name}.work" / "go").touch()

    def times(self, name: str, state: str = "ended") -> list[str]:
        return [f"{at(e['time'][:16]):%H:%M}" for e in history(self.store, name) if e["state"] == state]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, (self.store / "said").read_text()
            time.sleep(0.02)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    for scheduler in machine.schedulers:
        if scheduler.poll() is None:
            scheduler.kill()
        scheduler.wait()
    for folder in machine.store.glob("*.work"):
        (folder / "go").touch()


def test_every_minute_killed_and_restarted(machine):
    machine.add("s", "* * * * *", "wait")
    scheduler = machine.start()
    machine.set_clock("2030-01-01T00:01")
    machine.until(lambda: len(machine.started("s")) == 1)
    machine.go("s")
    machine.until(lambda: machine.times("s") == ["00:01"])
    (machine.store / "s.work" / "go").unlink()
    machine.set_clock("2030-01-01T00:02")
    machine.until(lambda: len(machine.started("s")) == 2)
    scheduler.kill()  # in the middle of the run, whose command lives on
    scheduler.wait()
    machine.set_clock("2030-01-01T00:05")
    scheduler = machine.start()
    machine.until(lambda: "waiting for it" in (machine.store / "said").read_text())
    assert len(machine.started("s")) == 2
    machine.go("s")
    machine.until(lambda: machine.times("s") == ["00:01", "00:02", "00:05"])  # the last stands for those missed
    assert len(machine.started("s")) == 3
    second, last = history(machine.store, "s")[1:]
    assert second["ending"] == "done" and 0 < second["seconds"] < 20
    assert second["started"].startswith("2030-01-01T00:02")
    assert [text[11:16] for text in last["missed"]] == ["00:03", "00:04"]

    scheduler.kill()
    scheduler.wait()
    (machine.store / "s.work" / "go").unlink()
    machine.start()
    machine.set_clock("2030-01-01T00:06")
    machine.until(lambda: len(machine.started("s")) == 4)
    machine.schedulers[-1].kill()  # and its command with it, as when the machine goes down
    machine.schedulers[-1].wait()
    os.kill(machine.started("s")[-1], signal.SIGKILL)
    machine.go("s")
    machine.start()
    machine.until(lambda: machine.times("s") == ["00:01", "00:02", "00:05", "00:06"])
    assert len(machine.started("s")) == 5  # 00:06 twice: the first was not done
    machine.set_clock("2030-01-01T00:05:30")  # set back: 00:06 is not run again
    machine.until(lambda: (machine.store / "said").read_text().endswith("Next: s at 2030-01-01 00:06 UTC.\n"))
    machine.set_clock("2030-01-01T00:06:30")
    machine.until(lambda: (machine.store / "said").read_text().endswith("Next: s at 2030-01-01 00:07 UTC.\n"))
    machine.set_clock("2030-01-01T00:07")
    machine.until(lambda: machine.times("s")[-1] == "00:07")
    assert machine.times("s") == ["00:01", "00:02", "00:05", "00:06", "00:07"]
    assert len(machine.started("s")) == 6


def test_ctrl_c_stops_the_command_and_the_next_start_goes_on_with_it(machine):
    machine.add("s", "* * * * *", "ctrl-c")
    scheduler = machine.start()
    machine.set_clock("2030-01-01T00:01")
    machine.until(lambda: len(machine.started("s")) == 1)
    time.sleep(0.1)
    scheduler.send_signal(signal.SIGINT)
    assert scheduler.wait(20) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(machine.started("s")[0], 0)
    assert machine.times("s", "running") == ["00:01"]
    machine.go("s")
    (entry,) = machine.once()
    assert entry["ending"] == "done" and len(machine.started("s")) == 2
    assert machine.times("s") == ["00:01"]


@pytest.mark.parametrize("missed", ["once", "skip"])
def test_runs_of_a_schedule_never_overlap_and_those_of_others_do_not_wait(machine, missed):
    machine.add("long", "*/2 * * * *", "wait", missed)
    machine.add("other", "5 * * * *", "0")
    machine.start()
    machine.set_clock("2030-01-01T00:02")
    machine.until(lambda: len(machine.started("long")) == 1)
    machine.set_clock("2030-01-01T00:07:30")
    machine.until(lambda: machine.times("other") == ["00:05"])
    assert len(machine.started("long")) == 1
    machine.go("long")
    machine.until(lambda: "00:06" in machine.times("long", "ended" if missed == "once" else "skipped"))
    first, last = history(machine.store, "long")
    assert first["time"][11:16] == "00:02" and first["ending"] == "done"
    if missed == "once":
        assert len(machine.started("long")) == 2 and [text[11:16] for text in last["missed"]] == ["00:04"] * 2
    else:
        assert len(machine.started("long")) == 1 and [text[11:16] for text in last["missed"]] == ["00:04", "00:06"]
        assert last["why"] == "the run before was not over"


def test_what_was_missed_is_skipped_and_said_where_that_was_told(machine, capsys):
    machine.add("s", "0 * * * *", "0", "skip")
    machine.set_clock("2030-01-01T05:30")
    assert machine.once() == []
    (entry,) = history(machine.store, "s")
    assert entry["state"] == "skipped" and "no scheduler" in entry["why"]
    assert [text[11:16] for text in entry["missed"]] == ["01:00", "05:00"]
    machine.set_clock("2030-01-01T06:00:10")
    capsys.readouterr()
    assert [e["ending"] for e in machine.once()] == ["done"]
    assert "Nothing is due" not in capsys.readouterr().err
    assert machine.once() == []
    assert capsys.readouterr().err.endswith("Nothing is due. Next: s at 2030-01-01 07:00 UTC.\n")


def test_how_a_command_ends_is_kept_with_its_output(machine):
    for name, what in (("fails", "1"), ("refused", "3"), ("wrong", "2")):
        machine.add(name, "@hourly", what)
    machine.set_clock("2030-01-01T01:00")
    ended = {e["schedule"]: e for e in machine.once()}
    assert {name: e["ending"] for name, e in ended.items()} == {
        "fails": "failed", "refused": "gate refused", "wrong": "wrong use"
    }  # fmt: skip
    assert "some progress" in Path(ended["fails"]["log"]).read_text()
    (machine.store / "fails.work" / "started").unlink()
    (machine.store / "fails.work").rmdir()
    machine.set_clock("2030-01-01T02:00")
    ended = {e["schedule"]: e for e in machine.once()}
    assert ended["fails"]["exit_code"] == 1 and "could not be started" in ended["fails"]["error"]
    assert ended["refused"]["exit_code"] == 3


def test_pauses_and_runs_by_hand_do_not_move_the_times(machine):
    machine.add("s", "0 * * * *", "0")
    change(machine.store, "s", asked=at("2030-01-01T01:00:05"))
    machine.set_clock("2030-01-01T01:00:06")  # 1:00 is due, too
    assert sorted(e["asked"] for e in machine.once()) == [False, True]
    change(machine.store, "s", paused=True)
    machine.set_clock("2030-01-01T05:30")
    assert machine.once() == []
    change(machine.store, "s", paused=False, since=machine.now)  # as `resume` does, on this clock
    assert machine.once() == []
    machine.set_clock("2030-01-01T06:00")
    (entry,) = machine.once()
    assert entry["time"][11:16] == "06:00" and "missed" not in entry


def test_two_schedulers_of_a_store(machine):
    machine.add("s", "* * * * *", "wait")
    machine.start()
    machine.set_clock("2030-01-01T00:01")
    machine.until(lambda: len(machine.started("s")) == 1)
    with pytest.raises(SchedulerRuns, match="already"):
        machine.once()
    assert len(machine.started("s")) == 1


def test_a_removed_schedule_is_not_taken_up(machine):
    machine.add("s", "* * * * *", "ctrl-c")
    scheduler = machine.start()
    machine.set_clock("2030-01-01T00:01")
    machine.until(lambda: len(machine.started("s")) == 1)
    time.sleep(0.1)
    scheduler.terminate()  # as a driver without a handler dies of it; its command lives on
    scheduler.wait()
    os.kill(machine.started("s")[0], signal.SIGKILL)
    remove(machine.store, "s")
    machine.once()
    assert len(machine.started("s")) == 1
    assert "removed" in history(machine.store, "s")[0]["why"]
