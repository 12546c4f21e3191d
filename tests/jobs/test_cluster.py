"""A cluster of nodes that share no disk: store on S3, PostgreSQL, MLflow. What a user submits; nodes that die."""
from __future__ import annotations

import json
import os
import pty
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psycopg
import pytest
from from_outside import Watch, descendants
from object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
from ray_head import RayHead

from pipelines.plan import detections_of
from pipelines.storage import Folder, _s3, s3_client
from pipelines.training_log import PROGRESS, read_progress

SMALL = [
    "sample.train=48", "sample.val=16", "sample.test=400", "ingest.rows_per_shard=16", "train.budget=60 steps",
    "train.batch_size=4", "train.validations=6", "train.warmup=4 steps", "gate.min_ap=0", "sweep.in_pipeline=true",
    "sweep.trials=2", "sweep.budget=4 steps", "sweep.validations=2", "predict.images_per_shard=16",
]  # fmt: skip
STORE = "s3://team/store"


@pytest.fixture
def shared(tmp_path, mlflow_server, postgres, monkeypatch):
    """The settings of a run whose state is all in servers; the environment has what they ask for."""
    from mlflow_server import new_database

    if why := ObjectStore.unfit(tmp_path):
        pytest.skip(why)
    user, _, rest = new_database(postgres, "ledger").partition("://")[2].partition("@")
    monkeypatch.setenv("PGPASSWORD", user.partition(":")[2])
    (tmp_path / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("DETR_CACHE", str(tmp_path / "tests"))
    with ObjectStore(tmp_path) as swift:
        monkeypatch.setenv("AWS_ENDPOINT_URL", swift.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        _s3.cache_clear()
        s3_client.cache_clear()
        s3_client().create_bucket(Bucket="team")
        yield [f"tracking.uri={mlflow_server.url}", f"workflow.database=postgresql://{user.partition(':')[0]}@{rest}"]
    _s3.cache_clear()
    s3_client.cache_clear()


def waited(for_what: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not for_what():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_pipeline_outlives_its_nodes_and_needs_no_disk_in_common(shared, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("nodes.py")), str(tmp_path)]
    nodes = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    log, mine = tmp_path / "log", tmp_path / "driver"
    try:
        address = nodes.stdout.readline().strip()
        at = f"cluster.address={address}"
        command = [sys.executable, "-m", "jobs.pipeline", "--store", STORE, "--json", at, *SMALL, *shared]
        # What the driver keeps nobody else sees: a file system of its own, where that is allowed.
        mine.mkdir()
        if os.geteuid() == 0:
            own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$DETR_CACHE" && exec "$@"', "sh"]
            command = [*own, *command]
            local = [*own, sys.executable, "-m", "jobs.ingest", "--store", str(mine / "store"), at, *SMALL]
            alone = subprocess.run(local, capture_output=True, text=True, env={**os.environ, "DETR_CACHE": str(mine)})
            assert alone.returncode == 2 and "does not see" in alone.stderr and "--store s3://" in alone.stderr
        with log.open("wb") as err:
            driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True,
                                      env={**os.environ, "DETR_CACHE": str(mine)})  # fmt: skip

        def kill(name: str) -> bool:
            nodes.stdin.write(f"kill {name}\n")
            nodes.stdin.flush()
            return nodes.stdout.readline().strip() == "killed"

        def events(kind: str) -> list[dict]:
            pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket="team", Prefix="store/train/")
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
            runs = [f"s3://team/{key}" for key in keys if key.endswith(PROGRESS)]
            return [event for run in runs for event in read_progress(run) if event["event"] == kind]

        waited(lambda: len(events("validation")) >= 2, driver, log, 900)
        waited(lambda: kill("RayTrainWorker"), driver, log)
        waited(lambda: kill("DetectBatches"), driver, log)
        out, _ = driver.communicate(timeout=600)
        assert driver.returncode == 0, log.read_text()[-4000:]
    finally:
        nodes.kill()
        nodes.wait()
    starts = [event["step"] for event in events("start")]
    assert len(starts) >= 2 and starts[-1] > 0  # it went on where it was
    result = json.loads(out.splitlines()[-1])
    name = result["predictions"].rpartition("/")[2]
    table = detections_of(f"{STORE}/predict/{name}")
    assert sorted(table["image_key"].to_pylist()) == sorted(set(table["image_key"].to_pylist()))
    assert len(table) == 400 and set(table["status"].to_pylist()) == {"ok"}
    assert result["champion"] == result["version"] == "1"
    token = (tmp_path / "token").read_text()
    assert token not in log.read_text() + out and SECRET_KEY not in out
    assert Folder(STORE).get("latest.json")


TRAINED = [
    "sample.train=48", "sample.val=16", "sample.test=32", "ingest.rows_per_shard=16", "train.budget=60 steps",
    "train.batch_size=4", "train.validations=3", "train.warmup=4 steps", "train.num_workers=2", "gate.min_ap=0",
    "predict.images_per_shard=16",
]  # fmt: skip


