"""benchmarks/listing.py at a small size: all that is served is listed, in folders of one key and of several pages."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "listing.py"


def test_it_lists_all_that_there_is():
    command = [sys.executable, str(SCRIPT), "--keys", "21", "--keys", "30000", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [run["keys"] for run in found["runs"]] == [21, 30_000]
    assert all(run["list_seconds"] > 0 and run["peak_MiB"] >= run["before_MiB"] > 0 for run in found["runs"])
