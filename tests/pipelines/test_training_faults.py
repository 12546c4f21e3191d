"""A training that is killed, robbed of its storage or fed nonsense goes on as if nothing had been, or says why not."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

from pipelines.detect import Detector
from pipelines.evaluate import evaluate
from pipelines.ingest import ingest, source
from pipelines.sample import write_sample
from pipelines.settings import RunSettings, UserError, override_settings
from pipelines.stage import read_json
from pipelines.storage import copy_verified
from pipelines.tracking import tracker
from pipelines.train import train
from pipelines.training_log import PROGRESS, read_progress
from pipelines.training_state import SNAPSHOT, load_state, sweep_orphans
from pipelines.validation import find_objects

STEPS, VALIDATIONS = 60, 6
SETTINGS = {
    "model": {
        "preset": "tiny", "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 32,
        "num_queries": 10, "image_size": 64, "image_max_size": 64, "dropout": 0.1,
    },
    "sample": {"train": 14, "val": 6, "test": 0},
    "train": {"budget": f"{STEPS} steps", "validations": VALIDATIONS, "batch_size": 2, "augment": {"recipe": "light"}},
}  # fmt: skip
ALONE = """
import sys
from pathlib import Path
from jobs.common import ray_session
from pipelines.settings import load_settings
from pipelines.tracking import tracker
from pipelines.train import train

settings = load_settings(sys.argv[1])
folder = Path(sys.argv[3])
with ray_session(settings):
    train(settings, Path(sys.argv[2]), folder, tracker(settings, folder.parent, "faults"), "killed")
"""


@pytest.fixture(scope="module")
def settings() -> RunSettings:
    return RunSettings.model_validate(SETTINGS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, settings, ray_cluster) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_sample(settings.sample, folder / "images")
    (folder / "dataset").mkdir()
    ingest(settings, source(settings, folder / "images"), folder / "dataset")
    return folder / "dataset"


def run(settings: RunSettings, dataset: Path, folder: Path) -> dict:
    folder.mkdir(exist_ok=True, parents=True)
    return train(settings, dataset, folder, tracker(settings, folder.parent, "faults"), folder.name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, settings, dataset) -> tuple[dict, Path]:
    """The training that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return run(settings, dataset, folder), folder


def start(
    settings: RunSettings, dataset: Path, place: Path, environment: dict | None = None, nodes: str | None = None
) -> subprocess.Popen:
    """The training in place/run, by a driver and a Ray of its own, which write to place/out.

    nodes: on a cluster of which one is killed, as cluster_of_nodes.py says.
    """
    (place / "run").mkdir()
    (place / "settings.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
    script = ["-c", ALONE] if nodes is None else [str(Path(__file__).with_name("cluster_of_nodes.py"))]
    paths = [str(path) for path in (place / "settings.yaml", dataset, place / "run")]
    command = [sys.executable, *script, *paths, *filter(None, [nodes])]
    with (place / "out").open("wb") as out:
        environment = os.environ | (environment or {})
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)


def checkpoints(folder: Path) -> list[Path]:
    """Those that Ray Train knows, the last one last."""
    snapshot = read_json(folder / "ray" / "run" / SNAPSHOT)
    names = {found["checkpoint_dir_name"] for found in snapshot["checkpoint_results"]}
    latest = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
    return [folder / "ray" / "run" / name for name in (*sorted(names - {latest}), latest)]


def assert_same_weights(one: dict, other: dict) -> None:
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items()), part


def events(folder: Path, kind: str) -> list[dict]:
    return [record for record in read_progress(folder / PROGRESS) if record["event"] == kind]


def wait_for(folder: Path, kind: str, times: int, seconds: float = 240) -> None:
    """Until soon after so many such events were told of, or it takes too long."""
    deadline = time.monotonic() + seconds
    while len(events(folder, kind)) < times and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # some steps later


def when_validated(folder: Path, times: int, then) -> threading.Thread:
    """Does something once, soon after so many validations were told of."""

    def wait() -> None:
        wait_for(folder, "validation", times)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_workers(driver: int | None = None) -> None:
    """kill -9 of the training workers of a driver's Ray, or of this process'."""
    below = psutil.Process(driver).children(recursive=True)
    mine = [p for p in below if "ray::RayTrainWorker" in " ".join(p.cmdline())]
    assert mine
    for process in mine:
        process.kill()


