"""What a sweep tries, what becomes of its trials, and what is left of them after a stop."""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from pipelines import sweep as module
from pipelines.settings import Range, RunSettings, UserError, override_settings
from pipelines.stage import read_json
from pipelines.sweep import check_space, choose_best, draw, plan, ready_space, settings_of
from pipelines.tracking import tracker

PRESETS = ("tiny", "detr_resnet50")


def settings_with(**changes) -> RunSettings:
    return override_settings(RunSettings(), {key.replace("__", "."): value for key, value in changes.items()})


def planned(settings: RunSettings, space: dict) -> list[dict]:
    return plan(override_settings(settings, {"sweep.space": space}))[2]


def test_the_present_settings_come_first_and_no_two_trials_are_alike():
    settings = settings_with(sweep__trials=12)
    space = ready_space(settings)
    trials = planned(settings, space)
    assert trials[0] == check_space(settings, space)[1] and len(trials) == 12
    assert len({json.dumps(trial, sort_keys=True) for trial in trials}) == 12
    assert trials == planned(settings, space) != planned(settings_with(sweep__trials=12, seed=1), space)


def test_a_small_space_is_tried_whole():
    assert len(planned(settings_with(sweep__trials=10), {"loss.cost_class": [2.0, 1.0]})) == 2


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_ready_space_is_around_the_present_settings_and_all_of_it_can_be_trained(preset, tied):
    settings = settings_with(model__preset=preset, sweep__tied=tied)
    space = ready_space(settings)
    _, present = check_space(settings, space)
    assert all(present[key] in values for key, values in space.items())
    assert ("loss.cost_bbox" in space) is not tied
    assert ("loss.focal_alpha" in space) is (preset == "tiny")
    assert ("loss.eos_coef" in space) is (preset == "detr_resnet50")
    assert ("model.denoising.groups" in space) is (preset == "tiny")
    drawn = random.Random(0)
    for _ in range(50):  # together, too
        values = {key: draw(tries, drawn) for key, tries in space.items()}
        override_settings(settings, settings_of(settings, values, present))


def test_a_cost_follows_its_loss_unless_both_are_named_or_it_is_told_not_to():
    settings = settings_with(loss__loss_bbox=5.0, loss__cost_bbox=4.0)
    present = {"loss.loss_bbox": 5.0}
    assert settings_of(settings, {"loss.loss_bbox": 10.0}, present) == {"loss.loss_bbox": 10.0, "loss.cost_bbox": 8.0}
    assert settings_of(settings, {"loss.cost_bbox": 2.0}, {"loss.cost_bbox": 4.0}) == {
        "loss.cost_bbox": 2.0, "loss.loss_bbox": 2.5,
    }  # fmt: skip
    both = {"loss.loss_bbox": 10.0, "loss.cost_bbox": 4.0}
    assert settings_of(settings, both, {**present, "loss.cost_bbox": 4.0}) == {"loss.loss_bbox": 10.0}
    free = override_settings(settings, {"sweep.tied": False})
    assert settings_of(free, {"loss.loss_bbox": 10.0}, present) == {"loss.loss_bbox": 10.0}
    assert settings_of(settings, present, present) == {}


def test_ranges_are_drawn_within_and_whole_numbers_stay_whole():
    drawn = random.Random(0)
    rates = [draw(Range(low=1e-4, high=1e-2, log=True), drawn) for _ in range(300)]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 0.35 < sum(rate < 1e-3 for rate in rates) / 300 < 0.65  # evenly over the logarithm
    queries = [draw(Range(low=50, high=52), drawn) for _ in range(60)]
    assert set(queries) == {50, 51, 52} and all(isinstance(number, int) for number in queries)
    assert all(isinstance(draw(Range(low=10, high=1000, log=True), drawn), int) for _ in range(20))


def test_values_are_what_the_setting_makes_of_them():
    """YAML has 1e-3 for a word, and 2 for no float."""
    space, present = check_space(RunSettings(), {"train.lr": ["1e-3", 2e-3], "loss.loss_ce": [1, 2]})
    assert space == {"train.lr": [1e-3, 2e-3], "loss.loss_ce": [1.0, 2.0]} and present["train.lr"] == 2e-3
    ranges = {"loss.loss_giou": Range(low=1, high=4), "model.num_queries": Range(low=30.0, high=300.0)}
    space, _ = check_space(RunSettings(), ranges)
    assert not space["loss.loss_giou"].is_whole() and space["model.num_queries"].is_whole()


