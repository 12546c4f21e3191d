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
    flat = [row(2, 30.0), row(4, 45.0), row(8, 47.0), row(16, 57.0), row(32, 58.0)]
    assert choose(flat)["batch_size"] == 8
    rising = [row(2, 30.0), row(4, 60.0), row(8, 80.0), row(16, 120.0), row(32, 0.0, fits=False)]
    assert choose(rising)["batch_size"] == 16
    assert choose([row(2, 0.0, fits=False)]) is None


def test_fewer_images_than_batch_norms_want_are_chosen_only_where_no_more_can_be_had():
    assert choose([row(2, 90.0), row(4, 50.0), row(8, 20.0)])["batch_size"] == 8
    assert choose([row(2, 90.0), row(4, 50.0), row(8, 0.0, fits=False)])["batch_size"] == 4


def measured_as(rates: dict[int, list[float]], gigabytes: float = 0.1):
    """In place of `measure`: the rates of each size, the last of them again and again; sizes without any do not fit."""
    calls = []

    def run(settings, folder, size, use_gpu):
        calls.append(size)
        left = rates.get(size, [0.0])
        rate = left.pop(0) if len(left) > 1 else left[0]
        return {"batch_size": size, "images_per_second": rate, "seconds_per_step": size / rate if rate else 0.0,
                "memory_gb": gigabytes * size, "fits": rate > 0, "device": "a CPU", "machine_gb": 16.0}  # fmt: skip

    run.calls = calls
    return run


@pytest.fixture
def many(dataset):
    """The same, said to have a thousand images: nothing here looks at them."""
    record = read_json(dataset / "dataset.json")
    record["splits"]["train"]["images"] = 1000
    write_json(dataset / "dataset.json", record)
    return dataset


def test_a_drop_is_measured_again_before_it_is_believed(many):
    run = measured_as({2: [10.0], 4: [2.0, 18.0], 8: [30.0], 16: [5.0, 50.0], 32: [51.0]})
    found = suggest(load_settings(None, SMALL), many, False, run)
    assert run.calls == [2, 4, 4, 8, 16, 16, 32]
    assert [r["images_per_second"] for r in found["rows"]] == [10.0, 18.0, 30.0, 50.0, 51.0]
    assert found["settings"][0] == "train.batch_size=16" and found["note"] is None
    run = measured_as({2: [10.0], 4: [18.0], 8: [30.0], 16: [20.0, 15.0]})
    found = suggest(load_settings(None, SMALL), many, False, run)
    assert run.calls == [2, 4, 8, 16, 16] and found["rows"][-1]["images_per_second"] == 20.0
    assert found["settings"][0] == "train.batch_size=8"


def test_neither_a_slow_machine_nor_one_that_gains_nothing_ends_the_search_before_batch_norms_have_enough(many):
    slow = measured_as({2: [0.25], 4: [0.25], 8: [0.25]})
    found = suggest(load_settings(None, SMALL), many, False, slow)
    assert slow.calls == [2, 4, 8] and found["settings"][0] == "train.batch_size=8" and found["note"] is None


def test_a_small_batch_says_what_forces_it(many):
    found = suggest(load_settings(None, SMALL), many, False, measured_as({2: [10.0], 4: [20.0]}))
    assert found["settings"][0] == "train.batch_size=4" and "memory does not hold more" in found["note"]
    large = measured_as({2: [10.0], 4: [20.0], 8: [40.0]}, gigabytes=2.0)  # 16 GB in all: 8 are not tried
    found = suggest(load_settings(None, SMALL), many, False, large)
    assert large.calls == [2, 4] and "memory does not hold more" in found["note"]
    record = read_json(many / "dataset.json")
    record["splits"]["train"]["images"] = 7
    write_json(many / "dataset.json", record)
    found = suggest(load_settings(None, SMALL), many, False, measured_as({2: [10.0], 4: [20.0], 8: [40.0]}))
    assert found["settings"][0] == "train.batch_size=4" and "there are 7 images" in found["note"]


def test_slow_steps_are_not_all_waited_for(dataset, monkeypatch):
    done, now = [], [0.0]

    def step(*rest):
        done.append(rest)
        now[0] += 20

    monkeypatch.setattr(module, "train_step", step)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    assert measure(load_settings(None, SMALL), dataset, 2, False)["seconds_per_step"] == 20 and len(done) == 2


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
    assert load_settings(None, found["settings"]).train.batch_size == 8
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
