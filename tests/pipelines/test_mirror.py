"""A store on S3: what one machine did another has, whole or said not to be; on a real server (OpenStack Swift)."""
from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

from pipelines.mirror import at_hand, fetch, name_of, open_store, publish, records
from pipelines.settings import UserError
from pipelines.stage import read_json, run_stage, write_json
from pipelines.storage import Folder, _s3, list_files, s3_client
from pipelines.training_log import PROGRESS, TrainingLog, progress_of, read_history, read_progress
from pipelines.workflow import latest

SMALL = [
    "sample.train=48", "sample.val=16", "sample.test=8", "ingest.rows_per_shard=16", "train.budget=12 steps",
    "train.batch_size=4", "train.validations=2", "train.warmup=4 steps", "gate.min_ap=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def swift(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swift")
    if why := ObjectStore.unfit(folder):
        pytest.skip(why)
    with ObjectStore(folder) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        _s3.cache_clear()
        s3_client.cache_clear()
        s3_client().create_bucket(Bucket="team")
        yield running
    _s3.cache_clear()
    s3_client.cache_clear()


@pytest.fixture
def machine(swift, monkeypatch, tmp_path):
    """machine("a") makes this process one with mirrors of its own, and gives it the store s3://team/TEST."""

    def turn_into(name: str) -> Path:
        monkeypatch.setenv("DETR_CACHE", str(tmp_path / name))
        return open_store(f"s3://team/{tmp_path.name}")

    return turn_into


def work(done: list, text: bytes = b"weights"):
    def write(folder: Path) -> dict:
        done.append(folder)
        (folder / "checkpoint").mkdir(exist_ok=True)
        (folder / "checkpoint" / "model.bin").write_bytes(text)
        (folder / ".lock2").write_bytes(b"not for others")
        return {"digest": "d"}

    return write


def test_what_one_machine_did_another_has_and_does_not_do_again(machine):
    done = []
    first = run_stage(machine("a"), "train", 1, {"lr": 1}, {}, work(done))
    store = machine("b")
    second = run_stage(store, "train", 1, {"lr": 1}, {}, work(done))
    assert len(done) == 1 and second["reused"] and not first["reused"]
    here = Path(second["folder"])
    assert here.is_relative_to(os.environ["DETR_CACHE"])
    assert (here / "checkpoint" / "model.bin").read_bytes() == b"weights"
    assert sorted(list_files(name_of(here), recursive=True)) == ["checkpoint/model.bin", "files.json", "stage.json"]
    assert [record["folder"] for record in records(store, "train")] == [str(here)]
    assert name_of(here / "checkpoint").startswith("s3://team/") and at_hand(name_of(here)) == here


def test_a_machine_that_died_before_its_result_was_there_puts_it_up_at_the_next_start(machine, monkeypatch):
    done, store = [], machine("a")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.stage.publish", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_stage(store, "train", 1, {}, {}, work(done))
    assert records(store, "train") == []
    assert run_stage(store, "train", 1, {}, {}, work(done))["reused"]
    assert run_stage(machine("b"), "train", 1, {}, {}, work(done))["reused"] and len(done) == 1


def test_two_machines_do_not_work_on_one_stage_at_once(machine, monkeypatch, tmp_path):
    monkeypatch.setattr("pipelines.mirror.BEAT", 0.4)
    done, began, go_on, store = [], threading.Event(), threading.Event(), machine("a")

    def slowly(folder: Path) -> dict:
        began.set()
        assert go_on.wait(100)
        return work(done)(folder)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run_stage, store, "train", 1, {}, {}, slowly)
        assert began.wait(30)
        code = "from pipelines.mirror import open_store; from pipelines.stage import run_stage; import sys;"
        code += "print(run_stage(open_store(sys.argv[1]), 'train', 1, {}, {}, lambda folder: 1 / 0)['reused'])"
        command = [sys.executable, "-c", code, f"s3://team/{tmp_path.name}"]
        env = {**os.environ, "DETR_CACHE": str(tmp_path / "b")}
        second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert second.stderr.readline().endswith("waiting for it.\n")
        go_on.set()
        out, err = second.communicate(timeout=100)
        assert out.strip() == "True", err
    assert len(done) == 1 and not first.result()["reused"]


