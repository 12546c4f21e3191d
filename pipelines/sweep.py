"""Search over any settings (Ray Tune): matching costs, loss weights, rates, queries; judged by AP on "val".

Never by the loss: the weights being tried change its scale. What a trial came to lies in its folder, and Tune is told
of it again when a sweep goes on after a stop: finished trials are not repeated, and nothing of Tune's own is read.
"""
from __future__ import annotations

import itertools
import math
import random
import shutil
import statistics
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from joblib import cpu_count

from pipelines.fit import fit_to_data
from pipelines.progress import console, progress
from pipelines.settings import Axis, Range, RunSettings, UserError, digest, override_settings
from pipelines.stage import read_json, write_json
from pipelines.tracking import Tracker
from pipelines.train import check_room, find_weights, train, uses_gpu
from pipelines.training_log import PROGRESS, read_history, read_progress
from pipelines.trials import analyse, draw_trials, trials_table

FORMAT = 2
TRIED, TRIAL = "tried.json", "trial.json"  # what a trial tries; what it came to, once it is over
# A cost and the weight of the loss it stands for (Carion et al. 2020 have one figure for both).
TIED = {"loss.cost_class": "loss.loss_ce", "loss.cost_bbox": "loss.loss_bbox", "loss.cost_giou": "loss.loss_giou"}
FACTORS = (0.5, 1.0, 2.0)  # of the present value, in the ready space

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
    space, present = check_space(settings, ready_space(settings) if options.space is None else options.space)
    check_room(settings, use_gpu)
    if options.scheduler != "none":
        _check_state_api()
    started = _started(folder)
    trials = _planned(space, present, settings)
    tried_at_once = _at_once(settings, use_gpu)

    run_file = folder / "run.json"
    run_id = read_json(run_file)["run_id"] if run_file.is_file() else None
    run_id = tracker.start_run(name, run_id, {"detr.stage": "sweep"})
    write_json(run_file, {"format": 1, "run_id": run_id})
    tracker.log_params(run_id, {"sweep": options.model_dump(mode="json"), "seed": settings.seed})
    number = options.trials if trials is None else len(trials)
    known = sum((folder / "trials" / digest(row["values"], 8) / TRIAL).is_file() for row in started)
    console.print(
        f"Sweep of {number} trials, {options.budget} each"
        + (f", {tried_at_once} at once" if tried_at_once > 1 else "") + (f"; {known} are known" if known else "") + "."
    )  # fmt: skip
    common = {
        "settings": settings.model_dump(mode="json"), "space": space_as_json(space), "present": present,
        "dataset": str(Path(dataset_folder).resolve()), "folder": str(folder), "tracker": asdict(tracker),
        "run_id": run_id, "name": name, "devices": _devices(settings, use_gpu),
    }  # fmt: skip
    status = "FAILED"
    try:
        with Follower(folder, number):
            _run_trials(common, settings, space, trials, [row["values"] for row in started], tried_at_once)
        rows = _rows(folder)
        ended = [row for row in rows if row["AP"] is not None]
        if not ended:
            raise UserError(f"No trial of the sweep ended; the first says: {rows[0]['error'] if rows else 'nothing'}")
        best = choose_best(rows, options.min_gain)
        found = {
            "format": FORMAT, "search": options.search, "scheduler": options.scheduler, "budget": options.budget,
            "validations": options.validations, "device": "GPU" if use_gpu else "CPU", "min_gain": options.min_gain,
            "space": common["space"], "present": present, "trials": rows, "best": best["number"],
        }  # fmt: skip
        write_json(folder / "trials.json", found)
        chosen = override_settings(settings, best["changes"]).model_dump(mode="json")
        (folder / "best.yaml").write_text(
            f"# Best of {len(rows)} trials of {options.budget} by AP on val: {best['AP']:.4f}.\n"
            + yaml.safe_dump(chosen, sort_keys=False),
            encoding="utf-8",
        )
        pictures = draw_trials(found, folder)
        for file in (folder / "trials.json", folder / "best.yaml", *pictures):
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
    elif loss.mal_gamma:
        space["loss.mal_gamma"] = [1.0, 1.5, 2.0]
    else:
        space["loss.focal_alpha"] = [0.25, 0.5, 0.75]
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

    Raises UserError for a setting or a value that cannot be, before anything runs.
    """
    checked: dict[str, Axis] = {}
    present: Values = {}
    for key, values in space.items():
        tries = values if isinstance(values, list) else [values.low, values.high]
        found = [_value(override_settings(settings, {key: value}), key) for value in tries]
        present[key] = _value(settings, key)
        if isinstance(present[key], dict):
            raise UserError(f"{key!r} in sweep.space is a group of settings; name one of {', '.join(present[key])}.", 2)
        if key.startswith(("sweep.", "train.budget", "train.validation")):
            raise UserError(f"{key!r} cannot be swept: all trials are of one length and judged alike.", 2)
        if isinstance(values, Range) and not all(isinstance(x, int | float) and x is not True for x in found):
            raise UserError(f"{key!r} in sweep.space is no number; give a list of values instead of a range.", 2)
        checked[key] = found if isinstance(values, list) else values
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


def choose_best(rows: list[dict[str, Any]], min_gain: float) -> dict[str, Any]:
    """The trial of highest AP, if it beats the present settings by so much; else these. Stopped ones do not count."""
    ended = [row for row in rows if row["AP"] is not None]
    ended = [row for row in ended if row["status"] == "finished"] or ended
    best = max(ended, key=lambda row: row["AP"])
    standing = next((row for row in rows if not row["changes"] and row["AP"] is not None), None)
    if standing is not None and best["AP"] < standing["AP"] + min_gain:
        return standing
    return best


def space_as_json(space: dict[str, Axis]) -> dict[str, Any]:
    """As trials.json has it."""
    return {key: values if isinstance(values, list) else values.model_dump() for key, values in space.items()}


def _planned(space: dict[str, Axis], present: Values, settings: RunSettings) -> list[Values] | None:
    """All trials' values, the present ones first; None where each is chosen when those before are known (Optuna)."""
    options = settings.sweep
    if options.search == "optuna":
        return None
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
        return [present, *(point for point in points if point != present)]
    drawn, chosen = random.Random(settings.seed), [present]
    for _ in range(100 * options.trials):  # a small space may have fewer points than there are to be trials
        if len(chosen) == options.trials:
            break
        point = {key: draw(values, drawn) for key, values in space.items()}
        if point not in chosen:
            chosen.append(point)
    return chosen


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


