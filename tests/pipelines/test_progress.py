"""What is said while something runs: lines where there is no terminal, records for who collects logs."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import progress, sweep, tracking, training_log
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


class Watched:
    """The event that ends a thread of `alongside`: instead of time, what happens next passes, and the bar is read."""

    def __init__(self, monkeypatch, where, happens: list):
        self.now, self.happens = 0.0, iter(happens)

        def make(**options):
            self.bar = progress.progress(get_time=lambda: self.now, **options)
            return self.bar

        monkeypatch.setattr(where, "progress", make)

    def wait(self, seconds: float) -> bool:
        self.bar._say()
        after = next(self.happens, None)
        if after is not None:
            seconds, change = after
            self.now += seconds
            change()
        return after is None


def read_left(lines: list[str]) -> list[int | None]:
    """Of each line the seconds left that it says."""
    found = []
    for line in lines:
        times = [part for part in line.split(", ") if part.endswith(" left")]
        hours, minutes, seconds = map(int, times[0].removesuffix(" left").split(":")) if times else (0, 0, -1)
        found.append(3600 * hours + 60 * minutes + seconds if times else None)
    return found


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


class Training:
    """A training's progress file, by a clock of its own."""

    def __init__(self, path: Path):
        self.path, self.now = path, 1000.0

    def add(self, event: str, after: float, **record) -> tuple:
        self.now += after
        line = json.dumps({"event": event, **record, "time": self.now}) + "\n"

        def write() -> None:
            with self.path.open("a") as file:
                file.write(line)

        return after, write

    def start(self, after: float, step: int = 0) -> tuple:
        about = {"messages": [], "parameters": 2e6, "trainable": 1e6, "workers": 1, "epoch_images": 48}
        return self.add("start", after, step=step, **about)

    def step(self, seconds: float, step: int, steps: int, share: float | None, pause: float = 0.0) -> tuple:
        return self.add("step", seconds + pause, step=step, steps=steps, share=share, epoch=0.1, loss=2.0,
                        images_per_second=9.0, seconds=seconds)  # fmt: skip

    def validation(self, step: int) -> tuple:
        return self.add("validation", 0, step=step, AP=0.25, AP50=0.5)


def follow_training(monkeypatch, capsys, training: Training, happens: list, validations: int) -> list[str]:
    """The bar's line before all that happens, and after it."""
    training_log.follow(Watched(monkeypatch, training_log, happens), training.path, validations)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("  train: ")]


def test_a_training_that_has_begun_is_not_said_to_be_starting(monkeypatch, capsys, tmp_path):
    training = Training(tmp_path / "progress.jsonl")
    happens = [
        training.start(20), training.add("epoch", 9, step=4), training.validation(6), training.validation(4),
        training.step(9, 20, 40, 0.5), training.validation(20), training.start(30, step=10),
    ]  # fmt: skip
    lines = follow_training(monkeypatch, capsys, training, happens, 6)
    numbers = "epoch 0.1, loss 2.00, 9 images/s"
    assert lines[0] == "  train: 0, starting" and lines[1] == "  train: 0, first steps"
    assert lines[2].startswith("  train: 4, ") and lines[2].endswith("first steps")
    assert all(line.startswith("  train: 6") and line.endswith("AP 0.250  first steps") for line in lines[3:5])
    assert all(line.startswith("  train: 20 of 40") and line.endswith(f"AP 0.250  {numbers}") for line in lines[5:7])
    assert lines[7].startswith("  train: 10 of 40")


def test_the_time_left_of_a_training_is_by_its_recent_steps_and_its_last_validation(monkeypatch, capsys, tmp_path):
    training = Training(tmp_path / "progress.jsonl")
    happens = [training.start(60), training.step(300, 20, 400, 0.05)]  # of which nothing can be said
    happens += [training.step(10, 20 * k, 400, 0.05 * k) for k in (2, 3, 4, 5)]
    happens += [training.validation(100), training.step(10, 120, 400, 0.3, pause=40)]
    left = read_left(follow_training(monkeypatch, capsys, training, happens, 4))
    assert left == [None, None, None, 180, 170, 160, 150, 150, 140 + 3 * 40, 140 + 3 * 40]


