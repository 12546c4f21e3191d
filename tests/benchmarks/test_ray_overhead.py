"""benchmarks/ray_overhead.py at a tiny size: every side trains, and ratios are those of the rates."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from jobs import common

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, no package

import ray_overhead
from feed import make_dataset, write_photographs
from ray_overhead import BARE, ONE, RAY, TWO


def record(step: int, rate: float) -> dict:
    return {"event": "step", "step": step, "images_per_second": rate}


def test_the_first_epoch_does_not_count():
    records = [{"event": "start"}, record(20, 0.5), {"event": "epoch"}, record(40, 2.0), record(50, 4.0)]
    found = ray_overhead.rate_of_records([*records, {"event": "validation"}], 2, 16)
    assert found == {"images_per_second": pytest.approx(60 / (40 / 2 + 20 / 4)), "steps": 30}
    assert ray_overhead.rate_of_records(records, 2, 21) == {"images_per_second": 4.0, "steps": 10}
    with pytest.raises(RuntimeError, match="more steps"):
        ray_overhead.rate_of_records(records, 2, 41)
    with pytest.raises(RuntimeError, match="started again"):
        ray_overhead.rate_of_records([*records, record(20, 1.0)], 2, 16)


def test_a_run_is_compared_to_those_beside_it(monkeypatch, tmp_path):
    rates = {BARE: iter([1.0, 0.8, 0.6]), RAY: iter([0.81, 0.63]), ONE: iter([1.0, 1.0, 1.0]), TWO: iter([1.5, 1.9])}

    def run_side(side, folder, keep_blocks, arguments):
        assert keep_blocks
        folder.mkdir(parents=True)
        return {"side": side, "threads": 1, "steps": 9, "images_per_second": next(rates[side])}

    monkeypatch.setattr(ray_overhead, "run_side", run_side)
    monkeypatch.setattr(ray_overhead, "make_dataset", lambda data, folder: folder)
    monkeypatch.setattr(ray_overhead, "cpu_count", lambda: 2)
    out = tmp_path / "found.json"
    told = ["--images", "4", "--rounds", "2", "--out", str(out)]
    done = CliRunner().invoke(ray_overhead.main, told, catch_exceptions=False)
    found = json.loads(out.read_text())["parts"]
    assert [run["side"] for run in found["a"]["runs"]] == [BARE, RAY, BARE, RAY, BARE]
    assert found["a"]["ratios"] == pytest.approx([0.9, 0.9]) and found["b"]["ratios"] == pytest.approx([1.5, 1.9])
    assert found["a"]["drift"] == pytest.approx(1 / 0.6 - 1) and found["b"]["drift"] == 0
    assert "0.900 (10.0% lost)" in done.stdout and "1.700; to reach: 1.7" in done.stdout
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines()]
    assert [TWO, "1", "9", "2.667", "1.500", "1.500"] in lines


def test_what_cannot_be_measured_is_told(monkeypatch):
    monkeypatch.setattr(ray_overhead, "cpu_count", lambda: 1)
    for told, said in (
        (["--images", "40", "--steps", "20"], "--steps 21"), (["--parts", "b"], "two cores"),
        (["--threads", "2"], "here 1"),
    ):  # fmt: skip
        done = CliRunner().invoke(ray_overhead.main, told)
        assert done.exit_code == 2 and said in done.stderr


@pytest.fixture(scope="module")
def dataset(ray_cluster, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_photographs(folder / "photographs", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "ray_session", lambda settings: nullcontext())  # there is one
        return make_dataset(folder / "photographs", folder)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("side", "steps", "cores"), [(BARE, 20, None), (RAY, 2, "1"), pytest.param(TWO, 2, "2", marks=pytest.mark.long)]
)
def test_every_side_is_measured(side, steps, cores, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ray_session", lambda settings: nullcontext())
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # and as it was in the end
    before = torch.get_num_threads()
    told = ["--preset", "tiny", "--size", "64", "--images", "4", "--steps", "22", "--threads", "1"]
    given = ["--dataset", str(dataset), "--folder", str(tmp_path), "--side", side]
    CliRunner().invoke(ray_overhead.main, [*told, *given], catch_exceptions=False)
    torch.set_num_threads(before)
    found = json.loads((tmp_path / "result.json").read_text())
    # Counted is what comes after the first epoch, of two steps; a training tells its pace after 20 and 22.
    assert (found["side"], found["threads"], found["steps"]) == (side, 1, steps) and found["images_per_second"] > 0
    if cores:
        assert os.environ["LOKY_MAX_CPU_COUNT"] == cores
        records = [json.loads(line) for line in (tmp_path / "training" / "progress.jsonl").read_text().splitlines()]
        assert records[0]["workers"] == int(cores)
        assert found["images_per_second"] == pytest.approx(
            next(r["images_per_second"] for r in records if r["event"] == "step" and r["step"] == 22)
        )


@pytest.mark.ray
def test_a_worker_of_a_new_ray_is_told_how_many_cores_it_has():
    """What holds a lone worker to one thread: joblib's count, in a process that Ray starts."""
    code = (
        "import ray, ray_overhead as b; b.measure_train = lambda *_: ray.get(ray.remote(b.cpu_count).remote());"
        "settings = b.make_settings('tiny', 64, 2, 22, 1, 'cpu');"
        "print('cores:', b.measure(b.ONE, settings, None, None, 22, 1, 'cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(ray_overhead.__file__).parent, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert "cores: 1" in done.stdout, done.stderr
