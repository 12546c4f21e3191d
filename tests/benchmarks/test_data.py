"""benchmarks/feed.py and ingest.py at a tiny size: every side gives images, and what is told is what was done."""
from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from jobs import common

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, no package

import feed

BENCHMARKS = Path(feed.__file__).parent


def run(script: str, *arguments: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
def test_feed_measures_every_side(ray_cluster, monkeypatch):
    told = ["--images", "8", "--rounds", "1", "--seconds", "0.5", "--workers", "2", "--json"]

    def run_side(side: str, folder: Path, keep_blocks: bool, arguments: list[str]) -> dict:
        """As the benchmark's own, in this process."""
        assert keep_blocks
        folder.mkdir(parents=True)
        here = ["--side", side, "--folder", str(folder)]
        CliRunner().invoke(feed.main, [*told, *arguments, *here], catch_exceptions=False)
        return json.loads((folder / "result.json").read_text())

    monkeypatch.setattr(common, "ray_session", lambda settings: nullcontext())  # there is one
    monkeypatch.setattr(feed, "run_side", run_side)
    before = torch.get_num_threads()
    done = CliRunner().invoke(feed.main, told, catch_exceptions=False)
    torch.set_num_threads(before)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sides"].keys() == {"ours", "ours, normalised here", "DataLoader, PIL", "DataLoader, uint8"}
    assert all(side[0]["images_per_second"] > 0 for side in found["sides"].values()) and found["ratio_to_PIL"] > 0


@pytest.mark.ray
def test_ingest_measures_what_it_ingested():
    found = run("ingest.py", "--images", "20")
    (row,) = found["runs"]
    assert row["images"] == 21  # and one of val
    assert row["seconds"] > 0 and row["read"] > 0 and row["worker_MiB"] > 0


def test_a_made_annotation_file_is_read_whole():
    found = run("ingest.py", "--annotations", "30")
    assert found["boxes"] == 210 and found["peak_MiB"] >= found["before_MiB"] > 0
