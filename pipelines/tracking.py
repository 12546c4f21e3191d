"""The only file that talks to MLflow tracking.

Every call goes through a client made for one URI: no active run, no global tracking URI. A `Tracker` is
three strings, so a Ray worker can be handed one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from pipelines.settings import RunSettings, UserError, flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own limits (mlflow.utils.validation); it refuses what is longer.
MAX_BATCH, MAX_KEY, MAX_PARAM, MAX_TAG, MAX_NAME, MAX_DIGEST = 100, 250, 6000, 5000, 500, 36
SOURCES = ("detr", "pipelines", "jobs")  # what decides how a run goes; changed tests do not
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}  # where nothing else is said
TRAINING = "training"  # the type of logged models that hold a training's figures; the registry's are detectors

logger = logging.getLogger(__name__)
_open: dict[str, Tracker] = {}  # runs of this process, by id; a stage's thread does not hear of Ctrl-C (end_open_runs)


def tracker(settings: RunSettings, store: Path, dataset_name: str) -> Tracker:
    """The tracker these settings ask for: a server, or SQLite and artifacts in the store.

    Raises UserError when a server or database is asked for and does not answer, or wants another user or password.
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
    _check_server(made)
    if root is None:
        made.client().search_experiments(max_results=1)  # says whether it knows us
    return made


def environment() -> dict[str, str]:
    """What this process runs on, for `Tracker.log_environment`: code, versions, platform, CPUs and GPUs.

    Nothing that names a machine, a user or a folder. gpus: those this process may use, so that the process
    that trains is the one to ask.
    """
    import torch
    from joblib import cpu_count

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    names = Counter(torch.cuda.get_device_name(gpu) for gpu in gpus)
    return {
        "code": code_version(),
        "python": platform.python_version(),
        **{name: _installed(name) for name in ("torch", "torchvision", "ray", "mlflow")},
        "cuda": torch.version.cuda or "none",
        "platform": platform.platform(),
        "cpus": str(cpu_count()),
        "gpus": ", ".join(f"{count} x {name}" for name, count in names.items()) or "none",
    }


def code_version() -> str:
    """`git <commit>`, with ` and changes` if the sources differ from it; else `detr-system <version>`.

    A checkout is taken for ours only if it tracks this file: an environment may lie in a checkout of the user's.
    """
    here = Path(__file__).resolve()
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        commit = _git(here.parent, "rev-parse", "HEAD")
        changes = _git(here.parents[1], "status", "--porcelain", "--", *SOURCES)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or somebody else's
        return f"detr-system {_installed('detr-system')}"
    return f"git {commit} and changes" if changes else f"git {commit}"


