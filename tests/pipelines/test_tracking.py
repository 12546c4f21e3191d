"""MLflow tracking on SQLite: one run per piece of work, nothing lost, nothing on stdout."""

import math
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.settings import UserError, load_settings
from pipelines.tracking import MAX_PARAM, Tracker, tracker


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Tracker:
    return tracker(load_settings(), tmp_path_factory.mktemp("store"), "digits")


def run_of(tracked: Tracker, run_id: str):
    return tracked.client().get_run(run_id)


def test_a_resumed_run_stays_one_run(tracked):
    run_id = tracked.start_run("train", tags={"key": "k1"})
    tracked.log_metrics(run_id, {"loss": 2.0}, 1)
    tracked.end_run(run_id, "FAILED")
    assert run_of(tracked, run_id).info.status == "FAILED"

    assert tracked.start_run("train", run_id, tags={"attempt": 2}) == run_id
    assert run_of(tracked, run_id).info.status == "RUNNING"
    tracked.log_metrics(run_id, {"loss": 1.0}, 2)
    tracked.end_run(run_id)

    run = run_of(tracked, run_id)
    assert (run.info.status, run.data.tags["attempt"], run.data.tags["key"]) == ("FINISHED", "2", "k1")
    history = tracked.client().get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]
    assert tracked.find_run({"key": "k1"}) == run_id


def test_a_run_that_is_gone_is_started_anew(tracked):
    first = tracked.start_run("train", "0" * 32)
    assert first != "0" * 32
    tracked.client().delete_run(first)
    assert tracked.start_run("train", first) != first


def test_find_run_needs_all_tags_and_takes_the_newest(tracked):
    tracked.start_run("a", tags={"stage": "sweep", "trial": 1})
    newest = tracked.start_run("b", tags={"stage": "sweep", "trial": 2})
    assert tracked.find_run({"stage": "sweep", "trial": 2}) == newest
    assert tracked.find_run({"stage": "sweep", "trial": 3}) is None


def test_params_can_be_logged_again_on_resume(tracked):
    run_id = tracked.start_run("train")
    params = {
        "train": {"lr": 4e-4, "weight_decay": float("nan"), "init_from": None, "augment": {"scale": 0.3}},
        "long": "x" * (MAX_PARAM + 100),
        "space": {f"loss.weight[{number}]": number for number in range(230)},
    }
    tracked.log_params(run_id, params)
    tracked.log_params(run_id, params)
    tracked.log_params(run_id, {"train": {"lr": 1e-4}})
    data = run_of(tracked, run_id).data
    assert data.params["train.lr"] == "0.0004"
    assert data.tags["changed.train.lr"] == "0.0001"  # params cannot change, but the change is not lost
    assert data.params["train.augment.scale"] == "0.3"
    assert data.params["train.init_from"] == "null"
    assert data.params["train.weight_decay"] == "NaN"
    assert len(data.params["long"]) == MAX_PARAM
    assert len(data.params) == 4 + 1 + 230
    assert [key for key in data.tags if key.startswith("changed.")] == ["changed.train.lr"]


def test_a_metric_that_is_not_finite_becomes_a_tag(tracked):
    run_id = tracked.start_run("train")
    tracked.log_metrics(run_id, {"loss": math.nan, "AP": 0.5, "grad": math.inf}, 7)
    tracked.log_metrics(run_id, {"loss": math.nan}, 8)
    data = run_of(tracked, run_id).data
    assert data.metrics == {"AP": 0.5}
    assert data.tags["not_finite.loss"] == "nan at step 8"
    assert data.tags["not_finite.grad"] == "inf at step 7"


def test_the_dataset_is_found_by_its_digest(tracked):
    run_id = tracked.start_run("train")
    for _ in range(2):  # a resumed run says it again
        tracked.log_dataset(run_id, "digits", "d" * 64, "training", profile={"images": 5})
        tracked.log_dataset(run_id, "digits", "e" * 64, "validation")
    inputs = run_of(tracked, run_id).inputs.dataset_inputs
    assert sorted((entry.dataset.digest, entry.tags[0].value) for entry in inputs) == [
        ("d" * 36, "training"),
        ("e" * 36, "validation"),
    ]
    assert "d" * 64 in next(e.dataset.profile for e in inputs if e.dataset.digest.startswith("d"))


def test_files_and_folders_end_in_the_stores_artifacts(tracked, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "page.html").write_text("<p>")
    run_id = tracked.start_run("report")
    tracked.log_file(run_id, tmp_path / "report" / "page.html", "one")
    tracked.log_file(run_id, tmp_path / "report", "all")
    place = Path(tracked.artifact_root.removeprefix("file://")) / run_id / "artifacts"
    assert (place / "one" / "page.html").read_text() == (place / "all" / "page.html").read_text() == "<p>"


def test_a_tracker_travels_as_plain_strings(tracked):
    copy = pickle.loads(pickle.dumps(tracked))
    assert copy == tracked
    assert copy.find_run({"no": "such"}) is None


def test_a_deleted_experiment_is_explained(tracked):
    mine = Tracker(tracked.uri, "gone", tracked.artifact_root)
    mine.client().delete_experiment(mine.experiment_id())
    with pytest.raises(UserError, match="experiments restore -x"):
        mine.start_run("train")


@pytest.mark.parametrize("uri, words", [("http://127.0.0.1:9", "No MLflow server answers"), ("mlruns", "write it as")])
def test_a_uri_that_cannot_work_fails_at_once(tmp_path, uri, words):
    with pytest.raises(UserError, match=words):
        tracker(load_settings(None, [f"tracking.uri={uri}"]), tmp_path, "digits")


def test_a_password_in_the_uri_is_not_shown(tmp_path):
    settings = load_settings(None, ["tracking.uri=http://me:secret@127.0.0.1:9"])
    with pytest.raises(UserError, match="at http://127") as error:
        tracker(settings, tmp_path, "digits")
    assert "secret" not in str(error.value)


def test_two_processes_may_open_a_new_store_at_once_and_stdout_stays_empty(tmp_path):
    script = (
        "import sys; from pathlib import Path; from pipelines.settings import load_settings\n"
        "from pipelines.tracking import tracker\n"
        "t = tracker(load_settings(), Path(sys.argv[1]), 'digits'); t.end_run(t.start_run('train'))\n"
    )

    def open_store(_):
        command = [sys.executable, "-c", script, str(tmp_path / "store")]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(open_store, range(2)):
            assert done.returncode == 0, done.stderr
            assert done.stdout == "" and done.stderr == ""
    mine = tracker(load_settings(), tmp_path / "store", "digits")
    assert len(mine.client().search_runs([mine.experiment_id()])) == 2
