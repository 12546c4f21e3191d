"""Who may change a registered model now, and every change so far: a ledger in MLflow, on any of its databases.

MLflow moves an alias without looking (the last writer wins) and has no locks. But a run's param cannot be changed once
it is written, in the database itself: of two who write the same param one fails. So the ledger is a run whose params
are numbered: the lease is the next free number, and an entry of the history cannot be overwritten later on.
"""
from __future__ import annotations

import getpass
import hashlib
import json
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psutil

from pipelines.settings import UserError
from pipelines.tracking import MAX_PARAM, Tracker

LEASE_SECONDS = 60  # what is done under a lease takes a few; so long a dead holder on another machine is waited for
WAIT_SECONDS = 300
POLL_SECONDS = (0.2, 2.0)  # at first, and at most: many who wait must not keep a server from who works
TAG = "detr.ledger"  # of the registered model: the ledger's run
ENTRY, LEASE, RELEASED = "entry", "lease", "lease.released"


class Ledger:
    """The ledger of one registered model; made with the model where there is none yet."""

    def __init__(self, tracker: Tracker, name: str):
        self.client, self.name = tracker.client(), name
        self.run_id = _find_run(tracker, name)
        self.mine: str | None = None  # the lease's param while this process holds it

    def entries(self) -> list[dict[str, Any]]:
        """All that was written, the oldest first; each has "number", "kind", "who", "when" (ISO, UTC)."""
        params = self._data().params
        return [{"number": at, **json.loads(params[key])} for at, key in enumerate(_numbered(params, ENTRY), 1)]

    def write(self, kind: str, **facts: Any) -> dict[str, Any]:
        """Add an entry, under the lease. Texts in it are cut where all of it is longer than MLflow takes."""
        number = len(_numbered(self._data().params, ENTRY)) + 1
        entry = {"kind": kind, "when": datetime.now(UTC).isoformat(timespec="seconds"), "who": who(), **facts}
        self.client.log_param(self.run_id, f"{ENTRY}.{number:06d}", short_json(entry, MAX_PARAM))
        return {"number": number, **entry}

    @contextmanager
    def lease(self, wait: float = WAIT_SECONDS) -> Iterator[None]:
        """Nobody else changes the model meanwhile. Raises UserError if it is not free in `wait` seconds.

        A holder that was killed is noticed at once on its machine, and after LEASE_SECONDS from another.
        """
        self.mine = self._take(wait)
        try:
            yield
        finally:
            self.client.set_tag(self.run_id, RELEASED, self.mine)
            self.mine = None

    def check_lease(self) -> None:
        """Raise UserError unless the lease still is this process's: to be asked before what cannot be undone."""
        params = self._data().params
        newest = _numbered(params, LEASE)[-1]
        if newest != self.mine or time.time() > json.loads(params[newest])["until"]:
            raise UserError(f"Changing model {self.name!r} took longer than {LEASE_SECONDS} s; try again.")

    def _take(self, wait: float) -> str:
        from mlflow.exceptions import MlflowException

        end, pause = time.monotonic() + wait, POLL_SECONDS[0]
        while True:
            data = self._data()
            taken = _numbered(data.params, LEASE)
            if not taken or data.tags.get(RELEASED, "") >= taken[-1] or _is_over(json.loads(data.params[taken[-1]])):
                mine = f"{LEASE}.{len(taken) + 1:06d}"
                me = psutil.Process()
                holder = {"id": uuid.uuid4().hex, "machine": _machine(), "pid": me.pid, "started": me.create_time(),
                          "until": time.time() + LEASE_SECONDS}  # fmt: skip
                try:
                    self.client.log_param(self.run_id, mine, json.dumps(holder))
                    return mine
                except MlflowException as error:
                    if error.error_code != "INVALID_PARAMETER_VALUE":
                        raise
            elif time.monotonic() > end:
                raise UserError(f"Somebody else is changing model {self.name!r}; try again in a minute.")
            time.sleep(random.uniform(0.5, 1.0) * pause)
            pause = min(2 * pause, POLL_SECONDS[1])

    def _data(self):
        return self.client.get_run(self.run_id).data


def who() -> str:
    """Who does this: the user of MLflow's server, or of this machine."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (OSError, KeyError):  # a container without a name for its user
        return "unknown"


def short_json(value: dict[str, Any], limit: int) -> str:
    """As JSON of at most `limit` characters: longer ones get their longest texts and lists cut."""
    length = limit
    while len(text := json.dumps(_cut(value, length), ensure_ascii=False, default=str)) > limit:
        length //= 2
    return text


def _cut(value: Any, length: int) -> Any:
    if isinstance(value, dict):
        return {key: _cut(inner, length) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cut(inner, length) for inner in value[: max(1, length // 8)]]
    return value[:length] + "…" if isinstance(value, str) and len(value) > length else value


def _numbered(params: dict[str, str], kind: str) -> list[str]:
    return sorted(key for key in params if key.startswith(f"{kind}."))


def _is_over(holder: dict[str, Any]) -> bool:
    if time.time() > holder["until"]:
        return True
    if holder["machine"] != _machine():
        return False
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """The same for all processes that see each other's pids, without the machine's name."""
    pids = os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else ""  # containers have their own
    text = f"{socket.gethostname()} {uuid.getnode()} {psutil.boot_time():.0f} {pids}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find_run(tracker: Tracker, name: str) -> str:
    """The ledger's run; one is made for a model without."""
    client = tracker.client()
    run_id = _named(client, name)
    if run_id is None:
        with tracker.lock():  # SQLite has a file beside it; on a server only who makes the model makes its ledger
            run_id = _make_run(tracker, name)
    if client.get_run(run_id).info.lifecycle_stage == "deleted":
        client.restore_run(run_id)
    return run_id


def _named(client, name: str) -> str | None:
    """The ledger's run as the model names it; None where it does not, or where there is no model."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name).tags.get(TAG)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _make_run(tracker: Tracker, name: str) -> str:
    from mlflow.exceptions import MlflowException

    client = tracker.client()
    try:
        client.create_registered_model(name)
        end = time.monotonic()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        end = time.monotonic() + 10  # whoever made the model is about to
    while not (run_id := _named(client, name)) and time.monotonic() < end:
        time.sleep(POLL_SECONDS[0])
    if run_id:
        return run_id
    made = tracker.start_run(f"registry of {name}", None, {"detr.stage": "registry", "detr.model": name})
    tracker.end_run(made)
    client.set_registered_model_tag(name, TAG, made)
    time.sleep(POLL_SECONDS[0])  # several may have waited for one that was killed: the last one's counts
    return client.get_registered_model(name).tags[TAG]
