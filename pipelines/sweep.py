"""Search over any settings (Ray Tune): matching costs, loss weights, rates, queries; judged by AP on "val".

Never by the loss: the weights being tried change its scale. What a trial came to lies in its folder, and Tune is told
of it again when a sweep goes on after a stop: finished trials are not repeated, and nothing of Tune's own is read.
"""
from __future__ import annotations

import itertools
import math
import os
import random
import statistics
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from joblib import cpu_count
from pyarrow.fs import FileType

from pipelines.fit import fit_to_data
from pipelines.mirror import at_hand, local, name_of
from pipelines.progress import RECENT, alongside, console, progress
from pipelines.settings import SAME_MODEL, Axis, Range, RunSettings, UserError, digest, override_settings
from pipelines.stage import read_json, write_json
from pipelines.storage import WORKING, Folder, is_remote, join, kind, list_files, locate
from pipelines.tracking import Tracker
from pipelines.train import check_room, find_weights, train, uses_gpu
from pipelines.training_log import PROGRESS, read_history, read_progress
from pipelines.training_state import Diverged
from pipelines.trials import analyse, draw_trials, trials_table

FORMAT = 2
TRIED, TRIAL = "tried.json", "trial.json"  # what a trial tries; what it came to, once it is over
# A cost and the weight of the loss it stands for (Carion et al. 2020 have one figure for both).
TIED = {"loss.cost_class": "loss.loss_ce", "loss.cost_bbox": "loss.loss_bbox", "loss.cost_giou": "loss.loss_giou"}
FACTORS = (0.5, 1.0, 2.0)  # of the present value, in the ready space
SWEEPABLE = ("model.", "loss.", "train.", "seed")
# What would make trials unlike in length or measure, or says nothing of a model.
FIXED = {f"train.{key}" for key in ("budget", "validations", "patience", "num_workers", "use_gpu", *SAME_MODEL)}
THROUGH = (0, 3, 6)  # trials that no scheduler stops: the present settings, and what says how good its cuts are
STARTED = 0.01  # of a trial, when no step of it is known yet
ATTEMPTS = 3  # for a trial that its machine was taken from
NOTHING = {"AP": -1.0, "validation": 0}  # Tune wants to be told something of a trial that came to nothing

Values = dict[str, Any]


