"""`detr submit` and `detr jobs` against a small server of our own that speaks Ray's Jobs API; no Ray runs."""
from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from jobs_api import JobsApi, submissions
from ray._raylet import AuthenticationTokenLoader

from jobs.cli import main
from jobs.on_cluster import fits, lacking
from pipelines import submit as submitting
from pipelines.settings import UserError

pytestmark = pytest.mark.before_ray
ROOT = Path(__file__).parents[2]
RESULT = '{"exit_code": 0, "AP": 0.5, "text": "AP 0.5"}\n'
TRAIN = ["train", "--store", "/shared/store", "data.path=s3://bucket/data"]


@pytest.fixture(autouse=True)
def without_token(monkeypatch, tmp_path):
    """A user without any token, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    AuthenticationTokenLoader.instance().reset_cache()
    yield
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture
def api(monkeypatch):
    with JobsApi() as api:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", api.address)
        yield api


def detr(*words: str):
    return CliRunner().invoke(main, list(words))


def submit(*words: str):
    return detr("submit", "--detach", "--json", *words)


def said(result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def sentence(result) -> str:
    text = result.stderr.strip()
    assert "Traceback" not in text and len(text.splitlines()) == 1, text
    return text


def id_of(*words: str) -> str:
    result = submit(*words)
    assert result.exit_code == 0, result.output
    return said(result)["submission_id"]


def test_what_is_asked_twice_is_one_job(api):
    first = submit(*TRAIN, "train.lr=2e-4")
    assert said(first)["how"] == "submitted" and said(first)["exit_code"] == 0
    assert re.fullmatch(r"detr-train-[0-9a-f]{16}", said(first)["submission_id"])
    second = submit("train", "train.lr=0.0002", "data.path=s3://bucket/data", "--store=/shared/store")
    assert said(second)["how"] == "attached" and said(second)["submission_id"] == said(first)["submission_id"]
    assert len(api.jobs) == len(submissions(api)) == len(api.packages) == 1
    (asked,) = submissions(api)
    assert asked["entrypoint"] == (
        "python -m jobs.on_cluster train --store /shared/store data.path=s3://bucket/data train.lr=2e-4 "
        "cluster.address=auto"
    )


def test_whatever_differs_is_another_job(api, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    asked = [
        TRAIN, [*TRAIN, "seed=1"], [*TRAIN, "--config", "mine.yaml"], ["sweep", *TRAIN[1:]],
        ["train", "--store", "/other", TRAIN[-1]], ["predict", *TRAIN[1:], "/images"],
        ["predict", *TRAIN[1:], "/others"], ["evaluate", *TRAIN[1:]], ["evaluate", *TRAIN[1:], "--split", "test"],
    ]  # fmt: skip
    found = [id_of(*words) for words in asked]
    assert len(set(found)) == len(found)
    assert id_of("evaluate", *TRAIN[1:], "--split", "val") == id_of("evaluate", *TRAIN[1:])  # the default
    monkeypatch.setattr(submitting, "requirements", lambda: ["ray>=9"])  # other code goes along
    assert id_of(*TRAIN) not in found


def test_what_goes_along_is_code_and_config_alone(api, tmp_path, monkeypatch):
    code = tmp_path / "code"
    for package in submitting.PACKAGES:
        place = code / package
        (place / "__pycache__").mkdir(parents=True)
        (place / ".hidden").mkdir()
        for name in ("__init__.py", "page.html.j2", ".env", "key.pem", "weights.pth", ".hidden/a.py"):
            (place / name).write_text(name)
        (place / "__pycache__" / "a.pyc").write_text("")
    for name in (".env", "id_rsa", "other.yaml", "image.jpg"):
        (tmp_path / name).write_text("secret")
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    packed = tmp_path / "packed"

    class Spec:
        def __init__(self, name):
            self.submodule_search_locations = [str(code / name)]

    with monkeypatch.context() as patch:
        patch.setattr(submitting, "find_spec", Spec)
        submitting.pack(packed, tmp_path / "mine.yaml")
    names = {str(path.relative_to(packed)) for path in packed.rglob("*") if path.is_file()}
    mine = {f"{package}/{name}" for package in submitting.PACKAGES for name in ("__init__.py", "page.html.j2")}
    assert names == mine | {"settings.yaml", "requirements.txt"}
    # And as it is sent, of this code: all of the packages that is in the repository, and nothing else.
    id_of(*TRAIN, "--config", str(tmp_path / "mine.yaml"))
    (package,) = api.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as file:
        sent = {name for name in file.namelist() if not name.endswith("/")}
        assert file.read("settings.yaml") == b"seed: 3\n"
        wanted = file.read("requirements.txt").decode().split()
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", *submitting.PACKAGES],
                             cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    assert sent == {*tracked, "settings.yaml", "requirements.txt"}
    assert "--config settings.yaml" in submissions(api)[-1]["entrypoint"]
    assert submissions(api)[-1]["metadata"]["detr_command"].endswith("mine.yaml")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.match(r"[\w.-]+", line)[0] for line in wanted} <= {re.match(r"[\w.-]+", line)[0] for line in declared}
    (ray,) = (line for line in wanted if line.startswith("ray["))
    assert ">=2.60" in ray and "<2.62" in ray and not any("pytest" in line for line in wanted)


def test_too_much_is_not_sent(api, monkeypatch):
    monkeypatch.setattr(submitting, "LARGEST", 2**16)
    result = submit(*TRAIN)
    assert result.exit_code == 2 and "MiB" in sentence(result)
    assert not api.packages and not api.jobs


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["schedule", "list"], "cannot be submitted"),
        (["fly"], "cannot be submitted"),
        ([*TRAIN, "train.bugdet=1 epoch"], "train.budget"),
        ([*TRAIN, "--splt", "val"], "--splt"),
        ([*TRAIN, "--json"], "--json"),
        ([*TRAIN, "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "data.path=s3://bucket/data"], "--store"),
        (["train", "--store", "/s", "data.path=my-data"], "my-data (data.path)"),
        (["train", "--store", "/s", "data.path=./my-data"], "my-data (data.path)"),
        (["train", "--store", "/s", "train.init_from=my-data"], "train.init_from"),
        (["train", "--store", "/s", "--config", "mine.yaml"], "there (train.storage)"),
        (["train", "--store", "/s", "tracking.uri=sqlite:///runs.db"], "tracking.uri"),
        (["predict", "--store", "/s", "my-data"], "my-data (the input)"),
        (["predict", "--store", "/s", "/images", "--model", "model"], "model (--model)"),
        (["predict", "--store", "/s", "/images", "--output", "found"], "found (--output)"),
        (["export", "--store", "/s"], "export (--output)"),
        (["predict", "--store", "/s", "https://me:secret@host/images"], "holds a password"),
        (["train", "--store", "/s", "--config", "secret.yaml"], "holds a password"),
    ],
)
def test_what_cannot_go_well_is_refused_before_anything_is_sent(api, tmp_path, words, word):
    (tmp_path / "my-data").mkdir()
    (tmp_path / "mine.yaml").write_text("train: {storage: there}\n")
    (tmp_path / "secret.yaml").write_text("data: {path: 's3://me:secret@bucket/data'}\n")
    result = submit(*words)
    assert result.exit_code == 2
    assert word in sentence(result) and "secret@" not in result.output
    assert not api.asked


def test_what_the_cluster_sees_itself_is_passed_on(api):
    id_of("train", "--store", "/s", "data.path=/shared/data", "data.images=photos", "train.backbone_weights=imagenet")
    id_of("train", "--store", "/s", "tracking.uri=sqlite:////s/runs.db", "model=small")
    id_of("predict", "--store", "/s", "s3://bucket/photos", "--model", "models:/sample@champion")


def test_an_address_of_a_cluster_that_is_given_is_kept(api):
    id_of(*TRAIN, "cluster.address=10.0.0.1:6379")
    assert "auto" not in submissions(api)[0]["entrypoint"]


def test_attempts_are_counted(api):
    first = id_of(*TRAIN)
    for number, status in ((2, "FAILED"), (3, "STOPPED")):
        api.end(first if number == 2 else f"{first}-{number - 1}", status, code=1)
        assert id_of(*TRAIN) == f"{first}-{number}"
        assert id_of(*TRAIN) == f"{first}-{number}"  # which waits
    api.end(f"{first}-3", "SUCCEEDED", f"working\n{RESULT}", 0)
    done = submit(*TRAIN)
    assert said(done)["how"] == "done before" and said(done)["submission_id"] == f"{first}-3"
    assert said(done)["result"]["AP"] == 0.5
    shown = detr("submit", *TRAIN)
    assert shown.exit_code == 0 and "--again" in shown.stdout and shown.stdout.endswith("AP 0.5\n")
    assert len(api.jobs) == 3
    again = [said(detr("submit", "--again", "--detach", "--json", *TRAIN)) for _ in range(2)]
    assert [job["submission_id"] for job in again] == [f"{first}-4"] * 2
    assert [job["how"] for job in again] == ["submitted", "attached"]


def test_two_who_submit_at_the_same_moment_get_one_job(api, tmp_path):
    """Both find nothing there, and both ask for the same id."""
    api.together = threading.Barrier(2)
    clients = [submitting.Client(api.address) for _ in range(2)]
    folder = tmp_path / "packed"
    submitting.pack(folder, None)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda client: submitting.submit(client, "detr-x", ["x"], folder, ["x"]), clients))
    assert sorted(found) == [("detr-x", "attached"), ("detr-x", "submitted")]
    assert len(api.jobs) == 1 and len(submissions(api)) == 2


def test_a_starting_cluster_is_waited_for(api):
    api.refusals = ["No available agent to submit job, please try again later."] * 2
    result = submit(*TRAIN)
    assert said(result)["how"] == "submitted"
    assert result.stderr.count("No available agent") == 1  # said once


def test_a_cluster_that_never_starts_is_one_sentence(monkeypatch):
    monkeypatch.setattr(submitting, "PATIENCE", 1)
    result = detr("submit", "--address", "http://127.0.0.1:9", "--json", *TRAIN)
    assert result.exit_code == 1 and "Connection refused" in said(result)["error"]
    waited, failed = result.stderr.splitlines()
    assert "Trying again" in waited and failed == said(result)["error"]
    result = detr("jobs", "list", "--address", "http://127.0.0.1:9")
    assert result.exit_code == 1 and "Connection refused" in sentence(result)


def test_what_is_no_cluster(tmp_path):
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = detr("jobs", "list", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert result.exit_code == 2 and "not the dashboard" in result.stderr


def test_a_server_that_never_answers_is_not_waited_for_for_ever(monkeypatch):
    import socket

    monkeypatch.setattr(submitting, "ANSWER", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = detr("jobs", "list", "--address", f"http://127.0.0.1:{server.getsockname()[1]}")
    assert result.exit_code == 1 and "not in time" in sentence(result)


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("127.0.0.1:8265", "write it as"), ("ray://127.0.0.1:10001", "write it as"), ("auto", "write it as"),
        ("http://:8265", "write it as"), ("http://127.0.0.1:x", "write it as"),
        ("http://me:hush@127.0.0.1:8265", "Leave name and password"),
        ("http://10.1.2.3:8265", "no token"), ("https://ray.example.org", "no token"),
        ("http://0.0.0.0:8265", "no token"),
    ],
)  # fmt: skip
def test_an_address_that_is_refused(address, word):
    for words in (["submit", "--address", address, *TRAIN], ["jobs", "list", "--address", address]):
        result = detr(*words)
        assert result.exit_code == 2
        assert word in sentence(result) and "hush" not in result.output


@pytest.mark.parametrize("address", ["http://localhost:8265/", "http://127.0.0.2:1", "http://[::1]:8265"])
def test_loopback_needs_no_token(address):
    assert submitting.api_address(address) == address.rstrip("/")


def test_where_the_address_comes_from(monkeypatch):
    assert submitting.api_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert submitting.api_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:5")
    assert submitting.api_address(None) == "http://127.0.0.1:5"
    assert submitting.api_address("http://127.0.0.1:6") == "http://127.0.0.1:6"


def test_the_address_given_is_the_one_that_is_asked(api, monkeypatch):
    """Ray's own client would take these instead, and a proxy would be told the token."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert detr("jobs", "list", "--address", api.address).exit_code == 0


