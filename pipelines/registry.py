"""The registry: versions of a detector, the gate a version must pass to become champion, and the way back.

A version is its weights, its label map and the code that runs them; tags on it say what it scored, on
which data, and every verdict on it. The alias `champion` is moved last, so that a crash leaves the old
champion standing.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from filelock import Timeout

from pipelines.settings import RunSettings, UserError, digest
from pipelines.stage import write_json
from pipelines.tracking import Tracker

CHAMPION, CHALLENGER = "champion", "challenger"  # aliases: the newest version is challenger until it is champion
FILES = ("model.safetensors", "config.json")  # what makes a checkpoint, each with its digest as a tag
PACKAGED = ("__init__.py", "detect.py")  # of pipelines/; the detector needs no more
REQUIREMENTS = (
    "mlflow", "torch", "torchvision", "scipy", "safetensors", "pydantic", "pillow", "numpy", "pandas",
)  # fmt: skip
LEASE_SECONDS = 300


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

    evaluation: what `evaluate` returned ("AP" and "split" of it), with "split_digest", the digest of that
    split's content. Returns {"name", "version", "uri", "run_id", "weights_sha256", "reused"}. Raises
    UserError if the folder is no checkpoint.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    client = tracker.client()
    checkpoint = Path(checkpoint)
    sums = _checksums(checkpoint)
    categories = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["categories"]
    with _lease(tracker, model_name, create=True):
        same = [f"name = '{model_name}'", *(f"tags.`{key}` = '{value}'" for key, value in sums.items())]
        known = client.search_model_versions(" and ".join(same), max_results=1)
        if known:
            return _registered(known[0], reused=True)
        tags = {
            **sums,
            **_evaluation_tags(evaluation),
            "dataset_digest": dataset_digest,
            "label_map": digest(categories),
            "classes": str(len(categories)),
            "run_id": run_id,
        }
        logged = client.create_logged_model(
            tracker.experiment_id(), name=model_name, source_run_id=run_id, tags=tags, model_type="detector"
        )
        with tempfile.TemporaryDirectory(prefix="detr-model-") as place:
            package = _package(Path(place), checkpoint, run_id, logged)
            client.log_model_artifacts(logged.model_id, str(package))
        client.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
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
    evaluation: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Make a version champion if it passes the gate.

    evaluation: as for `register`, measured now; the champion's is the one kept with its version.
    folder: gets `verdict.json`. Returns {"promoted", "reason", "version", "previous", "champion", "rules":
    [{"rule", "ok", "figure", "limit"}, ...]}; the same verdict is kept as tags on the version, whether it
    passed or not. A standing champion stays champion, and takes on the new evaluation. Raises UserError if
    there is no such version, or somebody else holds the registry.
    """
    client = tracker.client()
    version = str(version)
    folder = Path(folder)
    candidate = _info(_version(tracker, model_name, version))
    new = _evaluation_tags(evaluation)
    with _lease(tracker, model_name):
        standing = champion(tracker, model_name)
        rules = _gate(settings, evaluation, candidate, standing)
        rules.append(_weights_rule(tracker, model_name, version, folder))
        promoted = all(rule["ok"] for rule in rules)
        verdict = {
            "promoted": promoted,
            "reason": _reason(model_name, version, evaluation, standing, rules),
            "version": version,
            "previous": standing["version"] if standing else None,
            "champion": version if promoted else standing["version"] if standing else None,
            "rules": rules,
        }
        tags = new | _verdict_tags("promoted" if promoted else "refused", verdict)
        if promoted and not (standing and standing["version"] == version):
            tags["previous_champion"] = standing["version"] if standing else ""
        for key, value in tags.items():
            client.set_model_version_tag(model_name, version, key, value)
        if promoted:
            challenger = _alias(tracker, model_name, CHALLENGER)
            if challenger and str(challenger.version) == version:
                client.delete_registered_model_alias(model_name, CHALLENGER)
            _move_champion(tracker, model_name, version)  # last: a crash leaves the old champion
    write_json(folder / "verdict.json", {"format": 1, "model": model_name, **verdict})
    return verdict