def assert_as_if_nothing_had_been(folder: Path, straight: tuple[dict, Path], stops: int = 1) -> None:
    """As many steps, no validation lost or told twice in the history, the same weights bit for bit."""
    first, *again = (start["step"] for start in events(folder, "start"))
    assert first == 0 and len(again) == stops
    assert all(0 < step < STEPS and step % 7 for step in again), "stopped in mid-epoch, and went on"
    history, expected = (read_json(where / "history.json") for where in (folder, straight[1]))
    assert [v["step"] for v in history["validations"]] == [v["step"] for v in expected["validations"]]
    assert [v["AP"] for v in history["validations"]] == [v["AP"] for v in expected["validations"]]
    state, other = (load_state(checkpoints(where)[-1]) for where in (folder, straight[1]))
    assert state["progress"]["step"] == other["progress"]["step"] == STEPS
    assert_same_weights(state, other)


@pytest.mark.ray
def test_a_training_keeps_all_it_needs_and_tells_mlflow_the_truth(straight, dataset):
    result, folder = straight
    assert result["steps"] == STEPS and len(events(folder, "validation")) == VALIDATIONS
    kept = checkpoints(folder)
    assert len(kept) <= 3 and not sweep_orphans(pafs.LocalFileSystem(), str(folder / "ray" / "run"))
    state = load_state(kept[-1])
    assert state["progress"]["step"] == STEPS and len(state["rng"]) == 1
    client = tracker(RunSettings(), folder.parent, "faults").client()
    found = client.get_run(result["run_id"])
    assert found.info.status == "FINISHED"
    assert {"env.code", "env.torch", "env.cpus"} <= found.data.tags.keys()
    steps = [metric.step for metric in client.get_metric_history(result["run_id"], "val/AP")]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    (model,) = client.search_logged_models([found.info.experiment_id])
    bound = [m for m in model.metrics if m.key == "val/AP"]
    digest = read_json(dataset / "dataset.json")["splits"]["val"]["digest"]
    assert len(bound) == VALIDATIONS and {m.dataset_digest for m in bound} == {digest[:36]}
    assert any(m.key.startswith("val/AP/") for m in model.metrics)
    pictures = client.list_artifacts(result["run_id"], "predictions")
    assert len(pictures) == VALIDATIONS and pictures[0].file_size > 1000


@pytest.mark.ray
def test_a_worker_and_then_the_driver_killed_in_mid_epoch_is_as_if_they_had_not_been(
    tmp_path, settings, dataset, straight
):
    folder = tmp_path / "run"
    process = start(settings, dataset, tmp_path)
    wait_for(folder, "validation", 2)
    kill_workers(process.pid)
    wait_for(folder, "start", 2)
    wait_for(folder, "validation", len(events(folder, "validation")) + 1)
    for each in (process, *psutil.Process(process.pid).children(recursive=True)):  # and its Ray with it
        each.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "out").read_text()[-2000:]
    assert not (folder / "history.json").exists()
    orphan = checkpoints(folder)[-1].with_name("checkpoint_of_an_upload_cut_off")
    shutil.copytree(checkpoints(folder)[-1], orphan)
    result = run(settings, dataset, folder)
    assert not orphan.exists()
    assert_as_if_nothing_had_been(folder, straight, stops=2)
    client = tracker(settings, folder.parent, "faults").client()
    assert [run.info.run_id for run in client.search_runs([client.get_run(result["run_id"]).info.experiment_id])] == [
        result["run_id"]
    ]
    steps = [metric.step for metric in client.get_metric_history(result["run_id"], "train/loss")]
    assert steps == sorted(set(steps))