def _run_trials(
    common: dict[str, Any], settings: RunSettings, space: dict[str, Axis], trials: list[Values] | None,
    started: list[Values], at_once: int,
) -> None:  # fmt: skip
    from ray import tune

    options, place = settings.sweep, Path(common["folder"]) / "ray"
    shutil.rmtree(place, ignore_errors=True)  # what Tune wrote before a stop is not read: each trial's folder is
    search, points = None, {"values": tune.grid_search(trials)}
    if trials is None:
        search, points = _optuna_search(space, common["present"], started, settings.seed), {}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, common=common), {"CPU": 0.1}),  # its worker asks for its own
        param_space=points,
        tune_config=tune.TuneConfig(
            metric="AP", mode="max", max_concurrent_trials=at_once, search_alg=search,
            num_samples=options.trials if search else 1, scheduler=_scheduler(settings),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(place), verbose=0, callbacks=[_notes(common)]),
    )  # fmt: skip
    tuner.fit()


def _scheduler(settings: RunSettings):
    """What stops trials: after a validation that others did better at."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule

    options = settings.sweep
    if options.scheduler == "asha":  # the lower half at the first, second, fourth … validation
        return AsyncHyperBandScheduler(
            time_attr="validation", max_t=options.validations, grace_period=1, reduction_factor=2,
            stop_last_trials=False,
        )  # fmt: skip
    if options.scheduler == "median":
        return MedianStoppingRule(time_attr="validation", grace_period=1, min_samples_required=3)
    return FIFOScheduler()


def _optuna_search(space: dict[str, Axis], present: Values, started: list[Values], seed: int):
    """Optuna's tree-structured Parzen estimator; what was started before comes first, and then the present settings."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def axis(values: Axis, standing: Any):
        if isinstance(values, list):
            return CategoricalDistribution(values if standing in values else [*values, standing])
        kind = IntDistribution if values.is_whole() else FloatDistribution
        return kind(min(values.low, standing), max(values.high, standing), log=values.log)

    first = started or [present]
    return OptunaSearch(
        space={f"values/{key}": axis(values, present[key]) for key, values in space.items()}, metric="AP", mode="max",
        points_to_evaluate=[{f"values/{key}": value for key, value in point.items()} for point in first],
        sampler=optuna.samplers.TPESampler(seed=seed + len(started), multivariate=True),
    )  # fmt: skip


