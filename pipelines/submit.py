"""Commands as jobs of a Ray cluster: all that talks to its Jobs API.

A job's id follows from what is asked: the command with its settings, and the code that goes along. Asked twice, it is
found instead of run; the attempt after a failed one has the next number. Who comes second at the same moment is refused
by Ray, and finds the job of the first.
"""
from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._raylet import AuthenticationTokenLoader
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from pipelines.progress import JOB, console, message_of
from pipelines.settings import UserError, digest
from pipelines.stage import printed_result

PROJECT = "detr-system"  # in pyproject.toml
PACKAGES = ("detr", "pipelines", "jobs")
CODE = (".py", ".j2")  # what goes along of them
LARGEST = 10 * 2**20  # bytes that go along
CONFIG, REQUIREMENTS = "settings.yaml", "requirements.txt"  # beside them
MARK = "detr_command"  # a job's metadata: it is ours, and what it runs
WITHOUT_ADDRESS = "http://127.0.0.1:8265"
ANSWER = (10, 60)  # seconds to connect, and to wait for an answer
DIRECTLY = {"http": None, "https": None, "all": None}  # whatever proxy the environment names
PATIENCE = 60  # seconds in which a cluster that starts is asked again
QUIET = 300  # seconds without a line after which the log is asked for anew: a lost connection says nothing
STOP_SECONDS = 60  # a cancelled command has so long to end cleanly, as one of a stopped schedule
CHATTY = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
KILLED_FROM = 128  # exit codes above are a signal's
NOT_FOUND = 127  # a shell's exit code where there is no such program
STOPPED = 130  # exit code of a command after Ctrl-C
TOKEN_HINT = (
    "put the token of the cluster into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH (on the cluster's "
    "head, `ray get-auth-token --generate` makes it, before Ray is started with RAY_AUTH_MODE=token)"
)

T = TypeVar("T")
Record = dict[str, Any]
How = Literal["submitted", "attached", "done before"]


class Away(UserError):
    """The cluster does not answer, or cannot take a job now; it may be starting."""


class Unknown(UserError):
    """The cluster has no such job."""


class Client(JobSubmissionClient):
    """Ray's client, which would wait for an answer for ever; what goes wrong is one sentence."""

    def __init__(self, address: str):
        """Ask whether there is a cluster at an `api_address`. Raises Away, or UserError (exit code 2)."""
        self.place = address
        self.proxies = DIRECTLY if _is_loopback(urlsplit(address).hostname) else None
        for name in CHATTY:
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes it, or RAY_ADDRESS, instead of an argument
        try:
            # Ray sends a token only where RAY_AUTH_MODE says so, which a laptop's environment need not.
            super().__init__(address, headers=_token(), verify=os.environ.get("REQUESTS_CA_BUNDLE") or True)
        except FileNotFoundError as error:  # of REQUESTS_CA_BUNDLE
            raise UserError(f"{error}", 2) from error
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            said = str(error).splitlines()[0] if isinstance(error, RuntimeError) else "no such answer"
            raise UserError(f"{address} is not the dashboard of a Ray cluster that takes jobs ({said}).", 2) from error

    def _do_request(self, method: str, endpoint: str, **more: Any) -> requests.Response:
        try:
            answer = super()._do_request(method, endpoint, timeout=ANSWER, proxies=self.proxies, **more)
        except AuthenticationError as error:
            had = bool(_token())
            raise UserError(
                f"{self.place} refuses the token that is here: {TOKEN_HINT}." if had else
                f"{self.place} asks for a token, and there is none here: {TOKEN_HINT}.", 2,
            ) from error  # fmt: skip
        except requests.exceptions.SSLError as error:
            raise UserError(
                f"{self.place} cannot be trusted: its certificate is not valid here (REQUESTS_CA_BUNDLE names a file "
                "of authorities).", 2,
            ) from error  # fmt: skip
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Away(f"{self.place} does not answer ({_reason(error)}).") from error
        except requests.RequestException as error:  # its text may hold the header
            raise UserError(f"{self.place} cannot be asked ({type(error).__name__}).") from None
        said = answer.text.strip().splitlines()[-1:] or [answer.reason]
        if answer.status_code >= 500:
            raise Away(f"{self.place} cannot do it now ({answer.status_code}: {said[0]}).")
        if answer.status_code == 404 and endpoint.startswith("/api/jobs/"):
            raise Unknown(said[0], 2)
        if answer.status_code >= 400 and answer.status_code != 404:
            raise UserError(f"{self.place} refuses it ({answer.status_code}: {said[0]}).")
        return answer

    def ask_agent(self, node: str, seconds: int) -> None:
        """Have the dashboard ask the agent of a node (its id) for the name of its log. Raises Away if it is not there.

        The head's agent starts jobs; without, the dashboard says so only where a job is submitted.
        """
        self._do_request("GET", f"/api/v0/logs?node_id={node}&glob=dashboard_agent.log&timeout={seconds}")


