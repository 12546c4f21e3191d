"""The whole pipeline on a cluster of nodes that share no disk, of which nodes die: store on S3, PostgreSQL, MLflow."""
from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

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
