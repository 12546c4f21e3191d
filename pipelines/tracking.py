"""The only file that talks to MLflow tracking.

Every call goes through a client made for one URI: no active run, no global tracking URI. A `Tracker` is
three strings, so a Ray worker can be handed one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from pipelines.settings import RunSettings, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own limits (mlflow.utils.validation); it refuses what is longer.
MAX_BATCH, MAX_KEY, MAX_PARAM, MAX_TAG, MAX_DIGEST = 100, 250, 6000, 5000, 36


def tracker(settings: RunSettings, store: Path, dataset_name: str) -> Tracker:
    """The tracker these settings ask for: a server, or SQLite and artifacts in the store.

    Raises UserError when a server is asked for and does not answer.
    """
    uri = settings.tracking.uri
    root: Path | None = Path(store).resolve()
    if uri is None:
        root.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{root / 'mlflow.db'}"
    elif uri.startswith(("http://", "https://")):
        root = None  # the server knows where its artifacts are
    elif "://" not in uri:
        raise UserError(f"tracking.uri is {uri!r}; write it as http(s)://…, sqlite:///… or postgresql://….", 2)
    made = Tracker(
        uri=uri,
        experiment=settings.tracking.experiment or dataset_name,
        artifact_root=(root / "mlartifacts").as_uri() if root else None,
    )
    if root is None:
        _check_server(made)
    return made


@dataclass(frozen=True)
class Tracker:
    """Runs of one experiment on one MLflow.

    artifact_root: where a new experiment keeps its artifacts; None leaves that to the server.
    """

    uri: str
    experiment: str
    artifact_root: str | None = None

    def client(self) -> MlflowClient:
        """The MLflow client for this URI (one per process)."""
        return _client(self.uri)

    def __str__(self) -> str:
        return re.sub(r"//[^/@]*@", "//", self.uri)  # without a password

    def experiment_id(self) -> str:
        """The experiment's id; it is made when there is none yet. Raises UserError if it was deleted."""
        from mlflow.exceptions import MlflowException

        client = self.client()
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return client.create_experiment(self.experiment, artifact_location=self.artifact_root)
            except MlflowException:  # another process was first
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UserError(
                f"MLflow's experiment {self.experiment!r} was deleted; restore it with "
                f"`mlflow experiments restore -x {found.experiment_id}` or set tracking.experiment."
            )
        return found.experiment_id

    def start_run(self, name: str, run_id: str | None = None, tags: Mapping[str, Any] | None = None) -> str:
        """Start a run, or go on with `run_id` if it exists; returns the run's id."""
        from mlflow.entities import RunTag
        from mlflow.exceptions import MlflowException

        client = self.client()
        tags = {key: str(value)[:MAX_TAG] for key, value in (tags or {}).items()}
        if run_id is not None:
            try:
                known = client.get_run(run_id).info.lifecycle_stage == "active"
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                known = False
            if known:
                client.update_run(run_id, status="RUNNING")
                if tags:
                    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
                return run_id
        return client.create_run(self.experiment_id(), tags=tags, run_name=name).info.run_id

    def find_run(self, tags: Mapping[str, Any]) -> str | None:
        """The newest run that carries all these tags, or None."""
        terms = [f"tags.`{key}` = '{_quoted(value)}'" for key, value in tags.items()]
        runs = self.client().search_runs(
            [self.experiment_id()], " and ".join(terms), max_results=1, order_by=["attributes.start_time DESC"]
        )
        return runs[0].info.run_id if runs else None

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log a nested dict as params with dotted names.

        MLflow's params cannot change. One that was logged before with another value keeps it; the new
        value is written to the tag `changed.<name>`.
        """
        from mlflow.entities import Param, RunTag

        client = self.client()
        values = {_key(name): _text(value)[:MAX_PARAM] for name, value in _flatten(params)}
        present = client.get_run(run_id).data.params
        new = [Param(name, value) for name, value in values.items() if name not in present]
        changed = [
            RunTag(f"changed.{name}"[:MAX_KEY], value[:MAX_TAG])
            for name, value in values.items()
            if name in present and present[name] != value
        ]
        for entries, kind in ((new, "params"), (changed, "tags")):
            for start in range(0, len(entries), MAX_BATCH):
                client.log_batch(run_id, **{kind: entries[start : start + MAX_BATCH]})

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step in one call.

        A value that is not finite would spoil MLflow's plots: it becomes the tag `not_finite.<name>`
        instead, which says the value and the step.
        """
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        finite, tags = [], []
        for name, value in metrics.items():
            number = float(value)
            if math.isfinite(number):
                finite.append(Metric(_key(name), number, now, int(step)))
            else:
                tags.append(RunTag(f"not_finite.{_key(name)}"[:MAX_KEY], f"{number} at step {step}"))
        if finite or tags:
            self.client().log_batch(run_id, metrics=finite, tags=tags)

    def log_file(self, run_id: str, path: Path | str, artifact_path: str | None = None) -> None:
        """Copy a file or a whole folder to the run's artifacts, below `artifact_path`."""
        path = Path(path)
        if path.is_dir():
            self.client().log_artifacts(run_id, str(path), artifact_path)
        else:
            self.client().log_artifact(run_id, str(path), artifact_path)

    def log_dataset(
        self,
        run_id: str,
        name: str,
        digest: str,
        context: str = "training",
        source: Mapping[str, Any] | None = None,
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Say which data the run used, by our own digest (MLflow keeps its first 36 characters).

        context: what for ("training", "validation", "test"); source: where it came from; profile: counts.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name[:500],
            digest=digest[:MAX_DIGEST],
            source_type="coco",
            source=json.dumps(dict(source or {})),
            profile=json.dumps({"digest": digest, **(profile or {})}),
        )
        tags = [InputTag("mlflow.data.context", context)]
        self.client().log_inputs(run_id, [DatasetInput(dataset, tags)])

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client().set_terminated(run_id, status)

    @contextmanager
    def lock(self, timeout: float = 60) -> Iterator[bool]:
        """Hold a lock beside the SQLite file; yields False for a server, which has no such file."""
        path = _sqlite_path(self.uri)
        if path is None:
            yield False
        else:
            with FileLock(f"{path}.lock", timeout=timeout):
                yield True


@lru_cache(maxsize=8)
def _client(uri: str) -> MlflowClient:
    # Before MLflow is imported: no telemetry, no bars of its own, and never a pickled model.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.WARNING)
    path = _sqlite_path(uri)
    if path is None:
        return MlflowClient(uri, registry_uri=uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.init.lock"):  # the first client makes the tables
        client = MlflowClient(uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _check_server(server: Tracker) -> None:
    """Fail in seconds where MLflow's own client would retry for minutes."""
    parts = urlsplit(server.uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"No MLflow server answers at {server} ({error}); start it, or leave tracking.uri out "
            "to keep runs in the store."
        ) from error


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _key(name: str) -> str:
    """A name as MLflow takes it: letters, digits and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:MAX_KEY]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _quoted(value: Any) -> str:
    text = str(value)
    if "'" in text:
        raise ValueError(f"a tag to search for cannot hold a quote: {text}")
    return text