def test_presets_can_be_swept():
    """A preset stands for other settings and leaves none of its own to read."""
    settings = settings_with(sweep__space={"model.preset": ["small", "base"], "train.lr": [1e-3]}, sweep__trials=9)
    _, present, trials = plan(settings)
    changes = [settings_of(settings, trial, present) for trial in trials[1:]]
    assert {change["model.preset"] for change in changes} == {"small", "base"}
    assert {override_settings(settings, change).model.hidden_dim for change in changes} == {192, 256}


def test_a_grid_is_tried_whole_or_refused():
    space = {"loss.cost_class": [1.0, 2.0, 3.0], "train.lr": [1e-3, 2e-3]}
    trials = planned(settings_with(sweep__search="grid"), space)
    assert len(trials) == 6 and trials[0] == {"loss.cost_class": 2.0, "train.lr": 2e-3}
    with pytest.raises(UserError, match=r"6 points.*sweep.trials") as refused:
        planned(settings_with(sweep__search="grid", sweep__trials=5), space)
    assert refused.value.exit_code == 2
    with pytest.raises(UserError, match=r"list of values for train.lr"):
        planned(settings_with(sweep__search="grid"), {"train.lr": Range(low=1e-3, high=2e-3)})


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("loss.cost_clas", [1.0], r"did you mean 'loss.cost_class'"),
        ("loss", [1.0], "Setting 'loss'"),
        ("los.cost_class", [1.0], "'loss'"),
        ("train.lr", [1e-3, -1.0], "greater than 0"),
        ("train.augment.recipe", Range(low=1.0, high=2.0), "train.augment.recipe.*'none'"),
        ("model.norm", ["frozen", 3], "model.norm"),
        ("train.augment", [{"recipe": "none"}], "group of settings; name one of recipe"),
        ("train.budget", ["1 minute"], "cannot be swept"),
        ("evaluate.max_dets", [10, 100], "cannot be swept"),
        ("train.num_workers", [1, 2], "cannot be swept"),
    ],
)
def test_what_cannot_be_tried_is_one_sentence_before_anything_runs(key, values, words):
    with pytest.raises(UserError, match=words) as refused:
        check_space(RunSettings(), {key: values})
    assert refused.value.exit_code == 2


def test_the_command_says_so_before_it_does_anything(tmp_path):
    from click.testing import CliRunner

    from jobs.cli import main

    store = tmp_path / "store"
    for command in (["sweep"], ["pipeline", "sweep.in_pipeline=true"]):
        result = CliRunner().invoke(main, [*command, "--store", str(store), "sweep.space={loss.cost_clas: [1, 2]}"])
        assert result.exit_code == 2 and "did you mean 'loss.cost_class'" in result.output
    assert not store.exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"low": 2, "high": 1}, "not less than high"),
        ({"low": 0, "high": 1, "log": True}, "log needs"),
        ({"low": 1, "hihg": 2}, "no setting .*hihg"),
        ([], "at least 1"),
        ("0.1", "list"),
    ],
)
def test_a_range_that_is_none_is_refused(told, words):
    with pytest.raises(UserError, match=words):
        override_settings(RunSettings(), {"sweep.space": {"train.lr": told}})


def row(number: int, ap: float | None, status: str = "finished", **changes) -> dict:
    return {"number": number, "AP": ap, "status": status, "changes": changes}


def test_the_present_settings_stay_unless_another_trial_gains_enough():
    present, better = row(0, 0.50), row(1, 0.505, lr=1)
    assert choose_best([present, better], 0.01) == present
    assert choose_best([present, better], 0.005) == better
    assert choose_best([row(0, None, "failed"), better], 0.01) == better
    assert choose_best([present, row(1, 0.9, "stopped", lr=1)], 0.01) == present  # it was not trained to its end


# A trial whose training is a sum: AP grows to what the learning rate says.
APS = {2e-3: 0.5, 1e-3: 0.3, 4e-3: 0.6, 3e-3: 0.1}  # the fourth is let through, though it is the worst
BROKEN, NONSENSE = 6e-3, 7e-3
VALIDATIONS = 4


