"""A Ray head of our own that asks for a token, on loopback ports nobody else has, for tests that submit jobs to it."""
from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path


class RayHead:
    """Start with `with RayHead() as head`; head.address is its dashboard, head.token_path the file of its token.

    Jobs' `python` is this one. In the end it and what it started are killed, and nothing else.
    """

    def __init__(self, cpus: int = 6):
        self.cpus, self.nodes = cpus, []

    def __enter__(self) -> RayHead:
        self.folder = Path(tempfile.mkdtemp(prefix="detr-ray-", dir="/tmp"))  # sockets want a short name
        self.token = secrets.token_hex(32)
        self.token_path = self.folder / "token"
        self.token_path.touch(0o600)
        self.token_path.write_text(self.token)
        gcs, dashboard, client, agent = _free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        # RAY_TMPDIR: also what Ray keeps for those who look for a cluster.
        self.environment = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_TMPDIR": str(self.folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "PYTHONPATH"):
            self.environment.pop(name, None)
        self.gcs = f"127.0.0.1:{gcs}"
        with (self.folder / "head.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(gcs),
                    "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
                    "--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent),
                    "--min-worker-port", "0", "--max-worker-port", "0", "--num-cpus", str(self.cpus),
                    "--object-store-memory", "100000000", "--disable-usage-stats",
                ],
                env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while not self._asks_for_a_token():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "head.log").read_text()
                self.__exit__()
                raise RuntimeError(f"Ray's head did not start:\n{said}")
            time.sleep(0.2)
        return self

    def add_node(self, cpus: int, **variables: str) -> None:
        """Start another node beside it, which keeps what its environment says for itself."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", self.gcs, "--num-cpus",
                   str(cpus), "--object-store-memory", "200000000", "--min-worker-port", "0", "--max-worker-port", "0",
                   "--dashboard-agent-listen-port", "0", "--disable-usage-stats",
                   # Its own: a node deletes a job's code when it needs it no more, and others may still.
                   "--temp-dir", str(self.folder / f"n{len(self.nodes)}")]  # fmt: skip
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("w") as said:
            self.nodes.append(subprocess.Popen(
                command, env=self.environment | variables, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            ))  # fmt: skip
        deadline = time.monotonic() + 240
        while "Ray runtime started" not in log.read_text():  # two at once do not start on one machine
            if self.nodes[-1].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray's node did not start:\n{log.read_text()}")
            time.sleep(0.2)

    def _asks_for_a_token(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.address}/api/version", timeout=5).close()
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            pass
        return False

    def processes(self) -> list[int]:
        """The processes of this head and of its jobs, wherever they run."""
        mine, found = f"RAY_TMPDIR={self.folder}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # ended, or another's
                if mine in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def __exit__(self, *error) -> None:
        for process in (*self.nodes, self.process):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + 20
        while left := self.processes():  # workers and jobs end by themselves without it
            if time.monotonic() > deadline:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
