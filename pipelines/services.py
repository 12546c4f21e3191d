"""What a run would meet of Ray, storage, MLflow and their clocks: each is asked as the run will ask it."""
from __future__ import annotations

import email.utils
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from pipelines.findings import (
    ANSWER,
    Finding,
    ask,
    bare,
    is_loopback,
    not_asked,
    ok,
    one_line,
    warning,
    wrong,
)
from pipelines.machine import gpus_to_use, nearest, needs, ray_folder
from pipelines.settings import RunSettings, UserError

SLOW_STATE = 5.0  # seconds
RESUMES = 4  # CPUs below which a Ray Data job that goes on starves: no room for readers beside its actors
AGENT = 10  # seconds in which the head's agent is to be there, as for Ray itself when a job is submitted
SKEW, SKEW_REFUSED = 30, 900  # seconds a clock may be off, and from which on S3 refuses every request
PROBE = 2**16  # bytes
CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
STALLS = "Restart the head with its dashboard: without, no stopped trial's place is freed, and sweeps stall."
NO_AGENT = (
    "Restart the head with another --dashboard-agent-listen-port: most often another Ray on that machine has the port "
    "(52365 by default)."
)
WITH_TOKEN = "start it with RAY_AUTH_MODE=token and the token that `ray get-auth-token --generate` makes"


class Place(NamedTuple):
    """A folder, file or s3:// prefix, and the option or setting that names it."""

    name: str
    uri: str
    write: bool


def places(settings: RunSettings, store: str) -> list[Place]:
    """Everything that a run with these settings reads or writes, each once."""
    data, train = settings.data, settings.train
    elsewhere = data.images if "://" in data.images or data.images.startswith("/") else None
    weights = None if train.backbone_weights == "imagenet" else train.backbone_weights
    named = (
        ("--store", store, True), ("train.storage", train.storage, True), ("data.path", data.path, False),
        ("data.images", elsewhere, False), ("train.init_from", train.init_from, False),
        ("train.backbone_weights", weights, False),
    )  # fmt: skip
    found: dict[str, Place] = {}
    for name, uri, write in named:
        if uri:
            found.setdefault(uri, Place(name, uri, write))
    return list(found.values())


# Ray


def check_ray(settings: RunSettings, store: str) -> list[Finding]:
    """The cluster, its token, its State API and its room for the run; or what of a Ray that will start here."""
    address, looked_at = settings.cluster.address, "RAY_API_SERVER_ADDRESS" in os.environ  # by check_jobs_api
    if address == "local":
        cpus = settings.cluster.local_cpus()
        token = [] if looked_at else [_token_of_local()]
        return [_starts_here(cpus), *token, *check_room(settings, cpus, gpus_to_use())]
    asked = urlsplit(address if "://" in address else f"//{address}")
    if asked.hostname and asked.port:  # Ray itself would wait for longer
        try:
            socket.create_connection((asked.hostname, asked.port), timeout=ANSWER).close()
        except OSError as error:
            return [wrong("Ray", f"nobody answers at {address} ({error.strerror or error})",
                          "Start the cluster, or mend cluster.address (local: Ray starts here).")]  # fmt: skip
    import ray

    try:
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        return [wrong("Ray", f"the cluster at {address} does not take us: {one_line(error)}", _how_to_join(error))]
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        has, url = ray.cluster_resources(), context.dashboard_url
    finally:
        ray.shutdown()
    cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
    api = check_jobs_api(url) if url and not looked_at else []
    if not url:
        api = [wrong("State API", "the cluster runs without its dashboard, which has it", STALLS)]
    return [
        ok("Ray", f"{len(nodes)} node(s), {cpus} CPUs, {gpus} GPUs; Ray {ray.__version__} and Python as here"), *api,
        *check_room(settings, cpus, gpus), *_several_machines(settings, store, len(nodes)),
    ]  # fmt: skip


