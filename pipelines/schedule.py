"""Commands on cron times: what is due is a pure function (`due`); DBOS remembers what ran and what was stopped.

Every run is a durable workflow with the id NAME@TIME, so that a time is run once whatever is restarted. Its one step
starts the command as a process of its own, which inherits a locked file: a command that outlives a killed scheduler
holds the lock, and the next scheduler waits for it and takes its result instead of starting it beside itself. A command
that died with its scheduler, or was stopped with it, is started again; stages that are done are found again.
"""
from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from croniter import CroniterError, croniter
from filelock import FileLock, Timeout
from pydantic import AwareDatetime, Field, ValidationError, field_validator

from detr.config import Settings
from pipelines.mirror import name_of
from pipelines.progress import console, duration
from pipelines.settings import UserError, refuse_password
from pipelines.stage import printed_result, read_json, write_json

FORMAT = 1
APPLICATION_VERSION = "1"  # raised when the workflow's steps change
GRACE = timedelta(minutes=1)  # so late a time still counts as in time, where a missed one is skipped
POLL = 0.5  # seconds between two looks at the clock
STOP_SECONDS = 60  # a stopped command has so long to end cleanly
STOPPED = 130  # exit code of a command after Ctrl-C
ENDINGS = {0: "done", 1: "failed", 2: "wrong use", 3: "gate refused", STOPPED: "stopped"}
REMEMBERED = 200  # runs of a schedule that are looked at to know which times were handled
WINDOWS = [timedelta(hours=1), timedelta(days=1), timedelta(days=32), timedelta(days=366)]

Record = dict[str, Any]


