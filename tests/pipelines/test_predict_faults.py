"""Batch inference on a real S3 server while its processes are killed: in the end the table is the undisturbed run's."""
from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
from PIL import Image

from pipelines.coco import IMAGE_EXTENSIONS
from pipelines.plan import claim
from pipelines.predict import make_recipe
from pipelines.settings import load_settings
from pipelines.storage import Folder

SMALL = {"preset": "tiny", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1, "num_queries": 10,
         "dim_feedforward": 32, "image_size": 128, "num_classes": 3}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swift")
    if why := ObjectStore.unfit(folder):
        pytest.skip(why)
    with ObjectStore(folder) as running:
        yield running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    import torch

    from detr.checkpoint import save_checkpoint
    from detr.config import ModelConfig
    from detr.model import DETR

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "small"
    classes = [{"id": number, "name": name} for number, name in enumerate(("cat", "dog", "emu"))]
    save_checkpoint(folder, DETR(ModelConfig.model_validate(SMALL)), classes, score_threshold=0.0)
    return folder


def make_images(number: int, truncated: int) -> dict[str, bytes]:
    """JPEGs of noise by their keys, some of which end too early."""
    rng = np.random.default_rng(0)
    made = {}
    for n in range(number):
        out = io.BytesIO()
        coarse = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        size = [(128, 96), (96, 128), (120, 120), (160, 100)][n % 4]
        Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).save(out, "JPEG")
        data = out.getvalue()
        made[f"{n % 7}/{n:05d}.jpg"] = data[: len(data) // 2] if n < truncated else data
    return made


def upload(store: ObjectStore, bucket: str, images: dict[str, bytes]) -> None:
    client = store.client()
    client.create_bucket(Bucket=bucket)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: client.put_object(Bucket=bucket, Key=f"in/{one[0]}", Body=one[1]), images.items()))


class Driver:
    """`detr predict` in a process of its own."""

    def __init__(self, store: ObjectStore, folder: Path, bucket: str, output: str, checkpoint: Path, name: str = "one"):
        environment = {
            **os.environ, "AWS_ENDPOINT_URL": store.endpoint, "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.out = (folder / f"{name}.{time.monotonic_ns()}.out").open("w+")
        command = [
            sys.executable, "-m", "jobs.cli", "predict", f"s3://{bucket}/in", "--output", f"s3://{bucket}/{output}",
            "--model", str(checkpoint), "--store", str(folder / f"store-{name}"), "--json",
            "predict.images_per_shard=25", "predict.batch_size=4",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, env=environment, stdout=self.out, stderr=self.out)

    def wait(self, seconds: float) -> dict | None:
        """Its result; None where it was killed or gave up."""
        code = self.process.wait(seconds)
        self.out.seek(0)
        lines = self.out.read().splitlines()
        return json.loads(next(line for line in lines if line.startswith("{"))) if code == 0 else None

    def said(self) -> str:
        self.out.seek(0)
        return self.out.read()

    def actor(self) -> psutil.Process | None:
        """The process of its model actor, as far as it has one by now."""
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if "DetectBatches" in " ".join(child.cmdline()):
                    return child
        except psutil.NoSuchProcess:
            pass
        return None


AWAY = "the object store does not answer"


def commits_of(store: ObjectStore, bucket: str, output: str) -> int:
    try:
        found = store.client().list_objects_v2(Bucket=bucket, Prefix=f"{output}/0001/commit-")
    except Exception:  # noqa: BLE001 - it is down, as the test wants it
        return 0
    return found.get("KeyCount", 0)


def table_of(store: ObjectStore, bucket: str, output: str, monkeypatch):
    from pipelines import storage
    from pipelines.plan import detections_of

    for name, value in (("AWS_ENDPOINT_URL", store.endpoint), ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
                        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY)):  # fmt: skip
        monkeypatch.setenv(name, value)
    storage.s3_client.cache_clear()
    try:
        return detections_of(f"s3://{bucket}/{output}")
    finally:
        storage.s3_client.cache_clear()