def check_jobs_api(url: str) -> list[Finding]:
    """Whether Ray's HTTP server asks for a token and takes ours, and whether the State API behind it answers."""
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # which Ray prefers to what it is told
    try:
        status, _, _ = ask(f"{url}/api/jobs/")
    except OSError as error:
        found, advice = f"nobody answers at {bare(url)} ({error})", "Restart the head with its dashboard, or mend"
        return [wrong("Ray's token", found, f"{advice} RAY_API_SERVER_ADDRESS."), wrong("State API", found, STALLS)]
    token, lets_in = _check_token(url, status)
    return [token, *(check_state(url) if lets_in else [not_asked("State API", "it is behind the same door")])]


def _check_token(url: str, status: int) -> tuple[Finding, bool]:
    """What a request without a token, which must be refused, and one with ours say; and whether we are let in.

    status: what the one without got.
    """
    check = "Ray's token"
    if status == 200:
        found = f"{bare(url)} answers without a token: anyone who reaches it runs code there"
        if is_loopback(url):
            return warning(check, f"{found}, which is everybody on this machine", f"To be safe, {WITH_TOKEN}."), True
        return wrong(check, found, f"Stop the cluster, and {WITH_TOKEN}."), True
    if status not in (401, 403):
        return wrong(check, f"{bare(url)} answers with status {status}, as no Ray does",
                     "Mend RAY_API_SERVER_ADDRESS, which is the address of Ray's dashboard."), False  # fmt: skip
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(url)  # asks for the version
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        advice = "Set RAY_AUTH_TOKEN_PATH to a file with its token; by default Ray reads ~/.ray/auth_token."
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            advice = f"Set RAY_AUTH_MODE=token, without which Ray sends none. {advice}"
        return wrong(check, f"{bare(url)} asks for a token, and does not take ours: {one_line(error)}", advice), False
    return ok(check, f"{bare(url)} refuses who has none, and takes ours"), True


def check_state(url: str) -> list[Finding]:
    """Whether Ray's State API answers soon: by it Ray frees the place of a sweep's trial that was stopped.

    If it does, also whether the head has its agent.
    """
    from ray.exceptions import RayError
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    began = time.monotonic()
    try:
        nodes = list_nodes(address=url, timeout=int(ANSWER))
    except (RayStateApiException, RayError, OSError, RuntimeError, KeyError, ValueError) as error:
        return [wrong("State API", f"it does not answer: {one_line(error)}", STALLS)]
    took = time.monotonic() - began
    found = f"it names {len(nodes)} node(s) within {took:.1f} s"
    agent = check_agent(url)
    if took > SLOW_STATE:
        return [warning("State API", found, "Give the head more CPUs or memory: sweeps wait for its answers."), agent]
    return [ok("State API", found), agent]


def check_agent(url: str) -> Finding:
    """Whether the agent on the head answers, by which Ray starts submitted jobs.

    It is asked to list a log, through the dashboard, which finds it as it does for a job.
    """
    from ray.exceptions import RayError
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

    from pipelines.submit import Away, Client

    check = "job agent"
    try:
        head = list_nodes(address=url, filters=[("is_head_node", "=", True), ("state", "=", "ALIVE")],
                          timeout=int(ANSWER))  # fmt: skip
        if not head:
            return wrong(check, "Ray names no node as its head, on which submitted jobs start", "Restart the head.")
        patiently = Retrying(retry=retry_if_exception_type(Away), stop=stop_after_delay(AGENT), wait=wait_fixed(0.5),
                             reraise=True)  # fmt: skip
        patiently(Client(url).ask_agent, head[0].node_id, int(SLOW_STATE))
    except Away:  # what the dashboard says of it is that it is in trouble
        return wrong(check, "the agent on the head does not answer: `detr submit` waits in vain for it to start jobs",
                     NO_AGENT)  # fmt: skip
    except (UserError, RayStateApiException, RayError, OSError, RuntimeError, KeyError, ValueError) as error:
        return wrong(check, f"the agent on the head cannot be asked: {one_line(error)}", NO_AGENT)
    return ok(check, "the agent on the head, which starts submitted jobs, answers")


