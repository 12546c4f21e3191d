"""benchmarks/evaluate.py at a tiny size: both sides compute the same."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluate.py"


def test_both_sides_measure_the_same():
    command = [sys.executable, str(SCRIPT), "--images", "12", "--resamples", "20", "--rounds", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["difference"] < 1e-12 and found["ratio"] > 0
    assert [len(values) for values in found["seconds"].values()] == [2] * 4