@pytest.mark.ray
@pytest.mark.long  # to a training it is a worker killed
def test_a_node_killed_is_as_if_it_had_not_been(tmp_path, settings, dataset, straight):
    process = start(settings, dataset, tmp_path, nodes="move")
    assert process.wait(timeout=400) == 0, (tmp_path / "out").read_text()[-3000:]
    assert_as_if_nothing_had_been(tmp_path / "run", straight)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_training_goes_on_with_fewer_workers_and_gets_one_back(tmp_path, settings, dataset):
    """No step and no validation is lost, and every image of every epoch comes, whoever prepares it."""
    steps = 1500  # one worker is to be busy for longer than the minute after which Ray looks for more
    changes = {"train.num_workers": 2, "train.min_workers": 1, "train.batch_size": 1, "train.budget": f"{steps} steps",
               "train.validations": 20, "train.ema_decay": 0.9}  # fmt: skip
    process = start(override_settings(settings, changes), dataset, tmp_path, nodes="shrink")
    assert process.wait(timeout=1100) == 0, (tmp_path / "out").read_text()[-3000:]
    said = events(tmp_path / "run", "start")
    assert [start["workers"] for start in said] == [2, 1, 2]
    assert 0 < said[1]["step"] <= said[2]["step"] < steps  # the new node may come before the next checkpoint
    assert "1 of 2 workers are there" in " ".join(record["text"] for record in events(tmp_path / "run", "message"))
    history = read_json(tmp_path / "run" / "history.json")
    assert len(history["validations"]) == 20 and history["steps"][-1]["step"] == steps
    assert {epoch["epoch"] for epoch in events(tmp_path / "run", "epoch")} == set(range(1, 2 * steps // 14 + 1))


@pytest.mark.ray
def test_validation_beside_the_training_finds_what_it_would_have_found(tmp_path, settings, dataset, straight):
    beside = override_settings(settings, {"train.validation": "beside"})
    result = run(beside, dataset, tmp_path / "run")
    expected = read_json(straight[1] / "history.json")["validations"]
    found = read_json(tmp_path / "run" / "history.json")["validations"]
    assert [(v["step"], v["AP"]) for v in found] == [(v["step"], v["AP"]) for v in expected]
    assert (result["AP"], result["best_step"]) == (straight[0]["AP"], straight[0]["best_step"])
    for name in ("metrics.json", "config.json"):
        assert read_json(tmp_path / "run" / "checkpoint" / name) == read_json(straight[1] / "checkpoint" / name)


@pytest.mark.ray
def test_two_workers_go_through_all_images_and_share_the_validation(tmp_path, settings, dataset):
    changes = {"train.num_workers": 2, "train.batch_size": 2, "train.micro_batches": 2, "train.budget": "3 epochs",
               "train.validations": 2}  # fmt: skip
    result = run(override_settings(settings, changes), dataset, tmp_path / "run")
    epochs = events(tmp_path / "run", "epoch")
    assert [epoch["images"] for epoch in epochs] == [14, 14, 14]
    assert result["steps"] == 11 and len(events(tmp_path / "run", "validation")) == 2
    assert len(load_state(checkpoints(tmp_path / "run")[-1])["rng"]) == 2


@pytest.mark.ray
def test_a_validation_finds_the_same_whoever_does_it(settings, dataset, straight):
    """Images of several shapes: any number of workers, to the last bit, and who evaluates the checkpoint."""
    few = override_settings(settings, {"evaluate.batch_size": 2})
    detector = Detector.load(straight[1] / "checkpoint", 2)
    alone = find_objects(detector, dataset, few, 0, 1).sort_by("image_id")
    shared = pa.concat_tables([find_objects(detector, dataset, few, rank, 2) for rank in range(2)]).sort_by("image_id")
    assert len(alone) == 6 and alone.equals(shared)
    (dataset.parent / "evaluated").mkdir()
    evaluate(few, dataset, straight[1] / "checkpoint", "val", dataset.parent / "evaluated")
    found = pq.read_table(dataset.parent / "evaluated" / "detections.parquet")
    for column in ("image_id", "scores", "boxes"):
        ours, theirs = (np.array(table[column].to_pylist()) for table in (alone, found))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.ray
@pytest.mark.long
def test_storage_that_fails_every_third_write_costs_nothing_but_time(tmp_path, settings, dataset, straight):
    if why := ObjectStore.unfit(tmp_path):
        pytest.skip(why)
    with ObjectStore(tmp_path, faulty=True) as store:
        access = {
            "AWS_ENDPOINT_URL": store.endpoint, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }  # fmt: skip
        # So many checkpoints that the first are deleted again; each takes ten seconds until it is written.
        changes = {"train.storage": "s3://ready/runs", "train.validations": 4}
        process = start(override_settings(settings, changes), dataset, tmp_path, access)
        assert process.wait(timeout=300) == 0, (tmp_path / "out").read_text()[-3000:]
        keys = [x["Key"] for x in store.client().list_objects_v2(Bucket="ready", Prefix="runs/run-")["Contents"]]
        assert sum(key.endswith("state.pt") for key in keys) in (2, 3)
        for key in (key for key in keys if key[-1] != "/"):  # runs/run-HASH/run/… as in a training's own folder
            path = tmp_path / "stored" / "ray" / key.split("/", 2)[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            store.client().download_file("ready", key, str(path))
    kept = checkpoints(tmp_path / "stored")
    state, other = load_state(kept[-1]), load_state(checkpoints(straight[1])[-1])
    assert state["progress"]["step"] == STEPS
    assert_same_weights(state, other)
    ours = (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes()
    assert ours in [(place / "model" / "model.safetensors").read_bytes() for place in kept]


@pytest.mark.ray
def test_numbers_that_are_no_numbers_end_a_training_with_a_sentence(tmp_path, settings, dataset, straight):
    shutil.copytree(straight[1], tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    mad = override_settings(settings, {"train.lr": 1e12, "train.budget": "200 steps"})
    with pytest.raises(UserError, match=r"stopped being finite .*Lower train\.lr \(it is 1e\+12\)"):
        run(mad, dataset, tmp_path / "run")
    assert len(events(tmp_path / "run", "start")) == 2, "it is not tried again in vain"
    last = load_state(checkpoints(tmp_path / "run")[-1])
    assert all(bool(torch.isfinite(value).all()) for value in last["model"].values())
    tracked = tracker(settings, tmp_path, "faults")
    assert tracked.client().get_run(read_json(tmp_path / "run" / "run.json")["run_id"]).info.status == "FAILED"


@pytest.mark.ray
def test_a_worker_that_dies_for_good_is_said_with_what_to_do(tmp_path, settings, dataset):
    """As the system's out-of-memory killer does it."""
    folder = tmp_path / "run"
    once = override_settings(settings, {"train.max_failures": 0})
    killer = when_validated(folder, 2, kill_workers)
    with pytest.raises(UserError, match=r"memory runs out\. Raise train\.micro_batches.*goes on from the last"):
        run(once, dataset, folder)
    killer.join()
    assert load_state(checkpoints(folder)[-1])["progress"]["step"] >= STEPS / VALIDATIONS


@pytest.mark.ray
@pytest.mark.long
def test_a_full_disk_is_said_and_what_was_kept_is_whole(tmp_path, settings, dataset):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        folder = place / "run"

        def fill() -> None:
            with (place / "filler").open("wb") as file:
                while file.write(bytes(2**20)):
                    file.flush()

        def fill_up() -> None:
            try:
                fill()
            except OSError:
                return

        filler = when_validated(folder, 2, fill_up)
        with pytest.raises(UserError, match=r"A disk is full .* free some space and run the same command"):
            train(settings, dataset, _made(folder), tracker(settings, tmp_path, "faults"), "full")
        filler.join()
        known = checkpoints(folder)
        assert load_state(known[-1])["progress"]["step"] >= STEPS / VALIDATIONS
        (place / "filler").unlink()
        result = train(settings, dataset, folder, tracker(settings, tmp_path, "faults"), "full")
        assert result["steps"] == STEPS
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.mark.ray
def test_a_training_that_is_told_to_stop_says_so_in_mlflow(tmp_path, settings, dataset):
    process = start(settings, dataset, tmp_path)
    wait_for(tmp_path / "run", "start", 1)
    process.terminate()
    assert process.wait(timeout=240) != 0
    run_id = read_json(tmp_path / "run" / "run.json")["run_id"]
    assert tracker(settings, tmp_path, "faults").client().get_run(run_id).info.status == "KILLED"


@pytest.mark.ray
def test_a_label_outside_the_map_is_said_before_anything_starts(tmp_path, settings, dataset):
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    record = read_json(copy / "dataset.json")
    record["categories"] = record["categories"][:3]
    (copy / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"has the label \d+, and the label map ends at 2: .* ingest again") as error:
        run(settings, copy, tmp_path / "run")
    assert error.value.exit_code == 2


def test_a_copy_that_is_not_what_was_written_is_noticed(tmp_path):
    (tmp_path / "from" / "model").mkdir(parents=True)
    (tmp_path / "from" / "model" / "weights").write_bytes(b"0123456789")

    class Loses(pafs.LocalFileSystem):
        """A storage that takes all and keeps less, without a word."""

        def open_input_stream(self, path):
            return pafs.LocalFileSystem().open_input_stream(str(tmp_path / "less"))

    (tmp_path / "less").write_bytes(b"01234")
    copy_verified(tmp_path / "from", pafs.LocalFileSystem(), str(tmp_path / "to"))
    assert (tmp_path / "to" / "model" / "weights").read_bytes() == b"0123456789"
    with pytest.raises(OSError, match="is not what was written to it"):
        copy_verified(tmp_path / "from", Loses(), str(tmp_path / "to"))