def check_room(settings: RunSettings, cpus: int, gpus: int) -> list[Finding]:
    """Whether the workers have room, and so has what goes on after a stop."""
    train, local = settings.train, settings.cluster.address == "local"
    use_gpu = bool(gpus) if train.use_gpu is None else train.use_gpu
    kind, there = ("GPU", gpus) if use_gpu else ("CPU", cpus)
    beside = train.validation == "beside"
    needed = (train.min_workers or train.num_workers) + beside
    findings = []
    if there < needed:
        who = "the workers and the validation beside them" if beside else "the workers"
        found = f"{who} need {needed} {kind}(s), and there are {there}"
        if local:
            findings.append(wrong("room", found, "Lower train.num_workers; the training would wait for ever."))
        else:
            findings.append(warning("room", found, "See that the cluster starts more, or lower train.num_workers."))
    if cpus < RESUMES:
        advice = "Leave cluster.num_cpus out, or raise it to" if local else "Add CPU workers, up to"
        found = f"{cpus} CPU(s): work that goes on after a stop may find no room for its readers, and wait for ever"
        findings.append(warning("room", found, f"{advice} {RESUMES} or more."))
    return findings or [ok("room", f"{needed} of {there} {kind}(s) are needed, and {cpus} CPUs let work go on again")]


def _starts_here(cpus: int) -> Finding:
    """A Ray of this machine alone, and the file by which other programs find a cluster here."""
    from joblib import cpu_count

    found = f"starts here, with {cpus} logical CPUs on {cpu_count()} cores"
    file = ray_folder() / "ray_current_cluster"
    try:
        host, _, port = file.read_text().strip().rpartition(":")
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except FileNotFoundError:
        return ok("Ray", found)
    except (OSError, ValueError):
        return warning("Ray", f"{found}; {file} names a cluster that is gone, and `ray status` and programs that name "
                       "none wait for it", f"Remove {file}, which a killed head has left.")  # fmt: skip
    return ok("Ray", f"{found}; another cluster runs here, at {host}:{port}")


def _token_of_local() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None or mode.lower() == "token":
        return not_asked("Ray's token", "a Ray that starts here asks for one of its own")
    return wrong("Ray's token", f"RAY_AUTH_MODE={mode}: a Ray that starts here would let everybody on this machine "
                 "run code in your name", "Unset RAY_AUTH_MODE.")  # fmt: skip


def _several_machines(settings: RunSettings, store: str, nodes: int) -> list[Finding]:
    """What all machines must reach, and one alone may have."""
    findings = []
    local = [place.name for place in places(settings, store) if "://" not in place.uri]
    if nodes > 1 and local:
        findings.append(warning("several machines", f"{', '.join(local)}: a folder, and there are {nodes} machines",
                                "See that all have it, as a shared file system, or give an s3:// URI."))  # fmt: skip
    if nodes > 1 and _in_sqlite(settings, store):
        findings.append(warning("several machines", "MLflow's runs go to a SQLite file, which is for one machine",
                                "Set tracking.uri to an MLflow server."))  # fmt: skip
    return findings


def _how_to_join(error: Exception) -> str:
    text = str(error).lower()
    if "version mismatch" in text:
        return "Use the cluster's Ray and Python here, or submit the job, which runs with them."
    if "token" in text:
        return "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
    return (
        "See that its head is up, and that RAY_AUTH_MODE=token is set if it asks for a token, with its own in "
        "RAY_AUTH_TOKEN_PATH; a machine that is not one of its own submits the job instead."
    )


# Storage


def check_reading(place: Place) -> list[Finding]:
    """Whether a place can be listed, and a file of it read."""
    from botocore.exceptions import BotoCoreError, ClientError

    from pipelines.storage import explain, filesystem

    check, uri = f"storage: {place.name}", place.uri
    fs, path = filesystem(uri)
    try:
        first = _first_file(fs, path, uri)
        if first is None:
            return [wrong(check, f"there is no file in {uri}", f"Put the files there, or mend {place.name}.")]
        with fs.open_input_stream(first) as file:
            file.read(PROBE)
    except (BotoCoreError, ClientError, OSError) as error:
        return [wrong(check, f"{uri} cannot be read: {explain(error)}", "Ask for the right to list and read it.")]
    return [ok(check, f"{uri} can be listed and read")]


