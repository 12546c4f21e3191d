"""Real servers for tests, on loopback: PostgreSQL, and an MLflow server with passwords that keeps its tables there."""
from __future__ import annotations

import configparser
import os
import pwd
import re
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
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path

SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=32MB",
            "unix_socket_directories=", "max_connections=60")  # fmt: skip


class Postgres:
    """Start with `with Postgres() as postgres`; postgres.uri is its first database, as SQLAlchemy takes it.

    Its programs refuse root, so that root runs them as another user, in a temporary folder of that user's.
    """

    def __init__(self):
        self.port, self.password = _free_port(), secrets.token_hex(16)
        self.uri = f"postgresql+psycopg://detr:{self.password}@127.0.0.1:{self.port}/postgres"

    @staticmethod
    def unfit() -> str | None:
        """What is amiss, or None."""
        if _programs() is None:
            return "PostgreSQL is not installed (Debian's package postgresql)"
        if os.geteuid() == 0 and _other_user() is None:
            return "PostgreSQL does not run as root, and there is no user postgres or nobody"
        return None

    def __enter__(self) -> Postgres:
        self.folder = Path(tempfile.mkdtemp(prefix="detr-postgres-"))
        owner = _other_user() if os.geteuid() == 0 else None
        how = {"cwd": self.folder, "user": owner, "group": owner and pwd.getpwnam(owner).pw_gid}
        how |= {"extra_groups": [] if owner else None}
        password = self.folder / "password"
        password.write_text(self.password)
        if owner:
            for path in (self.folder, password):
                shutil.chown(path, owner)
        programs, data = _programs(), self.folder / "data"
        initdb = [programs / "initdb", "-D", data, "-U", "detr", "-A", "scram-sha-256", "--pwfile", password,
                  "--no-sync", "--no-locale", "-E", "UTF8"]  # fmt: skip
        done = subprocess.run(initdb, **how, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise RuntimeError(f"initdb failed: {done.stderr}")
        options = [word for setting in SETTINGS for word in ("-c", setting)]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(self.port), *options],
                **how, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            _until(self._answers, self.process, self.folder / "log", 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.process.send_signal(signal.SIGQUIT)  # at once, its own processes too
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(_libpq(self.uri), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def new_database(uri: str, name: str) -> str:
    """An empty database beside the one of a URI, with a name that begins so; returns the URI of the new one."""
    import psycopg

    name = f"{name}_{secrets.token_hex(4)}"
    with psycopg.connect(_libpq(uri), autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
    return re.sub(r"/[^/]*$", f"/{name}", uri)


class MlflowServer:
    """Start with `with MlflowServer(folder, postgres.uri) as server`: url, user and password of its admin, database.

    Artifacts go through the server into a folder of its own; no one reads or writes without a password.
    """

    def __init__(self, folder: Path, postgres: str):
        self.folder, self.postgres = folder, postgres
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.user, self.password = "admin", secrets.token_urlsafe(16)

    @staticmethod
    def unfit() -> str | None:
        """What is amiss, or None."""
        return None if find_spec("flask_wtf") else "MLflow's server with passwords is not installed (mlflow[auth])"

    def __enter__(self) -> MlflowServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        runs, users = (new_database(self.postgres, kind) for kind in ("mlflow", "users"))
        self.database = runs
        auth = configparser.ConfigParser(interpolation=None)
        auth["mlflow"] = {"default_permission": "READ", "database_uri": users, "admin_username": self.user,
                          "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
                          "auth_cache_ttl_seconds": "60"}  # fmt: skip
        with (self.folder / "auth.ini").open("w") as file:
            auth.write(file)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | {
            "MLFLOW_BACKEND_STORE_URI": runs,  # not in the command, which everybody on the machine can list
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # processes that nothing here asks for
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [
            sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1",
            "--artifacts-destination", (self.folder / "artifacts").as_uri(),
            "--host", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1],
        ]  # fmt: skip
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.folder, start_new_session=True
            )
        try:
            _until(self._answers, self.process, self.folder / "log", 120)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


def _programs() -> Path | None:
    """The folder of the newest PostgreSQL: Debian keeps it out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    there = found[-1] if found else shutil.which("initdb")
    return Path(there).resolve().parent if there else None


def _other_user() -> str | None:
    known = {user.pw_name for user in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None)


def _libpq(uri: str) -> str:
    return uri.replace("postgresql+psycopg://", "postgresql://")


def _until(answers, process: subprocess.Popen, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not answers():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args[0]} did not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
