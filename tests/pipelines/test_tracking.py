"""MLflow tracking on SQLite: one run per piece of work, nothing lost, nothing on stdout."""

import math
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import pipelines.tracking
from pipelines.settings import UserError, load_settings
from pipelines.tracking import MAX_PARAM, Tracker, code_version, environment, tracker


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


def steps_of(tracked: Tracker, run_id: str, key: str):
    return [(m.step, m.value) for m in tracked.client().get_metric_history(run_id, key)]


def another_process(tracked: Tracker) -> Tracker:
    """The tracker as a process has it that has logged nothing yet."""
    pipelines.tracking._last_steps.cache_clear()
    return pickle.loads(pickle.dumps(tracked))


def test_steps_done_again_after_a_restart_are_not_logged_again(tracked):
    run_id = tracked.start_run("train")
    for step in (10, 20, 30):
        tracked.log_metrics(run_id, {"loss": 1.0 / step}, step)
    restarted = another_process(tracked)  # its checkpoint is of step 10
    for step in (20, 30, 40):
        restarted.log_metrics(run_id, {"loss": 9.0, "val/AP": step / 100}, step)
        restarted.log_metrics(run_id, {"loss": 8.0}, step)
    assert steps_of(tracked, run_id, "loss") == [(10, 0.1), (20, 0.05), (30, 1 / 30), (40, 9.0)]
    assert steps_of(tracked, run_id, "val/AP") == [(20, 0.2), (30, 0.3), (40, 0.4)]  # each metric by itself


def test_the_last_steps_are_asked_for_once(tracked, monkeypatch):
    run_id = tracked.start_run("train")
    client, asked = tracked.client(), []
    get_run = client.get_run
    monkeypatch.setattr(client, "get_run", lambda run_id: asked.append(run_id) or get_run(run_id))
    for step in range(3):
        tracked.log_metrics(run_id, {"loss": 1.0}, step)
    assert asked == [run_id]


