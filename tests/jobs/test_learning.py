"""At full size: the tiny preset learns the built-in images from random weights (make test-all)."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "sample.yaml"


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_built_in_images_are_learnt_in_a_thousand_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", "--store", str(tmp_path / "store"), "--config", str(CONFIG), "--json",
         "train.budget=1000 steps", "train.validations=2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    print(f"AP {result['AP']:.3f}, AP50 {result['AP50']:.3f}, {result['images_per_second']} images/s")
    assert result["AP"] > 0.6 and result["AP50"] > 0.88  # 700 steps in a bare loop: 0.66 and 0.92
