"""The registry: versions of a detector, the gate a version must pass to become champion, and the way back.

A version is its weights, its label map and thresholds, and the code that runs them; tags on it say what it scored, on
which data, and every verdict on it. What moves the alias `champion` is in the model's ledger first (`pipelines.ledger`)
and done last, so that a crash leaves the old champion standing, and the next one who asks knows what happened.
"""
from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from pipelines.gate import TRAINED_ON, judge, missing_classes
from pipelines.ledger import TAG, Ledger, short_json, who
from pipelines.progress import console
from pipelines.settings import RunSettings, UserError, digest
from pipelines.stage import read_json, write_json
from pipelines.tracking import MAX_TAG, Tracker

CHAMPION, CHALLENGER = "champion", "challenger"  # aliases: the newest version is challenger until it is champion
FILES = ("model.safetensors", "config.json")  # what makes a checkpoint; these and TRAINED_ON have their digest as a tag
PACKAGED = ("__init__.py", "detect.py")  # of pipelines/; the detector needs no more
REQUIREMENTS = (
    "mlflow", "torch", "torchvision", "scipy", "safetensors", "pydantic", "pillow", "numpy", "pandas",
)  # fmt: skip
OBJECTS = 30  # of a class in the split; with fewer, its best threshold says little and the overall one is taken
TRIES = 20  # of a promotion, while others move the champion


def registered_name(settings: RunSettings, dataset_name: str) -> str:
    """The registered model's name: tracking.model_name or the dataset's, without what MLflow refuses."""
    name = settings.tracking.model_name or dataset_name
    return re.sub(r"[^\w-]+", "-", name, flags=re.ASCII).strip("-") or "detector"