def sweep(settings: RunSettings, dataset_folder: Path, folder: Path, tracker: Tracker, name: str) -> dict[str, Any]:
    """Try `sweep.trials` settings for `sweep.budget` each; trial 0 is the present settings.

    Leaves trials.json (what `pipelines.trials` reads), pictures, and best.yaml, which `train --config` takes. Another
    trial is best only when it beats the present settings by `sweep.min_gain` AP, since short trials are noisy.
    Returns {"best": changed settings, "best_config", "trials": rows, "run_id", "words"}. Raises UserError for a setting
    that does not exist, where no trial can get what it needs, or when no trial ended.
    """
    settings, fitted = fit_to_data(find_weights(settings), dataset_folder)
    if fitted:
        console.print(f"Fitted to the data: {'; '.join(fitted)}.")
    folder, options, use_gpu = Path(folder).resolve(), settings.sweep, uses_gpu(settings)
    space, present, trials = plan(settings)
    check_room(settings, use_gpu)
    if options.scheduler != "none":
        _check_state_api()
    shared = name_of(folder)  # for what trials write, wherever they are
    for place in _places(shared, TRIAL):
        if read_json(join(place, TRIAL))["again"]:  # it failed of what may be better by now
            Folder(place).delete(TRIAL)
    known = len(_rows(shared))
    tried_at_once = _at_once(settings, use_gpu)

    run_id = tracker.start_run(name, _run_id(shared), {"detr.stage": "sweep"})
    write_json(join(shared, "run.json"), {"format": 1, "run_id": run_id})
    tracker.log_params(run_id, {"sweep": options.model_dump(mode="json"), "seed": settings.seed})
    number = options.trials if trials is None else len(trials)
    console.print(
        f"Sweep of {number} trials, {options.budget} each"
        + (f", {tried_at_once} at once" if tried_at_once > 1 else "") + (f"; {known} are known" if known else "") + "."
    )  # fmt: skip
    common = {
        "settings": settings.model_dump(mode="json"), "present": present, "folder": shared,
        "dataset": name_of(dataset_folder), "tracker": asdict(tracker), "run_id": run_id, "name": name,
        "devices": _devices(settings, use_gpu),
    }  # fmt: skip
    status = "FAILED"
    try:
        with alongside(follow, shared, number, tracker):
            run_trials(common, settings, space, trials, tried_at_once)
        rows = _rows(shared)
        if len(rows) < number and trials is None:
            console.print(f"Optuna proposed {number - len(rows)} of its trials a second time; they were not repeated.")
        if all(row["AP"] is None for row in rows):
            raise UserError(f"No trial of the sweep ended; the first says: {rows[0]['error'] if rows else 'nothing'}")
        best = choose_best(rows, options.min_gain)
        found = {
            "format": FORMAT, "search": options.search, "scheduler": options.scheduler, "budget": options.budget,
            "validations": options.validations, "device": "GPU" if use_gpu else "CPU", "min_gain": options.min_gain,
            "space": {key: axis if isinstance(axis, list) else axis.model_dump() for key, axis in space.items()},
            "grace_period": options.grace_period, "present": present, "trials": rows, "best": best["number"],
        }  # fmt: skip
        for file in _leave(found, best, settings, folder):
            tracker.log_file(run_id, file)
        tracker.log_metrics(run_id, {"best/AP": best["AP"]})
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.end_run(run_id, status)
    words = analyse(found)["words"]
    console.print(trials_table(found))
    for sentence in words:
        console.print(sentence)
    return {"best": best["changes"], "best_config": "best.yaml", "trials": rows, "run_id": run_id, "words": words}


def plan(settings: RunSettings) -> tuple[dict[str, Axis], Values, list[Values] | None]:
    """The space, the present values of its axes, and all trials' values, the present ones first.

    These are None where each is chosen when those before are known (Optuna). Raises UserError for a space that cannot
    be tried, as `check_space`, or a grid of too many points.
    """
    options = settings.sweep
    space, present = check_space(settings, ready_space(settings) if options.space is None else options.space)
    if options.search == "optuna":
        return space, present, None
    ranges = [key for key, values in space.items() if isinstance(values, Range)]
    if options.search == "grid":
        if ranges:
            raise UserError(f"A grid has no ranges: give a list of values for {', '.join(ranges)} in sweep.space.", 2)
        number = math.prod(len(values) for values in space.values())
        if number > options.trials:
            raise UserError(
                f"The grid of sweep.space has {number} points, which are more than sweep.trials ({options.trials}). "
                "Name fewer settings or values in sweep.space, raise sweep.trials, or set sweep.search=random.", 2,
            )  # fmt: skip
        points = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        return space, present, [present, *(point for point in points if point != present)]
    drawn, chosen = random.Random(settings.seed), [present]
    for _ in range(100 * options.trials):  # a small space may have fewer points than there are to be trials
        if len(chosen) == options.trials:
            break
        point = {key: draw(values, drawn) for key, values in space.items()}
        if point not in chosen:
            chosen.append(point)
    return space, present, chosen


def _leave(found: dict[str, Any], best: dict[str, Any], settings: RunSettings, folder: Path) -> list[Path]:
    """Write trials.json, best.yaml and the pictures."""
    write_json(folder / "trials.json", found)
    chosen = override_settings(settings, best["changes"]).model_dump(mode="json")
    (folder / "best.yaml").write_text(
        f"# Best of {len(found['trials'])} trials of {found['budget']} by AP on val: {best['AP']:.4f}.\n"
        + yaml.safe_dump(chosen, sort_keys=False),
        encoding="utf-8",
    )
    return [folder / "trials.json", folder / "best.yaml", *draw_trials(found, folder)]