def _first_file(fs, path: str, uri: str) -> str | None:
    import pyarrow.fs as pafs

    from pipelines.storage import ASKING, bucket_and_key, list_page

    if fs.get_file_info(path).type == pafs.FileType.File:
        return path
    if fs.type_name == "local":
        return next((os.path.join(folder, files[0]) for folder, _, files in os.walk(path) if files), None)
    bucket, key = bucket_and_key(uri)
    page = list_page(bucket, f"{key.rstrip('/')}/" if key else "", attempts=ASKING)
    return next((f"{bucket}/{entry['Key']}" for entry in page.get("Contents", ()) if int(entry["Size"])), None)


def check_writing(place: Place, probe: str) -> list[Finding]:
    """Whether what is written to a place is there as it was written, is listed, can be created once, and goes again.

    probe: the name of a folder to do that in, which is there for the time of it.
    """
    from pipelines.storage import _s3, is_remote, plain, s3_client

    check = f"storage: {place.name}"
    if not is_remote(place.uri) and os.path.isfile(plain(place.uri)):
        return [wrong(check, f"{place.uri} is a file", "Name a folder.")]
    error, note = _try_writing(place, probe)
    if error is None and note:
        return [warning(check, f"{place.uri} keeps what is written, but {note}",
                        "Never let two runs write one output at a time.")]  # fmt: skip
    if error is None:
        return [ok(check, f"{place.uri} keeps, lists and deletes what is written, and lets one alone create a file")]
    if not is_remote(place.uri):
        return [wrong(check, error, "Free some space, or ask for the right to write there.")]
    advice = "Ask who runs the store; until it is mended nothing that is put there is safe."
    if {os.environ.get(name) for name in CHECKSUMS} != {"when_required"}:
        os.environ.update(dict.fromkeys(CHECKSUMS, "when_required"))
        for clients in (_s3, s3_client):
            clients.cache_clear()
        if _try_writing(place, probe)[0] is None:
            advice = f"Set {CHECKSUMS[0]} and {CHECKSUMS[1]} to when_required: it works with these."
    return [wrong(check, error, advice)]


def _try_writing(place: Place, probe: str) -> tuple[str | None, str]:
    """(what is wrong with a place or None, what else is to be known)."""
    error, note = None, ""
    marks = _marks(place)
    try:
        note = _write_and_read(place, probe)
    except UserError as raised:
        error = str(raised)
    finally:
        left = clean(place, probe, marks)
    if left:
        error = f"{error or 'It does not let go of what is deleted:'} {left} is still there."
    return error, note


def _write_and_read(place: Place, probe: str) -> str:
    """Raises UserError where a run would lose by it; returns what else it should know."""
    from botocore.exceptions import BotoCoreError, ClientError

    from pipelines.storage import ASKING, Folder, bucket_and_key, copy_verified, explain, locate, s3_client

    folder = Folder(f"{_there(place.uri)}/{probe}", ASKING)
    data, other = os.urandom(PROBE), os.urandom(PROBE)

    def look(name: str, wanted: bytes) -> None:
        kept = folder.get(name)
        if kept != wanted:
            what = "is not there" if kept is None else "holds something else"
            raise UserError(f"{folder.place(name)} was written without an error, and {what}: the storage loses data.")

    folder.put("put", data)
    look("put", data)
    if folder.names("") != ["put"]:
        raise UserError(f"{folder.place('put')} was written, and no listing shows it: the storage loses data.")
    with tempfile.TemporaryDirectory() as temporary:  # as a checkpoint goes up: by pyarrow, in parts
        (Path(temporary) / "file").write_bytes(data)
        fs, path = locate(folder.place("copied"))
        try:
            copy_verified(Path(temporary), fs, path)
        except OSError as error:
            raise UserError(f"{folder.place('copied')} cannot be written in parts: {explain(error)}") from error
    if not folder.create("once", data):
        raise UserError(f"{folder.place('once')} is said to be there before it is; the storage is not to be trusted.")
    if folder.create("once", other):
        look("once", other)
        return "lets each of two runs create the same file, so that both take it for theirs (it ignores If-None-Match)"
    look("once", data)
    bucket, key = bucket_and_key(folder.place("asked"))
    if bucket is not None:
        try:
            s3_client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except (BotoCoreError, ClientError) as error:  # Folder.create does without
            return f"does not know how to create a file only where there is none: {explain(error).rstrip('.')}"
    return ""