@pytest.fixture
def sums(monkeypatch):
    """`pipelines.sweep` with trainings that take no time, and note that they were done."""

    def trial(config, common):
        import json

        from pipelines import sweep
        from pipelines.training_log import PROGRESS
        from pipelines.training_state import Diverged

        def train(settings, dataset, place, tracker, name, tags, callbacks):
            rate = settings.train.lr
            with (place.parents[1] / "trained").open("a") as file:
                file.write(f"{rate}\n")
            if rate == 6e-3:
                raise Diverged("The model's outputs stopped being finite.")
            if rate == 7e-3:
                raise RuntimeError("Something else.")
            for k in range(1, 5):
                ap = APS[rate] * k / 4 if rate in APS else 0.3 * k / 4
                with (place / PROGRESS).open("a") as file:
                    record = {"event": "validation", "step": 10 * k, "mark": k, "AP": ap, "AP50": ap}
                    file.write(json.dumps({"event": "start", "time": 100 * k}) + "\n")
                    file.write(json.dumps(record | {"time": 100 * k + 9}) + "\n")
                if k < 4:
                    callbacks[0].after_report(None, [{"AP": -1.0, "mark": k}], None)  # a checkpoint in between
                callbacks[0].after_report(None, [{"AP": ap, "mark": k}], None)
                time.sleep(0.3)  # for Tune to decide
            return {"steps": 40, "images_per_second": 9.0, "AP": ap, "AP50": ap, "run_id": "run"}

        sweep.train = train
        original(config, common)

    original = module._trial
    monkeypatch.setattr(module, "_trial", trial)


def try_all(folder: Path, settings: RunSettings, space: dict, tracked, at_once: int = 1) -> list[dict]:
    space, present, trials = plan(override_settings(settings, {"sweep.space": space}))
    common = {
        "settings": settings.model_dump(mode="json"), "present": present, "dataset": str(folder),
        "folder": str(folder), "tracker": {"uri": tracked.uri, "experiment": "x", "artifact_root": None},
        "run_id": "parent", "name": "sums", "devices": 2,
    }  # fmt: skip
    module.run_trials(common, settings, space, trials, at_once)
    return module._rows(folder)


def trained(folder: Path) -> Counter:
    return Counter(map(float, (folder / "trained").read_text().split()))


@pytest.mark.ray
def test_trials_are_stopped_failed_and_finished_each_with_its_row_and_known_ones_are_not_done_again(
    tmp_path, ray_cluster, sums
):
    rates = [*APS, BROKEN, NONSENSE]
    settings = settings_with(
        sweep__trials=6, sweep__search="grid", sweep__validations=VALIDATIONS, sweep__grace_period=1
    )
    tracked = tracker(settings, tmp_path / "store", "x")
    rows = try_all(tmp_path, settings, {"train.lr": rates}, tracked)
    assert [row["values"]["train.lr"] for row in rows] == rates and [row["number"] for row in rows] == list(range(6))
    status = {row["values"]["train.lr"]: row["status"] for row in rows}
    assert status == {
        2e-3: "finished", 1e-3: "stopped", 4e-3: "finished", 3e-3: "finished", BROKEN: "failed", NONSENSE: "failed",
    }
    by_rate = {row["values"]["train.lr"]: row for row in rows}
    assert [point["AP"] for point in by_rate[4e-3]["curve"]] == pytest.approx([0.15, 0.3, 0.45, 0.6])
    assert by_rate[1e-3]["AP"] == 0.075 and len(by_rate[1e-3]["curve"]) == 1
    assert "finite" in by_rate[BROKEN]["error"] and "Something else" in by_rate[NONSENSE]["error"]
    assert by_rate[2e-3]["changes"] == {} and by_rate[4e-3]["seconds"] == 4 * 9  # of four starts
    assert by_rate[4e-3]["device_hours"] == pytest.approx(2 * 36 / 3600)
    assert not by_rate[BROKEN]["again"] and by_rate[NONSENSE]["again"]

    # As after a kill: one trial that was about to be stopped, and one that was not started.
    for rate, files in {1e-3: [module.TRIAL], NONSENSE: [module.TRIAL, module.TRIED]}.items():
        tried = tmp_path.glob("trials/*/tried.json")
        (place,) = (path.parent for path in tried if read_json(path)["values"]["train.lr"] == rate)
        for file in files:
            (place / file).unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("trials/*/trial.json")}
    again = try_all(tmp_path, settings, {"train.lr": rates}, tracked)
    assert [row["number"] for row in again] == list(range(6)) and len(before) == 4
    assert all(path.read_bytes() == content for path, content in before.items())
    assert again[1]["status"] == "stopped"  # by the AP it had before: it was not trained again
    # What failed without a reason that is the trial's own is tried again by Tune itself.
    assert trained(tmp_path) == Counter([*rates, *[NONSENSE] * (2 * module.ATTEMPTS - 1)])