def test_the_time_left_is_measured_anew_where_a_training_gets_longer_or_starts_again(monkeypatch, capsys, tmp_path):
    training = Training(tmp_path / "progress.jsonl")
    happens = [
        training.start(60), training.step(30, 20, None, None), training.step(10, 40, 50, 0.8),
        training.step(10, 60, 400, 0.15), training.step(10, 80, 400, 0.2), training.step(20, 100, 400, 0.25),
        training.start(90, step=80), training.step(200, 100, 400, 0.25), training.step(20, 120, 400, 0.3),
    ]  # fmt: skip
    left = read_left(follow_training(monkeypatch, capsys, training, happens, 1))
    # Of two hundred steps in so many seconds nothing is said, nor of a plan for fifty.
    assert left == [None, None, None, None, None, 160, 225, None, None, 280, 280]


def test_an_old_rate_of_a_training_is_forgotten(monkeypatch, capsys, tmp_path):
    training = Training(tmp_path / "progress.jsonl")
    slow, fast = 600, 60  # seconds for twenty steps
    happens = [training.start(60)] + [training.step(slow, 20 * k, 2000, 0.01 * k) for k in range(1, 6)]
    happens += [training.step(fast, 20 * k, 2000, 0.01 * k) for k in range(6, 50)]
    left = read_left(follow_training(monkeypatch, capsys, training, happens, 1))
    assert left[6] == 95 * slow and left[-1] == 51 * fast


def test_the_time_left_of_a_sweep_is_said_when_half_a_trial_is_over_and_counts_what_a_trial_needs_besides_its_steps(
    monkeypatch, capsys, tmp_path
):  # fmt: skip
    def start(number: int):
        place = tmp_path / "trials" / str(number)
        place.mkdir(parents=True)
        (place / sweep.TRIED).write_text(json.dumps({"number": number}))

    def reach(number: int, share: float):
        place = tmp_path / "trials" / str(number)
        with (place / training_log.PROGRESS).open("a") as file:
            file.write(json.dumps({"event": "step", "share": share, "time": share}) + "\n")

    def end(number: int):
        place = tmp_path / "trials" / str(number)
        row = {"number": number, "status": "finished", "AP": 0.5, "seconds": 100, "changes": {}, "error": None}
        (place / sweep.TRIAL).write_text(json.dumps(row))

    def stay():
        pass

    happens = [
        (30, stay), (10, lambda: start(0)), (60, lambda: reach(0, 0.2)), (10, lambda: reach(0, 0.4)),
        (10, lambda: reach(0, 0.8)), (20, lambda: end(0)), (10, stay), (0, lambda: start(1)), (60, stay),
    ]  # fmt: skip
    sweep.follow(Watched(monkeypatch, sweep, happens), str(tmp_path), 3, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  sweep: ")]
    assert lines[2].startswith("  sweep: 0 of 3, 1 running")
    left = read_left(lines)
    # 80 seconds for 0.79 of a trial; 100 for all of it but its start; 110 until the next one starts.
    assert left == [None] * 5 + [223, 203, 203, 219, 219, 219]


def test_a_table_is_a_record_with_its_rows_and_is_read_as_lines(records):
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Trials")
    for name in ("trial", "changes", "AP"):
        table.add_column(name)
    table.add_row("0", Text("lr=[1]"), "0.51")
    table.add_row("1", "", "")
    console.print(table)
    (said,) = records()
    assert said["message"] == "Trials"
    assert said["rows"] == [{"trial": "0", "changes": "lr=[1]", "AP": "0.51"}, {"trial": "1", "changes": "", "AP": ""}]
    assert message_of(json.dumps(said)) == "Trials\ntrial 0, changes lr=[1], AP 0.51\ntrial 1"