def check_cleaning(place: Place, probe: str) -> list[Finding]:
    """Delete what a check of this place has left."""
    check, left = f"storage: {place.name}", clean(place, probe)
    return [wrong(check, f"{left} is still there", "Delete it.")] if left else [ok(check, "nothing was left")]


def clean(place: Place, probe: str, marks: frozenset[str] | None = None) -> str | None:
    """Delete a probe and all in it; returns its name if it is there still.

    marks: those that `_marks` found before; others above the probe are deleted, too.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    from pipelines.storage import ASKING, bucket_and_key, list_page, s3_client

    bucket, path = bucket_and_key(f"{_there(place.uri)}/{probe}")
    if bucket is None:
        shutil.rmtree(path, ignore_errors=True)
        return path if os.path.exists(path) else None
    client = s3_client()
    try:
        keys = [entry["Key"] for entry in list_page(bucket, path, attempts=ASKING).get("Contents", ())]
        keys += sorted(_marks(place) - marks) if marks is not None else []
        for key in keys:
            client.delete_object(Bucket=bucket, Key=key)
        with suppress(ClientError):  # not every store knows of these
            for upload in client.list_multipart_uploads(Bucket=bucket, Prefix=path).get("Uploads", ()):
                client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return f"s3://{bucket}/{path}" if list_page(bucket, path, attempts=ASKING).get("Contents") else None
    except (BotoCoreError, ClientError):
        return None  # who may not list has written nothing


def _marks(place: Place) -> frozenset[str]:
    """The empty objects by which pyarrow makes folders of the parts of a prefix."""
    from botocore.exceptions import BotoCoreError, ClientError

    from pipelines.storage import bucket_and_key, s3_client

    bucket, key = bucket_and_key(place.uri)
    if bucket is None:
        return frozenset()
    parts = [part for part in key.split("/") if part]
    found = set()
    for depth in range(1, len(parts) + 1):
        mark = "/".join(parts[:depth]) + "/"
        with suppress(BotoCoreError, ClientError):
            s3_client().head_object(Bucket=bucket, Key=mark)
            found.add(mark)
    return frozenset(found)


def _there(uri: str) -> str:
    """A place; of a local folder that is not there yet, the nearest above it that is."""
    from pipelines.storage import bucket_and_key

    bucket, path = bucket_and_key(uri)
    return str(nearest(path)) if bucket is None else uri.rstrip("/")


# MLflow


def check_mlflow(settings: RunSettings, store: str) -> list[Finding]:
    """Whether runs can be kept where the settings say: a server, a database, or a SQLite file."""
    uri = settings.tracking.uri
    if _in_sqlite(settings, store):
        return [_check_sqlite(Path(uri.removeprefix("sqlite:///")) if uri else Path(store) / "mlflow.db")]
    if uri is None:
        return [wrong("MLflow", f"its SQLite file cannot be in {store}", "Set tracking.uri to a server or database.")]
    if not uri.startswith(("http://", "https://")):
        return [_check_database(uri)]
    try:
        status, _, body = ask(f"{uri.rstrip('/')}/version")
        password = _asks_for_password(uri)
    except OSError as error:
        return [wrong("MLflow", f"nobody answers at {bare(uri)} ({error})",
                      "Start the server, or mend tracking.uri; without it runs are kept in the store.")]  # fmt: skip
    if status in (401, 403):  # for those who are let in alone
        status, body = _ask_as_us(uri, "/version")
    runs = body.decode(errors="replace").strip()
    if status in (401, 403):
        return [password, _may_write(settings, uri)]
    if status != 200 or not re.fullmatch(r"\d+\.\d+[\w.]*", runs):
        return [wrong("MLflow", f"{bare(uri)} answers with status {status}, as no MLflow does", "Mend tracking.uri.")]
    return [_server_version(uri, runs), password, _may_write(settings, uri)]


def _ask_as_us(uri: str, path: str) -> tuple[int, bytes]:
    """(status, body) of a request with our user and password, as MLflow's own client sends them."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(get_default_host_creds(uri), path, "GET", timeout=int(ANSWER), max_retries=0)
    return answer.status_code, answer.content