def ready_space(settings: RunSettings) -> dict[str, list[Any]]:
    """What makes or breaks a DETR, around the present settings: for `sweep.space` where none is told.

    Costs move with their losses (see `settings_of`) unless sweep.tied is false: then they have axes of their own.
    """
    loss, model, rates = settings.loss, settings.model, settings.train

    def around(value: float) -> list[float]:
        return [_rounded(value * factor) for factor in FACTORS]

    space: dict[str, list[Any]] = {key: around(_value(settings, key)) for key in TIED.values()}
    if not settings.sweep.tied:
        space |= {key: around(_value(settings, key)) for key in TIED}
    if model.class_loss == "softmax":
        space["loss.eos_coef"] = around(loss.eos_coef)
    else:
        space["loss.focal_alpha"] = [loss.focal_alpha, 0.25, 0.5, 0.75]
        if loss.mal_gamma:
            space["loss.mal_gamma"] = [loss.mal_gamma, 1.0, 1.5, 2.0]
    space["train.lr"] = around(rates.lr)
    if rates.init_from or rates.backbone_weights:
        space["train.lr_backbone"] = around(rates.backbone_rate(trained=True))
    space["model.num_queries"] = [model.num_queries, 2 * model.num_queries]
    if model.queries == "anchors":
        space["model.denoising.groups"] = sorted({0, model.denoising.groups, 2 * model.denoising.groups})
    # A value of nothing has nothing around it.
    return {key: sorted(set(values)) for key, values in space.items() if len(set(values)) > 1}


def check_space(settings: RunSettings, space: dict[str, Axis]) -> tuple[dict[str, Axis], Values]:
    """The space with its values as settings have them (YAML reads 1e-3 as a word), and the present values of its axes.

    A range is of whole numbers where the setting is one. Raises UserError for a setting or a value that cannot be,
    before anything runs.
    """
    checked: dict[str, Axis] = {}
    present: Values = {}
    for key, values in space.items():
        tries = values if isinstance(values, list) else [values.low, values.high]
        found = [_value(override_settings(settings, {key: value}), key) for value in tries]
        if key == "model.preset":  # it becomes other settings, and none of its own
            found = tries
        present[key] = _value(settings, key)
        if isinstance(present[key], dict):
            raise UserError(f"{key!r} in sweep.space is a group of settings; name one of {', '.join(present[key])}.", 2)
        if not key.startswith(SWEEPABLE) or key in FIXED:
            raise UserError(
                f"{key!r} cannot be swept: trials differ in what a model is and learns by ({', '.join(SWEEPABLE)}); "
                "their length, data and measure are the same.", 2,
            )  # fmt: skip
        if isinstance(values, Range) and not all(isinstance(x, int | float) and x is not True for x in found):
            raise UserError(f"{key!r} in sweep.space is no number; give a list of values instead of a range.", 2)
        checked[key] = found if isinstance(values, list) else Range(low=found[0], high=found[1], log=values.log)
    for key, values in checked.items():
        for value in values if isinstance(values, list) else [values.low, values.high]:
            override_settings(settings, settings_of(settings, {**present, key: value}, present))
    return checked, present


def settings_of(settings: RunSettings, values: Values, present: Values) -> Values:
    """The settings that a trial changes: its values, and what is tied to them.

    Where sweep.tied is on, a matching cost is multiplied with what its loss is multiplied with, and the other way
    round, unless the space names both.
    """
    changes = {key: value for key, value in values.items() if value != present[key]}
    if settings.sweep.tied:
        for cost, loss in TIED.items():
            for one, other in ((cost, loss), (loss, cost)):
                if one in changes and other not in values and present[one]:
                    changes[other] = _rounded(_value(settings, other) * changes[one] / present[one])
    return changes


def contains(values: Axis, value: Any) -> bool:
    """Whether an axis has a value."""
    if isinstance(values, list):
        return value in values
    return isinstance(value, int | float) and values.low <= value <= values.high