def _reason(error: Exception) -> str:
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    return found[1] if found else "not in time" if isinstance(error, requests.Timeout) else type(error).__name__


def _token() -> dict[str, str]:
    """The header with the token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; {} if there is none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return {}
    try:
        header = AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True)
    except AuthenticationError as error:
        raise UserError(
            f"There is no token in the file of RAY_AUTH_TOKEN_PATH, {os.environ.get('RAY_AUTH_TOKEN_PATH')}.", 2
        ) from error
    if not all(value.isascii() and value.isprintable() for value in header.values()):
        raise UserError("The token of the cluster must be one line of plain characters; yours has others.", 2)
    return header


def api_address(given: str | None) -> str:
    """The cluster's dashboard: as given, else RAY_API_SERVER_ADDRESS, else one on this machine.

    Raises UserError (exit code 2) for what is no address, and for one that is not loopback where there is no token.
    """
    address = (given or os.environ.get("RAY_API_SERVER_ADDRESS") or WITHOUT_ADDRESS).rstrip("/")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UserError(f"{re.sub(r'//.*@', '//...@', address)} is not the address of a dashboard; write it as "
                        f"{WITHOUT_ADDRESS}.", 2)  # fmt: skip
    if "@" in parts.netloc:
        raise UserError("Leave name and password out of the address, where others see them; a token is enough.", 2)
    if not _is_loopback(host):
        if not _token():
            raise UserError(
                f"{address} is not this machine, and there is no token: without one anybody who reaches the cluster "
                f"runs programs on it. Start it with one, and {TOKEN_HINT}.", 2,
            )  # fmt: skip
        if parts.scheme == "http":
            console.print(
                f"The token travels unencrypted to {address}; a tunnel is better: ssh -L 8265:127.0.0.1:8265 {host}",
                soft_wrap=True,
            )
    return address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def pack(folder: Path, config: Path | None) -> str:
    """Put into an empty folder what goes along, and return its digest: code, requirements, the file of --config.

    Raises UserError where it is too large, or this code is not installed.
    """
    files = {REQUIREMENTS: "".join(f"{line}\n" for line in requirements()).encode()}
    if config is not None:
        files[CONFIG] = config.read_bytes()
    for package in PACKAGES:
        place = Path(find_spec(package).submodule_search_locations[0])
        for path in place.rglob("*"):
            name = path.relative_to(place)
            if path.suffix in CODE and path.is_file() and not any(part.startswith(".") for part in name.parts):
                files[f"{package}/{name.as_posix()}"] = path.read_bytes()
    size = sum(len(content) for content in files.values())
    if size > LARGEST:
        largest = max(files, key=lambda name: len(files[name]))
        raise UserError(
            f"What would go along is {size / 2**20:.0f} MiB, and at most {LARGEST >> 20} are sent; the largest file is "
            f"{config if largest == CONFIG else largest}.", 2,
        )  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return digest({name: sha256(content).hexdigest() for name, content in files.items()})


def requirements() -> list[str]:
    """What this installation says it needs, one package and its versions a line: `ray[data]>=2.60,<2.62`."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{PROJECT} is not installed in this Python; install it: pip install -e .") from error
    return sorted(line.partition(";")[0].replace(" ", "") for line in lines if "extra ==" not in line)


