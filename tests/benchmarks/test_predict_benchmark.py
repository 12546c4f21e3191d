"""benchmarks/predict.py at a tiny size: every side looks at all images, and its memory is that of all processes."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "predict.py"


def run(*arguments: str) -> dict:
    command = [sys.executable, str(SCRIPT), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_plain_loop_is_measured():
    found = run("--preset", "tiny", "--images", "70", "--rounds", "1", "--only", "plain loop, float32")
    (side,) = found["sides"]["plain loop, float32"]
    assert side["images"] == 70 and side["images_per_second"] > 0 and found["to_loop"]["plain loop, float32"] == 1


@pytest.mark.ray
def test_predict_and_its_memory_are_measured():
    (found,) = run("--memory", "30")["runs"]
    assert found["images"] == 30 and found["images_per_second"] > 0
    assert 100 < found["driver_MiB"] < found["all_MiB"] and 100 < found["worker_MiB"] < found["all_MiB"]
