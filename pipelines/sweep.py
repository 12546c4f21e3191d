"""Search over matching costs, loss weights and learning rate (Ray Tune), judged by AP on "val".

Never by the loss: the weights being tried change its scale.
"""
from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import yaml

from pipelines.fit import fit_to_data
from pipelines.progress import console
from pipelines.settings import RunSettings, UserError, digest, override_settings
from pipelines.stage import read_json, write_json
from pipelines.tracking import Tracker
from pipelines.train import find_weights, train

FORMAT = 1


def sweep(settings: RunSettings, dataset_folder: Path, folder: Path, tracker: Tracker, name: str) -> dict[str, Any]:
    """Try `sweep.trials` settings for `sweep.budget` each; trial 0 is the present settings.

    Leaves trials.json (a row per trial, failed ones with their reason) and best.yaml, which
    `train --config` takes. Another trial is best only when it beats the present settings by
    `sweep.min_gain` AP, since short trials are noisy. Returns {"best": changed settings, "best_config",
    "trials": rows, "run_id"}. Raises UserError for a setting that does not exist, or when no trial ended.
    """
    from ray import tune

    settings, fitted = fit_to_data(find_weights(settings), dataset_folder)
    if fitted:
        console.print(f"Fitted to the data: {'; '.join(fitted)}.")
    folder, options = Path(folder).resolve(), settings.sweep
    present = _present(settings)
    for key, values in options.space.items():
        for value in values:  # a misspelt setting or a wrong value is said before anything runs
            override_settings(settings, {key: value})

    run_file = folder / "run.json"
    run_id = read_json(run_file)["run_id"] if run_file.is_file() else None
    run_id = tracker.start_run(name, run_id, {"detr.stage": "sweep"})
    write_json(run_file, {"format": FORMAT, "run_id": run_id})
    tracker.log_params(run_id, {"sweep": options.model_dump(mode="json"), "seed": settings.seed})
    base = settings.model_dump(mode="json")

    def trial(config: dict[str, Any]) -> None:
        """A Tune trial: a Ray Train run of its own, named by what it tries, so that it can be taken up again."""
        config = config["values"]
        changes = {
            **config, "train.budget": options.budget, "train.validations": 1, "train.validation": "inline",
        }  # fmt: skip
        mine = override_settings(RunSettings.model_validate(base), changes)
        key = digest(config, 8)
        place = folder / "trials" / key
        place.mkdir(parents=True, exist_ok=True)
        tags = {"mlflow.parentRunId": run_id, "detr.stage": "trial"}
        found = train(mine, dataset_folder, place, tracker, f"{name}-{key}", tags)
        tune.report({key: found[key] for key in ("AP", "AP50", "steps", "images_per_second", "run_id")})

    class Follower(tune.Callback):
        """Says how a trial ended as soon as it did. (Tune pickles it, so it holds no bar.)"""

        ended = 0

        def on_trial_complete(self, iteration: int, trials: list, trial, **info: Any) -> None:
            self.ended += 1
            _say_ended(self.ended, len(combinations), trial, present)

        def on_trial_error(self, iteration: int, trials: list, trial, **info: Any) -> None:
            self.on_trial_complete(iteration, trials, trial)

    combinations = _combinations(options.space, present, options.trials, settings.seed)
    console.print(f"Sweep of {len(combinations)} trials, {options.budget} each.")
    status = "FAILED"
    try:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": 0.1}),  # its worker asks for its own
            param_space={"values": tune.grid_search(combinations)},
            tune_config=tune.TuneConfig(metric="AP", mode="max", max_concurrent_trials=options.max_concurrent),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder / "ray"), verbose=0, callbacks=[Follower()]),
        )
        rows = [_row(result, present) for result in tuner.fit()]
        ended = [row for row in rows if row["AP"] is not None]
        if not ended:
            raise UserError(f"No trial of the sweep ended; the first says: {rows[0]['error']}")
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.end_run(run_id, status)

    standing = next((row["AP"] for row in ended if not row["changes"]), None)
    best = max(ended, key=lambda row: row["AP"])
    if standing is not None and best["AP"] < standing + options.min_gain:
        best = next(row for row in ended if not row["changes"])
    write_json(folder / "trials.json", {"format": FORMAT, "trials": rows, "best": best})
    chosen = override_settings(settings, best["changes"]).model_dump(mode="json")
    (folder / "best.yaml").write_text(
        f"# Best of {len(rows)} trials by AP on val: {best['AP']:.4f}.\n" + yaml.safe_dump(chosen, sort_keys=False),
        encoding="utf-8",
    )
    for file in ("trials.json", "best.yaml"):
        tracker.log_file(run_id, folder / file)
    tracker.log_metrics(run_id, {"best/AP": best["AP"]})
    for row in rows:
        if row["AP"] is None:
            console.print(f"  {_in_words(row['changes'])} failed: {row['error']}")
    console.print(f"  Best: {_in_words(best['changes'])}")
    return {"best": best["changes"], "best_config": "best.yaml", "trials": rows, "run_id": run_id}


def _present(settings: RunSettings) -> dict[str, Any]:
    """The values of the space's settings as they are now; raises UserError for one that does not exist."""
    present = {}
    for key, values in settings.sweep.space.items():
        value: Any = settings.model_dump(mode="json")
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict):
            raise UserError(f"{key!r} in sweep.space is a group of settings; name one of {', '.join(value)}.", 2)
        override_settings(settings, {key: values[0]})  # a misspelt one is said with the one that is meant
        present[key] = value
    return present


def _combinations(
    space: dict[str, list[Any]], present: dict[str, Any], number: int, seed: int
) -> list[dict[str, Any]]:
    """The present settings and then others of the space at random, no two alike; fewer where there are fewer."""
    others = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    others = [values for values in others if values != present]
    return [present, *random.Random(seed).sample(others, min(number - 1, len(others)))]


def _row(result, present: dict[str, Any]) -> dict[str, Any]:
    metrics, error = result.metrics or {}, result.error
    return {
        "changes": _changes(result.config["values"], present),
        **{key: metrics.get(key) for key in ("AP", "AP50", "steps", "images_per_second", "run_id")},
        "seconds": round(metrics.get("time_total_s", 0.0), 1),
        "error": None if error is None else str(error).strip().splitlines()[-1],
    }


def _say_ended(number: int, of: int, trial, present: dict[str, Any]) -> None:
    found, changes = trial.last_result or {}, _changes(trial.config["values"], present)
    how = f"AP {found['AP']:.4f} after {found['time_total_s']:.0f} s" if "AP" in found else "failed"
    console.print(f"  trial {number} of {of}, {how}: {_in_words(changes)}")


def _changes(values: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v != present[k]}


def _in_words(changes: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in changes.items()) or "the present settings"
