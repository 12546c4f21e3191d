"""Tracking and registry on a real MLflow server with passwords, its tables in PostgreSQL."""
from __future__ import annotations

import json
import re
import secrets
import time
from pathlib import Path

import psycopg
import pytest
from mlflow_server import new_database

from pipelines.registry import champion, download, history, promote, register, rollback
from pipelines.settings import UserError, load_settings
from pipelines.tracking import Tracker, tracker

SENTENCE = re.compile(r"[A-Z][^\n]*[^.\n]\.")
EVALUATION = {"split": "val", "split_digest": "val-1", "data": {"seen": None, "base_known": True, "rejected": 0.0}}


@pytest.fixture(scope="module")
def tracked(mlflow_server, tmp_path_factory) -> Tracker:
    return tracker(asked_for(mlflow_server), tmp_path_factory.mktemp("store"), "digits")


@pytest.fixture
def log_in(mlflow_server, monkeypatch):
    """log_in() makes a new user, who may read all and write nothing, and goes on as that user; returns the name."""
    from mlflow.server import get_app_client

    admin = get_app_client("basic-auth", mlflow_server.url)

    def make(may_not_see: str | None = None) -> str:
        user, password = f"user-{secrets.token_hex(4)}", secrets.token_hex(8)
        admin.create_user(user, password)
        if may_not_see:
            admin.grant_user_permission(user, "registered_model", may_not_see, "DENY")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return user

    return make


def asked_for(server):
    return load_settings(None, [f"tracking.uri={server.url}", "gate.min_ap=0.1", "gate.margin=0"])