def choose_best(rows: list[dict[str, Any]], min_gain: float) -> dict[str, Any]:
    """The trial of highest AP, if it beats the present settings by so much; else these. Stopped ones do not count."""
    ended = [row for row in rows if row["AP"] is not None]
    ended = [row for row in ended if row["status"] == "finished"] or ended
    best = max(ended, key=lambda row: row["AP"])
    standing = next((row for row in rows if not row["changes"] and row["AP"] is not None), None)
    if standing is not None and best["AP"] < standing["AP"] + min_gain:
        return standing
    return best


def draw(values: Axis, drawn: random.Random) -> Any:
    """A value of an axis at random; of a range one with three digits, evenly over it or over its logarithm."""
    if isinstance(values, list):
        return drawn.choice(values)
    if values.is_whole() and not values.log:
        return drawn.randint(int(values.low), int(values.high))
    if values.log:
        value = math.exp(drawn.uniform(math.log(values.low), math.log(values.high)))
    else:
        value = drawn.uniform(values.low, values.high)
    value = min(max(_rounded(value), values.low), values.high)
    return round(value) if values.is_whole() else value


def run_trials(
    common: dict[str, Any], settings: RunSettings, space: dict[str, Axis], trials: list[Values] | None, at_once: int
) -> None:  # fmt: skip
    """Let Tune do the trials, or Optuna's where they are None; each leaves its row in its folder."""
    from ray import tune

    # The present settings may not be in the space that Optuna is to search; so they are tried without it.
    listed = [common["present"]] if trials is None else trials
    _tune(common, settings, at_once, param_space={"values": tune.grid_search(listed)})
    if trials is not None:
        return
    tried = [row["values"] for row in _started(common["folder"])]
    inside = [values for values in tried if all(contains(axis, values[key]) for key, axis in space.items())]
    number = settings.sweep.trials - (len(tried) - len(inside))
    if number > 0:
        search = _optuna_search(space, inside, settings.seed + len(tried))
        _tune(common, settings, at_once, search_alg=search, num_samples=number)


def _tune(
    common: dict[str, Any], settings: RunSettings, at_once: int, param_space: dict[str, Any] | None = None,
    **options: Any,
) -> None:  # fmt: skip
    from ray import tune

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # with it a sweep that is stopped would seem to be over
    fs, place = locate(join(common["folder"], "ray"), WORKING)
    if fs.get_file_info(place).type == FileType.Directory:
        fs.delete_dir(place)  # what Tune wrote before a stop is not read: each trial's folder is
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, common=common), {"CPU": 0.1}),  # its worker asks for its own
        param_space=param_space or {},
        tune_config=tune.TuneConfig(
            metric="AP", mode="max", max_concurrent_trials=at_once, scheduler=_scheduler(settings, common), **options
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=place, storage_filesystem=fs, verbose=0, callbacks=[_notes(common)],
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
        ),
    )  # fmt: skip
    tuner.fit()


def _scheduler(settings: RunSettings, common: dict[str, Any]):
    """What stops trials: after a validation that others did better at, but for a few (THROUGH)."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

    options = settings.sweep
    if options.scheduler == "none":
        return FIFOScheduler()

    grace = min(options.grace_period, options.validations)

    class Lenient:
        def on_trial_result(self, controller, trial, result):
            decision = super().on_trial_result(controller, trial, result)
            through = read_json(join(_place(common, trial), TRIED))["number"] in THROUGH
            return TrialScheduler.CONTINUE if through else decision

        def _on_insufficient_samples(self, controller, trial, time):  # it would pause, and start the trial anew
            return TrialScheduler.CONTINUE

    if options.scheduler == "asha":

        class Halving(Lenient, AsyncHyperBandScheduler):
            pass

        return Halving(
            time_attr="validation", max_t=options.validations, grace_period=grace, reduction_factor=2,
            stop_last_trials=False,
        )  # fmt: skip

    class Median(Lenient, MedianStoppingRule):
        pass

    return Median(time_attr="validation", grace_period=grace, min_samples_required=3)


def _optuna_search(space: dict[str, Axis], known: list[Values], seed: int):
    """Optuna's tree-structured Parzen estimator, told of known trials first."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def axis(values: Axis):
        if isinstance(values, list):
            return CategoricalDistribution(values)
        kind = IntDistribution if values.is_whole() else FloatDistribution
        return kind(values.low, values.high, log=values.log)

    return OptunaSearch(
        space={f"values/{key}": axis(values) for key, values in space.items()}, metric="AP", mode="max",
        points_to_evaluate=[{f"values/{key}": value for key, value in point.items()} for point in known],
        sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True),
    )  # fmt: skip


