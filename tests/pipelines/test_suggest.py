"""Batch size and learning rate for a machine: measured, chosen, and said where memory ends."""
from __future__ import annotations

import shutil

import pytest
import torch
from test_feed import dataset as images  # noqa: F401

from pipelines import suggest as module
from pipelines.settings import UserError, load_settings
from pipelines.stage import read_json, write_json
from pipelines.suggest import choose, measure, scaled_rate, suggest, suggestion_table

SMALL = ["model.hidden_dim=32", "model.nheads=4", "model.enc_layers=1", "model.dec_layers=1"]


@pytest.fixture
def dataset(images, tmp_path):  # noqa: F811
    """The feed's eleven images, with what is told of a dataset besides."""
    folder = shutil.copytree(images, tmp_path / "dataset")
    record = read_json(folder / "dataset.json")
    record["categories"] = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    record["splits"]["train"] |= {"images": 11, "max_objects": 2}
    write_json(folder / "dataset.json", record)
    return folder


def row(size: int, rate: float, fits: bool = True) -> dict:
    return {"batch_size": size, "images_per_second": rate, "fits": fits}


def test_the_smallest_batch_of_nearly_the_best_rate_is_chosen():
    flat = [row(2, 30.0), row(4, 45.0), row(8, 47.0), row(16, 48.0)]
    assert choose(flat)["batch_size"] == 4
    rising = [row(2, 30.0), row(4, 60.0), row(8, 120.0), row(16, 0.0, fits=False)]
    assert choose(rising)["batch_size"] == 8
    assert choose([row(2, 0.0, fits=False)]) is None


def test_the_rate_follows_the_root_of_the_batch():
    assert scaled_rate(1.2e-3, 8, 8) == 1.2e-3
    assert scaled_rate(1e-3, 8, 32) == pytest.approx(2e-3)
    assert scaled_rate(1e-3, 8, 2) == pytest.approx(5e-4)


def test_batches_grow_until_the_images_end_and_what_is_suggested_can_be_copied(dataset):
    found = suggest(load_settings(None, SMALL), dataset, False, measure)
    sizes = [r["batch_size"] for r in found["rows"]]
    assert sizes == [2, 4, 8]  # 16 would be more than there are
    assert all(r["fits"] and r["images_per_second"] > 0 for r in found["rows"])
    assert [s.split("=")[0] for s in found["settings"]] == ["train.batch_size", "train.lr"]
    assert load_settings(None, found["settings"]).train.batch_size in sizes
    assert suggestion_table(found).row_count == len(sizes)


def test_a_batch_too_large_for_the_memory_is_a_row_and_no_end(dataset, monkeypatch):
    def step(net, criterion, optimizer, parts, *rest):
        if len(parts[0]["counts"]) > limit:
            raise error

    monkeypatch.setattr(module, "train_step", step)
    limit, error = 2, torch.OutOfMemoryError("no more")
    found = suggest(load_settings(None, SMALL), dataset, False, measure)
    assert [r["fits"] for r in found["rows"]] == [True, False] and found["settings"][0] == "train.batch_size=2"
    limit, error = 0, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    with pytest.raises(UserError, match="Not even 2 images"):
        suggest(load_settings(None, SMALL), dataset, False, measure)
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        suggest(load_settings(None, SMALL), dataset, False, measure)


@pytest.mark.ray
def test_a_worker_measures_as_a_training_does(dataset, ray_cluster):
    found = suggest(load_settings(None, SMALL), dataset, False)
    assert [r["fits"] for r in found["rows"]] == [True] * 3 and found["device"].endswith("CPU cores")
    assert all(0 < r["memory_gb"] < 8 for r in found["rows"])
    with pytest.raises(UserError, match="nowhere") as caught:
        suggest(load_settings(None, [*SMALL, "train.init_from=nowhere"]), dataset, False)
    assert caught.value.exit_code == 2
    (dataset / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"weights\.pth"):  # seen in the worker alone
        suggest(load_settings(None, [*SMALL, f"train.init_from={dataset / 'weights.pth'}"]), dataset, False)
    with pytest.raises(UserError, match="no GPU"):
        suggest(load_settings(None, SMALL), dataset, True)