def register(
    settings: RunSettings,
    tracker: Tracker,
    run_id: str,
    checkpoint: Path,
    evaluation: dict[str, Any],
    dataset_digest: str,
    model_name: str,
) -> dict[str, Any]:
    """Make the checkpoint a version of `model_name`, or find the version it already is. A new one is its challenger.

    A version whose files were spoilt is not found: the checkpoint becomes a new one. evaluation: what `evaluate`
    returned; the thresholds of its best F1, overall and of each class that has enough objects, become the model's own.
    Returns {"name", "version", "uri", "run_id", "weights_sha256", "reused"}. Raises UserError if the folder is no
    checkpoint.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    client = tracker.client()
    ledger = Ledger(tracker, model_name)
    with tempfile.TemporaryDirectory(prefix="detr-model-") as place:
        files = Path(place) / "checkpoint"
        _checksums(Path(checkpoint))  # says what is missing
        shutil.copytree(checkpoint, files, ignore=shutil.ignore_patterns("__pycache__"))
        config = read_json(files / "config.json")
        write_json(files / "config.json", {**config, **_thresholds(evaluation)})
        sums = _checksums(files)
        known = _same_version(tracker, model_name, sums)
        if known:
            return _registered(known, reused=True)
        tags = {
            **sums,
            **_evaluation_tags(evaluation),
            "dataset_digest": dataset_digest,
            "label_map": digest(config["categories"]),
            "classes": str(len(config["categories"])),
            "run_id": run_id,
        }
        logged = client.create_logged_model(
            tracker.experiment_id(), name=model_name, source_run_id=run_id, tags=tags, model_type="detector"
        )
        package = _package(Path(place), files, run_id, logged)
        tags["package_digest"] = _package_digest(package)
        client.log_model_artifacts(logged.model_id, str(package))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    with ledger.lease():  # not while files go up, which may take long
        known = _same_version(tracker, model_name, sums)
        if known:
            return _registered(known, reused=True)
        try:
            # By place: MLflow resolves models:/… sources with the process's global tracking URI.
            made = client.create_model_version(
                model_name, logged.artifact_location, run_id, tags=tags, model_id=logged.model_id
            )
        except MlflowException as error:
            raise UserError(f"MLflow did not take a version of {model_name!r}: {error.message}") from error
        client.set_registered_model_alias(model_name, CHALLENGER, made.version)
    return _registered(made, reused=False)


def champion(tracker: Tracker, model_name: str) -> dict[str, Any] | None:
    """{"name", "version", "uri", "run_id", "ap", "split", "split_digest", "label_map", "tags"}, or None."""
    found = _alias(tracker, model_name, CHAMPION)
    return _info(found) if found else None


def check_champion(tracker: Tracker, model_name: str) -> None:
    """Raises UserError where the model has no champion: what became of its newest version, and how to use that."""
    if champion(tracker, model_name):
        return
    number = newest_version(tracker, model_name)
    tags = _version(tracker, model_name, number).tags
    why = tags["verdict_reason"].rstrip(".") if tags.get("verdict") == "refused" else (
        f"Version {number} was not promoted, or is no longer champion"
    )  # fmt: skip
    raise UserError(
        f"{model_name!r} has no champion. {why}; to use that version nevertheless, say --model "
        f"models:/{model_name}/{number}.", 2,
    )  # fmt: skip


def newest_version(tracker: Tracker, model_name: str) -> str:
    """The highest version number of a registered model. Raises UserError if it has none."""
    versions = tracker.client().search_model_versions(f"name = '{model_name}'")
    if not versions:
        raise UserError(f"MLflow at {tracker.uri} has no version of {model_name!r}; run `detr register` first.", 2)
    return str(max(int(version.version) for version in versions))


def promote(
    settings: RunSettings,
    tracker: Tracker,
    model_name: str,
    version: str,
    evaluation: dict[str, Any] | None,
    compare: Callable[[Path], dict[str, Any]],
    folder: Path,
    models: Path,
    why: str = "",
) -> dict[str, Any]:
    """Make a version champion if it passes the gate.

    evaluation: what `evaluate` found now, with "data" (see `gate.judge`); None where its files could not be had, which
    is a refusal. compare: called with the checkpoint of a champion that is another version; measures that on the same
    images and returns `compare_evaluations` of it and of this version, with what `gate.judge` asks beside; nobody is
    kept waiting meanwhile. folder: gets `verdict.json`; models: where champions' files are kept, as for `download`.
    why: in the asker's words, kept.

    Returns {"promoted", "reason", "version", "previous", "champion", "rules", "comparison", "who", "when", "why"}; the
    same is kept with the version (tags, and an artifact of the ledger's run) whether it passed or not. A standing
    champion stays champion, and takes on the new evaluation. Raises UserError if there is no such version, or somebody
    else holds the registry.
    """
    client = tracker.client()
    version = str(version)
    folder = Path(folder)
    _version(tracker, model_name, version)
    ledger = Ledger(tracker, model_name)
    with tempfile.TemporaryDirectory(prefix="detr-candidate-") as temporary:  # not a copy fetched earlier
        candidate = _examine(tracker, model_name, version, Path(temporary), whole=True)
    if evaluation is None and candidate["problem"] is None:
        raise UserError(f"The files of {model_name!r} version {version} could not be had before; try again.")
    for _ in range(TRIES):
        standing = _Standing(tracker, ledger)
        other, comparison = None, None
        if standing.version not in (None, version):
            other = {"version": standing.version, "problem": standing.problem, "categories": []}
            if other["problem"] is None:
                other |= _examine(tracker, model_name, standing.version, models)
                if other["problem"]:
                    other["problem"] += "; mend that, or run `detr rollback` to return to the champion before it"
            fits = not missing_classes(other["categories"], candidate["categories"])
            if candidate["problem"] is None and other["problem"] is None and fits:
                comparison = compare(other["place"])
        with ledger.lease():
            now = _Standing(tracker, ledger)
            if (now.version, now.problem) != (standing.version, standing.problem):
                continue  # the champion was moved meanwhile: measure against the new one
            now.settle()
            candidate["rolled_back"] = _version(tracker, model_name, version).tags.get("rolled_back")
            rules = judge(settings.gate, evaluation, candidate, other, comparison)
            promoted = all(rule["ok"] for rule in rules)
            verdict = {
                "promoted": promoted,
                "reason": _reason(model_name, version, evaluation, now.version, rules),
                "version": version,
                "previous": now.version,
                "champion": version if promoted else now.version if now.problem is None else None,
                "rules": rules,
                "comparison": comparison,
                "who": who(),
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "why": why,
            }
            moves = promoted and now.alias != version
            facts = {"version": version, "reason": verdict["reason"], "why": why}
            if moves:
                facts |= {"how": "promoted", "to": version, "from": now.version}
            else:
                facts |= {"outcome": "promoted" if promoted else "refused"}
            number = ledger.write("move" if moves else "verdict", **facts)["number"]
            if moves:
                _move_champion(tracker, ledger, version)  # a crash before this leaves the old champion
            # From here on what was done is told, and never what was only meant.
            measured = _evaluation_tags(evaluation) if evaluation else {}
            for key, value in (measured | _verdict_tags(verdict)).items():
                client.set_model_version_tag(model_name, version, key, value)
            client.log_dict(ledger.run_id, verdict, f"verdicts/{number:06d}-version-{version}.json")
            if moves:
                ledger.write("done", move=number)
                challenger = _alias(tracker, model_name, CHALLENGER)
                if challenger and str(challenger.version) == version:
                    client.delete_registered_model_alias(model_name, CHALLENGER)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "verdict.json", {"format": 2, "model": model_name, **verdict})
        return verdict
    raise UserError(f"The champion of {model_name!r} was moved {TRIES} times meanwhile; try again.")


def rollback(tracker: Tracker, model_name: str, why: str) -> dict[str, Any]:
    """Give the alias back to the champion before this one, of those whose files are there and whole.

    Where the champion was deleted or spoilt and there is none before it, that is acknowledged: the next version that
    passes is a first champion. Returns {"version" (or None), "previous", "reason"}; the version that lost the alias
    gets the tag rolled_back, and the gate refuses it from then on. Raises UserError if there is no champion or it
    followed none.
    """
    _model(tracker, model_name)
    ledger = Ledger(tracker, model_name)
    standing = _Standing(tracker, ledger)
    if standing.version is None:
        raise UserError(f"Model {model_name!r} has no champion to roll back.", 2)
    with tempfile.TemporaryDirectory(prefix="detr-rollback-") as place:

        def usable(version: str) -> bool:
            return _examine(tracker, model_name, version, Path(place))["problem"] is None

        before = next((version for version in reversed(standing.champions[:-1]) if usable(version)), None)
        if before is None and standing.problem is None and usable(standing.version):
            raise UserError(f"Version {standing.version} of {model_name!r} was the first champion.", 2)
    with ledger.lease():
        now = _Standing(tracker, ledger)
        if now.champions != standing.champions:
            raise UserError(f"The champion of {model_name!r} was moved meanwhile; see `detr history`, and try again.")
        now.settle()
        number = ledger.write("move", how="rolled back", to=before, **{"from": standing.version}, why=why)["number"]
        _move_champion(tracker, ledger, before)
        _forbid(tracker, model_name, standing.version, why)
        ledger.write("done", move=number)
    return {"version": before, "previous": standing.version, "reason": why}


def history(tracker: Tracker, model_name: str) -> list[dict[str, Any]]:
    """Every verdict and every move of the champion, the oldest first.

    [{"when", "who", "what", "version", "from", "why", "reason"}]; what: "promoted" (the alias moved, or stayed),
    "refused", "rolled back", "found" (somebody else had moved the alias), or "abandoned": its process was killed before
    the alias moved. Raises UserError if there is no such model.
    """
    if TAG not in _model(tracker, model_name).tags:
        return []
    entries = Ledger(tracker, model_name).entries()
    outcomes = _outcomes(tracker, model_name, entries)
    rows = []
    for entry in entries:
        if entry["kind"] not in ("move", "verdict"):
            continue
        moved = entry["kind"] == "move"
        what = entry["how" if moved else "outcome"]
        if moved and outcomes[entry["number"]] == "abandoned":
            what = "abandoned"
        rows.append(
            {
                "when": entry["when"], "who": entry["who"], "what": what,
                "version": entry["to"] if moved else entry["version"], "from": entry.get("from"),
                "why": entry.get("why", ""), "reason": entry.get("reason", ""),
            }
        )  # fmt: skip
    return rows


def download(tracker: Tracker, model_uri: str, folder: Path) -> tuple[Path, str, str]:
    """A local checkpoint folder for a model -> (checkpoint folder, model name, version).

    model_uri: `models:/NAME@champion`, `models:/NAME/3`, or a checkpoint's own folder. An alias is
    resolved once: whoever works long keeps the version returned here. The files' digests are compared
    with the version's tags. Raises UserError if there is no such model, or its files are not those that
    were registered. A plain folder has its name and the first characters of its weights' digest.
    """
    text = str(model_uri)
    if not text.startswith("models:/"):
        sums = _checksums(Path(text))
        return Path(text).resolve(), Path(text).resolve().name, sums["model.safetensors_sha256"][:12]
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", text)
    if not match:
        raise UserError(f"{text} is not a model; write models:/NAME@champion or models:/NAME/3.", 2)
    name, alias, number = match.groups()
    if alias:
        found = _alias(tracker, name, alias)
        if found is None:
            raise UserError(f"MLflow at {tracker} has no model {name!r} with the alias {alias!r}.", 2)
    else:
        found = _version(tracker, name, number)
    place = _fetch(tracker, found, Path(folder))
    sums = _checksums(place)
    for key in sorted({*sums, *(key for key in found.tags if key.endswith("_sha256"))}):
        if found.tags.get(key) != sums.get(key):
            shutil.rmtree(place)  # so that the next attempt fetches anew
            raise UserError(
                f"{key.removesuffix('_sha256')} of {name!r} version {found.version} is not what was "
                f"registered (sha256 {str(sums.get(key))[:12]}… instead of {str(found.tags.get(key))[:12]}…); "
                "register the checkpoint again."
            )
    return place, name, str(found.version)


def _package(place: Path, checkpoint: Path, run_id: str, logged) -> Path:
    """The version's folder in MLflow's layout, written from a neutral place and freed of its paths."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    import detr

    sources = Path(__file__).parent
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(detr.__file__).parent, place / "detr", ignore=skip)
    (place / "pipelines").mkdir()
    for name in PACKAGED:
        shutil.copy2(sources / name, place / "pipelines" / name)
    shutil.copy2(sources / "registered_model.py", place)
    signature = ModelSignature(
        inputs=Schema([ColSpec("binary", "image", required=False), ColSpec("string", "path", required=False)]),
        outputs=Schema(
            [
                ColSpec(Array(Array(DataType.double)), "boxes"),
                ColSpec(Array(DataType.double), "scores"),
                ColSpec(Array(DataType.long), "category_ids"),
                ColSpec(Array(DataType.string), "category_names"),
                ColSpec("string", "status"),
            ]
        ),
        # -1: the model's own threshold (MLflow has no param without a number)
        params=ParamSchema([ParamSpec("score_threshold", "double", -1.0)]),
    )
    package = place / "model"
    mlflow_model = Model(
        artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id, model_uuid=logged.model_id
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example was not provided")  # the signature is
        mlflow.pyfunc.save_model(
            path=str(package),
            python_model=str(place / "registered_model.py"),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=[str(place / "detr"), str(place / "pipelines")],
            pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in REQUIREMENTS],
            signature=signature,
            mlflow_model=mlflow_model,
        )
    # MLflow notes where this machine kept the files, and needs only their names.
    flavor = mlflow_model.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor["model_code_path"] = "registered_model.py"
    flavor["artifacts"]["checkpoint"]["uri"] = "artifacts/checkpoint"
    mlflow_model.save(str(package / "MLmodel"))
    for cache in package.rglob("__pycache__"):
        shutil.rmtree(cache)
    return package