def test_the_work_of_a_machine_that_is_silent_is_taken_over_and_ones_own_at_once(machine, monkeypatch):
    monkeypatch.setattr("pipelines.mirror.BEAT", 0.4)
    monkeypatch.setattr("pipelines.mirror.SILENT", 1.0)
    done = []
    for name, least in (("a", 0.0), ("b", 1.0)):
        place = machine("a")
        key = run_stage(place, "other", 1, {"name": name}, {}, work([]))["key"]  # the folder's name
        here = place / "other" / key
        other = Folder(name_of(here))
        for file in ("files.json", "stage.json"):
            other.delete(file)
        shutil.rmtree(here)
        dead = {"format": 1, "who": f"{socket.gethostname()} {here}", "pid": 0, "sign": 7}
        other.put("working.json", json.dumps(dead).encode())
        began = time.monotonic()
        assert not run_stage(machine(name), "other", 1, {"name": name}, {}, work(done))["reused"]
        assert time.monotonic() - began > least
        assert other.get("working.json") is None
    assert len(done) == 2


def test_what_is_not_as_it_was_written_is_said_and_not_taken(machine):
    folder = Path(run_stage(machine("a"), "train", 1, {}, {}, work([]))["folder"])
    there = Folder(name_of(folder))
    machine("b")
    there.put("checkpoint/model.bin", b"other weights")
    with pytest.raises(UserError, match=r"model\.bin is not what was written; delete s3://team/.*files\.json and run"):
        at_hand(there.uri)
    there.delete("checkpoint/model.bin")
    with pytest.raises(UserError, match=r"model\.bin is missing"):
        at_hand(there.uri)
    with pytest.raises(UserError, match="holds no finished folder"):
        at_hand(f"{there.uri}0")


def test_a_name_in_a_store_cannot_leave_its_folder(machine, tmp_path):
    folder = Path(run_stage(machine("a"), "train", 1, {}, {}, work([]))["folder"])
    there = Folder(name_of(folder))
    listed = json.loads(there.get("files.json"))
    machine("b")
    for name in ("../../../../../../evil", "/tmp/evil", "a//b"):
        there.put("files.json", json.dumps({**listed, "files": {name: "0" * 64}}).encode())
        with pytest.raises(UserError, match="is no name of a file in a store"):
            at_hand(there.uri)
    with pytest.raises(UserError, match="is no name"):
        open_store("s3://team/a/../../../b")
    assert not list(tmp_path.rglob("evil"))


def test_what_was_done_again_replaces_what_a_machine_had_of_it(machine):
    folder = machine("a") / "promote" / "digits-1"
    for text in ("refused", "promoted"):
        machine("a")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "verdict.json", text)
        publish(folder)
        other = machine("b") / "promote" / "digits-1"
        assert fetch(other) and read_json(other / "verdict.json") == text


def test_a_local_store_is_as_it_was(tmp_path):
    assert open_store(tmp_path) == tmp_path and name_of(tmp_path / "a") == str(tmp_path / "a")
    assert at_hand(str(tmp_path)) == tmp_path
    record = run_stage(tmp_path, "train", 1, {}, {}, work([]))
    assert not (Path(record["folder"]) / "files.json").exists()
    assert [one["key"] for one in records(tmp_path, "train")] == [record["key"]]


class Silent:
    """A tracker that takes everything."""

    def log_metrics(self, *figures, **bound):
        pass


