"""The MLflow server as deploy/mlflow.yaml starts it: its command, its SQL and its users on a real PostgreSQL."""
from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import psycopg
import pytest
import yaml
from mlflow_server import MlflowServer, _free_port, _libpq, _programs, _until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long  # half a minute, most of it MLflow's start


def test_the_server_starts_as_the_manifest_says_and_asks_for_a_password(postgres, tmp_path):
    if reason := MlflowServer.unfit():
        pytest.skip(f"no MLflow server: {reason}")
    objects = {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all((ROOT / "deploy/mlflow.yaml").open())}
    passwords = {"postgres-password": "pg-" + "a" * 9, "ledger-password": "led-" + "b" * 9,
                 "admin-password": "adm-" + "c" * 12, "flask-key": "key-" + "d" * 12,
                 "trainer": "tra-" + "e" * 12, "reader": "rea-" + "f" * 12}  # fmt: skip
    for name, password in passwords.items():
        (tmp_path / name).write_text(password)
    address = re.search(r"@([\d.:]+)/", postgres).group(1)
    host, port = address.split(":")

    # What PostgreSQL's image does with an empty volume: the user and database it is told, then the SQL.
    with psycopg.connect(_libpq(postgres), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE mlflow SUPERUSER LOGIN PASSWORD '{passwords['postgres-password']}'")
        admin.execute("CREATE DATABASE mlflow OWNER mlflow")
    sql = tmp_path / "databases.sql"
    sql.write_text(objects["ConfigMap", "postgres"]["data"]["databases.sql"].replace("/secrets/", f"{tmp_path}/"))
    connect = ["--host", host, "--port", port, "--username", "mlflow", "--dbname", "mlflow"]
    subprocess.run(
        [_programs() / "psql", "--no-psqlrc", "--set", "ON_ERROR_STOP=1", *connect, "--file", sql],
        env={**os.environ, "PGPASSWORD": passwords["postgres-password"]}, check=True, capture_output=True,
    )  # fmt: skip
    ledger = {"host": host, "port": port, "user": "ledger", "password": passwords["ledger-password"]}
    psycopg.connect(**ledger, dbname="ledger").close()
    for database in ("mlflow", "mlflow_users"):
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            psycopg.connect(**ledger, dbname=database)

    container = objects["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"][0]
    (tmp_path / "auth.ini").write_text(
        objects["ConfigMap", "mlflow"]["data"]["auth.ini"].replace("@postgres/", f"@{address}/")
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PG"))}
    for variable in container["env"]:
        if "valueFrom" in variable:
            variable["value"] = passwords[variable["valueFrom"]["secretKeyRef"]["key"]]
        environment[variable["name"]] = variable["value"].replace("@postgres/", f"@{address}/")
    environment["MLFLOW_AUTH_CONFIG_PATH"] = str(tmp_path / "auth.ini")
    own = str(_free_port())
    arguments = [
        re.sub(r"\b5000\b", own, argument).replace("0.0.0.0", "127.0.0.1").replace("s3://", f"{tmp_path.as_uri()}/")
        for argument in container["args"]
    ]
    assert container["command"] == ["mlflow", "server"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *container["command"], *arguments],
            stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path, start_new_session=True,
        )  # fmt: skip
    try:
        _until(lambda: ask(own, "/health") == 200, server, tmp_path / "log", 120)
        search = "/api/2.0/mlflow/experiments/search?max_results=1"
        admin = basic("admin", passwords["admin-password"])
        assert ask(own, search) == 401
        assert ask(own, search, **admin) == 200
        assert ask(own, search, Host="mlflow.evil.example", **admin) == 403
        assert ask(own, search, Host=f"mlflow:{own}", **admin) == 200
        people(own, passwords, tmp_path)
        for process in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]:
            assert not any(password in " ".join(process.cmdline()) for password in passwords.values())
        assert not any(password in (tmp_path / "log").read_text() for password in passwords.values())
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()


def people(port: str, passwords: dict[str, str], folder: Path) -> None:
    """The page's program makes a user; who registers what is as the page says."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (folder / "detr-secrets").mkdir()
    (folder / "detr-secrets" / "trainer-password").write_text(passwords["trainer"])
    program = program.replace("5000", port) + f'users.create_user("reader", {passwords["reader"]!r})\n'
    who = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": passwords["admin-password"]}
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **who, "HOME": str(folder)}, check=True)

    def register(user: str, what: str, name: str) -> int:
        body = {"name": name} | ({"source": f"models:/{name}"} if what == "model-versions" else {})
        return ask(port, f"/api/2.0/mlflow/{what}/create", body, **basic(user, passwords[user]))

    assert register("trainer", "registered-models", "coco") == 200
    assert register("reader", "model-versions", "coco") == 403
    assert register("reader", "registered-models", "another") == 200
    assert ask(port, "/api/2.0/mlflow/registered-models/get?name=coco", **basic("reader", passwords["reader"])) == 200
    moved = {"name": "coco", "alias": "champion", "version": "1"}
    assert ask(port, "/api/2.0/mlflow/registered-models/alias", moved, **basic("reader", passwords["reader"])) == 403


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def ask(port: str, path: str, body: dict | None = None, **headers: str) -> int:
    data = None if body is None else json.dumps(body).encode()
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
