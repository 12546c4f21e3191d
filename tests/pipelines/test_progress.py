"""What is said while something runs: lines where there is no terminal, records for who collects logs."""
from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from pipelines import progress, tracking
from pipelines.progress import about, console, message_of, track


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.15)


@pytest.fixture
def records(monkeypatch, capsys):
    monkeypatch.setenv(progress.LOG, "json")
    monkeypatch.setattr(tracking, "_open", {})  # other tests' runs

    def read() -> list[dict]:
        said = capsys.readouterr()
        assert not said.out
        return [json.loads(line) for line in said.err.splitlines()]

    return read


def work(items: int = 4, seconds: float = 0.1) -> None:
    for _ in track(range(items), "reading", items):
        time.sleep(seconds)


def test_without_a_terminal_long_work_says_how_far_it_is_and_its_end_once(soon, capsys):
    work()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and lines[0].startswith("  reading: 1 of 4")
    assert any("/s" in line and "left" in line for line in lines[1:-1]) or len(lines) == 2
    assert lines[-1].startswith("  reading: 4 of 4, ") and "left" not in lines[-1]
    work(2, 0)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_records_say_what_they_are_about(soon, records):
    with about(command="pipeline", job=None), about(stage="ingest", key="k1"):
        console.print("Images [of one]\nand of another")
        work()
    console.print("after")
    console.print("")
    first, *steps, last, after = records()
    about_it = {"command": "pipeline", "stage": "ingest", "key": "k1"}
    assert first == {"time": first["time"], "level": "info", "message": "Images [of one]\nand of another", **about_it}
    assert first["time"].endswith("+00:00") and first["time"] <= last["time"]
    assert {"done": 1, "total": 4}.items() <= steps[0].items() and about_it.items() <= last.items()
    assert {"done": 4, "total": 4}.items() <= last.items()
    assert after["message"] == "after" and not about_it.keys() & after.keys()


def test_the_mlflow_run_is_named_while_it_is_open(records, tmp_path):
    from pipelines.settings import RunSettings
    from pipelines.tracking import tracker

    here = tracker(RunSettings(), tmp_path, "photos")
    run_id = here.start_run("a sweep")
    trial = here.start_run("a trial")
    console.print("while both are open")
    here.end_run(run_id)
    console.print("the trial's")
    here.end_run(trial)
    console.print("none")
    assert [said.get("run_id") for said in records() if "logger" not in said] == [run_id, trial, None]


def test_a_person_who_follows_reads_sentences():
    assert message_of('{"time": "2026-01-01T00:00:00.000+00:00", "level": "info", "message": "Done."}') == "Done."
    crash = '{"time": "x", "level": "critical", "message": "E: no", "traceback": "Traceback"}'
    assert message_of(crash) == "Traceback"
    for line in ("a line of Ray's", '{"time": broken', '{"exit_code": 0}', '{"time": 1}'):
        assert message_of(line) == line


@pytest.mark.parametrize(("words", "code", "message"), [
    (["ingest", "data.path=nothing-here"], 2, "nothing-here"),
    (["ingest", "data.pth=x"], 2, "data.path"),
])  # fmt: skip
def test_a_commands_error_is_a_record(monkeypatch, words, code, message):
    monkeypatch.setenv(progress.LOG, "json")
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == code
    (said,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert said["level"] == "error" and message in said["message"] and said["exit_code"] == code
    assert said.get("command") == "ingest"


def test_what_libraries_say_and_a_crash_are_records():
    code = (
        "import logging, warnings\n"
        "from pipelines.progress import say_all_as_records\n"
        "say_all_as_records()\n"
        "logging.getLogger('a.library').warning('disk %s', 'slow')\n"
        "logging.getLogger('a.library').info('nobody asked')\n"
        "warnings.warn('old')\n"
        "1 / 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    slow, old, crash = [json.loads(line) for line in done.stderr.splitlines()]
    assert slow["message"] == "disk slow" and slow["logger"] == "a.library" and slow["level"] == "warning"
    assert "old" in old["message"]
    assert crash["level"] == "critical" and "ZeroDivisionError" in crash["traceback"]


def test_another_kind_of_log_is_refused(monkeypatch):
    monkeypatch.setenv(progress.LOG, "jsn")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "ingest", "data.path=x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.strip() == "DETR_LOG is 'jsn'; it can be json, or nothing."
