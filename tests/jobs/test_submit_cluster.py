"""`detr submit` and `detr jobs` on a real Ray head that asks for a token, as a user types them."""
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from ray_head import RayHead

ROOT = Path(__file__).parents[2]
SAMPLE = ["sample.train=8", "sample.val=4", "sample.test=0"]


@pytest.fixture(scope="module")
def head():
    with RayHead() as head:
        yield head


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cluster") / "store")


@pytest.fixture
def start(head, tmp_path):
    """Start `detr` with these words for that cluster, in an empty folder and with the token's file."""

    def start(*words: str, **variables: str) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"RAY_API_SERVER_ADDRESS": head.address, "RAY_AUTH_TOKEN_PATH": str(head.token_path),
                        "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), **variables}  # fmt: skip
        return subprocess.Popen([sys.executable, "-m", "jobs.cli", *words], cwd=tmp_path, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    return start


@pytest.fixture
def detr(start):
    """Run it to its end: (exit code, what it printed as JSON, what it said)."""

    def detr(*words: str, **variables: str) -> tuple[int, dict, str]:
        words = (words[0], "--json", *words[1:]) if words[0] == "submit" else (*words, "--json")
        process = start(*words, **variables)
        out, said = process.communicate(timeout=180)
        assert process.returncode == json.loads(out)["exit_code"], said
        return process.returncode, json.loads(out), said

    return detr


def wait_for(process: subprocess.Popen, word: str) -> list[str]:
    lines = []
    for line in process.stderr:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError("".join(lines))


def test_a_command_runs_once_whoever_follows_it(start, detr, store, head):
    words = ("ingest", "--store", store, *SAMPLE)
    first, second = start("submit", *words), start("submit", "--json", *words)  # at the same moment
    job_id = re.search(r"detr-ingest-\w+", wait_for(first, "Running entrypoint")[0])[0]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    code, made, said = detr("submit", *words)
    out, _ = second.communicate(timeout=60)
    assert json.loads(out) | {"how": "attached"} == made and second.returncode == 0
    assert code == 0, said
    assert (made["submission_id"], made["how"], made["state"]) == (job_id, "attached", "SUCCEEDED")
    assert made["result"]["images"] == {"train": 8, "val": 4}
    assert Path(made["result"]["folder"], "dataset.json").is_file() and made["result"]["folder"].startswith(store)
    assert "Running entrypoint" in said and "Dataset sample" in said and head.token not in said
    code, again, _ = detr("submit", *words)
    assert code == 0 and again["how"] == "done before" and again["result"] == made["result"]
    (job,) = detr("jobs", "list")[1]["jobs"]
    assert job["submission_id"] == job_id and job["command"] == shlex.join(words)
    asked = Request(f"{head.address}/api/jobs/{job_id}", headers={"Authorization": f"Bearer {head.token}"})
    with urlopen(asked) as answer:
        assert json.load(answer)["driver_info"]  # it joined this cluster, and started none of its own


def test_a_training_is_cancelled_cleanly(start, detr, store, head):
    words = ("train", "--store", store, *SAMPLE, "train.budget=100000 steps", "train.batch_size=2")
    followed = start("submit", "--json", *words)
    job_id = re.search(r"detr-train-\w+", wait_for(followed, "Training")[0])[0]
    assert detr("jobs", "status", job_id)[1]["state"] == "RUNNING"
    shown = [Path(f"/proc/{pid}/cmdline").read_text() for pid in head.processes()]
    assert any("jobs.on_cluster" in line for line in shown)
    assert not any(head.token in line for line in shown)
    code, cancelled, _ = detr("jobs", "cancel", job_id)
    assert code == 0 and cancelled["state"] == "STOPPED"
    out, said = followed.communicate(timeout=30)
    assert followed.returncode == 130 == json.loads(out)["exit_code"] and "cancelled" in said
    with sqlite3.connect(Path(store) / "mlflow.db") as runs:  # it had the time to end as after Ctrl-C
        assert runs.execute("select status from runs").fetchall() == [("KILLED",)]


def test_the_exit_code_is_the_jobs_own_and_the_next_attempt_has_a_number(detr, store, tmp_path):
    data = tmp_path / "data"
    words = ("submit", "ingest", "--store", store, f"data.path={data}")
    code, failed, said = detr(*words)
    assert code == 2 and failed["state"] == "FAILED"
    assert str(data) in failed["result"]["error"] and failed["result"]["error"] in said
    (data / "images").mkdir(parents=True)
    (data / "instances_train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    code, again, said = detr(*words)
    assert code == 2 and "its list 'images' is empty" in again["result"]["error"]
    assert again["submission_id"] == f"{failed['submission_id']}-2", said


def test_without_the_right_token_nothing_is_told(detr):
    for words, variables, word in (
        (("jobs", "list"), {"RAY_AUTH_MODE": "disabled"}, "asks for a token"),
        (("submit", "ingest", "--store", "/nowhere"), {"RAY_AUTH_TOKEN": "wrong"}, "refuses the token"),
    ):
        code, answer, said = detr(*words, **variables)
        assert code == 2 and word in answer["error"]
        assert said.strip() == answer["error"] and "wrong" not in said
