"""The whole pipeline, killed and undisturbed, at a size that ends in minutes."""
from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from from_outside import Watch, descendants
from PIL import Image
from safetensors.numpy import load_file

SMALL = [
    "sample.train=48", "sample.val=16", "sample.test=8", "ingest.rows_per_shard=16",
    "train.budget=24 steps", "train.batch_size=4", "train.validations=4", "train.warmup=4 steps",
    "sweep.in_pipeline=true", "sweep.trials=1", "sweep.budget=2 steps", "sweep.min_gain=1", "gate.min_ap=0",
]  # fmt: skip


def start(command: str, store: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"jobs.{command}", "--store", str(store), "--json", *SMALL, *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, expected: int = 0) -> tuple[dict, str]:
    out, err = process.communicate(timeout=500)
    assert process.returncode == expected, err
    return json.loads(out.strip().splitlines()[-1]), err


@pytest.fixture
def call(ray_cluster):
    """As `finish(start(...))`, in this process and by the session's Ray."""

    def call(command: str, store: Path, *more: str, expected: int = 0, usual=SMALL) -> tuple[dict, str]:
        module = importlib.import_module(f"jobs.{command}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "ray_session", lambda settings: nullcontext(), raising=False)
            done = CliRunner().invoke(module.main, ["--store", str(store), "--json", *usual, *more])
        assert done.exit_code == expected, done.output
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return call


def wait_for_checkpoint(store: Path, process: subprocess.Popen) -> None:
    """Until the training (not the sweep's trial) has reported a checkpoint and gone on."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        for progress in (store / "train").glob("*/progress.jsonl"):
            events = [json.loads(line)["event"] for line in progress.read_text().splitlines()]
            kept = list(progress.parent.glob("ray/run/checkpoint_*/state.pt"))
            if kept and events.count("validation") >= 2:
                return
        time.sleep(0.05)
    raise AssertionError("no checkpoint came")


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, dict, str, Watch]:
    """A pipeline killed with SIGKILL in training, and started again, with somebody watching."""
    store = tmp_path_factory.mktemp("killed") / "store"
    first = start("pipeline", store)
    wait_for_checkpoint(store, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = start("pipeline", store)
    with Watch(lambda: descendants(second.pid)) as watch:
        result, log = finish(second)
    return store, result, log, watch


@pytest.mark.timeout(900)
def test_a_killed_pipeline_goes_on_where_it_stopped(killed):
    store, result, log, _ = killed
    assert "Going on with the pipeline that was stopped" in log
    assert "going on from step" in log
    stages = {s["stage"]: s for s in result["stages"]}
    assert stages["train"]["seconds"] > 0
    history = json.loads((Path(result["checkpoint"]).parent / "history.json").read_text())
    assert [v["step"] for v in history["validations"]] == [6, 12, 18, 24] and history["steps"][-1]["step"] == 24
    (progress,) = store.glob("train/*/progress.jsonl")
    records = map(json.loads, progress.read_text().splitlines())
    first, again = (record["step"] for record in records if record["event"] == "start")
    assert first == 0 and again in (6, 12, 18)


def test_on_one_machine_nothing_listens_for_others(killed):
    *_, watch = killed
    for process in ("raylet", "gcs_server", "dashboard", "ray::RayTrainWorker"):  # they were seen
        assert any(process in command for command in watch.commands), watch.commands
    assert not watch.beyond


@pytest.mark.long  # that a training's weights are the same after a kill, test_training_faults.py says, too
@pytest.mark.timeout(900)
def test_a_killed_pipeline_ends_as_a_straight_one(killed, tmp_path):
    _, result, _, _ = killed
    straight, _ = finish(start("train", tmp_path / "store"))
    places = (result["checkpoint"], straight["checkpoint"])
    ours, theirs = (load_file(Path(place) / "model.safetensors") for place in places)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert (value == theirs[key]).all(), key


@pytest.mark.ray
def test_what_a_pipeline_left_can_be_followed_both_ways(killed, call):
    store, result, _, _ = killed
    for asked in (result["dataset"]["digest"], f"models:/{result['model']}@champion", result["predictions"]):
        found, _ = call("lineage", store, asked)
        assert [dataset["id"] for dataset in found["datasets"]] == [result["dataset"]["digest"]]
        [run], [weights] = found["runs"], found["weights"]
        assert (run["stage"], run["status"], run["changed"]["train.budget"]) == ("train", "FINISHED", "24 steps")
        [version] = found["versions"]
        assert (version["version"], version["weights"], version["run_id"]) == ("1", weights["id"], run["id"])
        assert [time["until"] for time in version["champion"]] == [None]
        assert [table["id"] for table in found["tables"]] == [result["predictions"]]
        assert len(found["unknown"]) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_pipeline_that_is_stopped_says_so_as_json_too(tmp_path, how):
    before = signal.getsignal(signal.SIGINT)
    if how == signal.SIGTERM:  # as in the background of a script, which hears no Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start("pipeline", tmp_path / "store")
    signal.signal(signal.SIGINT, before)
    while "ingest done" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(how)
    result, log = finish(process, 130)
    assert result == {"exit_code": 130, "error": "Stopped. The same command goes on from here."}
    assert result["error"] in log and "Traceback" not in log


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_killed_ingest_goes_on_where_it_stopped(tmp_path, call):
    data, rng = tmp_path / "data", np.random.default_rng(0)
    (data / "images").mkdir(parents=True)
    pixels = rng.integers(0, 255, (1500, 2000, 3), np.uint8)  # decoded in a tenth of a second, so that there is time
    for split, numbers in (("train", range(20)), ("val", range(20, 22))):
        images = [{"id": n, "file_name": f"{n}.png", "width": 2000, "height": 1500} for n in numbers]
        for image in images:
            pixels[0, 0] = image["id"]
            Image.fromarray(pixels).save(data / "images" / image["file_name"], compress_level=1)
        boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81} for n in numbers]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "noise"}]}
        (data / f"instances_{split}.json").write_text(json.dumps(content))
    told = (f"data.path={data}", "ingest.rows_per_shard=1")
    first = start("ingest", tmp_path / "store", *told)
    notes: list[Path] = []
    while len(notes) < 3:
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
        notes = list((tmp_path / "store").glob("ingest/*/train-*.json"))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (folder,) = (tmp_path / "store" / "ingest").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("train-*.json")}
    assert 3 <= len(before) < 20 and not (folder / "dataset.json").exists()
    result, _ = call("ingest", tmp_path / "store", *told)
    assert result["images"] == {"train": 20, "val": 2}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    straight, _ = call("ingest", tmp_path / "other", *told)
    assert result["digest"] == straight["digest"]


def test_everything_that_was_promised_is_there(killed):
    _, result, _, _ = killed
    assert result["verdict"]["promoted"] and result["champion"] == result["version"]
    assert set(result["AP"]) == {"val", "test"}
    assert Path(result["report"]).read_text().count("<html") == 1
    manifest = json.loads((Path(result["predictions"]) / "manifest.json").read_text())
    assert manifest["images"] == manifest["ok"] == 8


def test_what_in_the_data_will_hurt_is_said_before_training_and_by_a_command(killed):
    store, _, log, _ = killed
    assert log.count("What in the data will hurt") == 1
    found, _ = finish(start("data", store, "model.num_queries=4"))
    few, many = found["findings"]
    assert "fewer than 20 training images" in few["what"] and all(word.endswith("images") for word in few["which"])
    assert many["which"][0].endswith("5 objects") and many["settings"] == ["model.num_queries=10"]


def test_a_second_run_does_nothing_again(killed):
    store, result, _, _ = killed
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/*/stage.json")}
    again, log = finish(start("pipeline", store))
    assert {path: path.stat().st_mtime_ns for path in store.glob("*/*/stage.json")} == before
    assert again["checkpoint"] == result["checkpoint"] and again["version"] == result["version"]
    for stage in ("ingest", "sweep", "train", "evaluate", "predict"):
        assert f"{stage} already done" in log


@pytest.mark.ray
def test_without_a_path_a_command_takes_the_stores_last_dataset_and_says_so(killed, call):
    store, result, _, _ = killed
    made = set(store.glob("*/*/stage.json"))
    found, log = call("evaluate", store, "--split", "test", usual=())
    assert found["AP"] == result["AP"]["test"] and found["reused"]
    assert "Without data.path: the last dataset of this store, sample, as read 20" in log
    assert set(store.glob("*/*/stage.json")) == made  # no other images were made or read


@pytest.mark.ray
def test_commands_find_what_the_pipeline_left(killed, call, tmp_path):
    store, result, _, _ = killed
    found, _ = call("evaluate", store, "--split", "test")
    assert found["AP"] == result["AP"]["test"] and found["reused"]
    said, _ = call("promote", store)
    assert said["promoted"] and "already" in said["reason"]
    refused, _ = call("promote", store, "gate.min_ap=1", "--why", "to see", expected=3)
    assert not refused["promoted"] and refused["reason"]
    told, _ = call("history", store)
    whats = [row["what"] for row in told["history"]]  # the pipeline may have asked more than once
    assert set(whats[:-1]) == {"promoted"} and whats[-1] == "refused"
    assert told["history"][-1]["why"] == "to see" and told["champion"] == result["version"]
    error, _ = call("rollback", store, "--why", "to see", expected=2)
    assert "was the first champion" in error["error"]

    image = next((store / "sample").glob("*/sample/images/val_*"))
    picture = tmp_path / "out.png"
    shown, _ = call("predict", store, str(image), "--show", "--output", str(picture))
    assert shown["picture"] == str(picture)
    assert max(Image.open(picture).size) >= 400


def test_a_second_model_is_measured_beside_the_champion(killed):
    store, result, _, _ = killed
    changes = ("sweep.in_pipeline=false", "train.budget=4 steps", "train.validations=1")
    second, _ = finish(start("pipeline", store, *changes), expected=3)
    verdict = second["verdict"]
    assert verdict["version"] != verdict["champion"] == result["version"]
    ap = verdict["comparison"]["AP"]
    assert ap["first"] == pytest.approx(result["AP"]["val"], abs=1e-9)
    assert ap["second"] == pytest.approx(second["AP"]["val"], abs=1e-9)
    assert ap["low"] <= ap["difference"] <= ap["high"]
    assert "AP is above the champion's" in [rule["rule"] for rule in verdict["rules"] if not rule["ok"]]
    assert verdict["reason"].partition(" was refused")[0] in Path(second["report"]).read_text()


@pytest.mark.ray
def test_a_model_is_refused_on_images_it_was_trained_on(killed, call, tmp_path):
    store, _, _, _ = killed
    (sample,) = (store / "sample").glob("*/sample")
    shutil.copytree(sample, tmp_path / "data")
    shutil.copy(sample / "instances_train.json", tmp_path / "data" / "instances_val.json")
    told = [f"data.path={tmp_path / 'data'}", "tracking.experiment=sample", "tracking.model_name=sample"]
    refused, _ = call("promote", store, *told, "--version", "1", expected=3)
    (rule,) = [rule for rule in refused["rules"] if not rule["ok"]]
    assert rule["rule"] == "was not trained on the images it is measured on" and rule["figure"] == 1.0
    call("ingest", store)  # the store's last dataset again


def test_the_readmes_python_detects_without_ray(killed, tmp_path):
    store, result, _, _ = killed
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    image = next((store / "sample").glob("*/sample/images/val_*"))
    code = code.replace("path/to/checkpoint", result["checkpoint"]).replace("photo.jpg", str(image))
    code += "\nimport sys\nassert not {'ray', 'mlflow', 'dbos'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[(")
