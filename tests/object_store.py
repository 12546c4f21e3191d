"""A real S3-compatible object store for tests: OpenStack Swift with its s3api, on loopback."""
from __future__ import annotations

import getpass
import importlib.util
import os
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "test:tester", "a-key-that-nothing-shows"
PAGE = 100  # keys in one answer; S3's own have 1,000, which take Swift most of a minute to store
SERVERS = ("account", "container", "object")
PIPELINE = "catch_errors gatekeeper healthcheck listing_formats bulk s3api tempauth slo dlo proxy-server"
RING = """
import sys
from swift.common.ring import RingBuilder

builder = RingBuilder(6, 1, 1)
here = {"ip": "127.0.0.1", "port": int(sys.argv[1])}
builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "device": "d1", "meta": "", **here,
                 **{f"replication_{key}": value for key, value in here.items()}})
builder.rebalance()
builder.get_ring().save(sys.argv[2])
"""


class ObjectStore:
    """Start with `with ObjectStore(folder) as store`; store.endpoint is what AWS_ENDPOINT_URL must be.

    The folder's file system must have user xattrs: `unfit` says what is amiss, or gives None. faulty: every third
    write is answered with "service unavailable", once it has come (see faulty_storage.py).
    """

    def __init__(self, folder: Path, faulty: bool = False):
        self.folder, self.faulty = folder, faulty
        self.processes: list[subprocess.Popen] = []
        self.ports = {name: _free_port() for name in (*SERVERS, "proxy")}
        self.endpoint = f"http://127.0.0.1:{self.ports['proxy']}"

    @staticmethod
    def unfit(folder: Path) -> str | None:
        if importlib.util.find_spec("swift") is None:
            return "Swift is not installed, which is for Linux alone"
        probe = folder / "xattr"
        probe.write_bytes(b"")
        try:
            os.setxattr(probe, "user.swift", b"1")
        except OSError as error:
            return f"{folder} has no user xattrs, which Swift needs ({error.strerror})"
        return None

    def __enter__(self) -> ObjectStore:
        (self.folder / "disk" / "d1").mkdir(parents=True)
        self._write("swift.conf", "[swift-hash]\nswift_hash_path_suffix = a\nswift_hash_path_prefix = b\n"
                    "[storage-policy:0]\nname = one\ndefault = yes\n")  # fmt: skip
        for name in SERVERS:
            # In a process of its own: Swift replaces threads by eventlet's where it is imported.
            ring = self.folder / f"{name}.ring.gz"
            subprocess.run([sys.executable, "-W", "ignore", "-c", RING, str(self.ports[name]), str(ring)], check=True)
            self._write(f"{name}.conf", self._default(name) + f"devices = {self.folder / 'disk'}\nmount_check = false\n"
                        f"[pipeline:main]\npipeline = {name}-server\n"
                        f"[app:{name}-server]\nuse = egg:swift#{name}\n")  # fmt: skip
        filters = [n for n in PIPELINE.split() if n not in ("tempauth", "s3api", "proxy-server")]
        self._write("proxy.conf", self._default("proxy")
                    + f"[pipeline:main]\npipeline = {'faulty ' * self.faulty}{PIPELINE}\n"
                    "[filter:faulty]\npaste.filter_factory = faulty_storage:filter_factory\n"
                    "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
                    "error_suppression_limit = 1000000\n"  # servers that are not up yet are not to be passed over
                    f"[filter:s3api]\nuse = egg:swift#s3api\nlocation = us-east-1\nmax_bucket_listing = {PAGE}\n"
                    f"[filter:tempauth]\nuse = egg:swift#tempauth\nuser_test_tester = {SECRET_KEY} .admin\n"
                    + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in filters))  # fmt: skip
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, or start it again with what it has stored."""
        for name in SERVERS:
            self._start(name)
        for name in SERVERS:  # a proxy without them says that there is no such bucket
            self._wait_for_port(self.ports[name])
        self._start("proxy")
        self._wait()

    def stop(self) -> None:
        """Kill all of it, the proxy first: without the others it says that there is no such bucket."""
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        self.processes.clear()

    def _default(self, name: str) -> str:
        return (
            f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {self.ports[name]}\nworkers = 0\nuser = {getpass.getuser()}\n"
            f"swift_dir = {self.folder}\nlog_level = ERROR\nlog_address = {self.folder / 'no-syslog'}\n"
        )

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _start(self, name: str) -> None:
        module = "obj" if name == "object" else name
        code = f"import sys; from swift.{module}.server import main; sys.exit(main())"
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-W", "ignore", "-c", code, str(self.folder / f"{name}.conf")]
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))

    @staticmethod
    def _wait_for_port(port: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody listens on port {port}")
            time.sleep(0.1)

    def _wait(self, seconds: float = 60) -> None:
        """Until it answers and takes a file."""
        deadline = time.monotonic() + seconds
        client = self.client()
        while True:
            try:
                with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="file")
                return
            except Exception as error:
                if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                    logs = "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in self.folder.glob("*.log"))
                    raise RuntimeError(f"Swift did not start: {error}\n{logs}") from error
                time.sleep(0.3)

    def client(self):
        """A boto3 client of it."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1", config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
        )  # fmt: skip

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> None:
        """Everything below a folder into a new bucket."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), bucket, f"{prefix}{path.relative_to(folder).as_posix()}")


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