@dataclass(frozen=True)
class Tracker:
    """Runs of one experiment on one MLflow.

    artifact_root: where a new experiment keeps its artifacts; None leaves that to the server.
    """

    uri: str
    experiment: str
    artifact_root: str | None = None

    def client(self) -> MlflowClient:
        """The MLflow client for this URI (one per process). What a server does not let us do is a UserError."""
        return _client(self.uri)

    def __str__(self) -> str:
        return self.uri

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
                f"`mlflow experiments restore -x {found.experiment_id}` or set tracking.experiment.", 2,
            )  # fmt: skip
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
                forget_last_steps()
                if tags:
                    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
                _open[run_id] = self
                return run_id
        run_id = client.create_run(self.experiment_id(), tags=tags, run_name=name).info.run_id
        _open[run_id] = self
        return run_id

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
        values = {_key(name): _text(value)[:MAX_PARAM] for name, value in flatten(params).items()}
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

    def log_metrics(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        step: int | None = None,
        *,
        model_id: str | None = None,
        dataset_name: str | None = None,
        dataset_digest: str | None = None,
    ) -> None:
        """Log numbers at a step in one call.

        A step is never written twice or gone back to: a training that goes on from an older checkpoint does
        steps again, and of those the values logged first stay. Without a step the values are final figures,
        which are always written (at step 0), and the newest is shown.

        model_id: a logged model (`training_model`) that the values are bound to, besides being the run's.
        dataset_name, dataset_digest: the data they were measured on, as given to `log_dataset`. MLflow keeps
        them with the model's values only; ValueError if one of the three is missing.

        A value that is not finite would spoil MLflow's plots: it becomes the tag `not_finite.<name>`
        instead, which says the value and the step.
        """
        from mlflow.entities import Metric, RunTag

        if (dataset_name or dataset_digest) and not (model_id and dataset_name and dataset_digest):
            raise ValueError("a metric's dataset needs a name, a digest and a model")
        bound = {
            "model_id": model_id,
            "dataset_name": dataset_name and dataset_name[:MAX_NAME],
            "dataset_digest": dataset_digest and dataset_digest[:MAX_DIGEST],
        }
        last = {} if step is None else _last_steps(self.uri, run_id)
        step, now = int(step or 0), int(time.time() * 1000)
        finite, tags = [], []
        for name, value in metrics.items():
            key, number = _key(name), float(value)
            if not math.isfinite(number):
                tags.append(RunTag(f"not_finite.{key}"[:MAX_KEY], f"{number} at step {step}"))
            elif step > last.get(key, -1):
                finite.append(Metric(key, number, now, step, **bound))
        if finite or tags:
            self.client().log_batch(run_id, metrics=finite, tags=tags)
        last.update((metric.key, step) for metric in finite)

    def training_model(self, run_id: str, name: str, tags: Mapping[str, Any] | None = None) -> str:
        """The id of the logged model that a training's validations are bound to; found again when the run goes on.

        One for a training, its values told apart by step, and not one for each validation: most checkpoints
        are soon deleted, and MLflow's list of models would fill with entries that have no files. MLflow
        reads all values of the models it lists (92 values at 100 steps: 3 MB and 0.7 s for each model), so
        with many classes the AP of each class is better bound once, for the best checkpoint. It sorts models
        by the newest value; what to sort trainings by is best logged at the end.
        """
        from mlflow.entities import LoggedModelOutput

        client = self.client()
        run = client.get_run(run_id)
        found = client.search_logged_models(
            [run.info.experiment_id], f"source_run_id = '{run_id}' AND model_type = '{TRAINING}'", max_results=1
        )
        if found:
            model_id = found[0].model_id
        else:
            model_id = client.create_logged_model(
                run.info.experiment_id,
                name=re.sub(r"[/:.%\"']", "-", name) or TRAINING,  # MLflow refuses these
                source_run_id=run_id,
                tags={key: str(value)[:MAX_TAG] for key, value in (tags or {}).items()},
                model_type=TRAINING,
            ).model_id
        known = run.outputs.model_outputs if run.outputs else []
        if model_id not in [output.model_id for output in known]:  # MLflow fails when told of the same one twice
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        return model_id

    def end_training_model(self, model_id: str, ready: bool = True, tags: Mapping[str, Any] | None = None) -> None:
        """Mark a logged model as READY or FAILED, with tags such as the best step; a failed one may get ready later."""
        client = self.client()
        if tags:
            client.set_logged_model_tags(model_id, {key: str(value)[:MAX_TAG] for key, value in tags.items()})
        client.finalize_logged_model(model_id, "READY" if ready else "FAILED")

    def log_environment(self, run_id: str, facts: Mapping[str, str]) -> None:
        """Say what a run runs on (see `environment`), as tags `env.<name>`; to be called at each start.

        What a run was started with stays. When it goes on with something else, `changed.env.<name>` lists
        both and all that follow, in order: `2.14.0 -> 2.15.0`.
        """
        from mlflow.entities import RunTag

        client = self.client()
        present = client.get_run(run_id).data.tags
        tags = {}
        for name, value in facts.items():
            key = f"env.{name}"
            so_far = present.get(f"changed.{key}") or present.get(key)
            if so_far is None:
                tags[key] = value
            elif so_far.split(" -> ")[-1] != value:
                tags[f"changed.{key}"] = f"{so_far} -> {value}"[-MAX_TAG:]
        if tags:
            client.log_batch(run_id, tags=[RunTag(key, value[:MAX_TAG]) for key, value in tags.items()])

    @contextmanager
    def system_metrics(self, run_id: str, seconds: float = 10) -> Iterator[None]:
        """Log the use of this process's machine every so many seconds, as `system/…`, while the block runs.

        CPU, memory, disk and network; with the package nvidia-ml-py also each NVIDIA GPU of the machine,
        whichever of them this process may use. The first CPU value of a start is always 0. The steps
        are samples, not the training's, and go on after a restart. MLflow's monitor gives up for good when
        the run is no longer RUNNING or MLflow fails once; nothing here ever fails the block.
        """
        monitor = None
        try:
            self.client()  # sets MLflow's environment before it is imported
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(
                run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=self.uri
            )
            monitor.start()
        except Exception as error:  # noqa: BLE001 - a training is worth more than its use of the machine
            logger.warning("The use of CPU, memory and GPU is not logged: %s", error)
        try:
            yield
        finally:
            if monitor is not None:
                monitor.finish()  # logs its own errors

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
            name=name[:MAX_NAME],
            digest=digest[:MAX_DIGEST],
            source_type="coco",
            source=json.dumps(dict(source or {})),
            profile=json.dumps({"digest": digest, **(profile or {})}),
        )
        tags = [InputTag("mlflow.data.context", context)]
        self.client().log_inputs(run_id, [DatasetInput(dataset, tags)])

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run that this process started as FINISHED, FAILED or KILLED; one that is closed stays as it is.

        Where another process closed it as stopped, and this one fails of that, it stays so, too.
        """
        if _open.pop(run_id, None):
            client = self.client()
            if status != "FAILED" or client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, status)

    def end_training(self, run_id: str, status: str, tags: Mapping[str, str]) -> None:
        """Close the run of a training that another process did and was ended in, with tags that say why."""
        client = self.client()
        for key, value in tags.items():
            client.set_tag(run_id, key, value[:MAX_TAG])
        self.end_training_model(self.training_model(run_id, TRAINING), ready=False)
        client.set_terminated(run_id, status)

    def watch_run(self, run_id: str, running: bool) -> None:
        """Have a run that another process keeps open closed with those of this one, when this one is stopped."""
        if running:
            _open[run_id] = self
        else:
            _open.pop(run_id, None)

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
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A quarter of a minute for a server that is away, and not four: a training waits meanwhile.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.WARNING)
    path = _sqlite_path(uri)
    if path is None:
        return _ServersClient(MlflowClient(uri, registry_uri=uri), uri)  # type: ignore[return-value]
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.init.lock"):  # the first client makes the tables
        client = MlflowClient(uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client


class _ServersClient:
    """An MlflowClient that says in one sentence what a server did not let it do.

    Users and passwords come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the file that MLflow
    keeps them in; it reads them anew for each request.
    """

    def __init__(self, client: MlflowClient, uri: str):
        self._client, self._uri = client, uri

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._client, name)
        if not callable(work):
            return work

        def ask(*arguments: Any, **options: Any) -> Any:
            from mlflow.exceptions import MlflowException
            from mlflow.utils.credentials import read_mlflow_creds

            try:
                return work(*arguments, **options)
            except MlflowException as error:
                if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
                    raise
                user = read_mlflow_creds().username
                if error.error_code == "PERMISSION_DENIED":
                    what = f"does not let {user!r} {name.replace('_', ' ')}; ask who runs it for the permission"
                else:
                    what = f"does not accept this password of {user!r}" if user else "asks for a user and a password"
                    what += "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of a user of it"
                raise UserError(f"MLflow at {self._uri} {what}.", 2) from error

        return ask


def forget_last_steps() -> None:
    """Ask anew which steps were logged: another process may have gone on meanwhile."""
    _last_steps.cache_clear()


def open_run() -> str | None:
    """The run that this process opened first of those that are open: a sweep's own before its trials'."""
    return next(iter(list(_open)), None)


def end_open_runs(status: str) -> None:
    """Close what this process started and has not closed; whoever would close it later on does not any more."""
    while _open:
        run_id, tracker = _open.popitem()
        tracker.client().set_terminated(run_id, status)


@lru_cache(maxsize=64)
def _last_steps(uri: str, run_id: str) -> dict[str, int]:
    """The last step of each metric: asked for once per process and run, then kept up by who logs.

    One process logs a training at a time, and each attempt of Ray's is a new process.
    """
    # to_proto is the only public way to the steps that comes without each metric's whole history
    metrics = _client(uri).get_run(run_id).data.to_proto().metrics
    return {metric.key: metric.step for metric in metrics}


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _check_server(server: Tracker) -> None:
    """Fail in seconds where MLflow's own client would retry for minutes; a file or a socket has no port to ask."""
    parts = urlsplit(server.uri)
    scheme = parts.scheme.split("+")[0]  # postgresql+psycopg
    port = parts.port or PORTS.get(scheme)
    if not parts.hostname or port is None:
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except OSError as error:
        what = "MLflow server" if scheme in ("http", "https") else "database"
        raise UserError(
            f"No {what} answers at {server} ({error}); start it, or leave tracking.uri out to keep runs in the store."
        ) from error


def _key(name: str) -> str:
    """A name as MLflow takes it: letters of any script, digits and `_-. :/`, and no path that has a shorter form."""
    name = re.sub(r"[^\w\-. :/]", "_", name)[: MAX_KEY - 1]
    return re.sub(r"(?<![^/])\.{0,2}(?=/|$)", "_", name)  # of a//b, a/./b and a/


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _quoted(value: Any) -> str:
    text = str(value)
    if "'" in text:
        raise ValueError(f"a tag to search for cannot hold a quote: {text}")
    return text