@pytest.mark.parametrize("way", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home"])
def test_a_token_goes_where_it_must_and_nowhere_else(way, monkeypatch, tmp_path):
    token = "0123456789abcdef" * 4
    if way == "RAY_AUTH_TOKEN":
        monkeypatch.setenv(way, token)
    else:
        path = tmp_path / ("token" if way == "RAY_AUTH_TOKEN_PATH" else ".ray/auth_token")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{token}\n")
        if way == "RAY_AUTH_TOKEN_PATH":
            monkeypatch.setenv(way, str(path))
    secrets = {"AWS_SECRET_ACCESS_KEY": "aws-hush", "MLFLOW_TRACKING_PASSWORD": "mlflow-hush", "PGPASSWORD": "pg-hush"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with JobsApi(token) as api:
        result = detr("submit", "--address", api.address, "--detach", *TRAIN)
        assert result.exit_code == 0, result.output
        for _, headers, body in api.asked:
            assert headers.pop("Authorization") == f"Bearer {token}"
            sent = str(headers).encode() + body
            assert not any(value.encode() in sent for value in (token, *secrets.values()))
        assert set(submissions(api)[0]["runtime_env"]["env_vars"]) == {"DETR_JOB", "RAY_JOB_STOP_WAIT_TIME_S"}
        assert token not in result.output
    assert submitting.api_address("https://ray.example.org") == "https://ray.example.org"


def test_a_token_over_plain_http_is_said(monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush")
    submitting.api_address("http://10.1.2.3:8265")
    warned = capsys.readouterr().err
    assert "unencrypted" in warned and "ssh -L" in warned and "hush" not in warned
    submitting.api_address("https://10.1.2.3:8265")
    submitting.api_address("http://127.0.0.1:8265")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("given", "word"), [(None, "asks for a token"), ("wrong", "refuses the token")])
def test_a_missing_or_wrong_token_is_one_sentence(given, word, monkeypatch):
    if given:
        monkeypatch.setenv("RAY_AUTH_TOKEN", given)
    with JobsApi("right") as api:
        for words in (["submit", "--address", api.address, *TRAIN], ["jobs", "list", "--address", api.address]):
            result = detr(*words)
            assert result.exit_code == 2
            assert word in sentence(result) and "wrong" not in result.output


@pytest.mark.parametrize("token", ["two\nlines", "schlüssel"])
def test_a_token_that_is_none_is_not_shown(token, monkeypatch, api):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    result = detr("jobs", "list")
    assert result.exit_code == 2
    assert "token" in sentence(result) and not any(word in result.output for word in ("two", "lines", "schl"))


def test_a_token_file_that_is_not_there(monkeypatch, api):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    result = detr("jobs", "list")
    assert result.exit_code == 2 and "/nowhere/token" in sentence(result)


def once(is_so, work) -> threading.Thread:
    """Do it as soon as that is so, while the test goes on."""

    def wait() -> None:
        while not is_so():
            time.sleep(0.02)
        work()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_job_is_followed_to_its_end(api):
    job_id = id_of(*TRAIN)
    api.jobs[job_id]["log"] = "Running entrypoint\nepoch 1\n"
    api.drops = 2  # the connection is lost; no line is lost or said twice
    more = f"epoch 2: {'long ' * 50}\nhalf a line {RESULT}bye"
    ending = once(lambda: not api.drops, lambda: api.end(job_id, "SUCCEEDED", more, 0))
    result = detr("submit", "--json", *TRAIN)
    ending.join()
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[1:-1] == ["Running entrypoint", "epoch 1", f"epoch 2: {'long ' * 50}", "bye"]
    assert said(result)["result"] == json.loads(RESULT) and said(result)["how"] == "attached"
    assert len(result.stdout.splitlines()) == 1
    followed = detr("jobs", "follow", job_id)
    assert followed.stdout == "AP 0.5\n" and followed.exit_code == 0 and "epoch 1" in followed.stderr


@pytest.mark.parametrize(
    ("ended", "code", "word"),
    [
        ({"status": "FAILED", "driver_exit_code": 1}, 1, "exit code 1"),
        ({"status": "FAILED", "driver_exit_code": 2}, 2, "exit code 2"),
        ({"status": "FAILED", "driver_exit_code": 3}, 3, "exit code 3"),
        ({"status": "FAILED", "driver_exit_code": 127}, 1, "no `python`"),
        ({"status": "FAILED", "driver_exit_code": -9}, 1, "memory"),
        ({"status": "FAILED", "driver_exit_code": 137}, 1, "memory"),
        ({"status": "FAILED", "message": "Failed to set up runtime environment.\nmore"}, 1, "runtime environment."),
        ({"status": "STOPPED"}, 130, "cancelled"),
    ],
)
def test_a_job_ends_the_command_as_it_ended(api, ended, code, word):
    api.add("detr-x", log='{"exit_code": 2, "error": "No."}\n', **ended)
    result = detr("jobs", "follow", "detr-x", "--json")
    assert result.exit_code == said(result)["exit_code"] == code
    assert word in result.stderr.splitlines()[-1]
    assert said(result)["result"]["error"] == "No."
    asked = said(detr("jobs", "status", "detr-x", "--json"))
    assert asked["command_exit_code"] == code and asked["exit_code"] == 0
    assert word in detr("jobs", "status", "detr-x").stdout


def test_ctrl_c_leaves_the_job_running(api):
    job_id = id_of(*TRAIN)
    followed = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "submit", *TRAIN], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    api.jobs[job_id]["log"] = "epoch 1\n"
    while "epoch 1" not in followed.stderr.readline():
        pass
    followed.send_signal(signal.SIGINT)
    (last,) = followed.communicate(timeout=20)[1].splitlines()
    assert followed.returncode == 130 and api.jobs[job_id]["status"] == "PENDING"
    assert f"detr jobs follow --address {api.address} {job_id}" in last
    assert f"detr jobs cancel --address {api.address} {job_id}" in last


def test_a_head_that_was_started_anew_has_forgotten_the_job(api):
    api.add("detr-x", log="epoch 1\n")
    api.drops = 1000
    forgetting = once(lambda: api.drops < 1000, api.jobs.clear)
    result = detr("jobs", "follow", "detr-x")
    forgetting.join()
    assert result.exit_code == 1 and "started anew" in result.stderr.splitlines()[-1]


def test_a_cluster_that_goes_away_while_a_job_is_followed(monkeypatch):
    monkeypatch.setattr(submitting, "PATIENCE", 1)
    with JobsApi() as api:
        api.add("detr-x", log="epoch 1\n")
        client = submitting.Client(api.address)
        shown: list[str] = []
        followed = ThreadPoolExecutor().submit(submitting.follow, client, "detr-x", shown.append)
        while not (shown or followed.done()):
            time.sleep(0.05)
    with pytest.raises(submitting.Away, match="does not answer"):
        followed.result(30)
    assert shown == ["epoch 1"]


def test_only_our_jobs_are_shown_and_touched(api):
    api.add("theirs", metadata={"owner": "them"})
    api.add("detr-old", "SUCCEEDED", code=0, end_time=1_700_000_050_000)
    api.add("detr-new", metadata={"detr_command": "sweep sweep.trials=8"})
    listed = said(detr("jobs", "list", "--json"))["jobs"]
    assert [job["submission_id"] for job in listed] == ["detr-old", "detr-new"]
    assert listed[0] | {"submission_id": "", "command": ""} == {
        "submission_id": "", "command": "", "state": "SUCCEEDED", "started": "2023-11-14T22:13:20+00:00",
        "ended": "2023-11-14T22:14:10+00:00", "exit_code": 0,
    }  # fmt: skip
    table = detr("jobs", "list").stdout
    assert "theirs" not in table and "sweep.trials=8" in table and "running" in table
    for command in ("status", "follow", "cancel"):
        for job_id in ("theirs", "nowhere", "../detr-old", "01000000"):
            result = detr("jobs", command, job_id)
            assert result.exit_code == 2 and f"no job {job_id}" in sentence(result)
    assert api.jobs["theirs"]["status"] == "RUNNING"


def test_a_job_is_cancelled(api):
    api.add("detr-x")
    result = detr("jobs", "cancel", "detr-x")
    assert result.exit_code == 0 and "cancelled" in result.stdout
    assert api.jobs["detr-x"]["status"] == "STOPPED"
    assert "over already" in detr("jobs", "cancel", "detr-x").stdout


def on_cluster(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "jobs.on_cluster", *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ""}, check=False)  # fmt: skip