def _trial(config: dict[str, Any], common: dict[str, Any]) -> None:
    """A Tune trial: a Ray Train run of its own in a folder named by what it tries, so that it can be taken up again."""
    place = join(common["folder"], f"trials/{digest(config['values'], 8)}")
    here = local(place)
    here.mkdir(parents=True, exist_ok=True)
    with FileLock(here / ".lock"):  # Optuna may propose the same twice
        _train_or_tell(config["values"], place, common)


def _train_or_tell(values: Values, place: str, common: dict[str, Any]) -> None:
    from ray import tune

    settings = RunSettings.model_validate(common["settings"])
    options, changes = settings.sweep, settings_of(settings, values, common["present"])
    row = _known(place, TRIAL)
    for point in (row or _row(place, common))["curve"]:  # of what was done before a stop Tune hears again
        if row or point["validation"] < options.validations:
            tune.report({"AP": point["AP"], "validation": point["validation"]})
    if row and not row["curve"]:
        tune.report(NOTHING)
    if row:
        return
    mine = override_settings(settings, {
        **changes, "train.budget": options.budget, "train.validations": options.validations,
        "train.validation": "inline", "train.patience": 0,
    })  # fmt: skip
    tags = {"mlflow.parentRunId": common["run_id"], "detr.stage": "trial", "detr.tries": _in_words(changes)}
    try:
        found = train(
            mine, at_hand(common["dataset"]), local(place), Tracker(**common["tracker"]),
            f"{common['name']}-{place.rpartition('/')[2]}", tags, callbacks=[_cut_reports(options.validations)],
        )  # fmt: skip
    except UserError as error:
        _end(place, common, "failed", str(error), again=not isinstance(error, Diverged))
        tune.report(NOTHING)
        return
    _end(place, common, "finished", **{key: found[key] for key in ("AP", "AP50", "run_id")})
    tune.report({"AP": found["AP"], "validation": options.validations})


def _cut_reports(validations: int):
    """Hands Tune a trial's AP at each validation but the last, which ends the trial anyway."""
    from ray.tune.integration.ray_train import TuneReportCallback

    class Cuts(TuneReportCallback):
        def after_report(self, run_context, metrics, checkpoint) -> None:
            if metrics[0]["AP"] >= 0 and metrics[0]["mark"] < validations:  # else a checkpoint in between
                super().after_report(run_context, [{"AP": metrics[0]["AP"], "validation": metrics[0]["mark"]}], None)

    return Cuts()