def checkpoint(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    config = {"format": 1, "categories": [{"id": 3, "name": "cat"}], "score_threshold": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measured(_champion: Path) -> dict:
    """What measuring the champion with AP 0.3 beside a version with 0.4 finds."""
    ap = {"first": 0.3, "second": 0.4, "difference": 0.1, "low": 0.05, "high": 0.15}
    return {"images": 9, "confidence": 0.95, "resamples": 9, "split_digest": "val-1", "seen_by_first": None, "AP": ap,
            "per_class": []}  # fmt: skip


def test_a_training_is_tracked_through_the_server(tracked, tmp_path):
    run_id = tracked.start_run("train", tags={"detr.stage": "train"})
    tracked.log_params(run_id, {"train": {"lr": 4e-4}})
    tracked.log_dataset(run_id, "digits", "d" * 64, "training")
    model_id = tracked.training_model(run_id, "digits")
    tracked.log_metrics(run_id, {"val/AP": 0.25}, 10, model_id=model_id)
    (tmp_path / "page.html").write_text("<p>")
    tracked.log_file(run_id, tmp_path / "page.html", "report")
    tracked.end_training_model(model_id)
    tracked.end_run(run_id)
    run = tracked.client().get_run(run_id)
    assert (run.info.status, run.data.params["train.lr"], run.data.metrics["val/AP"]) == ("FINISHED", "0.0004", 0.25)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")  # through the server, which alone knows the place
    assert Path(tracked.client().download_artifacts(run_id, "report/page.html", str(tmp_path))).read_text() == "<p>"
    assert tracked.find_run({"detr.stage": "train"}) == run_id


def test_a_model_is_registered_promoted_fetched_and_rolled_back(tracked, mlflow_server, tmp_path):
    settings = asked_for(mlflow_server)
    run_id = tracked.start_run("train")
    for weights, ap in ((b"one", 0.3), (b"two", 0.4)):
        folder = checkpoint(tmp_path / weights.decode(), weights)
        made = register(settings, tracked, run_id, folder, {"AP": ap, **EVALUATION}, "data", "cats")
        places = (tmp_path / "promote", tmp_path / "models")
        verdict = promote(settings, tracked, "cats", made["version"], {"AP": ap, **EVALUATION}, measured, *places)
        assert verdict["promoted"], verdict["reason"]
    assert champion(tracked, "cats")["version"] == "2"
    place, name, version = download(tracked, "models:/cats@champion", tmp_path / "got")
    assert (name, version, (place / "model.safetensors").read_bytes()) == ("cats", "2", b"two")
    assert register(settings, tracked, run_id, folder, {"AP": 0.4, **EVALUATION}, "data", "cats")["reused"]
    rollback(tracked, "cats", "misses small cats")
    assert champion(tracked, "cats")["version"] == "1"
    rows = history(tracked, "cats")
    assert [row["what"] for row in rows] == ["promoted", "promoted", "rolled back"]
    assert {row["who"] for row in rows} == {mlflow_server.user}


@pytest.mark.parametrize(
    "user, password, words",
    [
        ("admin", "not-the-password", "does not accept this password of 'admin'"),
        ("nobody", "not-the-password", "does not accept this password of 'nobody'"),
        (None, None, "asks for a user and a password"),
    ],
)
def test_who_is_not_known_is_told_so_at_once(mlflow_server, tmp_path, monkeypatch, user, password, words):
    for name, value in (("USERNAME", user), ("PASSWORD", password)):
        if value is None:
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
        else:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    started = time.monotonic()
    with pytest.raises(UserError, match=words) as error:
        tracker(asked_for(mlflow_server), tmp_path, "digits")
    assert time.monotonic() - started < 10
    assert SENTENCE.fullmatch(str(error.value)) and "not-the-password" not in str(error.value)
    assert error.value.exit_code == 2


def test_who_may_only_read_fetches_models_and_changes_nothing(tracked, mlflow_server, log_in, tmp_path):
    settings, evaluation = asked_for(mlflow_server), {"AP": 0.3, **EVALUATION}
    run_id = tracked.start_run("train")
    one, two = (checkpoint(tmp_path / weights.decode(), weights) for weights in (b"one", b"two"))
    register(settings, tracked, run_id, one, evaluation, "data", "dogs")

    user = log_in()
    assert download(tracked, "models:/dogs/1", tmp_path / "got")[2] == "1"
    for work in (
        lambda: register(settings, tracked, run_id, two, evaluation, "data", "dogs"),
        lambda: promote(settings, tracked, "dogs", "1", evaluation, measured, tmp_path / "p", tmp_path / "models"),
        lambda: tracked.start_run("train"),
    ):
        with pytest.raises(UserError, match=f"does not let '{user}' ") as error:
            work()
        assert SENTENCE.fullmatch(str(error.value))
    assert champion(tracked, "dogs") is None
    assert len(tracked.client().search_model_versions("name = 'dogs'")) == 1


def test_who_may_not_see_a_model_is_told_so(tracked, mlflow_server, log_in, tmp_path):
    settings = asked_for(mlflow_server)
    register(settings, tracked, tracked.start_run("train"), checkpoint(tmp_path / "one", b"one"),
             {"AP": 0.3, **EVALUATION}, "data", "secret-dogs")  # fmt: skip
    user = log_in(may_not_see="secret-dogs")
    for work in (
        lambda: download(tracked, "models:/secret-dogs/1", tmp_path / "got"),
        lambda: champion(tracked, "secret-dogs"),
    ):
        with pytest.raises(UserError, match=f"does not let '{user}' ") as error:
            work()
        assert SENTENCE.fullmatch(str(error.value))


def test_runs_in_a_postgresql_of_ones_own_with_the_password_in_the_environment(postgres, tmp_path, monkeypatch):
    parts = psycopg.conninfo.conninfo_to_dict(new_database(postgres, "runs").replace("+psycopg", ""))
    place = f"postgresql://{parts['user']}@{parts['host']}:{parts['port']}/{parts['dbname']}"
    monkeypatch.setenv("PGPASSWORD", parts["password"])
    mine = tracker(load_settings(None, [f"tracking.uri={place}"]), tmp_path, "digits")
    run_id = mine.start_run("train")
    (tmp_path / "note").write_text("x")
    mine.log_file(run_id, tmp_path / "note")
    mine.end_run(run_id)
    assert mine.client().get_run(run_id).info.status == "FINISHED"
    assert (tmp_path / "mlartifacts" / run_id / "artifacts" / "note").read_text() == "x"