def _trial(config: dict[str, Any], common: dict[str, Any]) -> None:
    """A Tune trial: a Ray Train run of its own in a folder named by what it tries, so that it can be taken up again."""
    from ray import tune

    values = config["values"]
    settings = RunSettings.model_validate(common["settings"])
    key, folder = digest(values, 8), Path(common["folder"])
    place = folder / "trials" / key
    if (place / TRIAL).is_file():  # done before a stop: Tune hears of it again
        row = read_json(place / TRIAL)
        for point in row["curve"]:
            tune.report({"AP": point["AP"], "validation": point["validation"]})
        if not row["curve"]:
            raise UserError(row["error"] or "It failed.")
        return
    changes = settings_of(settings, values, common["present"])
    options = settings.sweep
    mine = override_settings(settings, {
        **changes, "train.budget": options.budget, "train.validations": options.validations,
        "train.validation": "inline", "train.patience": 0,
    })  # fmt: skip
    tags = {"mlflow.parentRunId": common["run_id"], "detr.stage": "trial", "detr.tries": _in_words(changes)}
    began = time.monotonic()
    try:
        found = train(
            mine, Path(common["dataset"]), place, Tracker(**common["tracker"]), f"{common['name']}-{key}", tags,
            callbacks=[_cut_reports(options.validations)],
        )  # fmt: skip
    except UserError as error:
        row = _row(place, common, time.monotonic() - began)
        write_json(place / TRIAL, row | {"status": "failed", "error": str(error)})
        raise
    row = _row(place, common, time.monotonic() - began)
    row |= {
        "status": "finished", "steps": found["steps"], "images_per_second": found["images_per_second"],
        "AP": found["AP"], "AP50": found["AP50"], "run_id": found["run_id"],
    }  # fmt: skip
    write_json(place / TRIAL, row)
    tune.report({"AP": found["AP"], "validation": options.validations})


def _cut_reports(validations: int):
    """Hands Tune a trial's AP at each validation but the last, which ends the trial anyway."""
    from ray.tune.integration.ray_train import TuneReportCallback

    class Cuts(TuneReportCallback):
        def after_report(self, run_context, metrics, checkpoint) -> None:
            if metrics[0]["AP"] >= 0 and metrics[0]["validated"] < validations:  # else a checkpoint in between
                known = {"AP": metrics[0]["AP"], "validation": metrics[0]["validated"]}
                super().after_report(run_context, [known], None)

    return Cuts()


def _notes(common: dict[str, Any]):
    """Notes what trials try, and what became of those that did not end by themselves."""
    from ray import tune

    def place_of(trials: list, trial) -> Path:
        place = Path(common["folder"]) / "trials" / digest(trial.config["values"], 8)
        if not (place / TRIED).is_file():
            place.mkdir(parents=True, exist_ok=True)
            tried = {"format": FORMAT, "number": trials.index(trial), "values": trial.config["values"]}
            write_json(place / TRIED, tried)
        return place

    def end(place: Path, trial, status: str, error: str | None = None) -> None:
        row = _row(place, common, (trial.last_result or {}).get("time_total_s", 0.0))
        write_json(place / TRIAL, row | {"status": status, "error": error})
        if status == "stopped" and row["run_id"]:
            scheduler, of = (common["settings"]["sweep"][key] for key in ("scheduler", "validations"))
            why = {"detr.stopped": f"by {scheduler} after validation {len(row['curve'])} of {of}"}
            Tracker(**common["tracker"]).end_training(row["run_id"], "KILLED", why)

    class Notes(tune.Callback):  # pickled by Tune
        def on_trial_start(self, iteration: int, trials: list, trial, **info: Any) -> None:
            place_of(trials, trial)

        def on_trial_complete(self, iteration: int, trials: list, trial, **info: Any) -> None:
            place = place_of(trials, trial)
            if not (place / TRIAL).is_file():
                end(place, trial, "stopped")

        def on_trial_error(self, iteration: int, trials: list, trial, **info: Any) -> None:
            place = place_of(trials, trial)
            if not (place / TRIAL).is_file():
                said = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
                end(place, trial, "failed", next(reversed(said.strip().splitlines()), "It failed without a word."))

    return Notes()