class Schedule(Settings):
    """A command and when to run it. Times are aware datetimes; `timezone` is what the cron times are meant in."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    cron: str
    timezone: str = "UTC"
    command: tuple[str, ...] = Field(min_length=1, description="the words after `detr`")
    folder: str = Field(description="where the command is run: relative paths in it mean what they meant when added")
    missed: Literal["once", "skip"] = "once"
    paused: bool = False
    since: AwareDatetime = Field(description="times up to here do not count: when it was added, or resumed")
    asked: AwareDatetime | None = Field(None, description="when a run was last asked for by hand")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(
                f"there is no time zone {name!r} on this machine; give one such as Europe/Berlin, or UTC "
                "(a machine without any: pip install tzdata)"
            ) from error
        return name

    @field_validator("cron")
    @classmethod
    def _cron_has_times(cls, cron: str) -> str:
        fields = cron.split()
        hint = "write minute, hour, day of month, month and day of week, such as '0 2 * * *' (daily at 2:00)"
        alias = re.fullmatch(r"@[a-z]+", cron)
        if not alias and len(fields) != 5:
            raise ValueError(f"{cron!r} is not a cron time; {hint}")
        if any(re.search(r"(?<![a-z])[hr](?![a-z])", field.lower()) for field in fields) and not alias:
            raise ValueError(f"{cron!r} has random times (H or R), which would be others after every start; {hint}")
        try:
            croniter(" ".join(fields), datetime.now(UTC)).get_next(datetime)
        except CroniterError as error:
            if "failed to find next date" in str(error):
                raise ValueError(f"{cron!r} never comes") from error
            raise ValueError(f"{cron!r} is not a cron time; {hint}") from error
        return " ".join(fields)


class Due(NamedTuple):
    """What a clock asks for: a time to run now (UTC) or none; the first and last of the times not run, or none."""

    run: datetime | None
    missed: tuple[datetime, datetime] | None


def next_time(schedule: Schedule, after: datetime) -> datetime:
    """The first cron time after an aware datetime, in the schedule's time zone.

    A wall-clock time that a change to summer time leaves out is the first that exists after it. One that occurs
    twice counts once, the first time, unless the cron's hour begins with `*`: every hour is every hour.
    """
    times = croniter(schedule.cron, after.astimezone(ZoneInfo(schedule.timezone)))
    every_hour = times.expressions[1].startswith("*")
    while True:
        found = times.get_next(datetime)
        if every_hour or not found.fold:
            return found


def due(schedule: Schedule, handled: datetime | None, now: datetime) -> Due | None:
    """What of a schedule is due at `now`, when its times up to `handled` were run or skipped; None if nothing is.

    Pure: the same for the same arguments, in whatever process. Of several times that passed, the last one is run and
    stands for all (missed="once"); with missed="skip" a time older than GRACE is not run. A clock that goes back makes
    nothing due until it is past `handled`.
    """
    if schedule.paused:
        return None
    since = max(schedule.since, handled) if handled else schedule.since
    first = next_time(schedule, since).astimezone(UTC)
    if first > now:
        return None
    last = _last_time(schedule, since, now)
    if schedule.missed == "skip" and now - last >= GRACE:
        return Due(None, (first, last))
    if first == last:
        return Due(last, None)
    return Due(last, (first, _last_time(schedule, since, last - timedelta(seconds=1))))


def _last_time(schedule: Schedule, since: datetime, until: datetime) -> datetime:
    """The last time after since and not after until; there must be one.

    Forward from ever earlier starts: the library's way back disagrees with its way forward around a change of clocks.
    """
    starts = [until - window for window in WINDOWS]
    for start in [*(start for start in starts if start > since), since]:
        last, found = None, next_time(schedule, start).astimezone(UTC)
        while found <= until:
            last, found = found, next_time(schedule, found).astimezone(UTC)
        if last is not None:
            return last
    raise ValueError(f"{schedule.name} has no time after {since} and until {until}")


def read_schedules(store: Path | str) -> list[Schedule]:
    """The schedules of a store, in the order they were added; UserError if their file is damaged."""
    path = Path(store) / "schedules.json"
    if not path.is_file():
        return []
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}; this version reads {FORMAT}. Update it.", 2)
        return [Schedule.model_validate(values) for values in content["schedules"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); mend or remove it.", 2) from error


def add(
    store: Path | str, name: str, cron: str, command: Sequence[str], folder: Path | str, timezone: str = "UTC",
    missed: str = "once",
) -> Schedule:  # fmt: skip
    """Keep a schedule, or find the same one; UserError (exit code 2) for a wrong time or a name that is taken."""
    refuse_password(command, "the scheduler's")
    try:
        made = Schedule(name=name, cron=cron, timezone=timezone, command=tuple(command), folder=str(folder),
                        missed=missed, since=_now())  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("name",):
            message = f"{name!r} is not a name; use letters, digits, dots, dashes and underscores, at most 64"
        else:
            message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{message}.", 2) from error
    given = ("cron", "timezone", "command", "folder", "missed")
    with _changing(store) as schedules:
        for other in schedules:
            if other.name == name:
                if all(getattr(other, key) == getattr(made, key) for key in given):
                    return other
                raise UserError(
                    f"There is another schedule {name} ({other.cron}: {' '.join(other.command)}); give another name, "
                    f"or remove it first: detr schedule remove {name}", 2,
                )  # fmt: skip
        schedules.append(made)
    return made


def change(store: Path | str, name: str, **values: Any) -> Schedule:
    """Replace fields of a schedule; UserError (exit code 2) if there is none of that name."""
    with _changing(store) as schedules:
        place = _place(schedules, name)
        schedules[place] = schedules[place].model_copy(update=values)
        return schedules[place]


def resume(store: Path | str, name: str) -> Schedule:
    """End a pause; what would have been due in it does not count as missed."""
    with _changing(store) as schedules:
        place = _place(schedules, name)
        if schedules[place].paused:
            schedules[place] = schedules[place].model_copy(update={"paused": False, "since": _now()})
        return schedules[place]


def remove(store: Path | str, name: str) -> Schedule:
    """Forget a schedule; its history stays. UserError (exit code 2) if there is none of that name."""
    with _changing(store) as schedules:
        return schedules.pop(_place(schedules, name))


def is_running(store: Path | str) -> bool:
    """Whether a scheduler runs on this store."""
    if not (Path(store) / "schedule.lock").exists():
        return False
    try:
        with _only_one(Path(store), timeout=0):
            return False
    except SchedulerRuns:
        return True


def history(store: Path | str, name: str | None = None, last: int | None = None) -> list[Record]:
    """Runs and skipped times of a store or of one schedule, the oldest first: all, or the last so many.

    Each is {"schedule", "time" (ISO, UTC), "command", "state": running, skipped or ended} and, as it applies, "asked"
    (by hand), "missed" (first and last time it stands for), "why" (skipped), "started", "seconds", "exit_code",
    "ending" (in words), "error", "log".
    """
    path = Path(store).resolve() / "schedule.db"
    if not path.is_file():
        return []
    from dbos import DBOSClient, DBOSPortableJSONSerializer

    client = DBOSClient(system_database_url=f"sqlite:///{path}", serializer=DBOSPortableJSONSerializer())
    try:
        prefix = None if name is None else f"{name}@"
        found = client.list_workflows(name="scheduled", workflow_id_prefix=prefix, sort_desc=True, limit=last)
    finally:
        client.destroy()
    return [_entry(status) for status in reversed(found)]


class SchedulerRuns(UserError):
    """Another process runs the schedules of this store."""


def serve(
    store: Path | str, program: Sequence[str], clock: Callable[[], datetime] | None = None,
    wait: Callable[[float], Any] = time.sleep, once: bool = False, only: str | None = None,
) -> list[Record]:  # fmt: skip
    """Run what is due as `program` + the schedule's command + --store and --json, in processes of their own.

    Runs of one schedule follow one another; those of different ones may run side by side. What a stopped or killed
    scheduler left is taken up first. once: return when all that is due now has ended; only: do nothing but what was
    asked for by hand of this schedule. Returns the runs that ended, as `history` does. clock gives aware datetimes,
    wait takes seconds. Raises SchedulerRuns if another process does this already. On KeyboardInterrupt the commands
    are stopped and it is raised again: threads of their runs then wait for ever, so that the ledger keeps them as not
    done, and the process must end with os._exit.
    """
    from dbos import DBOS, SetWorkflowID

    store, clock = Path(store).resolve(), clock or _now
    stopping = threading.Event()

    @DBOS.workflow(name="scheduled", max_recovery_attempts=None)
    def scheduled(run: Record) -> Record:
        if "skipped" in run:
            return {}
        return DBOS.run_step({"name": "command"}, _run_command, store, list(program), run, clock, stopping)

    with _only_one(store):
        _launch(store)
        left = DBOS.list_workflows(name="scheduled", status=["PENDING", "ENQUEUED"])
        going = {_schedule_of(w.workflow_id): DBOS.retrieve_workflow(w.workflow_id) for w in left}
        for handle in going.values():
            _say(f"Taking up {handle.workflow_id}.")
        handled: dict[str, list[datetime]] = {}
        ended_at: dict[str, datetime] = {}
        outcomes: list[Record] = []
        schedules: list[Schedule] = []
        said: dict[str, str] = {}

        def start(schedule: Schedule, at: datetime, **more: Any) -> None:
            run = {"name": schedule.name, "time": at.isoformat(), "command": list(schedule.command),
                   "folder": schedule.folder, **more}  # fmt: skip
            mark = "-asked" if "asked" in more else ""
            with SetWorkflowID(f"{schedule.name}@{_stamp(at)}{mark}"):
                handle = DBOS.start_workflow(scheduled, run)
            if not mark:
                handled[schedule.name].append(at)
            if "skipped" in more:
                handle.get_result()
                _say(f"{schedule.name}: {_local(at, schedule)} skipped: {more['skipped']}.")
            else:
                going[schedule.name] = handle
                by_hand = " by hand" if mark else ""
                _say(f"{schedule.name}: {_local(at, schedule)}{by_hand} starts; {_log(store, run)}")

        try:
            while True:
                for name, handle in list(going.items()):
                    status = handle.get_status()
                    if status.status not in ("PENDING", "ENQUEUED", "DELAYED"):
                        del going[name]
                        ended_at[name] = clock()
                        outcomes.append(_entry(status))
                        _say(f"{name}: {describe(outcomes[-1])}.")
                now = clock()
                try:
                    schedules = read_schedules(store)
                except UserError as error:  # goes on with those it knows
                    _say_once(said, "file", str(error))
                for schedule in schedules:
                    name = schedule.name
                    if name in going or only not in (None, name):
                        continue
                    if name not in handled:
                        handled[name] = _handled(name)
                    if schedule.asked and DBOS.get_workflow_status(f"{name}@{_stamp(schedule.asked)}-asked") is None:
                        start(schedule, schedule.asked, asked=True)
                        continue
                    if only:
                        continue
                    # A clock that was set back leaves times in the future; they are not run again when they come.
                    found = due(schedule, max((t for t in handled[name] if t <= now), default=None), now)
                    if found is None:
                        continue
                    missed = {"missed": [t.isoformat() for t in found.missed]} if found.missed else {}
                    if missed and schedule.missed == "skip":
                        before = name in ended_at and found.missed[1] <= ended_at[name]
                        why = "the run before was not over" if before else "no scheduler was running"
                        start(schedule, found.missed[1], skipped=why, **missed)
                        missed = {}
                    if found.run is not None:
                        start(schedule, found.run, **missed)
                if once and not going:
                    if not outcomes and only is None and "file" not in said:
                        _say(f"Nothing is due. {_next(schedules, now)}")
                    break
                if not once:
                    _say_once(said, "next", _next(schedules, now))
                wait(POLL)
        except KeyboardInterrupt:
            stopping.set()
            _stop(store, list(going))
            raise
        DBOS.destroy()
    return outcomes


def describe(entry: Record, scheduler: bool = True) -> str:
    """How a run ended, in words; scheduler: whether one runs that would be running it."""
    if entry["state"] == "skipped":
        text = f"skipped: {entry['why']}"
    elif entry["state"] == "running":
        text = "running" if scheduler else "stopped; goes on when a scheduler starts"
    elif "seconds" in entry:
        seconds = entry["seconds"]
        text = f"{entry['ending']} after {f'{seconds:.1f} s' if seconds < 60 else duration(seconds)}"
    else:
        text = entry["ending"]
    if entry.get("error"):
        text += f": {entry['error'].rstrip('.')}"
    if entry.get("missed") and entry["missed"][0] != entry["time"]:
        text += f" (for all times since {datetime.fromisoformat(entry['missed'][0]):%Y-%m-%d %H:%M} UTC)"
    return text


def _launch(store: Path) -> None:
    """DBOS on the ledger of this store; it takes up what an earlier scheduler left."""
    from dbos import DBOS, DBOSPortableJSONSerializer

    DBOS(
        config={
            "name": "detr-schedule",
            "system_database_url": f"sqlite:///{store / 'schedule.db'}",
            "application_version": APPLICATION_VERSION,
            "executor_id": "schedule",  # there is one scheduler
            "serializer": DBOSPortableJSONSerializer(),
            "log_level": "ERROR",
            "enable_otlp": False,
        }
    )
    DBOS.launch()


def _run_command(
    store: Path, program: list[str], run: Record, clock: Callable[[], datetime], stopping: threading.Event
) -> Record:
    """Start a run's command, or wait for the one that an earlier scheduler started, and say how it ended."""
    log = _log(store, run)
    result = log.with_suffix(".json")
    outcome: Record = {"log": str(log)}
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with (log.parent / "lock").open("a+") as lock:
            _wait_for(lock, f"{run['name']}: the command that an earlier scheduler started still runs; waiting for it.")
            _not_after(stopping)
            left = _printed(result)
            if left is not None and left["exit_code"] != STOPPED:
                seconds = result.stat().st_mtime - (log.parent / "lock").stat().st_mtime
                outcome |= {"exit_code": left["exit_code"], "seconds": round(seconds, 1), "error": left.get("error")}
                return {**outcome, "started": _noted(lock).get("started")}
            if not any(s.name == run["name"] and list(s.command) == run["command"] for s in read_schedules(store)):
                return {"skipped": "the schedule was removed or changed before it could go on"}
            outcome["started"], started = clock().isoformat(timespec="seconds"), time.monotonic()
            lock.truncate(0)
            child = _start_command([*program, *run["command"], "--store", name_of(store), "--json"], run, log, lock)
            lock.write(json.dumps({"pid": child.pid, "started": outcome["started"]}))
        code = child.wait()
    except OSError as error:
        return {**outcome, "exit_code": 1, "error": f"it could not be started: {error}"}
    _not_after(stopping)
    outcome |= {"exit_code": code, "seconds": round(time.monotonic() - started, 1)}
    outcome["error"] = (_printed(result) or {}).get("error")
    return outcome