def _checksums(checkpoint: Path) -> dict[str, str]:
    """{"model.safetensors_sha256": hex, "config.json_sha256": hex, …}; UserError if a file is missing."""
    sums = {}
    for name in (*FILES, TRAINED_ON):
        path = checkpoint / name
        if name == TRAINED_ON and not path.is_file():  # of a checkpoint from elsewhere
            continue
        if not path.is_file():
            raise UserError(f"{checkpoint} is no checkpoint folder: it has no {name}.", 2)
        with path.open("rb") as stream:
            sums[f"{name}_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _package_digest(package: Path) -> str:
    """Of all files of a version but the checkpoint, which has digests of its own: names and contents."""
    files = {path.relative_to(package): path for path in package.rglob("*") if path.is_file()}
    sums = {str(n): hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items() if n.parts[0] != "artifacts"}
    return digest(sums, 64)


def _fetch(tracker: Tracker, found, folder: Path) -> Path:
    """The version's checkpoint under `folder`, downloaded once."""
    place = folder / f"{found.name}-{found.version}"
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        got = _get(tracker, found, "/artifacts/checkpoint", Path(temporary))
        with suppress(OSError):  # another process may have been first
            got.rename(place)
        if not place.is_dir():
            raise UserError(f"{place} cannot be made.")
    return place


def _get(tracker: Tracker, found, below: str, folder: Path) -> Path:
    """What a version has below its source, downloaded into a folder."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    folder.mkdir(exist_ok=True)
    try:
        got = download_artifacts(
            artifact_uri=f"{found.source}{below}", dst_path=str(folder), tracking_uri=tracker.uri,
            registry_uri=tracker.uri,
        )  # fmt: skip
    except (MlflowException, OSError) as error:
        console.print(f"  {' '.join(str(error).split())}")  # it names places, which belong into no verdict
        raise UserError(f"The files of {found.name!r} version {found.version} cannot be fetched.") from error
    return Path(got)


def _evaluation_tags(evaluation: dict[str, Any]) -> dict[str, str]:
    return {
        "ap": repr(_ap(evaluation)),
        "split": str(evaluation["split"]),
        "split_digest": str(evaluation["split_digest"]),
    }


def _ap(evaluation: dict[str, Any]) -> float:
    """NaN where there was nothing to find; no rule accepts that."""
    return float("nan") if evaluation["AP"] is None else float(evaluation["AP"])


def _thresholds(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says of the model's own thresholds, as members of its config.json."""
    best = (evaluation.get("best_f1") or {}).get("threshold")
    if best is None:
        return {}
    classes = {
        str(one["id"]): one["best_f1"]["threshold"]
        for one in evaluation["per_class"]
        if one["truth"] >= OBJECTS and one["best_f1"]["threshold"] is not None
    }
    return {"score_threshold": best, "score_thresholds": classes}


def _same_version(tracker: Tracker, name: str, sums: dict[str, str]):
    """The newest version with these digests whose files are still those; None where there is none."""
    terms = [f"name = '{name}'", *(f"tags.`{key}` = '{value}'" for key, value in sums.items())]
    found = tracker.client().search_model_versions(" and ".join(terms))
    for version in sorted(found, key=lambda version: -int(version.version)):
        with tempfile.TemporaryDirectory(prefix="detr-version-") as place:
            if _examine(tracker, name, str(version.version), Path(place), whole=True)["problem"] is None:
                return version
    return None


def _examine(tracker: Tracker, name: str, version: str, folder: Path, whole: bool = False) -> dict[str, Any]:
    """What the gate must know of a version's files: {"version", "problem", "place", "categories", "megabytes"}.

    whole: its code, which MLflow runs when somebody loads it, is verified, too.
    """
    found = {"version": version, "problem": None, "place": None, "categories": [], "megabytes": None}
    try:
        place, _, _ = download(tracker, f"models:/{name}/{version}", folder)
        if whole:
            registered = _version(tracker, name, version)
            package = _get(tracker, registered, "", folder / "package")
            if _package_digest(package) != registered.tags.get("package_digest"):
                raise UserError(
                    f"The code of {name!r} version {version} is not what was registered; register the checkpoint again."
                )
    except UserError as error:
        return found | {"problem": str(error).rstrip(".")}
    size = round((place / FILES[0]).stat().st_size / 1e6, 1)
    return found | {"place": place, "categories": read_json(place / FILES[1])["categories"], "megabytes": size}


def _reason(name: str, version: str, evaluation: dict[str, Any], standing: str | None, rules: list[dict]) -> str:
    """The verdict as one sentence."""
    failed = [rule["words"] for rule in rules if not rule["ok"]]
    if failed:
        return f"Version {version} of {name} was refused: {'; and '.join(failed)}."
    ap = f"AP {_ap(evaluation):.4f} on {evaluation['split']}"
    if standing is None:
        return f"Version {version} of {name} is the first champion, with {ap}."
    if standing == version:
        return f"Version {version} of {name} already is the champion, with {ap}."
    beaten = next(rule["words"] for rule in rules if rule["rule"] == "AP is above the champion's")
    return f"Version {version} of {name} is the new champion: {beaten} ({evaluation['split']})."


def _verdict_tags(verdict: dict[str, Any]) -> dict[str, str]:
    """The dated tag is never overwritten. What is too long for a tag is whole in the ledger's artifacts."""
    comparison = verdict["comparison"] and {key: verdict["comparison"][key] for key in ("AP", "images", "confidence")}
    outcome = "promoted" if verdict["promoted"] else "refused"
    kept = {"outcome": outcome, **verdict, "comparison": comparison}
    return {
        f"verdict.{datetime.now(UTC):%Y%m%dT%H%M%S.%f}": short_json(kept, MAX_TAG),
        "verdict": outcome,
        "verdict_reason": verdict["reason"][:1000],
    }


class _Standing:
    """Who is champion, by the alias and by the ledger, and what is between the two."""

    def __init__(self, tracker: Tracker, ledger: Ledger):
        self.ledger = ledger
        entries = ledger.entries()
        outcomes = _outcomes(tracker, ledger.name, entries)
        moves = [entry for entry in entries if entry["kind"] == "move"]
        told = {entry["move"] for entry in entries if entry["kind"] in ("done", "abandoned")}
        self.tracker = tracker
        self.open = [(move, outcomes[move["number"]]) for move in moves if move["number"] not in told]
        self.champions: list[str] = []  # the last one is the present one, before it those to go back to
        for move in moves:
            if outcomes[move["number"]] == "abandoned":
                continue
            if move["how"] == "rolled back":
                while self.champions and self.champions[-1] != move["to"]:
                    self.champions.pop()
            else:
                self.champions.append(move["to"])
        alias = _alias(tracker, ledger.name, CHAMPION)
        self.alias = str(alias.version) if alias else None
        self.found = None  # who was champion before somebody moved the alias without a word to the ledger
        if self.alias is not None and self.champions[-1:] != [self.alias]:
            self.found = (self.champions[-1] if self.champions else None,)
            self.champions.append(self.alias)
        self.version = self.champions[-1] if self.champions else None
        self.problem = None
        if self.version is not None and self.alias is None:
            if _exists(tracker, ledger.name, self.version):
                self.problem = (
                    f"champion version {self.version} lost its alias; run `detr promote --version {self.version}` to "
                    "give it back, or `detr rollback` to return to the champion before it"
                )
            else:
                self.problem = (
                    f"champion version {self.version} was deleted, so nothing can be measured against it; run `detr "
                    "rollback` to return to the champion before it or, if there is none, to begin anew"
                )

    def settle(self) -> None:
        """Write into the ledger what was learnt from the alias, under the lease."""
        for move, outcome in self.open:
            if outcome == "done" and move["how"] == "promoted" and _exists(self.tracker, self.ledger.name, move["to"]):
                for key, value in (("verdict", "promoted"), ("verdict_reason", move["reason"][:1000])):
                    self.ledger.client.set_model_version_tag(self.ledger.name, move["to"], key, value)
            if outcome == "done" and move["how"] == "rolled back":
                _forbid(self.tracker, self.ledger.name, move["from"], move["why"])
            self.ledger.write(outcome, move=move["number"])
        if self.found:
            entry = self.ledger.write("move", how="found", to=self.alias, **{"from": self.found[0]})
            self.ledger.write("done", move=entry["number"])


def _outcomes(tracker: Tracker, name: str, entries: list[dict[str, Any]]) -> dict[int, str]:
    """{a move's number: "done" or "abandoned"}; of the last one the alias may be the only witness."""
    outcomes = {entry["move"]: entry["kind"] for entry in entries if entry["kind"] in ("done", "abandoned")}
    for entry in entries:
        if entry["kind"] == "move" and entry["number"] not in outcomes:
            alias = _alias(tracker, name, CHAMPION)
            there = str(alias.version) if alias else None
            # Without alias and version: MLflow deletes a version's aliases with it.
            done = there == entry["to"] or (there is None and not _exists(tracker, name, entry["to"]))
            outcomes[entry["number"]] = "done" if done else "abandoned"
    return outcomes


def _move_champion(tracker: Tracker, ledger: Ledger, version: str | None) -> None:
    """The alias to a version (None: away), if the lease still is ours."""
    client = tracker.client()
    ledger.check_lease()
    if version is None:
        client.delete_registered_model_alias(ledger.name, CHAMPION)
        return
    client.set_registered_model_alias(ledger.name, CHAMPION, version)
    now = champion(tracker, ledger.name)
    if now is None or now["version"] != version:
        raise UserError(f"MLflow does not show version {version} of {ledger.name!r} as {CHAMPION}; try again.")


def _forbid(tracker: Tracker, name: str, version: str, why: str) -> None:
    """The gate refuses a version that was rolled back from then on."""
    if _exists(tracker, name, version):
        tracker.client().set_model_version_tag(name, version, "rolled_back", why[:1000])


def _model(tracker: Tracker, name: str):
    from mlflow.exceptions import MlflowException

    try:
        return tracker.client().get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"MLflow at {tracker} has no registered model {name!r}.", 2) from error