def _in_sqlite(settings: RunSettings, store: str) -> bool:
    uri = settings.tracking.uri
    return uri.startswith("sqlite:") if uri else "://" not in store


def _check_sqlite(file: Path) -> Finding:
    import sqlite3

    folder, advice = nearest(file.parent), "Mend its rights, or name another --store or tracking.uri."
    if not os.access(folder, os.W_OK):
        return wrong("MLflow", f"{folder} may not be written to, where {file} is to be", advice)
    if not file.exists():
        return ok("MLflow", f"its runs will be in {file}")
    try:
        connection = sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=rw", uri=True, timeout=ANSWER)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.Error as error:
        if "locked" in str(error):
            return warning("MLflow", f"{file} is kept locked by another process", "Wait for it, or see what it is.")
        return wrong("MLflow", f"{file} cannot be used: {one_line(error)}", advice)
    return ok("MLflow", f"its runs are in {file}, which can be written")


def _check_database(uri: str) -> Finding:
    import sqlalchemy

    found = f"the database {bare(uri)}"
    try:
        engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": int(ANSWER)})
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table("experiments"):
                return ok("MLflow", f"{found} answers; the first run makes its tables")
            # The right to write is looked at before there is a row to write.
            connection.execute(sqlalchemy.text("UPDATE experiments SET name = name WHERE 1 = 0"))
            connection.rollback()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, TypeError) as error:
        return wrong("MLflow", f"{found} cannot be used: {one_line(error)}",
                     "See that it is up, and that tracking.uri and PGPASSWORD are right.")  # fmt: skip
    return ok("MLflow", f"{found} answers, and can be written")


def check_ledger(settings: RunSettings) -> list[Finding]:
    """Whether a pipeline can note what it has done in the database that the settings name."""
    import sqlalchemy

    uri = settings.workflow.database
    if uri is None or uri.startswith("sqlite:"):
        return [not_asked("ledger", "a pipeline notes what it has done in a SQLite file")]
    found = f"the database {bare(uri)}"
    driver = re.sub(r"^postgresql://", "postgresql+psycopg://", uri)  # as DBOS does
    try:
        engine = sqlalchemy.create_engine(driver, connect_args={"connect_timeout": int(ANSWER)})
        with engine.connect() as connection:
            may = connection.execute(sqlalchemy.text("SELECT has_database_privilege(current_database(), 'CREATE')"))
            if not may.scalar():
                return [wrong("ledger", f"{found} does not let this user make its tables",
                              "Make the user its owner, or grant CREATE on it.")]  # fmt: skip
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        return [wrong("ledger", f"{found} cannot be used: {one_line(error)}",
                      "See that it is up, and that workflow.database and PGPASSWORD are right.")]  # fmt: skip
    return [ok("ledger", f"{found} answers, and takes tables")]


def _server_version(uri: str, runs: str) -> Finding:
    from packaging.version import Version

    found = f"version {runs} at {bare(uri)}"
    try:
        meant = next(one.specifier for one in needs() if one.name == "mlflow")
    except PackageNotFoundError:
        return ok("MLflow", found)
    if meant.contains(runs, prereleases=True):
        return ok("MLflow", found)
    found += f", and this is made for {meant}"
    if Version(runs) < Version(version("mlflow")):
        return wrong("MLflow", found, f"Update the server to {version('mlflow')}.")
    return warning("MLflow", found, "Try a short run first.")


