"""`detr schedule` as a user types it."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from jobs.cli import main
from jobs.schedule import main as group

ROOT = Path(__file__).parents[2]


@pytest.fixture
def detr(tmp_path, monkeypatch):
    """Invoke a subcommand in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda command, *more: CliRunner().invoke(main, ["schedule", command, "--store", "kept", *more])


def said(result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", sorted(group.commands))
def test_every_subcommand_has_an_example(command, detr):
    shown = CliRunner().invoke(main, ["schedule", command, "--help"])
    assert shown.exit_code == 0 and f"Example: detr schedule {command}" in shown.stdout


def test_a_schedule_from_adding_to_removing(detr):
    added = detr("add", "nightly", "0 2 * * *", "--timezone", "Europe/Berlin", "--", "sweep", "sweep.trials=8",
                 "sweep.budget=2 minutes")  # fmt: skip
    assert added.exit_code == 0, added.stderr
    assert "02:00 CE" in added.stdout and "detr schedule start --store kept" in added.stdout
    again = detr("add", "nightly", "0 2 * * *", "--timezone", "Europe/Berlin", "--", "sweep", "sweep.trials=8",
                 "sweep.budget=2 minutes")  # fmt: skip
    assert again.exit_code == 0
    other = detr("add", "nightly", "0 3 * * *", "--", "sweep")
    assert other.exit_code == 2 and "another schedule nightly" in other.stderr
    listed = detr("list").stdout
    assert "nightly" in listed and "'sweep.budget=2 minutes'" in listed
    assert detr("pause", "nightly").exit_code == 0
    (shown,) = said(detr("list", "--json"))["schedules"]
    assert shown["paused"] and shown["next"] is None
    assert said(detr("start", "--once", "--json")) == {"exit_code": 0, "runs": []}
    idle = detr("start", "--once").stderr
    assert idle == "Nothing is due. Every schedule is paused; `detr schedule resume` ends that.\n"
    assert said(detr("resume", "nightly", "--json"))["next"] == said(detr("list", "--json"))["schedules"][0]["next"]
    idle = detr("start", "--once")
    assert idle.exit_code == 0 and not idle.stdout
    assert re.fullmatch(r"Nothing is due\. Next: nightly at \d{4}-\d\d-\d\d 02:00 CES?T\.\n", idle.stderr)
    assert detr("remove", "nightly").exit_code == 0
    assert "There are no schedules" in detr("list").stdout
    assert detr("start", "--once").stderr == "Nothing is due. Nothing is scheduled; `detr schedule add` does.\n"
    for command in ("pause", "resume", "remove", "run"):
        gone = detr(command, "nightly")
        assert gone.exit_code == 2 and "no schedule nightly" in gone.stderr


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["fly"], "cannot be scheduled"),
        (["schedule", "start"], "cannot be scheduled"),
        (["train", "train.bugdet=1 epoch"], "train.budget"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "--splt", "val"], "--split"),
        (["train", "--store", "elsewhere"], "--store"),
        (["train", "--help"], "--help"),
    ],
)
def test_a_command_that_would_fail_at_night_is_refused_by_day(detr, words, word):
    result = detr("add", "nightly", "0 2 * * *", "--", *words)
    assert result.exit_code == 2
    assert word in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not Path("kept", "schedules.json").exists()


def test_a_run_now_is_the_command_with_its_exit_code_and_output(detr):
    assert detr("add", "odd", "0 2 * * *", "--", "predict", "photos").exit_code == 0
    result = detr("run", "odd", "--json")
    assert result.exit_code == 2, result.output
    assert "photos" in said(result)["error"] and "photos" in Path(said(result)["log"]).read_text()
    (entry,) = said(detr("history", "odd", "--json"))["history"]
    assert entry["asked"] and entry["ending"] == "wrong use"
    assert "wrong use" in detr("history").stdout and "wrong use" in detr("list").stdout


def test_a_run_is_left_to_the_scheduler_that_there_is(detr):
    detr("add", "odd", "0 2 * * *", "--", "predict", "photos")
    with FileLock("kept/schedule.lock"):
        assert said(detr("list", "--json"))["scheduler_runs"]
        assert "No scheduler" not in detr("list").stdout
        assert "The scheduler runs it" in detr("run", "odd").stdout
        second = detr("start")
        assert second.exit_code == 1 and "already" in second.stderr
    (run,) = said(detr("start", "--once", "--json"))["runs"]
    assert run["asked"] and run["exit_code"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_scheduler_stops_cleanly_and_at_once(tmp_path, number):
    started = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "schedule", "start"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Nothing is scheduled" in started.stderr.readline()
    stopped = time.monotonic()
    started.send_signal(number)
    assert "Stopped." in started.communicate(timeout=10)[1]
    assert started.returncode == 130 and time.monotonic() - stopped < 5