def test_a_step_that_could_not_be_logged_may_be_logged_again(tracked, monkeypatch):
    run_id = tracked.start_run("train")
    client = tracked.client()
    with monkeypatch.context() as patch:
        patch.setattr(client, "log_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tracked.log_metrics(run_id, {"loss": 1.0}, 1)
    tracked.log_metrics(run_id, {"loss": 1.0}, 1)
    assert steps_of(tracked, run_id, "loss") == [(1, 1.0)]


def test_final_figures_without_a_step_can_be_renewed(tracked):
    run_id = tracked.start_run("train")
    tracked.log_metrics(run_id, {"test/final/AP": 0.5})
    time.sleep(0.002)  # the newest by the millisecond is shown
    tracked.log_metrics(run_id, {"test/final/AP": 0.4})
    assert run_of(tracked, run_id).data.metrics == {"test/final/AP": 0.4}


@pytest.mark.parametrize("name", ["猫", "", ".", "..", "a//b", "a/", "a/../b", "crème brûlée & tea", "n" * 300])
def test_a_class_of_any_name_has_a_metric_of_its_own(tracked, name):
    run_id = tracked.start_run("train")
    tracked.log_metrics(run_id, {"val/AP": 0.5, "val/AP/犬": 0.6, f"val/AP/{name}": 0.7}, 1)
    assert sorted(run_of(tracked, run_id).data.metrics.values()) == [0.5, 0.6, 0.7]


def test_more_figures_than_mlflow_takes_at_once(tracked):
    run_id = tracked.start_run("train")
    tracked.log_metrics(run_id, {f"val/AP/{i}": math.nan if i % 5 == 0 else 0.5 for i in range(1300)}, 1)
    data = run_of(tracked, run_id).data
    assert len(data.metrics) == 1040
    assert sum(key.startswith("not_finite.") for key in data.tags) == 260


def test_ap_is_bound_to_the_trainings_model_and_the_datasets_digest(tracked):
    client, val = tracked.client(), {"dataset_name": "digits-val", "dataset_digest": "e" * 64}
    run_id = tracked.start_run("train")
    tracked.log_dataset(run_id, "digits-val", "e" * 64, "validation")
    model_id = tracked.training_model(run_id, "digits: v1.0", {"classes": 10})
    tracked.log_metrics(run_id, {"val/AP": 0.1, "val/AP/seven": 0.2}, 10, model_id=model_id, **val)
    tracked.log_metrics(run_id, {"train/loss": 3.0}, 10)

    again = another_process(tracked)
    assert again.training_model(run_id, "digits: v1.0") == model_id  # one for the training
    again.log_metrics(run_id, {"val/AP": 0.9}, 10, model_id=model_id, **val)
    again.log_metrics(run_id, {"val/AP": 0.3, "val/AP/seven": 0.4}, 20, model_id=model_id, **val)
    again.log_metrics(run_id, {"best/AP": 0.3}, model_id=model_id, **val)
    again.end_training_model(model_id, tags={"best_step": 20})

    digest = run_of(tracked, run_id).inputs.dataset_inputs[0].dataset.digest
    datasets = [{"dataset_name": "digits-val", "dataset_digest": digest}]
    [model] = client.search_logged_models([tracked.experiment_id()], "metrics.`best/AP` > 0.2", datasets)
    assert (model.model_id, model.name, model.source_run_id) == (model_id, "digits- v1-0", run_id)
    assert model.status == "READY" and model.tags == {"classes": "10", "best_step": "20"}
    assert sorted((m.key, m.step, m.value) for m in model.metrics) == [
        ("best/AP", 0, 0.3),
        ("val/AP", 10, 0.1),
        ("val/AP", 20, 0.3),
        ("val/AP/seven", 10, 0.2),
        ("val/AP/seven", 20, 0.4),
    ]
    assert {(m.run_id, m.dataset_name, m.dataset_digest) for m in model.metrics} == {(run_id, "digits-val", digest)}
    run = run_of(tracked, run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model_id]
    assert run.data.metrics["val/AP"] == 0.3  # the run's own figures are kept as well
    assert steps_of(tracked, run_id, "val/AP/seven") == [(10, 0.2), (20, 0.4)]


def test_a_failed_trainings_model_may_get_ready_later(tracked):
    model_id = tracked.training_model(tracked.start_run("train"), "digits")
    assert tracked.client().get_logged_model(model_id).status == "PENDING"
    tracked.end_training_model(model_id, ready=False)
    assert tracked.client().get_logged_model(model_id).status == "FAILED"
    tracked.end_training_model(model_id)
    assert tracked.client().get_logged_model(model_id).status == "READY"


@pytest.mark.parametrize("lacks", ["model_id", "dataset_name", "dataset_digest"])
def test_a_dataset_that_mlflow_would_drop_is_refused(tracked, lacks):
    given = {key: "x" for key in ("model_id", "dataset_name", "dataset_digest") if key != lacks}
    with pytest.raises(ValueError, match="a name, a digest and a model"):
        tracked.log_metrics(tracked.start_run("train"), {"AP": 0.5}, 1, **given)


def test_what_a_run_ran_on_is_told_at_each_start(tracked):
    run_id = tracked.start_run("train")
    for torch in ("2.14.0", "2.14.0", "2.15.0", "2.15.0", "2.14.0"):
        tracked.log_environment(run_id, {"torch": torch, "gpus": "none"})
    tracked.log_environment(run_id, {"torch": "2.14.0", "new": "fact"})
    tags = {k: v for k, v in run_of(tracked, run_id).data.tags.items() if "env." in k}
    assert tags == {
        "env.torch": "2.14.0",
        "changed.env.torch": "2.14.0 -> 2.15.0 -> 2.14.0",
        "env.gpus": "none",
        "env.new": "fact",
    }


def test_the_environment_names_no_machine_user_or_folder(tracked):
    facts = environment()
    assert set(facts) == {
        "code", "python", "torch", "torchvision", "ray", "mlflow", "cuda", "platform", "cpus", "gpus",
    }  # fmt: skip
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(facts["cpus"]) >= 1
    assert all(facts.values())
    assert str(Path.cwd()) not in str(facts) and str(Path(sys.prefix)) not in str(facts)
    run_id = tracked.start_run("train")
    tracked.log_environment(run_id, facts)
    tags = run_of(tracked, run_id).data.tags
    assert {key: tags[f"env.{key}"] for key in facts} == facts


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_code_is_a_commit_changed_or_not_and_else_a_package(tmp_path, monkeypatch):
    for name in ("pipelines/tracking.py", "tests/test.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(pipelines.tracking, "__file__", str(tmp_path / "pipelines" / "tracking.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_version().startswith("detr-system ")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "tests")
    git(tmp_path, "commit", "-qm", "one")
    assert code_version().startswith("detr-system ")  # somebody's checkout that we are installed in
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "two")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "tests" / "test.py").write_text("x = 2\n")
    assert code_version() == f"git {commit}"
    (tmp_path / "pipelines" / "new.py").write_text("")
    assert code_version() == f"git {commit} and changes"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert code_version().startswith("detr-system ")


def system_steps(tracked: Tracker, run_id: str) -> list[int]:
    return [step for step, _ in steps_of(tracked, run_id, "system/cpu_utilization_percentage")]