def _asks_for_password(uri: str) -> Finding:
    check = "MLflow's password"
    status, _, _ = ask(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search", {"max_results": 1})
    if status in (401, 403):
        return ok(check, "it refuses who has none")
    if is_loopback(uri):
        return ok(check, "it asks for none, and this machine alone reaches it")
    return wrong(check, f"{bare(uri)} asks for none: whoever reaches it changes models, and with them what runs",
                 "Start it with --app-name basic-auth, or behind a proxy that asks for passwords.")  # fmt: skip


def _may_write(settings: RunSettings, uri: str) -> Finding:
    """Whether we are let in, and may write: asked by deleting a tag that nothing has."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(int(ANSWER))
    from mlflow.exceptions import MlflowException

    from pipelines.tracking import tracker

    check, path = "MLflow's rights", settings.data.path or "sample"
    dataset = settings.data.name or path.rstrip("/").rpartition("/")[2]
    model = settings.tracking.model_name or dataset
    try:
        ours = tracker(settings, Path("."), dataset)
        client = ours.client()
        experiment = client.get_experiment_by_name(ours.experiment)
        asked = [partial(client.delete_registered_model_tag, model, "detr.doctor")]
        if experiment:
            asked.append(partial(client.delete_experiment_tag, experiment.experiment_id, "detr.doctor"))
        for delete in asked:
            try:
                delete()
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
    except UserError as error:
        return wrong(check, str(error), "Ask who runs it for a user who may edit, or set tracking.experiment.")
    except MlflowException as error:
        return wrong(check, f"{bare(uri)} fails: {one_line(error.message)}", "Look into the server's log.")
    return ok(check, f"we may write the experiment {ours.experiment} and the model {model}")


def check_pickles() -> list[Finding]:
    """Whether a model from the registry may hold a pickle, which runs what code it likes."""
    told = os.environ.get("MLFLOW_ALLOW_PICKLE_DESERIALIZATION")
    if told is None:
        return [ok("pickles", "refused by every command here; for MLflow's own programs set "
                   "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false")]  # fmt: skip
    if told.lower() in ("false", "0"):
        return [ok("pickles", "refused")]
    return [wrong("pickles", f"MLFLOW_ALLOW_PICKLE_DESERIALIZATION={told}: a model from the registry may run any code",
                  "Set it to false; no model of this project holds a pickle.")]  # fmt: skip


# Clocks


def check_clocks(settings: RunSettings, store: str) -> list[Finding]:
    """How far this machine's clock is from those of the servers that a run asks."""
    from pipelines.storage import is_remote, s3_client

    servers = {}
    if any(is_remote(place.uri) for place in places(settings, store)):
        servers["the object store"] = s3_client().meta.endpoint_url
    if (settings.tracking.uri or "").startswith(("http://", "https://")):
        servers["MLflow"] = settings.tracking.uri
    findings = [_clock(server, url) for server, url in servers.items()]
    return [one for one in findings if one] or [not_asked("clock", "no server to compare it with")]


def _clock(server: str, url: str) -> Finding | None:
    """None where there is no answer or no date in it, of which other checks speak."""
    before = time.time()
    try:
        _, headers, _ = ask(url)
        date = email.utils.parsedate_to_datetime(headers["Date"]).timestamp()
    except (OSError, TypeError, ValueError):
        return None
    off = min(0.0, date + 1 - before) or max(0.0, date - time.time())  # a date has whole seconds
    if abs(off) < SKEW:
        return ok("clock", f"it agrees with that of {server}")
    amount = f"{abs(off):.0f} seconds" if abs(off) < 120 else f"{abs(off) / 60:.0f} minutes"
    found = f"it is {amount} {'behind' if off > 0 else 'ahead of'} that of {server}"
    advice = "Set it, and keep it set (systemd-timesyncd, chrony)."
    if abs(off) > SKEW_REFUSED and server != "MLflow":
        return wrong("clock", f"{found}, and S3 refuses such requests", advice)
    return warning("clock", found, advice)
