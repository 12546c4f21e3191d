"""`detr doctor` where things are broken or hostile, each made so for real, and where they are well."""
from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from mlflow_server import new_database
from object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

from pipelines import machine, services
from pipelines.doctor import apart, checks_of, secrets_here, without
from pipelines.findings import NOT_ASKED, OK, WARNING, WRONG, Finding, ok
from pipelines.services import CHECKSUMS, Place
from pipelines.settings import RunSettings, load_settings

TOKEN = secrets.token_hex(16)
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Without what a user of this machine may have set."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "RAY_A", "MLFLOW_ALLOW")) and name != "AWS_CA_BUNDLE":
            monkeypatch.delenv(name)


def found_by(check: Callable[[], list[Finding]], *arguments, limit: float = 60) -> list[Finding]:
    return apart("it", partial(check, *arguments), limit)


def detr_doctor(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs.cli", "doctor", "--json", *arguments]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": paths} | environment)  # fmt: skip


def answer_of(process: subprocess.Popen) -> tuple[int, dict[str, list[dict]], str]:
    """(exit code, findings by check, all that was printed)."""
    out, err = process.communicate(timeout=120)
    found: dict[str, list[dict]] = {}
    for finding in json.loads(out.splitlines()[-1])["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return process.returncode, found, out + err


class Stub(BaseHTTPRequestHandler):
    """Answers what its server's `answers` say for the beginning of a path, or 404."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = next((a for path, a in self.server.answers.items() if self.path.startswith(path)), (404, b""))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_) -> None:
        """Nothing."""


@contextmanager
def listening(handler: type, host: str = "127.0.0.1", **what) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer((host, 0), handler)
    vars(server).update(what)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url_of(server: ThreadingHTTPServer, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.server_address[1]}"


@pytest.fixture(scope="module")
def own_address() -> str:
    """An address of this machine that others could reach."""
    addresses = (one.address for them in psutil.net_if_addrs().values() for one in them if one.family == socket.AF_INET)
    address = next((one for one in addresses if not one.startswith("127.")), None)
    return address or pytest.skip("this machine has no address but loopback")


@pytest.fixture(scope="module")
def silent():
    """The port of one who takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


# Where everything hangs: begun first, looked at last, since it waits and does nothing.


@pytest.fixture(scope="module", autouse=True)
def while_all_hangs(silent, tmp_path_factory):
    folder, url = tmp_path_factory.mktemp("hangs"), f"http://127.0.0.1:{silent}"
    process = detr_doctor(
        folder, f"cluster.address=127.0.0.1:{silent}", f"tracking.uri={url}", "train.storage=s3://bucket/up",
        "data.path=s3://other/data", AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="bcdef",
        RAY_API_SERVER_ADDRESS=url,
    )  # fmt: skip
    began, ended = time.monotonic(), []

    def wait() -> None:
        ended.append((process.communicate(), time.monotonic() - began))

    waits = threading.Thread(target=wait, daemon=True)
    waits.start()
    yield process, waits, ended
    process.kill()
    waits.join(10)


# A laptop


def test_a_healthy_laptop_has_nothing_wrong_and_keeps_nothing(tmp_path):
    code, found, _ = answer_of(detr_doctor(tmp_path, RAY_TMPDIR=str(tmp_path)))
    assert code == 0 and not [f for them in found.values() for f in them if f["verdict"] == WRONG]
    assert found["storage: --store"][0]["verdict"] == found["GPU"][0]["verdict"] == found["room"][0]["verdict"] == OK
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_or_kills_its_process_is_a_finding():
    (broke,) = apart("odd", partial(int, "x"))
    assert broke.verdict == WRONG and "ValueError: invalid literal" in broke.found
    (died,) = apart("odd", os.abort)
    assert died.verdict == WRONG and "SIGABRT" in died.found


def test_every_check_is_run(tmp_path):
    settings = load_settings(None, ["train.storage=s3://a/b", "data.path=s3://c/d", "data.images=s3://c/d"])
    names = [name for name, _ in checks_of(settings, str(tmp_path))]
    assert names == ["Ray", "storage: --store", "storage: train.storage", "storage: data.path", "MLflow", "ledger",
                     "pickles", "clock", "GPU", "disk", "versions", "open ports"]  # fmt: skip


def test_no_secret_is_printed_and_a_gpu_that_is_asked_for_must_be_there(tmp_path):
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    hidden = {
        "AWS_SECRET_ACCESS_KEY": "Sesam/öffne+dich", "MLFLOW_TRACKING_PASSWORD": "passwort-7", "PGPASSWORD": "pg-5432",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "RAY_AUTH_TOKEN": "r" * 32, "RAY_AUTH_TOKEN_PATH": str(token),
    }  # fmt: skip
    url = "http://someone:geheim99@127.0.0.1:9"
    process = detr_doctor(
        tmp_path, "train.storage=s3://bucket/up", "tracking.uri=postgresql://me@127.0.0.1:9/mlflow",
        "train.use_gpu=true", **hidden, AWS_ENDPOINT_URL=url, RAY_API_SERVER_ADDRESS=url,
    )  # fmt: skip
    code, found, said = answer_of(process)
    assert code == 1 and found["storage: train.storage"][0]["verdict"] == found["MLflow"][0]["verdict"] == WRONG
    for secret in (*hidden.values(), TOKEN, "geheim99"):
        assert secret == str(token) or secret not in said
    (gpu,) = found["GPU"]
    assert gpu["verdict"] == (OK if torch.cuda.is_available() else WRONG), gpu


def test_a_secret_that_an_error_repeats_is_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYXdz")
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    said = f"Bearer {TOKEN} and FwoGZXIvYXdz were refused at https://me:pässwört@host/x"
    clean = without(secrets_here(), ok("it", said))
    assert clean.found == "Bearer *** and *** were refused at https://***@host/x"


# Storage: a real S3 (Swift), and a proxy before it that spoils things


class Proxy(BaseHTTPRequestHandler):
    """Hands on what it gets to the store, but for what its server spoils: see `spoilt`."""

    protocol_version = "HTTP/1.1"

    def hand_on(self) -> None:
        server = self.server
        done = ("expect", "transfer-encoding")  # with here
        headers = {name: value for name, value in self.headers.items() if name.lower() not in done}
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        self.body = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        refused = server.refuse(self, headers)
        if refused == "hang":
            server.hanging.wait(60)
            return
        if refused:
            return self._say(refused, [], b"")
        connection = http.client.HTTPConnection(server.store, timeout=60)
        connection.request(self.command, self.path, self.body, headers)  # with the Host that was signed
        answer = connection.getresponse()
        got = server.spoil(self, answer.read())
        ours = {"Date": formatdate(time.time() + server.ahead, usegmt=True)}
        if self.command != "HEAD":  # whose length is of what it does not say
            ours["Content-Length"] = str(len(got))
        skipped = {"transfer-encoding", "connection", *map(str.lower, ours)}
        headers = [pair for pair in answer.getheaders() if pair[0].lower() not in skipped]
        self._say(answer.status, [*headers, *ours.items()], got)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = hand_on

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _say(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers or [("Content-Length", "0")]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def swift(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swift")
    if why := ObjectStore.unfit(folder):
        pytest.skip(why)
    with ObjectStore(folder) as running:
        running.client().create_bucket(Bucket="runs")
        running.client().create_bucket(Bucket="data")
        running.client().put_object(Bucket="data", Key="set/images/a.png", Body=b"png")
        yield running


@pytest.fixture
def reachable(swift, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", swift.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return swift


@pytest.fixture
def spoilt(reachable, monkeypatch):
    """spoilt(refuse=, spoil=, ahead=) puts a proxy before the store: what it answers itself with which status, how it
    changes what is read, how many seconds its dates are ahead."""
    with listening(Proxy, store=reachable.endpoint.removeprefix("http://"), hanging=threading.Event()) as server:

        def spoil(refuse=lambda request, headers: 0, spoil=lambda request, body: body, ahead: float = 0) -> None:
            vars(server).update(refuse=refuse, spoil=spoil, ahead=ahead)
            monkeypatch.setenv("AWS_ENDPOINT_URL", url_of(server))

        yield spoil
        server.hanging.set()


@pytest.fixture
def left(swift) -> Callable[[], list[str]]:
    """What is in the bucket of runs."""
    return lambda: [entry["Key"] for entry in swift.client().list_objects_v2(Bucket="runs").get("Contents", ())]


def write(uri: str, limit: float = 60) -> Finding:
    place = Place("train.storage", uri, True)
    check = partial(services.check_writing, place, f"probe-{time.time_ns()}")
    (found, *_) = apart("storage: train.storage", check, limit)
    return found


def test_a_store_that_is_well(reachable, left):
    found = write("s3://runs/new/place")
    assert found.verdict == OK, found
    assert left() == []  # not even what pyarrow makes of the parts of a prefix
    (read,) = found_by(services.check_reading, Place("data.path", "s3://data/set", False))
    assert read.verdict == OK


def test_a_wrong_key_a_missing_bucket_and_an_empty_folder(reachable, monkeypatch):
    (none,) = found_by(services.check_reading, Place("data.path", "s3://data/nothing", False))
    assert none.verdict == WRONG and "There is no bucket or folder s3://data/nothing" in none.found
    gone = write("s3://gone/away")
    assert gone.verdict == WRONG and "there is no such bucket" in gone.found
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    denied = write("s3://runs/place")
    assert denied.verdict == WRONG and "access is denied" in denied.found and "wrong-secret" not in str(denied)


def test_a_store_that_refuses_checksums(spoilt, left, monkeypatch):
    def refuse(request, headers):
        sums = ("x-amz-checksum", "x-amz-trailer", "x-amz-sdk-checksum")
        return 411 if request.command == "PUT" and any(name.lower().startswith(sums) for name in headers) else 0

    spoilt(refuse=refuse)
    found = write("s3://runs/place")
    assert found.verdict == WRONG and "411" in found.found
    assert found.advice == f"Set {CHECKSUMS[0]} and {CHECKSUMS[1]} to when_required: it works with these."
    assert left() == []
    for name in CHECKSUMS:
        monkeypatch.setenv(name, "when_required")
    assert write("s3://runs/place").verdict == OK


def test_a_store_that_alters_or_loses_what_was_written(spoilt, left):
    def alter(request, body):
        return body[:-1] + b"x" if request.command == "GET" and "probe" in request.path.split("?")[0] else body

    spoilt(spoil=alter)
    found = write("s3://runs/place")
    assert found.verdict == WRONG and "holds something else: the storage loses data" in found.found
    spoilt(refuse=lambda request, headers: 200 if request.command == "PUT" else 0)
    found = write("s3://runs/place")
    assert found.verdict == WRONG and "is not there: the storage loses data" in found.found
    assert left() == []


def test_a_store_that_does_not_know_who_was_first(spoilt, left, swift):
    def ignore(request, headers):
        if "If-None-Match" not in headers:
            return 0
        bucket, key = request.path.strip("/").split("/", 1)
        swift.client().put_object(Bucket=bucket, Key=key, Body=request.body)
        return 200

    spoilt(refuse=ignore)
    found = write("s3://runs/place")
    assert found.verdict == WARNING and "it ignores If-None-Match" in found.found, found
    spoilt(refuse=lambda request, headers: 501 if "If-None-Match" in headers else 0)
    found = write("s3://runs/place")
    assert found.verdict == WARNING and "does not know how to create a file only where there is none" in found.found
    assert left() == []


def test_a_probe_goes_also_where_the_store_hangs(spoilt, left):
    began = time.monotonic()
    spoilt(refuse=lambda request, headers: "hang" * (request.command == "GET" and request.path.endswith("/put")))
    found = write("s3://runs/place", limit=5)
    assert found.verdict == WRONG and "did not answer within 5 seconds" in found.found
    assert left() == [] and time.monotonic() - began < 20


def test_read_only_data_is_not_written_to(reachable, tmp_path):
    settings = load_settings(None, ["data.path=s3://data/set", f"train.init_from={tmp_path / 'a.pth'}"])
    assert [(p.name, p.write) for p in services.places(settings, "store")] == [
        ("--store", True), ("data.path", False), ("train.init_from", False)
    ]  # fmt: skip
    before = reachable.client().list_objects_v2(Bucket="data")["Contents"]
    assert found_by(services.check_reading, Place("data.path", "s3://data", False))[0].verdict == OK
    assert reachable.client().list_objects_v2(Bucket="data")["Contents"] == before


@pytest.mark.parametrize(("ahead", "verdict", "words"), [
    (1200, WRONG, "20 minutes behind that of the object store, and S3 refuses"),
    (-45, WARNING, "seconds ahead of that of the object store"),
    (0, OK, "agrees"),
])  # fmt: skip
def test_a_clock_that_is_off(spoilt, ahead, verdict, words):
    spoilt(ahead=ahead)
    settings = load_settings(None, ["train.storage=s3://runs/place"])
    (found,) = found_by(services.check_clocks, settings, "store")
    assert found.verdict == verdict and words in found.found


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path, monkeypatch):
    with small_disk(tmp_path / "full", "size=1m") as folder:
        with suppress(OSError), (folder / "filler").open("wb") as file:
            while file.write(bytes(4096)):
                file.flush()
        (found,) = found_by(services.check_writing, Place("--store", str(folder / "store"), True), "probe")
        assert found.verdict == WRONG and "No space left" in found.found
        assert [path.name for path in folder.iterdir()] == ["filler"]
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        disk, rays, *_ = found_by(machine.check_disks, RunSettings(), {"--store": str(folder / "store")})
        assert (disk.check, disk.verdict, rays.verdict) == ("disk: --store", WRONG, WRONG)
        assert "Ray makes no object above 95%" in rays.found


def test_a_disk_without_room_for_more_files(tmp_path):
    with small_disk(tmp_path / "many", "size=8g,nr_inodes=50") as folder:
        (found, *_) = found_by(machine.check_disks, RunSettings(), {"--store": str(folder)})
        assert found.verdict == WRONG and "inodes" in found.found


def test_a_local_folder_is_not_made(tmp_path):
    (found,) = found_by(services.check_writing, Place("--store", str(tmp_path / "a" / "b"), True), "probe")
    assert found.verdict == OK and list(tmp_path.iterdir()) == []


# MLflow


@pytest.fixture
def server_settings(mlflow_server):
    return load_settings(None, [f"tracking.uri={mlflow_server.url}", "data.name=doctor"])


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_an_mlflow_server_with_passwords(server_settings, mlflow_server, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.server import get_app_client

    found = by_name(found_by(services.check_mlflow, server_settings, "store"))
    assert {finding.verdict for finding in found.values()} == {OK} and len(found) == 3, found
    client = MlflowClient(mlflow_server.url)
    made = client.create_experiment("doctor")
    before = client.get_experiment(made).last_update_time
    assert by_name(found_by(services.check_mlflow, server_settings, "store"))["MLflow's rights"].verdict == OK
    assert client.get_experiment(made).last_update_time == before  # nothing was written

    user, password = "reader", secrets.token_hex(8)
    get_app_client("basic-auth", mlflow_server.url).create_user(user, password)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    may_not = by_name(found_by(services.check_mlflow, server_settings, "store"))["MLflow's rights"]
    assert may_not.verdict == WRONG and "does not let 'reader'" in may_not.found
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-it")
    refused = by_name(found_by(services.check_mlflow, server_settings, "store"))["MLflow's rights"]
    assert refused.verdict == WRONG and "does not accept this password of 'reader'" in refused.found
    assert "not-it" not in refused.found


def test_an_mlflow_without_passwords_of_another_version_and_none_at_all(own_address):
    answers = {"/api/2.0/mlflow/": (200, b"{}")}
    with listening(Stub, "0.0.0.0", answers=answers) as server:
        for host, version, others, verdict in (
            (own_address, b"2.9.2", WRONG, WRONG), ("127.0.0.1", b"3.99.0", OK, WARNING)
        ):  # fmt: skip
            answers["/version"] = (200, version)
            settings = load_settings(None, [f"tracking.uri={url_of(server, host)}"])
            found = by_name(found_by(services.check_mlflow, settings, "store"))
            assert found["MLflow's password"].verdict == others
            assert found["MLflow"].verdict == verdict and "<3.18" in found["MLflow"].found
            assert ("whoever reaches it changes models" in found["MLflow's password"].found) == (others == WRONG)
    (found,) = found_by(services.check_mlflow, settings, "store")
    assert found.verdict == WRONG and "nobody answers" in found.found


def test_mlflow_in_postgresql_and_in_sqlite(postgres, tmp_path, monkeypatch):
    uri = new_database(postgres, f"doctor_{secrets.token_hex(4)}")
    password = uri.split(":")[2].split("@")[0]
    settings = load_settings(None, [f"tracking.uri={uri.replace(f':{password}@', '@')}"])
    monkeypatch.setenv("PGPASSWORD", password)
    assert found_by(services.check_mlflow, settings, "store")[0].verdict == OK
    monkeypatch.setenv("PGPASSWORD", "wrong")
    assert found_by(services.check_mlflow, settings, "store")[0].verdict == WRONG
    plain = uri.replace(f":{password}@", "@").replace("+psycopg", "")
    of_ledger = load_settings(None, [f"workflow.database={plain}"])
    assert found_by(services.check_ledger, of_ledger)[0].verdict == WRONG
    monkeypatch.setenv("PGPASSWORD", password)
    assert found_by(services.check_ledger, of_ledger)[0].verdict == OK
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE experiments (name TEXT)")
        assert found_by(services.check_mlflow, RunSettings(), str(tmp_path))[0].verdict == OK
    file.write_bytes(b"no database at all, and longer than a header of one is: " * 20)
    (found,) = found_by(services.check_mlflow, RunSettings(), str(tmp_path))
    assert found.verdict == WRONG and "not a database" in found.found
    assert found_by(services.check_mlflow, RunSettings(), "s3://runs/store")[0].advice.startswith("Set tracking.uri")


def test_pickles(monkeypatch):
    assert services.check_pickles()[0].verdict == OK
    for value, verdict in (("true", WRONG), ("1", WRONG), ("False", OK)):
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", value)
        assert services.check_pickles()[0].verdict == verdict


# This machine


def test_too_few_cpus_and_workers(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def room(*told: str) -> list[Finding]:
        return [f for f in found_by(services.check_ray, load_settings(None, told), "store") if f.check == "room"]

    (few,) = room("cluster.num_cpus=2")
    assert few.verdict == WARNING and "2 CPU(s)" in few.found and "4 or more" in few.advice
    (many,) = room("cluster.num_cpus=6", "train.num_workers=7", "train.use_gpu=false")
    assert many.verdict == WRONG and "need 7 CPU(s), and there are 6" in many.found
    (enough,) = room("cluster.num_cpus=6", "train.num_workers=7", "train.min_workers=6", "train.use_gpu=false")
    assert enough.verdict == OK
    (beside,) = room("cluster.num_cpus=6", "train.num_workers=6", "train.validation=beside", "train.use_gpu=false")
    assert beside.verdict == WRONG and "the validation beside them need 7" in beside.found


def test_a_current_cluster_file_of_a_killed_head(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    file = tmp_path / "ray" / "ray_current_cluster"
    file.write_text("127.0.0.1:9")
    found = found_by(services.check_ray, RunSettings(), "store")[0]
    assert found.verdict == WARNING and found.advice == f"Remove {file}, which a killed head has left."
    file.unlink()
    assert found_by(services.check_ray, RunSettings(), "store")[0].verdict == OK


def test_a_local_ray_that_would_be_open(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    token = by_name(found_by(services.check_ray, RunSettings(), "store"))["Ray's token"]
    assert token.verdict == WRONG and "let everybody on this machine run code" in token.found


def versions_with(folder: Path, **installed: str) -> Finding:
    """What is found where distributions of these versions come first on the path."""
    for name, version in installed.items():
        inside = folder / f"{name}-{version}.dist-info"
        inside.mkdir()
        (inside / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code = "from pipelines.machine import check_versions; print(check_versions()[0].model_dump_json())"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{root}"})  # fmt: skip
    return Finding(**json.loads(done.stdout))


def test_packages_out_of_their_ranges_and_other_than_tested(tmp_path):
    (tmp_path / "a").mkdir()
    assert versions_with(tmp_path / "a").verdict in (OK, WARNING)
    found = versions_with(tmp_path / "a", mlflow="2.9.2", aiohttp_cors="0.0.1")
    assert found.verdict == WRONG and "mlflow 2.9.2 (needs <3.18,>=3.14)" in found.found
    (tmp_path / "b").mkdir()
    found = versions_with(tmp_path / "b", safetensors="999.0")
    assert found.verdict == WARNING and "safetensors 999.0 (tested: " in found.found


def test_a_torchvision_of_another_torch(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = ("from pipelines.machine import check_gpu; from pipelines.settings import RunSettings\n"
            "print(check_gpu(RunSettings())[0].model_dump_json())")  # fmt: skip
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"})  # fmt: skip
    found = Finding(**json.loads(done.stdout))
    assert found.verdict == WRONG and "do not go together" in found.found


LISTENS = "import socket, sys; a = socket.create_server(('0.0.0.0', 0)); print(a.getsockname()[1], flush=True)"


def test_open_ports_are_said_with_whose_they_are():
    """Of an MLflow, and of a worker of Ray's, which the command of the raylet above it tells."""
    waits = f"{LISTENS}; sys.stdin.read()"
    worker = f"import os, subprocess, sys; subprocess.run(['ray::IDLE', '-c', {waits!r}], executable=sys.executable)"
    told = ["/usr/bin/raylet", "--session-name=session_2026-01-02_03-04-05_6_7", "--gcs-address=10.9.8.7:6379"]
    with (
        subprocess.Popen([sys.executable, "-c", waits, "mlflow", "server"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE) as mlflow,
        subprocess.Popen([sys.executable, "-c", worker, *told], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE) as raylet,
    ):  # fmt: skip
        port, _ = int(mlflow.stdout.readline()), raylet.stdout.readline()
        (found,) = found_by(machine.check_ports)
        mlflow.stdin.close(), raylet.stdin.close()  # which ends them
    assert found.verdict == WARNING and f"MLflow (process {mlflow.pid}), port {port}" in found.found
    assert "Ray at 10.9.8.7:6379 (session_2026-01-02_03-04-05_6_7), port " in found.found


# Ray: a Jobs API that lets everybody in, a real head with a token


def test_nobody_listens():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (found,) = found_by(services.check_ray, load_settings(None, [f"cluster.address={address}"]), "store")
    assert found.verdict == WRONG and f"nobody answers at {address}" in found.found


def test_a_jobs_api_that_lets_everybody_in(own_address):
    answers = {"/api/jobs/": (200, b"[]"), "/api/v0/nodes": (500, b"{}")}
    with listening(Stub, "0.0.0.0", answers=answers) as server:
        open_to_all, state = found_by(services.check_jobs_api, url_of(server, own_address))
        assert open_to_all.verdict == WRONG and "anyone who reaches it runs code there" in open_to_all.found
        assert "RAY_AUTH_MODE=token" in open_to_all.advice
        assert (state.check, state.verdict) == ("State API", WRONG)
        assert found_by(services.check_jobs_api, url_of(server))[0].verdict == WARNING
        server.answers = {}
        assert "status 404, as no Ray does" in found_by(services.check_jobs_api, url_of(server))[0].found


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray head with a token: its folder and addresses."""
    ports = [free_port() for _ in range(3)]
    with tempfile.TemporaryDirectory(prefix="detr-", dir="/tmp") as folder:  # sockets want a short path
        (Path(folder) / "token").write_text(TOKEN)
        environment = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
        command = [RAY, "start", "--head", "--port", ports[0], "--dashboard-port", ports[1], "--num-cpus", "2",
                   "--ray-client-server-port", ports[2], "--dashboard-agent-listen-port", "0",
                   "--object-store-memory", "100000000", "--disable-usage-stats"]  # fmt: skip
        try:
            subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, timeout=120)
            yield Path(folder), f"127.0.0.1:{ports[0]}", environment
        finally:
            processes = processes_of(folder)
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, 10)


def free_port() -> str:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def processes_of(folder: str, word: str = "") -> list[psutil.Process]:
    """Those of the Ray in a folder: who was told of it, and their children, of whom some forget it.

    word: only those in whose command it is.
    """
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == folder:
                found |= {process, *process.children(recursive=True)}
    return [process for process in found if word in command_of(process)]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def with_token(head, monkeypatch):
    for name, value in head[2].items():
        monkeypatch.setenv(name, value)
    return load_settings(None, [f"cluster.address={head[1]}"])


def test_a_cluster_that_asks_for_a_token(with_token, head):
    found = found_by(services.check_ray, with_token, "store")
    assert [(f.check, f.verdict) for f in found] == [
        ("Ray", OK), ("Ray's token", OK), ("State API", OK), ("job agent", OK), ("room", WARNING)
    ], found  # fmt: skip
    assert "refuses who has none, and takes ours" in found[1].found and "2 CPU(s)" in found[4].found
    (ports,) = found_by(machine.check_ports)
    port, session = head[1].rpartition(":")[2], (head[0] / "ray" / "session_latest").resolve().name
    assert ports.verdict == WARNING and re.search(rf"Ray at \S+:{port} \({session}\), \d+ ports", ports.found)
    assert ports.found.count(session) == 1


def test_a_token_that_is_wrong_or_not_sent(with_token, head, monkeypatch):
    dashboard = dashboard_of(head[0])
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 32)
    refused, state = found_by(services.check_jobs_api, dashboard)
    assert refused.verdict == WRONG and "does not take ours" in refused.found
    assert refused.advice.startswith("Set RAY_AUTH_TOKEN_PATH")
    assert state.verdict == NOT_ASKED
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert found_by(services.check_jobs_api, dashboard)[0].advice.startswith("Set RAY_AUTH_MODE=token, without which")


def dashboard_of(folder: Path) -> str:
    (process,) = processes_of(str(folder), "dashboard.py")
    return "http://127.0.0.1:" + next(word.split("=")[1] for word in process.cmdline() if word.startswith("--port="))


def test_several_machines_share_what_they_write(tmp_path):
    settings = load_settings(None, ["data.path=s3://a/b"])
    found = services._several_machines(settings, str(tmp_path), 2)
    assert [f.verdict for f in found] == [WARNING, WARNING] and "--store: a folder" in found[0].found
    assert services._several_machines(settings, str(tmp_path), 1) == []
    apart_from = load_settings(None, ["tracking.uri=http://mlflow:5000"])
    assert services._several_machines(apart_from, "s3://a/store", 2) == []


@pytest.mark.ray
def test_a_ray_of_our_own_asks_its_own_state_api(with_token, head):
    """Though another cluster is named in the file of the machine's current one."""
    assert (head[0] / "ray" / "ray_current_cluster").read_text().endswith(head[1].rpartition(":")[2])
    code = (
        "import ray\nfrom jobs.common import ray_session\nfrom pipelines.settings import load_settings\n"
        "def asked():\n    from ray.util.state import list_nodes\n"
        "    return [node.node_id for node in list_nodes(timeout=20)]\n"
        "with ray_session(load_settings(None, ['cluster.num_cpus=1']), dashboard=True):\n"
        "    assert ray.get(ray.remote(asked).remote()) == [ray.get_runtime_context().get_node_id()]\n"
        "print('its own')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("its own\n"), done.stderr


def test_a_head_whose_agent_could_not_start(with_token, head):
    """As where its port was taken: the agent's note of its address, by which Ray finds it for a job, is missing."""
    code = (
        "import json, ray\nfrom ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX\n"
        "from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put\n"
        "from pipelines import services\nservices.AGENT = 1\n"
        f"ray.init({with_token.cluster.address!r}, log_to_driver=False)\n"
        "(node,) = ray.nodes()\n"
        "key = f'{DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX}{node[\"NodeID\"]}'.encode()\n"
        "noted = _internal_kv_get(key, namespace=b'dashboard')\n"
        "assert noted and _internal_kv_del(key, namespace=b'dashboard')\n"
        f"found = services.check_jobs_api({dashboard_of(head[0])!r})\n"
        "_internal_kv_put(key, noted, namespace=b'dashboard')\n"
        "print(json.dumps([finding.model_dump() for finding in found]))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": paths})  # fmt: skip
    found = [Finding(**one) for one in json.loads(done.stdout.splitlines()[-1])]
    assert [(f.check, f.verdict) for f in found] == [("Ray's token", OK), ("State API", OK), ("job agent", WRONG)]
    assert "`detr submit` waits in vain" in found[2].found and "--dashboard-agent-listen-port" in found[2].advice


def test_a_cluster_whose_state_api_is_dead(with_token, head):
    dashboards = processes_of(str(head[0]), "dashboard.py")
    for process in dashboards:
        process.kill()
    assert psutil.wait_procs(dashboards, 10)[0]
    found = by_name(found_by(services.check_ray, with_token, "store"))
    assert found["Ray"].verdict == OK and found["State API"].verdict == WRONG, found
    assert "sweeps stall" in found["State API"].advice


def test_a_cluster_of_another_version(with_token):
    """Its own note of its version is changed, so that it says so."""
    code = (
        "import json, ray\nfrom ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put\n"
        f"ray.init({with_token.cluster.address!r}, log_to_driver=False)\n"
        "said = json.loads(_internal_kv_get(b'CLUSTER_METADATA', namespace=b'cluster'))\n"
        "said['ray_version'] = '2.1.0'\n"
        "_internal_kv_put(b'CLUSTER_METADATA', json.dumps(said).encode(), namespace=b'cluster')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    (found,) = found_by(services.check_ray, with_token, "store")
    assert found.verdict == WRONG and "2.1.0" in found.found and "Use the cluster's Ray" in found.advice


# The end of what began first


def test_it_ends_within_a_minute_though_everything_hangs(while_all_hangs):
    """Side by side: five checks that wait for half a minute each."""
    process, waits, ended = while_all_hangs
    waits.join(60)
    (((out, _), seconds),) = ended
    assert process.returncode == 1 and seconds < 60
    hung = {finding["check"] for finding in json.loads(out)["findings"] if finding["verdict"] == WRONG}
    assert hung >= {"Ray", "Ray's token", "storage: train.storage", "storage: data.path", "MLflow"}