def disturb(
    store: ObjectStore, folder: Path, bucket: str, checkpoint: Path, kills: list[str], seed: int, shards: int
) -> dict:
    """Run to its end, with a kill -9 of each of `kills` at random moments; a driver that died is started again.

    The first comes when something is committed, so that there is something to lose; later ones may hit a start.
    """
    chance, wanted = random.Random(seed), 1
    driver, left, said = Driver(store, folder, bucket, "torn", checkpoint), list(kills), []
    deadline = time.monotonic() + 1200
    while True:
        assert time.monotonic() < deadline, driver.said()
        if driver.process.poll() is not None:
            result = driver.wait(10)
            if result is not None:
                assert not left, f"done before {left} was killed: {said}"
                return result
            # One that starts while the store is away says so soon, since that may be a wrong address.
            assert driver.process.returncode in (-signal.SIGKILL, 1) or AWAY in driver.said(), driver.said()
            driver = Driver(store, folder, bucket, "torn", checkpoint)
        if not left:
            time.sleep(0.5)
            continue
        before = commits_of(store, bucket, "torn")
        if before < wanted or (left[0] == "actor" and driver.actor() is None):
            time.sleep(0.2)
            continue
        time.sleep(chance.uniform(0, 2))
        kind, victim = left[0], driver.actor()
        if kind == "driver":
            driver.process.kill()
            driver.process.wait()
        elif kind == "actor" and victim is not None:
            victim.kill()
        elif kind == "storage":
            store.stop()
            time.sleep(chance.uniform(1, 4))
            store.start()
        else:
            continue
        said.append(f"{kind} at {before} commits")
        print(said[-1])
        left.pop(0)
        wanted = before + chance.choice((0, 0, 1, shards // 10))


def compare(
    store: ObjectStore, bucket: str, output: str, keys: list[str], calm: dict, torn: dict, monkeypatch
) -> None:
    one, other = (table_of(store, bucket, name, monkeypatch) for name in ("calm", output))
    assert other["image_key"].to_pylist() == sorted(keys, key=str.encode)
    assert other.equals(one)
    assert torn["output_digest"] == calm["output_digest"]  # the same bytes
    assert torn["rejects"] == calm["rejects"] and torn["images"] == len(keys)


@pytest.fixture(scope="module")
def buckets(store) -> None:
    """One that is empty, and one that is another user's."""
    store.client().create_bucket(Bucket="empty")
    upload(store, "some", make_images(3, 0))


@pytest.mark.parametrize("case, words", [
    ("empty", "There is no image below s3://empty"),
    ("gone", "There is no bucket or folder s3://gone"),
    ("denied", "access is denied"),
    ("denied output", "access is denied"),
    ("no output", "there is no such bucket"),
    ("no model", "no model 'nobody' with the alias 'champion'"),
    ("another plan", "holds results of another plan (score_threshold was 0.4, now 0.0); give another --output"),
    ("no store", AWAY),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_an_exit_code(store, buckets, checkpoint, tmp_path, case, words):
    given = {"empty": "s3://empty", "gone": "s3://gone/in"}.get(case, "s3://some/in")
    output = {"no output": "s3://nowhere/out", "denied output": "s3://some/out"}.get(case, str(tmp_path / "out"))
    environment = {
        **os.environ, "AWS_ENDPOINT_URL": store.endpoint, "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": "wrong" if case.startswith("denied") else SECRET_KEY,
    }  # fmt: skip
    if case == "denied output":
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "a.jpg").write_bytes(next(iter(make_images(1, 0).values())))
        given = str(folder)
    if case == "no store":
        environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    if case == "another plan":
        settings = load_settings(None, ["predict.score_threshold=0.4"])
        claim(Folder(output), make_recipe(settings, given, None, checkpoint, *model_of(checkpoint)))
    model = "models:/nobody@champion" if case == "no model" else str(checkpoint)
    command = [sys.executable, "-m", "jobs.cli", "predict", given, "--output", output, "--model", model,
               "--store", str(tmp_path / "store"), "--json"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == (1 if case == "no store" else 2), done.stderr
    error = json.loads(done.stdout)["error"]
    assert words in error and error.count("\n") == 0
    assert "Traceback" not in done.stderr and SECRET_KEY not in done.stdout + done.stderr


def model_of(checkpoint: Path) -> tuple[str, str]:
    """The name and version that a plain folder has."""
    return checkpoint.name, hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]


@pytest.fixture(scope="module")
def few(store, checkpoint, tmp_path_factory) -> tuple[dict[str, bytes], dict]:
    """The bucket "few": its images, and what an undisturbed run says of it, whose output is in calm/."""
    images = make_images(250, 10)
    upload(store, "few", images)
    calm = Driver(store, tmp_path_factory.mktemp("calm"), "few", "calm", checkpoint).wait(300)
    assert (calm["images"], calm["rejected"]) == (250, 10)
    return images, calm


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_killed_driver_actor_and_storage_leave_the_undisturbed_table(store, few, checkpoint, tmp_path, monkeypatch):
    images, calm = few
    torn = disturb(store, tmp_path, "few", checkpoint, ["actor", "storage", "driver"], 0, 10)
    assert torn["reused_images"] > 0
    compare(store, "few", "torn", list(images), calm, torn, monkeypatch)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_two_drivers_on_one_plan_leave_one_table(store, few, checkpoint, tmp_path, monkeypatch):
    images, calm = few
    drivers = [Driver(store, tmp_path, "few", "twice", checkpoint, name) for name in ("one", "other")]
    one, other = (driver.wait(400) for driver in drivers)
    assert one and other, [driver.said() for driver in drivers]
    assert one["output_digest"] == other["output_digest"] and one["plan"] == other["plan"]
    assert one["images_here"] + other["images_here"] >= 250
    compare(store, "few", "twice", list(images), calm, other, monkeypatch)
    listed = store.client().list_objects_v2(Bucket="few", Prefix="twice/0001/part-")
    assert listed["KeyCount"] == 10  # no second part of a shard


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_ten_kills_among_two_thousand_images_leave_the_undisturbed_table(
    store, checkpoint, tmp_path, monkeypatch, shared_data
):
    images = make_images(1958, 40)
    for path in sorted((shared_data / "edge_cases" / "images").iterdir()):
        assert path.suffix.lower() in IMAGE_EXTENSIONS
        images[f"edge/{path.name}"] = path.read_bytes()
    assert len(images) == 2000
    upload(store, "many", images)
    calm = Driver(store, tmp_path, "many", "calm", checkpoint).wait(900)
    assert calm["images"] == 2000 and calm["rejected"] == 40 + 8
    seed = int(os.environ.get("DETR_TEST_SEED", random.randrange(1000)))
    print(f"DETR_TEST_SEED={seed}")
    kinds = ["driver", "actor", "storage"] * 3 + ["driver"]
    random.Random(seed).shuffle(kinds)
    torn = disturb(store, tmp_path, "many", checkpoint, kinds, seed, 80)
    compare(store, "many", "torn", list(images), calm, torn, monkeypatch)