@pytest.mark.ray
@pytest.mark.parametrize(("low", "decay"), [(1e-4, 1e-4), (1e-4, 0.0)])
def test_optuna_goes_on_from_what_is_known_within_the_space(tmp_path, ray_cluster, sums, low, decay):
    """Two at a time; also where the present settings lie outside of the space (a decay of 0 has no logarithm)."""
    space = {"train.lr": {"low": low, "high": 1e-2, "log": True}, "train.weight_decay": {"low": 1e-5, "high": 1e-3,
             "log": True}}  # fmt: skip
    settings = settings_with(
        sweep__trials=2, sweep__search="optuna", sweep__scheduler="median", sweep__space=space,
        train__weight_decay=decay,
    )  # fmt: skip
    tracked = tracker(settings, tmp_path / "store", "x")
    first = try_all(tmp_path, settings, settings.sweep.space, tracked, at_once=2)
    assert first[0]["changes"] == {} and [row["number"] for row in first] == [0, 1]
    more = override_settings(settings, {"sweep.trials": 3})
    rows = try_all(tmp_path, more, settings.sweep.space, tracked, at_once=2)
    assert rows[:2] == first and [row["number"] for row in rows] == list(range(3))
    assert sum(trained(tmp_path).values()) == 3  # none twice
    for row in rows[1:]:
        assert low <= row["values"]["train.lr"] <= 1e-2 and 1e-5 <= row["values"]["train.weight_decay"] <= 1e-3


SMALL = [
    "sample.train=16", "sample.val=8", "sample.test=0", "train.batch_size=4", "model.image_size=64",
    "model.hidden_dim=32", "model.nheads=4", "model.dim_feedforward=32", "sweep.trials=4", "sweep.budget=4 steps",
    "sweep.validations=2", "sweep.grace_period=1", "sweep.search=grid",
    "sweep.space={train.lr: [0.002, 0.001, 1e+30]}",
]  # fmt: skip


def start(store: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs.cli", "sweep", "--store", str(store), "--json", *SMALL, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_trials(store: Path, number: int, process: subprocess.Popen) -> dict[Path, bytes]:
    deadline = time.monotonic() + 300
    while len(known := list(store.glob("sweep/*/trials/*/trial.json"))) < number and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    return {path: path.read_bytes() for path in known}


@pytest.mark.ray
def test_stopped_and_killed_between_trials_it_repeats_none_and_leaves_one_tree(tmp_path):
    """By real trainings, one of which diverges."""
    from mlflow import MlflowClient

    store = tmp_path / "store"
    stopped = start(store)
    first = wait_for_trials(store, 1, stopped)
    while len(list(store.glob("sweep/*/trials/*/run.json"))) < 2:  # the next one trains
        time.sleep(0.1)
    time.sleep(3)
    stopped.send_signal(signal.SIGINT)  # as Ctrl-C
    _, err = stopped.communicate(timeout=120)
    assert stopped.returncode == 130 and "goes on from here" in err, err
    assert not list(store.glob("sweep/*/stage.json")) and len(list(store.glob("sweep/*/trials/*/trial.json"))) == 1
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (experiment,) = (x for x in client.search_experiments() if x.name != "Default")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED", "KILLED"]

    killed = start(store)
    before = wait_for_trials(store, 2, killed)
    assert first.items() <= before.items()
    mine = psutil.Process(killed.pid).children(recursive=True)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    psutil.wait_procs(mine, timeout=60)
    again = start(store)
    out, err = again.communicate(timeout=500)
    assert again.returncode == 0, err
    result = json.loads(out.strip().splitlines()[-1])
    assert len(before) == 2 and all(path.read_bytes() == content for path, content in before.items())
    status = {row["values"]["train.lr"]: row["status"] for row in result["trials"]}
    assert [row["number"] for row in result["trials"]] == [0, 1, 2]
    assert status.pop(1e30) == "failed" and set(status.values()) <= {"finished", "stopped"}
    assert "train.lr" in next(row["error"] for row in result["trials"] if row["status"] == "failed")
    (folder,) = store.glob("sweep/*")
    assert (folder / "best.yaml").is_file() and read_json(folder / "trials.json")["best"] == 0

    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags["detr.stage"] == "sweep")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 4 and len(children) == 3 and parent.info.status == "FINISHED"
    ended = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    assert {run.info.run_id: run.info.status for run in children} == {
        row["run_id"]: ended[row["status"]] for row in result["trials"]
    }
    assert not [model for model in client.search_logged_models([experiment.experiment_id])
                if str(model.status).endswith("PENDING")]  # fmt: skip


@pytest.mark.ray
def test_what_no_trial_can_get_is_refused_at_once(tmp_path, ray_cluster):
    settings = settings_with(train__num_workers=500)
    with pytest.raises(UserError, match="500 worker") as refused:
        module.check_room(settings, use_gpu=False)
    assert refused.value.exit_code == 2
    with pytest.raises(UserError, match=r"leave .* out"):
        module.check_room(settings_with(train__use_gpu=True), use_gpu=True)