def _notes(common: dict[str, Any]):
    """Notes what trials try, and what became of those that did not end by themselves."""
    from ray import tune

    class Notes(tune.Callback):  # pickled by Tune
        def on_trial_start(self, iteration: int, trials: list, trial, **info: Any) -> None:
            place = _place(common, trial)
            if not _known(place, TRIED):
                values = trial.config["values"]
                taken = {row["number"] for row in _started(common["folder"])}
                free = (n for n in itertools.count(1) if n not in taken)
                number = 0 if values == common["present"] else next(free)  # of several it may not start first
                local(place).mkdir(parents=True, exist_ok=True)
                write_json(join(place, TRIED), {"format": FORMAT, "number": number, "values": values})

        def on_trial_complete(self, iteration: int, trials: list, trial, **info: Any) -> None:
            if not _known(_place(common, trial), TRIAL):
                self._close(trial, "stopped", "KILLED")

        def on_trial_error(self, iteration: int, trials: list, trial, **info: Any) -> None:
            self.on_trial_start(iteration, trials, trial)  # its process may not have come up
            if not _known(_place(common, trial), TRIAL):
                said = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
                why = next(reversed(said.strip().splitlines()), "It failed without a word.")
                self._close(trial, "failed", "FAILED", why)

        def _close(self, trial, status: str, run_status: str, error: str | None = None) -> None:
            place, sweep = _place(common, trial), common["settings"]["sweep"]
            row = _row(place, common)
            if row["run_id"]:
                reached = row["curve"][-1]["validation"] if row["curve"] else 0
                why = error or f"by {sweep['scheduler']} after validation {reached} of {sweep['validations']}"
                Tracker(**common["tracker"]).end_training(row["run_id"], run_status, {f"detr.{status}": why})
            _end(place, common, status, error, again=status == "failed")

    return Notes()


def _place(common: dict[str, Any], trial) -> str:
    return join(common["folder"], f"trials/{digest(trial.config['values'], 8)}")


def _end(
    place: str, common: dict[str, Any], status: str, error: str | None = None, again: bool = False, **known: Any
) -> None:  # fmt: skip
    """Write a trial's row. again: when the sweep is started again, it is to be tried once more."""
    write_json(join(place, TRIAL), _row(place, common) | {"status": status, "error": error, "again": again, **known})


def _row(place: str, common: dict[str, Any]) -> dict[str, Any]:
    """A trial's row (see `pipelines.trials`) as far as it has come, by its folder."""
    tried, history = read_json(join(place, TRIED)), read_history(join(place, PROGRESS))
    seconds = _seconds(place)
    settings = RunSettings.model_validate(common["settings"])
    validations, steps = history["validations"], history["steps"]
    best = max(validations, key=lambda found: found["AP"], default={"AP": None, "AP50": None})
    rates = [step["images_per_second"] for step in steps]
    return {
        "number": tried["number"],
        "values": tried["values"],
        "changes": settings_of(settings, tried["values"], common["present"]),
        "status": "",
        "AP": best["AP"],
        "AP50": best["AP50"],
        "curve": [{"validation": found["mark"], **{key: found[key] for key in ("step", "AP", "AP50")}}
                  for found in validations],
        "steps": steps[-1]["step"] if steps else None,
        "images_per_second": round(statistics.median(rates), 2) if rates else None,
        "seconds": round(seconds, 1),
        "device_hours": round(seconds / 3600 * common["devices"], 4),
        "run_id": _run_id(place),
        "error": None,
    }  # fmt: skip


def _seconds(place: str) -> float:
    """What a training took, all its starts together, by its progress file."""
    spent, last = 0.0, None
    for record in read_progress(join(place, PROGRESS)):
        if record["event"] != "start" and last is not None:
            spent += record["time"] - last
        last = record["time"]
    return spent


def _started(folder: str) -> list[dict[str, Any]]:
    """What trials that were started before try, in the order of their numbers."""
    return sorted((read_json(join(place, TRIED)) for place in _places(folder, TRIED)), key=lambda row: row["number"])


def _rows(folder: str) -> list[dict[str, Any]]:
    """Trials that are over, in the order of their numbers."""
    return sorted((read_json(join(place, TRIAL)) for place in _places(folder, TRIAL)), key=lambda row: row["number"])


def _places(folder: str, name: str) -> list[str]:
    """The folders of a sweep's trials that hold a file of that name."""
    trials = join(folder, "trials")
    if not is_remote(trials):
        return [str(file.parent) for file in Path(trials).glob(f"*/{name}")]
    if kind(trials) == FileType.NotFound:
        return []
    found = (file.split("/") for file in list_files(trials, recursive=True))
    return [join(trials, parts[0]) for parts in found if parts[1:] == [name]]