def test_a_python_that_lacks_something_says_so_before_it_runs(tmp_path):
    packed = tmp_path / "packed"
    submitting.pack(packed, None)
    with (packed / "requirements.txt").open("a") as file:
        file.write("flying-carpet>=2\nclick>=99\n")
    (packed / "jobs" / "cli.py").write_text("raise SystemExit('it ran')")
    done = on_cluster(packed, "sample")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "flying-carpet is missing" in line and re.search(r"click is [\d.]+ and must be >=99", line)
    assert "deploy/Dockerfile" in line and "pip install 'flying-carpet>=2' 'click>=99'" in line
    assert "ray" not in line and sys.executable in line
    assert json.loads(done.stdout)["error"] in line


def test_what_is_sent_runs_by_itself(tmp_path):
    packed = tmp_path / "packed"
    submitting.pack(packed, None)
    made = "sample.train=2", "sample.val=1", "sample.test=0"
    done = on_cluster(packed, "sample", "--output", str(tmp_path / "made"), *made)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == str(tmp_path / "made")
    assert len(list((tmp_path / "made" / "images").iterdir())) == 3
    misspelt = on_cluster(packed, "sample", "sample.trian=2")
    assert misspelt.returncode == 2 and "sample.train" in misspelt.stderr


@pytest.mark.parametrize(
    ("found", "versions", "fit"),
    [
        ("2.15.0+cu132", ">=2.10", True), ("2.9.1", ">=2.10", False), ("2.62", "<2.62,>=2.60", False),
        ("2.61.5", "<2.62,>=2.60", True), ("2.60", ">=2.60.0", True), ("2.60.0", ">=2.60", True),
        ("2.60.0", "<2.60", False), ("3", "<4,>=3.4", False), ("10.1", ">=9", True), ("2.61rc1", "<2.62", True),
        ("1.0", "", True),
    ],
)  # fmt: skip
def test_versions_are_compared_by_number(found, versions, fit):
    assert fits(found, versions) is fit


def test_our_own_requirements_are_understood():
    assert lacking(submitting.requirements()) == []
    with pytest.raises(ValueError, match="only >= and <"):
        fits("1.0", "~=1.0")


def test_an_installation_without_metadata_says_so(monkeypatch):
    monkeypatch.setattr(submitting, "PROJECT", "detr-nowhere")
    with pytest.raises(UserError, match="not installed"):
        submitting.requirements()