def _exists(tracker: Tracker, name: str, version: str | None) -> bool:
    from mlflow.exceptions import MlflowException

    if version is None:
        return False
    try:
        tracker.client().get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return False
    return True


def _version(tracker: Tracker, name: str, version: str):
    from mlflow.exceptions import MlflowException

    try:
        return tracker.client().get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(f"MLflow at {tracker} has no version {version} of {name!r}.", 2) from error


def _alias(tracker: Tracker, name: str, alias: str):
    from mlflow.exceptions import MlflowException

    try:
        return tracker.client().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # a missing alias is an INVALID_PARAMETER_VALUE, a missing model a RESOURCE_DOES_NOT_EXIST
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _info(version) -> dict[str, Any]:
    tags = dict(version.tags)
    return {
        "name": version.name,
        "version": str(version.version),
        "uri": f"models:/{version.name}/{version.version}",
        "run_id": version.run_id,
        "ap": float(tags.get("ap", "nan")),
        "split": tags.get("split"),
        "split_digest": tags.get("split_digest"),
        "label_map": tags.get("label_map"),
        "tags": tags,
    }


def _registered(version, reused: bool) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": str(version.version),
        "uri": f"models:/{version.name}/{version.version}",
        "run_id": version.run_id,
        "weights_sha256": version.tags["model.safetensors_sha256"],
        "reused": reused,
    }