def test_progress_of_a_training_and_of_validations_elsewhere_is_one_history(machine):
    name = name_of(machine("a") / "train" / "k")
    place = f"{name}/{PROGRESS}"
    metrics = {"AP": 0.1, "AP50": 0.2, "per_class": []}

    def trained(steps):
        log = TrainingLog(place, Silent(), "run", {})
        log.lines.go_on()
        for step in steps:
            log._write({"event": "step", "step": step, "loss": 1.0 / step})
        log.finish()

    trained((20, 40))
    machine("b")  # the training goes on there, and one of its steps is done again
    elsewhere = TrainingLog(progress_of(place, 40), Silent(), "run", {})
    elsewhere.validation(40, metrics, mark=1)
    elsewhere.finish()
    trained((40, 60))
    history = read_history(place)
    assert [step["step"] for step in history["steps"]] == [20, 40, 60]
    assert [(found["step"], found["AP"]) for found in history["validations"]] == [(40, 0.1)]
    times = [record["time"] for record in read_progress(place)]
    assert times == sorted(times) and len(times) == 5


def test_a_store_on_s3_asks_for_an_mlflow_that_all_reach(swift, tmp_path):
    from click.testing import CliRunner

    from jobs.report import main

    done = CliRunner().invoke(main, ["--store", "s3://team/store"])
    assert done.exit_code == 2 and "set tracking.uri to an MLflow server" in done.output


@pytest.mark.ray
@pytest.mark.long
def test_shards_and_training_of_one_machine_are_anothers(swift, tmp_path):
    def train(machine: str) -> dict:
        changes = ["sample.train=16", "sample.val=4", "train.budget=2 steps",
                   f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]  # fmt: skip
        command = [sys.executable, "-m", "jobs.train", "--store", "s3://team/training", "--json", *SMALL, *changes]
        env = {**os.environ, "DETR_CACHE": str(tmp_path / machine)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first, second = train("a"), train("b")
    assert not first["reused"] and second["reused"] and first["run_id"] == second["run_id"]
    places = [Path(found["checkpoint"]) for found in (first, second)]
    assert places[1].is_relative_to(tmp_path / "b")
    weights = [(place / "model.safetensors").read_bytes() for place in places]
    assert weights[0] == weights[1]


@pytest.mark.ray
@pytest.mark.long
def test_a_pipeline_on_s3_is_one_for_two_machines(swift, mlflow_server, postgres, tmp_path, monkeypatch):
    from mlflow_server import new_database

    database = new_database(postgres, "ledger").replace("+psycopg", "")
    user, _, rest = database.removeprefix("postgresql://").partition("@")
    monkeypatch.setenv("PGPASSWORD", user.partition(":")[2])
    shared = [f"tracking.uri={mlflow_server.url}", f"workflow.database=postgresql://{user.partition(':')[0]}@{rest}"]

    def pipeline(machine: str) -> dict:
        command = [sys.executable, "-m", "jobs.pipeline", "--store", "s3://team/pipeline", "--json", *SMALL, *shared]
        env = {**os.environ, "DETR_CACHE": str(tmp_path / machine)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first = pipeline("a")
    assert first["champion"] == "1" and [s["stage"] for s in first["stages"] if s["reused"]] == ["sample"]
    shutil.rmtree(tmp_path / "a")
    second = pipeline("b")
    again = {stage["stage"] for stage in second["stages"] if not stage["reused"]}
    assert again <= {"register", "promote"}, again  # which ask the registry each time
    assert second["AP"] == first["AP"] and second["version"] == first["version"]
    assert first["predictions"].endswith(second["predictions"].rpartition("/")[2])
    monkeypatch.setenv("DETR_CACHE", str(tmp_path / "c"))
    store = open_store("s3://team/pipeline")
    training = latest(store, "train")
    assert {"checkpoint", "history.json", "stage.json"} <= {path.name for path in Path(training["folder"]).iterdir()}
    assert latest(store, "predict")["result"]["images"] == 8
    from pipelines.plan import detections_of

    assert len(detections_of(name_of(store / "predict" / first["predictions"].rpartition("/")[2]))) == 8