def _known(place: str, name: str) -> dict[str, Any] | None:
    """What a file of a trial says, or None."""
    try:
        return read_json(join(place, name))
    except FileNotFoundError:
        return None


def _run_id(place: str) -> str | None:
    return (_known(place, "run.json") or {"run_id": None})["run_id"]


def _devices(settings: RunSettings, use_gpu: bool) -> int:
    """GPUs that a trial takes; without GPUs the cores of this machine, all of which it uses."""
    return settings.train.num_workers if use_gpu else cpu_count()


def _at_once(settings: RunSettings, use_gpu: bool) -> int:
    """Trials that run side by side: as many as there are devices for, or fewer where so many are told.

    A training without GPU uses all cores of its machine; two of them would take each other's time.
    """
    import ray

    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes())  # a head may do no work
    room = int(ray.cluster_resources().get("GPU", 0)) if use_gpu else nodes
    room = max(1, room // settings.train.num_workers)
    return min(room, settings.sweep.max_concurrent or room)


def _check_state_api() -> None:
    """Raise UserError where Ray's State API does not answer: trials that are stopped would keep their places."""
    import ray
    from ray.util.state import list_nodes

    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=30)
    except Exception as error:  # it raises whatever its HTTP client does
        raise UserError(
            f"Ray's State API does not answer ({' '.join(str(error).split())[:200]}), which frees the places of trials "
            "that are stopped early. Start the cluster with its dashboard, or set sweep.scheduler=none."
        ) from error


def follow(stop: threading.Event, folder: str, number: int, tracker: Tracker) -> None:
    """Show how far a sweep of so many trials is, on stderr, by what they leave in their folders.

    MLflow runs of trials that go on are watched, so that they are closed with those of this process when it is stopped.
    """
    said = {row["number"] for row in _rows(folder)}
    with progress(speed_estimate_period=RECENT) as bar:
        task = bar.add_task("sweep", total=number, note="starting", left=None)
        first = None
        done = False
        while not done:
            done = stop.wait(10.0 if is_remote(folder) else 2.0)
            rows = _rows(folder)
            for row in rows:
                if row["number"] not in said:
                    said.add(row["number"])
                    console.print(f"  trial {len(said)} of {number}, {_ended_words(row)}")
            running = []
            for place in _places(folder, TRIED):
                runs = not _known(place, TRIAL)
                if run_id := _run_id(place):
                    tracker.watch_run(run_id, runs)
                if runs:
                    running.append(_share(place))
            share = len(rows) + sum(running)
            first = share if first is None else first
            best = max((row["AP"] for row in rows if row["AP"] is not None), default=None)
            note = f"{len(running)} running" + (f", best AP {best:.3f}" if best is not None else "")
            bar.update(task, completed=share, note=note)
            # Half a trial of each place has what a trial needs besides its steps, of which it takes more at its start.
            measured = share - first >= max(1, len(running)) / 2
            bar.update(task, left=bar.tasks[task].time_remaining if measured else None)


def _ended_words(row: dict[str, Any]) -> str:
    how = {"finished": "AP {AP:.4f}", "stopped": "stopped at AP {AP:.4f}", "failed": "failed"}[row["status"]]
    why = f" ({row['error']})" if row["error"] else ""
    return f"{how.format(AP=row['AP'] or 0.0)} after {row['seconds']:.0f} s: {_in_words(row['changes'])}{why}"


def _share(place: str) -> float:
    """Of a trial's time, what is over: a little of one that starts, so that its rate is measured from there."""
    shares = [record["share"] or 0.0 for record in read_progress(join(place, PROGRESS)) if record["event"] == "step"]
    return max([STARTED, *shares[-1:]])


def _value(settings: RunSettings, key: str) -> Any:
    value: Any = settings.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _rounded(value: float) -> float:
    """Three digits: more say nothing, and make long names."""
    return float(f"{value:.3g}")


def _in_words(changes: Values) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items()) or "the present settings"