def test_the_use_of_the_machine_is_logged_and_goes_on_after_a_restart(tracked, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = mlflow.get_tracking_uri()
    run_id = tracked.start_run("train")
    for least in (2, 5):
        with tracked.system_metrics(run_id, seconds=0.1):
            end = time.monotonic() + 60
            while len(system_steps(tracked, run_id)) < least and time.monotonic() < end:
                time.sleep(0.05)
    steps = system_steps(tracked, run_id)
    assert len(steps) >= 5 and steps == list(range(len(steps)))
    values = run_of(tracked, run_id).data.metrics
    assert 0 < values["system/system_memory_usage_percentage"] <= 100
    time.sleep(0.3)
    assert system_steps(tracked, run_id) == steps  # it has stopped
    assert mlflow.get_tracking_uri() == uri and mlflow.active_run() is None
    assert not list(tmp_path.iterdir())


def test_a_training_goes_on_when_its_use_of_the_machine_cannot_be_logged(tracked, monkeypatch, caplog):
    import mlflow.system_metrics.system_metrics_monitor as mlflows

    with tracked.system_metrics("0" * 32, seconds=0.01):  # no such run: the monitor ends by itself
        time.sleep(0.1)
    monkeypatch.setattr(mlflows.SystemMetricsMonitor, "__init__", lambda *_, **__: 1 / 0)
    done = False
    with tracked.system_metrics(tracked.start_run("train")):
        done = True
    assert done and "is not logged" in caplog.text
    with pytest.raises(RuntimeError, match="mine"), tracked.system_metrics(tracked.start_run("train")):
        raise RuntimeError("mine")


def test_a_picture_of_each_validation_is_an_artifact(tracked, tmp_path):
    run_id = tracked.start_run("train")
    for step in (500, 1000):
        path = tmp_path / f"step-{step:07d}.png"
        Image.new("RGB", (8, 8), (step % 256, 0, 0)).save(path)
        tracked.log_file(run_id, path, "val/detections")
        path.unlink()  # it was copied
    found = tracked.client().list_artifacts(run_id, "val/detections")
    assert [file.path for file in found] == [f"val/detections/step-{step:07d}.png" for step in (500, 1000)]
    got = tracked.client().download_artifacts(run_id, found[0].path, str(tmp_path))
    assert Image.open(got).size == (8, 8)


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


@pytest.mark.parametrize(
    "uri, words",
    [
        ("http://127.0.0.1:9", "No MLflow server answers"),
        ("postgresql://me@127.0.0.1:9/runs", "No database answers at postgresql://me@127.0.0.1:9/runs"),
        ("mysql+pymysql://127.0.0.1:9/runs", "No database answers"),
        ("mlruns", "write it as"),
    ],
)
def test_a_uri_that_cannot_work_fails_at_once(tmp_path, uri, words):
    with pytest.raises(UserError, match=words):
        tracker(load_settings(None, [f"tracking.uri={uri}"]), tmp_path, "digits")


@pytest.mark.parametrize("uri, port", [("postgresql://host/runs", 5432), ("postgresql+psycopg://host:9/runs", 9),
                                       ("mysql://host/runs", 3306), ("https://host", 443)])  # fmt: skip
def test_a_server_is_asked_at_its_usual_port(monkeypatch, tmp_path, uri, port):
    asked = []

    def connect(place, timeout):
        asked.append(place)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr("pipelines.tracking.socket.create_connection", connect)
    with pytest.raises(UserError, match="nobody there"):
        tracker(load_settings(None, [f"tracking.uri={uri}"]), tmp_path, "digits")
    assert asked == [("host", port)]


@pytest.mark.parametrize("uri", ["http://me:secret@127.0.0.1:9", "postgresql://me:secret@host/runs",
                                 "postgresql://host/runs?user=me&password=secret", "https://:secret@host"])  # fmt: skip
def test_a_password_in_the_uri_is_refused_and_not_shown(uri, tmp_path):
    (tmp_path / "settings.yaml").write_text(f"tracking: {{uri: '{uri}'}}\n")
    for given in [(None, [f"tracking.uri={uri}"]), (tmp_path / "settings.yaml",)]:
        with pytest.raises(UserError, match="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as error:
            load_settings(*given)
        assert "secret" not in str(error.value)
    assert load_settings(None, ["tracking.uri=postgresql://me@host:5432/runs"]).tracking.uri  # a user is no secret


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


def test_a_run_that_was_closed_as_stopped_is_not_closed_as_failed_by_who_failed_of_it(tmp_path):
    here = tracker(load_settings(), tmp_path, "photos")
    for by_another, ended in (("KILLED", "KILLED"), (None, "FAILED")):
        run_id = here.start_run("a trial")
        if by_another:
            here.client().set_terminated(run_id, by_another)
        here.end_run(run_id, "FAILED")
        assert here.client().get_run(run_id).info.status == ended