def patiently(ask: Callable[[], T]) -> T:
    """What ask() returns; it is asked again for PATIENCE seconds while it raises Away, which is said."""
    said: list[str] = []

    def say(state: RetryCallState) -> None:
        if not said or said[-1] != str(state.outcome.exception()):
            said.append(str(state.outcome.exception()))
            console.print(f"{said[-1]} Trying again for {PATIENCE} seconds.", soft_wrap=True)

    return Retrying(
        retry=retry_if_exception_type(Away), stop=stop_after_delay(PATIENCE), wait=wait_exponential(0.5, max=5),
        before_sleep=say, reraise=True,
    )(ask)  # fmt: skip


def submit(
    client: Client, job_id: str, words: Sequence[str], folder: Path, shown: Sequence[str], again: bool = False
) -> tuple[str, How]:
    """Have a command run, once: (the job's id, whether it was submitted now, was there already, or is done).

    job_id: of the first attempt. Of the attempts that are over, those that did not succeed are passed over, and with
    `again` those that did, too. words: the command as the job runs it; folder: what `pack` made; shown: the command as
    it was typed. Raises Away.
    """
    name, number = job_id, 1
    while True:
        found = find(client, name)
        if found is None:
            try:
                client.submit_job(
                    # An id is refused by the cluster if it is there: who comes second finds the job of the first.
                    submission_id=name,
                    entrypoint=shlex.join(["python", "-m", "jobs.on_cluster", *words]),
                    # Others see these variables; what is secret is the cluster's own.
                    runtime_env={
                        "working_dir": str(folder),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), JOB: name},
                    },
                    metadata={MARK: shlex.join(shown)},
                )  # fmt: skip
                return name, "submitted"
            except Away:
                if find(client, name) is None:
                    raise
                return name, "attached"
        if not found.status.is_terminal():
            return name, "attached"
        if found.status == JobStatus.SUCCEEDED and not again:
            return name, "done before"
        number += 1
        name = f"{job_id}-{number}"


def find(client: Client, job_id: str) -> JobDetails | None:
    """The job of this id, if it is there and ours."""
    if not re.fullmatch(r"[\w.-]+", job_id):
        return None
    try:
        found = client.get_job_info(job_id)
    except Unknown:
        return None
    return found if _is_ours(found) else None


def known(client: Client, job_id: str) -> JobDetails:
    """As `find`; UserError (exit code 2) where there is none."""
    found = find(client, job_id)
    if found is None:
        raise UserError(f"There is no job {job_id} of detr's at {client.place}; `detr jobs list` shows them.", 2)
    return found


def ours(client: Client) -> list[JobDetails]:
    """Our jobs on the cluster, the oldest first."""
    return sorted((job for job in client.list_jobs() if _is_ours(job)), key=lambda job: job.start_time or 0)


def _is_ours(job: JobDetails) -> bool:
    return job.submission_id is not None and MARK in (job.metadata or {})


def describe(job: JobDetails) -> Record:
    """A job as JSON: {"submission_id", "state", "command", "started", "ended" (ISO, UTC, or None), "exit_code"}.

    The exit code is the command's, None where it has none yet; state and times are Ray's.
    """
    return {
        "submission_id": job.submission_id, "state": job.status.value, "command": job.metadata[MARK],
        "started": _time(job.start_time), "ended": _time(job.end_time),
        "exit_code": ending(job)[0] if job.status.is_terminal() else None,
    }  # fmt: skip