class Terminal:
    """A command in a terminal of its own; close() is what closing its window is."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path):
        self.screen, theirs = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder
        )
        os.close(theirs)

    def read_until(self, word: str) -> str:
        shown = ""
        while word not in shown:
            try:
                shown += os.read(self.screen, 4096).decode(errors="replace")
            except OSError as ended:
                raise AssertionError(shown) from ended
        return shown

    def close(self) -> None:
        os.close(self.screen)


def all_rows(uri: str) -> Iterator[tuple[str, bytes]]:
    """What is in the tables of a database, as text, by table."""
    with psycopg.connect(uri.replace("+psycopg", "")) as database:
        tables = database.execute(
            "SELECT table_schema, table_name FROM information_schema.tables "
            "WHERE table_schema NOT IN ('pg_catalog', 'information_schema') AND table_type = 'BASE TABLE'"
        ).fetchall()
        for schema, table in tables:
            name = psycopg.sql.Identifier(schema, table)
            rows = database.execute(psycopg.sql.SQL("SELECT t::text FROM {} t").format(name)).fetchall()
            yield f"table {schema}.{table}", "\n".join(row[0] for row in rows).encode()


def all_files(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


def all_objects(bucket: str) -> Iterator[tuple[str, bytes]]:
    for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", ()):
            yield entry["Key"], s3_client().get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_training_is_submitted_from_a_terminal_that_is_closed_and_nobody_sees_a_secret(
    shared, tmp_path, mlflow_server, monkeypatch
):
    ledger = os.environ["PGPASSWORD"]
    home, nodes = tmp_path / "home", [tmp_path / "node-1", tmp_path / "node-2"]
    for folder in (home, *nodes):
        folder.mkdir()
    monkeypatch.setenv("DETR_LOG", "json")  # of the cluster's machines
    monkeypatch.setenv("DETR_CACHE", str(tmp_path / "head"))
    with RayHead(cpus=0) as head:
        for folder in nodes:
            head.add_node(3, DETR_CACHE=str(folder))
        # What a user has on his own machine: no key and no password.
        private = ("RAY_", "AWS_", "MLFLOW_", "PG", "DETR_LOG")
        user = {name: value for name, value in os.environ.items() if not name.startswith(private)}
        user |= {"RAY_API_SERVER_ADDRESS": head.address, "RAY_AUTH_TOKEN_PATH": str(head.token_path),
                 "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(home)}  # fmt: skip
        # A model of its own: the other test's stands in the same MLflow.
        told, said = ["--store", STORE, *TRAINED, *shared, "tracking.model_name=submitted"], {}

        def detr(*words: str) -> dict:
            command = [sys.executable, "-m", "jobs.cli", *words]
            done = subprocess.run(command, env=user, cwd=home, capture_output=True, text=True, timeout=900)
            said[f"{len(said)}: {' '.join(words[:2])}"] = (done.stdout + done.stderr).encode()
            assert done.returncode == 0, done.stderr[-4000:]
            return json.loads(done.stdout)

        servers = mlflow_server.process.pid
        with Watch(lambda: [*head.processes(), *descendants(servers)]) as watch:
            first = Terminal([sys.executable, "-m", "jobs.cli", "submit", "train", *told], user, home)
            shown = first.read_until(" images, 2 worker(s)")
            first.close()
            assert first.process.wait(30) != 0
            trained = detr("submit", "--json", "train", *told)
            again = detr("submit", "--json", "train", *told)
            made = detr("submit", "--json", "pipeline", *told)
        jobs = detr("jobs", "list", "--json")["jobs"]
        asked = Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
        with urlopen(asked) as answer:
            said["what Ray tells of its jobs"] = answer.read()

        assert trained["how"] == "attached" and trained["submission_id"] in shown
        assert again["how"] == "done before" and again["result"] == trained["result"]
        assert sorted(job["command"].split()[0] for job in jobs) == ["pipeline", "train"]
        assert made["result"]["version"] == made["result"]["champion"] == "1"
        # The pipeline took the training that was there.
        assert Path(made["result"]["checkpoint"]).parts[-2:] == Path(trained["result"]["checkpoint"]).parts[-2:]

        # Each thing that the training said bears its names, wherever it is collected.
        (log,) = head.folder.glob(f"ray/session_2*/logs/job-driver-{trained['submission_id']}.log")
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"time"')]
        steps = [line for line in lines if line.get("stage") == "train" and "AP50" in line["message"]]
        assert len(steps) == 3 and all(line["job"] == trained["submission_id"] for line in lines)
        assert {line["run_id"] for line in steps} == {trained["result"]["run_id"]}
        assert "images, 2 worker(s)" in shown and '{"time"' not in shown

        secret = {"Ray's token": head.token, "a key of S3": SECRET_KEY, "MLflow's password": mlflow_server.password,
                  "the ledger's password": ledger}  # fmt: skip
        places = {**said, "the terminal": shown.encode(), "process lists": "\n".join(watch.commands).encode()}
        folders = (*nodes, home, tmp_path / "head", mlflow_server.folder)
        found = [*places.items(), *all_objects("team"), *all_files(*folders)]
        found += [item for item in all_files(head.folder) if item[0] != str(head.token_path)]
        for database in (mlflow_server.database, shared[1].partition("=")[2]):
            found += all_rows(database)
    assert watch.looks > 20 and any("RayTrainWorker" in command for command in watch.commands)
    assert len(found) > 100
    for place, data in found:
        if place == str(mlflow_server.folder / "auth.ini"):  # the server's own, as its manual has it
            continue
        for name, text in secret.items():
            assert text.encode() not in data, f"{name} is in {place}"
    # Ray's machines talk to each other at ports that ask for the token. What has a page and takes jobs does not listen
    # for others, nor does MLflow.
    assert any("mlflow" in command for command in watch.commands)
    dashboard = urlsplit(head.address).port
    assert not [command for command, port in watch.beyond if "mlflow" in command or port == dashboard]
