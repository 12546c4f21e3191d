"""The benchmarks at a tiny size: their sides compute the same, and copies from device to host are counted."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from detr.config import ModelConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, no package

import common
import criterion
import inference
import train_step

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    backbone="resnet18", hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=32, num_queries=9,
    num_classes=5,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sides(reference: str, own: str, measure) -> dict[str, float]:
    """How far our side is from the plain one, by the benchmark's own measure."""
    saved = {name: measure(name)[1] for name in (reference, own)}
    assert saved[own].keys() == saved[reference].keys()
    return {key: float((saved[own][key] - value).detach().abs().max()) for key, value in saved[reference].items()}


def test_losses_and_gradients_of_both_sides_agree():
    cases = {"some": [2, 3], "none in one": [0, 4]}
    found = sides(common.REFERENCE, "ours", lambda side: criterion.measure(side, CONFIG, cases, CPU, 1))
    assert len(found) == 2 * (2 * 3 + 2)  # two layers' three losses, two gradients
    assert max(found.values()) < 1e-5


def test_detections_of_both_sides_agree_and_queries_differ():
    def measure(kind: str):
        return inference.measure(kind, "float32", CONFIG, (64, 96), (1, 2), CPU, 1)

    assert max(sides("plain", "ours", measure).values()) < 1e-4
    assert measure("ours")[0]["2"]["spread"] > 0.01


def test_a_training_step_of_both_sides_starts_from_the_same_gradients(tmp_path):
    for kind in ("plain", "ours"):
        result, saved = train_step.measure(kind, "float32", CONFIG, (64, 96), 2, CPU, 1)
        (tmp_path / kind).mkdir()
        common.write_result(tmp_path / kind, result, saved)
        assert result["seconds"] > 0
    found = common.differences(*(tmp_path / kind / "saved.safetensors" for kind in ("ours", "plain")))
    assert found["loss"] < 1e-4 and found["gradients"] < 5e-3


def test_differences_are_told(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.5)):
        saved = {"loss/x": torch.tensor([value, 2.0]), "gradients/x": torch.tensor([3.0 * value, 4.0])}
        (tmp_path / name).mkdir()
        common.write_result(tmp_path / name, {}, saved)
    found = common.differences(tmp_path / "b" / "saved.safetensors", tmp_path / "a" / "saved.safetensors")
    assert found == pytest.approx({"loss": 0.5, "gradients": 1.5 / 5})


def test_copies_to_the_host_are_counted():
    x = torch.arange(6.0)

    def copies(call) -> int:
        return common.count_host_copies(call, CPU)

    assert copies(lambda: x.cpu().numpy()) == copies(lambda: x.sum().item()) == copies(x.tolist) == 1
    assert copies(lambda: x[x > 2]) == copies(lambda: x.nonzero()) == copies(lambda: bool(x.any())) == 1
    assert copies(lambda: (x.sum(), x[torch.tensor([1, 2])], x.clone())) == 0


def test_host_settings_of_the_allocator_reach_the_sides_that_are_to_have_them(monkeypatch):
    seen = {}

    def run(command, env, **_):
        side, folder = (command[command.index(option) + 1] for option in ("--side", "--folder"))
        seen[side] = env.get("MALLOC_MMAP_MAX_")
        common.write_result(Path(folder), {"seconds": len(seen)}, {"loss/x": torch.tensor(1.0)})

    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.setattr(common.subprocess, "run", run)
    results = common.run_rounds(["ours, float32, blocks kept", "ours, float32", common.REFERENCE], 2)
    assert list(seen.values()) == ["0", None, None]
    assert [r["seconds"] for r in results[common.REFERENCE]] == [3, 3]