def rollback(tracker: Tracker, model_name: str, why: str) -> dict[str, Any]:
    """Give the alias back to the champion before this one.

    Returns {"version", "previous", "reason"}; kept as tags on the version that lost the alias, which the
    gate refuses from then on. Raises UserError if there is no champion or it followed none.
    """
    client = tracker.client()
    with _lease(tracker, model_name):
        standing = champion(tracker, model_name)
        if standing is None:
            raise UserError(f"Model {model_name!r} has no champion to roll back.", 2)
        before = standing["tags"].get("previous_champion")
        if not before:
            raise UserError(f"Version {standing['version']} of {model_name!r} was the first champion.", 2)
        _version(tracker, model_name, before)
        result = {"version": before, "previous": standing["version"], "reason": why}
        tags = _verdict_tags("rolled back", result) | {"rolled_back": why[:1000]}
        for key, value in tags.items():
            client.set_model_version_tag(model_name, standing["version"], key, value)
        _move_champion(tracker, model_name, before)
    return result


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
    for key, value in _checksums(place).items():
        if found.tags.get(key) != value:
            shutil.rmtree(place)  # so that the next attempt fetches anew
            raise UserError(
                f"{key.removesuffix('_sha256')} of {name!r} version {found.version} is not what was "
                f"registered (sha256 {value[:12]}… instead of {str(found.tags.get(key))[:12]}…); "
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
    shutil.copytree(checkpoint, place / "checkpoint", ignore=skip)
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
            artifacts={"checkpoint": str(place / "checkpoint")},
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
    """{"model.safetensors_sha256": hex, "config.json_sha256": hex}; UserError if a file is missing."""
    sums = {}
    for name in FILES:
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{checkpoint} is no checkpoint folder: it has no {name}.", 2)
        with path.open("rb") as stream:
            sums[f"{name}_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _fetch(tracker: Tracker, found, folder: Path) -> Path:
    """The version's checkpoint under `folder`, downloaded once."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    place = folder / f"{found.name}-{found.version}"
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        try:
            got = download_artifacts(
                artifact_uri=f"{found.source}/artifacts/checkpoint",
                dst_path=temporary,
                tracking_uri=tracker.uri,
                registry_uri=tracker.uri,
            )
        except (MlflowException, OSError) as error:
            raise UserError(
                f"The files of {found.name!r} version {found.version} cannot be fetched: {error}"
            ) from error
        Path(got).rename(place)
    return place


def _evaluation_tags(evaluation: dict[str, Any]) -> dict[str, str]:
    return {
        "ap": repr(_ap(evaluation)),
        "split": str(evaluation["split"]),
        "split_digest": str(evaluation["split_digest"]),
    }


def _ap(evaluation: dict[str, Any]) -> float:
    """NaN where there was nothing to find; no rule accepts that."""
    return float("nan") if evaluation["AP"] is None else float(evaluation["AP"])


def _gate(
    settings: RunSettings, evaluation: dict[str, Any], candidate: dict[str, Any], standing: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The rules, each with what was found and what was asked."""
    gate = settings.gate
    ap = _ap(evaluation)
    figure = round(ap, 6) if math.isfinite(ap) else None
    rules = [{"rule": "AP reaches the floor", "ok": ap >= gate.min_ap, "figure": figure, "limit": gate.min_ap}]
    if "rolled_back" in candidate["tags"]:  # otherwise the next scheduled run would bring it back
        why = candidate["tags"]["rolled_back"]
        rules.append({"rule": "was not rolled back", "ok": False, "figure": why, "limit": None})
    if standing is None or standing["version"] == candidate["version"]:
        return rules
    same_data = str(evaluation["split_digest"]) == standing["split_digest"]
    rules += [
        {
            "rule": "measured on the champion's data",
            "ok": same_data,
            "figure": str(evaluation["split_digest"])[:12],
            "limit": str(standing["split_digest"])[:12],
        },
        {
            "rule": "has the champion's label map",
            "ok": candidate["label_map"] == standing["label_map"],
            "figure": candidate["label_map"],
            "limit": standing["label_map"],
        },
    ]
    if same_data:  # otherwise the two numbers cannot be compared
        limit = standing["ap"] + gate.margin
        rules.append(
            {"rule": "AP is above the champion's", "ok": ap > limit, "figure": figure, "limit": round(limit, 6)}
        )
    return rules


def _weights_rule(tracker: Tracker, name: str, version: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".candidate-") as temporary:
        try:
            download(tracker, f"models:/{name}/{version}", Path(temporary))
            found = "as registered"
        except UserError as error:
            found = str(error)
    return {
        "rule": "files are those registered",
        "ok": found == "as registered",
        "figure": found,
        "limit": "as registered",
    }


def _reason(
    name: str, version: str, evaluation: dict[str, Any], standing: dict[str, Any] | None, rules: list[dict[str, Any]]
) -> str:
    """The verdict as one sentence."""
    ap = f"AP {_ap(evaluation):.4f}" if math.isfinite(_ap(evaluation)) else "AP undefined (nothing to find)"
    other = f"champion version {standing['version']}" if standing else ""
    sentences = {
        "AP reaches the floor": lambda rule: f"{ap} is below gate.min_ap {rule['limit']}",
        "was not rolled back": lambda rule: (
            f"it was rolled back ({rule['figure']}); delete its tag rolled_back to allow it again"
        ),
        "measured on the champion's data": lambda rule: (
            f"it was measured on other data ({rule['figure']}…) than {other} ({rule['limit']}…), "
            f"which must be evaluated and promoted on the same data first"
        ),
        "has the champion's label map": lambda rule: f"its classes are not those of {other}",
        "AP is above the champion's": lambda rule: f"{ap} is not above {rule['limit']:.4f}, the bar set by {other}",
        "files are those registered": lambda rule: rule["figure"].rstrip("."),
    }
    failed = [sentences[rule["rule"]](rule) for rule in rules if not rule["ok"]]
    if failed:
        return f"Version {version} of {name} was refused: {'; and '.join(failed)}."
    if standing is None:
        return f"Version {version} of {name} is the first champion, with {ap} on {evaluation['split']}."
    if standing["version"] == version:
        return f"Version {version} of {name} already is the champion, with {ap} on {evaluation['split']}."
    return (
        f"Version {version} of {name} is the new champion: {ap} on {evaluation['split']} "
        f"beats the {standing['ap']:.4f} of version {standing['version']}."
    )


def _verdict_tags(outcome: str, verdict: dict[str, Any]) -> dict[str, str]:
    """Who, when, why and the figures; the dated tag is never overwritten."""
    try:
        who = getpass.getuser()
    except (OSError, KeyError):  # a container without a name for its user
        who = "unknown"
    now = datetime.now(UTC)
    text = json.dumps(
        {"outcome": outcome, "who": who, "when": now.isoformat(timespec="seconds"), **verdict}, ensure_ascii=False
    )
    return {
        f"verdict.{now:%Y%m%dT%H%M%S.%f}": text[:5000],
        "verdict": outcome,
        "verdict_reason": verdict["reason"][:1000],
    }


def _move_champion(tracker: Tracker, name: str, version: str) -> None:
    tracker.client().set_registered_model_alias(name, CHAMPION, version)
    now = champion(tracker, name)
    if now is None or now["version"] != version:
        raise UserError(f"MLflow took version {version} of {name!r} as {CHAMPION} but does not show it; try again.")


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


@contextmanager
def _lease(tracker: Tracker, name: str, create: bool = False) -> Iterator[None]:
    """Nobody else reads, judges and moves the alias meanwhile; UserError if it is not free in a minute.

    With SQLite a lock file. A server has no compare-and-set, so there it is a tag on the registered model:
    written, read back after a moment, and good for LEASE_SECONDS should its holder die.
    """
    from mlflow.exceptions import MlflowException

    client = tracker.client()
    try:
        with tracker.lock() as locked:
            if create:
                try:
                    client.create_registered_model(name)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
            if locked:
                yield
                return
            with _tag_lease(client, name):
                yield
    except Timeout as error:
        raise UserError(f"Somebody else is changing model {name!r}; try again in a minute.") from error


@contextmanager
def _tag_lease(client, name: str, wait: float = 60, settle: float = 0.5) -> Iterator[None]:
    mine = f"{uuid.uuid4().hex} {time.time() + LEASE_SECONDS:.0f}"
    end = time.monotonic() + wait
    while True:
        held = client.get_registered_model(name).tags.get("lease", "")
        if not held or float(held.split()[1]) < time.time():
            client.set_registered_model_tag(name, "lease", mine)
            time.sleep(settle)
            held = client.get_registered_model(name).tags.get("lease", "")
            if held == mine:
                break
        if time.monotonic() > end:
            raise Timeout(f"lease of {name}")
        time.sleep(settle)
    try:
        yield
    finally:
        if client.get_registered_model(name).tags.get("lease") == mine:
            client.delete_registered_model_tag(name, "lease")