def _time(milliseconds: int | None) -> str | None:
    return milliseconds and datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def ending(job: JobDetails) -> tuple[int, str]:
    """How a job that is over ended: the command's exit code, and it in words.

    1 where the command could not be run or was killed, STOPPED where it was cancelled.
    """
    code, job_id = job.driver_exit_code, job.submission_id
    if job.status == JobStatus.SUCCEEDED:
        return 0, f"{job_id} is done."
    if job.status == JobStatus.STOPPED:
        return STOPPED, f"{job_id} was cancelled. Submitted again, it goes on from there."
    if code is None:
        why = (job.message or "Ray does not say why").strip().splitlines()
        return 1, f"{job_id} could not be run: {why[-1] if why[0].startswith('Traceback') else why[0]}"
    if code == NOT_FOUND:
        return 1, f"{job_id} could not be run: the cluster's head has no `python` in its PATH."
    if code < 0 or (code > KILLED_FROM and code != STOPPED):
        number = -code if code < 0 else code - KILLED_FROM
        memory = ", perhaps for want of memory" if number == 9 else ""
        return 1, f"{job_id} was killed by signal {number}{memory}."
    return code, f"{job_id} failed with exit code {code}."


class Log:
    """A job's log as it comes: its lines, and the result that the command printed."""

    def __init__(self, show: Callable[[str], None]):
        self.show, self.read, self.part, self.result = show, 0, "", None

    def take(self, text: str) -> None:
        """The next piece."""
        self.read += len(text)
        *lines, self.part = (self.part + text).split("\n")
        for line in lines:
            self._line(line)

    def end(self) -> None:
        if self.part:
            self._line(self.part)
            self.part = ""

    def _line(self, line: str) -> None:
        result = printed_result(line)
        if result is None:
            self.show(message_of(line))
        else:
            self.result = result


def follow(client: Client, job_id: str, show: Callable[[str], None]) -> tuple[JobDetails, Record | None]:
    """Hand the lines of a job's log to show() until it is over: (the job, what it printed as JSON).

    A connection that is lost is made anew. Raises Away where that fails, UserError where the job is gone.
    """
    log = Log(show)
    while True:
        # Whatever is wrong with this connection, the next question says.
        with suppress(aiohttp.ClientError, OSError, RuntimeError):
            asyncio.run(_tail(client, job_id, log))
        job = patiently(lambda: find(client, job_id))
        if job is None:
            raise UserError(
                f"{client.place} does not know {job_id} any more: its head was started anew; submitted again, the "
                "command goes on from what is in its store."
            )
        if job.status.is_terminal():
            break
        time.sleep(1)
    with suppress(Away):  # the node that has the log may be gone
        log.take(client.get_job_logs(job_id)[log.read :])
    log.end()
    return job, log.result


async def _tail(client: Client, job_id: str, log: Log) -> None:
    """Read the log until it ends, or nothing came for QUIET seconds. It comes from its first line each time."""
    had = log.read
    chunks = client.tail_job_logs(job_id)
    try:
        while True:
            async with asyncio.timeout(QUIET):  # wait_for, in Python 3.11, loses a Ctrl-C that comes with a chunk
                text = await anext(chunks)
            log.take(text[had:])
            had = max(0, had - len(text))
    except (StopAsyncIteration, TimeoutError):
        return
    finally:
        await chunks.aclose()


def result_of(client: Client, job_id: str) -> Record | None:
    """What a job that is over printed as JSON, if it did and its log is still there."""
    log = Log(lambda line: None)
    with suppress(Away):
        log.take(client.get_job_logs(job_id))
    log.end()
    return log.result


def cancel(client: Client, job_id: str) -> JobDetails:
    """Stop a job and wait until it is over; one that is over already is left as it is."""
    deadline = time.monotonic() + STOP_SECONDS + 15
    asked = False
    while not (job := known(client, job_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"{job_id} was told to stop, and did not within {STOP_SECONDS + 15} seconds.")
        asked = asked or client.stop_job(job_id)  # not yet possible in the moment in which it starts
        time.sleep(0.5)
    return job