def _row(place: Path, common: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A trial's row (see `pipelines.trials`) as far as it has come, by its folder."""
    tried, history = read_json(place / TRIED), read_history(place / PROGRESS)
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
        "curve": [{"validation": i, **{key: found[key] for key in ("step", "AP", "AP50")}}
                  for i, found in enumerate(validations, 1)],
        "steps": steps[-1]["step"] if steps else None,
        "images_per_second": round(statistics.median(rates), 2) if rates else None,
        "seconds": round(seconds, 1),
        "device_hours": round(seconds / 3600 * common["devices"], 4),
        "run_id": read_json(place / "run.json")["run_id"] if (place / "run.json").is_file() else None,
        "error": None,
    }  # fmt: skip


def _started(folder: Path) -> list[dict[str, Any]]:
    """What trials that were started before try, in the order of their numbers."""
    return sorted((read_json(file) for file in folder.glob(f"trials/*/{TRIED}")), key=lambda row: row["number"])


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Trials that are over, in the order of their numbers."""
    return sorted((read_json(file) for file in folder.glob(f"trials/*/{TRIAL}")), key=lambda row: row["number"])


def _devices(settings: RunSettings, use_gpu: bool) -> int:
    """GPUs that a trial takes; without GPUs the cores of this machine, all of which it uses."""
    return settings.train.num_workers if use_gpu else cpu_count()


def _at_once(settings: RunSettings, use_gpu: bool) -> int:
    """Trials that run side by side: as many as there are devices for, or fewer where so many are told.

    A training without GPU uses all cores of its machine; two of them would take each other's time.
    """
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
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


class Follower:
    """Shows how far a sweep is, on stderr, by what its trials leave in their folders."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.ended = {row["number"] for row in _rows(self.folder)}
        self.thread.start()

    def __exit__(self, *error) -> None:
        self.stop.set()
        self.thread.join()

    def _follow(self) -> None:
        with progress() as bar:
            task = bar.add_task("sweep", total=self.number, note="starting")
            began, first = time.monotonic(), None
            done = False
            while not done:
                done = self.stop.wait(2.0)
                rows = _rows(self.folder)
                for row in rows:
                    if row["number"] not in self.ended:
                        self.ended.add(row["number"])
                        console.print(f"  trial {len(self.ended)} of {self.number}, {self._words(row)}")
                running = [self._share(file.parent) for file in self.folder.glob(f"trials/*/{TRIED}")
                           if not (file.parent / TRIAL).is_file()]  # fmt: skip
                share = len(rows) + sum(running)
                first = share if first is None else first
                left = None
                if share > first:
                    left = (time.monotonic() - began) / (share - first) * (self.number - share)
                best = max((row["AP"] for row in rows if row["AP"] is not None), default=None)
                note = f"{len(running)} running" + (f", best AP {best:.3f}" if best is not None else "")
                bar.update(task, completed=share, note=note, left=left)

    def _words(self, row: dict[str, Any]) -> str:
        how = {"finished": "AP {AP:.4f}", "stopped": "stopped at AP {AP:.4f}", "failed": "failed"}[row["status"]]
        how = how.format(AP=row["AP"] or 0.0)
        return f"{how} after {row['seconds']:.0f} s: {_in_words(row['changes'])}" + (
            f" ({row['error']})" if row["error"] else ""
        )

    @staticmethod
    def _share(place: Path) -> float:
        shares = [record["share"] or 0.0 for record in read_progress(place / PROGRESS) if record["event"] == "step"]
        return shares[-1] if shares else 0.0


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