def _start_command(words: list[str], run: Record, log: Path, lock) -> subprocess.Popen:
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # wherever it is run
    with log.open("a", encoding="utf-8") as errors, log.with_suffix(".json").open("wb") as result:
        errors.write(f"{' '.join(words)}\n")
        errors.flush()
        # A session of its own: Ctrl-C in the scheduler's terminal is the scheduler's to pass on.
        return subprocess.Popen(
            words, cwd=run["folder"], stdin=subprocess.DEVNULL, stdout=result, stderr=errors, pass_fds=[lock.fileno()],
            start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip


def _not_after(stopping: threading.Event) -> None:
    """Never return once the scheduler stops: a step without a result is taken up by the next one."""
    if stopping.is_set():
        threading.Event().wait()


def _wait_for(lock, message: str) -> None:
    said = False
    while not _is_free(lock):
        if not said:
            _say(message)
        said = True
        time.sleep(POLL)


def _is_free(lock) -> bool:
    """Take the lock of a schedule's command if no process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _noted(lock) -> Record:
    """What the lock's file says of the command: {"pid", "started"}, or {} if its scheduler did not come to that."""
    lock.seek(0)
    return json.loads(lock.read() or "{}")


def _stop(store: Path, names: list[str]) -> None:
    """Ask the commands of these schedules to stop, wait for them, and kill those that do not end in STOP_SECONDS."""

    def alive() -> list[int]:
        pids = []
        for path in (store / "schedule" / name / "lock" for name in names):
            if path.is_file():
                with path.open("a+") as lock:  # while it is held, the process with this id is the command
                    if not _is_free(lock) and (noted := _noted(lock)):
                        pids.append(noted["pid"])
        return pids

    pids = alive()
    if pids:
        _say(f"Stopping {len(pids)} command{'s' if len(pids) > 1 else ''}.")
    for pid in pids:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    try:
        while alive() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:  # after a second Ctrl-C, too
        for pid in alive():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _printed(path: Path) -> Record | None:
    """The line of JSON that a command printed in its end, if it did."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return printed_result(lines[-1]) if lines else None


def _entry(status: Any) -> Record:
    """A workflow of the ledger as `history` returns it."""
    run, outcome = status.input["args"][0], status.output or {}
    entry = {"schedule": run["name"], "time": run["time"], "command": run["command"], "asked": run.get("asked", False)}
    if "missed" in run:
        entry["missed"] = run["missed"]
    why = run.get("skipped") or outcome.get("skipped")
    if why:
        return {**entry, "state": "skipped", "why": why}
    if status.status in ("PENDING", "ENQUEUED", "DELAYED"):
        return {**entry, "state": "running"}
    if status.status != "SUCCESS":
        outcome = {"exit_code": 1, "error": str(status.error or status.status)}
    code = outcome["exit_code"]
    ending = f"killed by signal {-code}" if code < 0 else ENDINGS.get(code, f"failed with exit code {code}")
    return {**entry, "state": "ended", "ending": ending, **{k: v for k, v in outcome.items() if v is not None}}


def _handled(name: str) -> list[datetime]:
    """The cron times of a schedule that the ledger knows, of its last runs."""
    from dbos import DBOS

    found = DBOS.list_workflows(workflow_id_prefix=f"{name}@", sort_desc=True, limit=REMEMBERED, load_output=False)
    runs = [status.input["args"][0] for status in found]
    return [datetime.fromisoformat(run["time"]) for run in runs if "asked" not in run]


@contextmanager
def _changing(store: Path | str) -> Iterator[list[Schedule]]:
    store = Path(store)
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(str(store / ".schedules.lock")):
        schedules = read_schedules(store)
        yield schedules
        values = [schedule.model_dump(mode="json") for schedule in schedules]
        write_json(store / "schedules.json", {"format": FORMAT, "schedules": values})


@contextmanager
def _only_one(store: Path, timeout: float = 2) -> Iterator[None]:
    store.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(store / "schedule.lock"))
    try:
        lock.acquire(timeout=timeout)  # who only looks whether there is one holds it for a moment
    except Timeout as error:
        raise SchedulerRuns(f"A scheduler runs on {store} already; stop it first, or leave it to that one.") from error
    try:
        yield
    finally:
        lock.release()


def _place(schedules: list[Schedule], name: str) -> int:
    for place, schedule in enumerate(schedules):
        if schedule.name == name:
            return place
    names = ", ".join(schedule.name for schedule in schedules) or "none"
    raise UserError(f"There is no schedule {name}; there are: {names}.", 2)


def _next(schedules: list[Schedule], now: datetime) -> str:
    times = [(next_time(s, max(now, s.since)), s) for s in schedules if not s.paused]
    if schedules and not times:
        return "Every schedule is paused; `detr schedule resume` ends that."
    if not times:
        return "Nothing is scheduled; `detr schedule add` does."
    at, schedule = min(times, key=lambda pair: pair[0])
    return f"Next: {schedule.name} at {_local(at, schedule)}."


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)


def _say_once(said: dict[str, str], kind: str, text: str) -> None:
    if said.get(kind) != text:
        said[kind] = text
        _say(text)


def _schedule_of(workflow_id: str) -> str:
    return workflow_id.partition("@")[0]


def _stamp(at: datetime) -> str:
    """A time as part of an id or a file's name: 20261122T020000Z."""
    return f"{at.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def _local(at: datetime, schedule: Schedule) -> str:
    return f"{at.astimezone(ZoneInfo(schedule.timezone)):%Y-%m-%d %H:%M %Z}"


def _log(store: Path, run: Record) -> Path:
    mark = "-asked" if "asked" in run else ""
    return store / "schedule" / run["name"] / f"{_stamp(datetime.fromisoformat(run['time']))}{mark}.log"


def _now() -> datetime:
    return datetime.now(UTC)
