"""A store on S3: each machine has a folder that mirrors it, so that stages work on files there as in a local store.

A folder that is finished is put up with `files.json` last, which names its files and their digests, and is fetched by
it. What changes while a stage runs (MLflow run, plan of steps, progress) is written to the store itself, by `name_of`.
"""
from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from pyarrow.fs import FileType

from pipelines.progress import console
from pipelines.settings import UserError, digest
from pipelines.storage import ASKING, Folder, bucket_and_key, is_remote, kind, list_files

FILES, FORMAT = "files.json", 1
WORKING = "working.json"  # who works on a folder
BEAT, SILENT = 20.0, 90.0  # seconds between two signs of life, and after which who gave none is taken for dead
AT_ONCE = 4  # files that are put up or fetched side by side
ANSWER = 60  # seconds a machine has to say what it sees


def open_store(given: str | Path) -> Path:
    """The local folder of a store: itself, or the mirror of one at s3://. Raises UserError where that cannot be had."""
    if not is_remote(given):
        return Path(given)
    place = _mirror(str(given))
    kind(given)  # says what is wrong with it, soon
    place.mkdir(parents=True, exist_ok=True)
    return place


def name_of(path: Path | str) -> str:
    """How every machine finds a file or folder: the URI of what a mirror mirrors, the absolute path of all else."""
    if is_remote(path):
        return Folder(path).uri
    path = Path(path).resolve()
    if not path.is_relative_to(_root()):
        return str(path)
    return f"s3://{path.relative_to(_root()).as_posix()}"


def at_hand(name: str | Path) -> Path:
    """The local folder with the files of a finished one, wherever it was finished; fetched if need be.

    Raises UserError where it is not, or not whole.
    """
    place = local(str(name))
    if not is_remote(name):
        return place
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(str(place / ".lock")):  # workers of one machine
        if not (place / FILES).is_file() and not fetch(place):
            raise UserError(f"{name} holds no finished folder ({FILES} is missing); run its stage again.")
    return place


def local(name: str) -> Path:
    """Where this machine has, or would have, what `name_of` named."""
    return _mirror(name) if is_remote(name) else Path(name)


def fetch(folder: Path) -> bool:
    """Bring what the store has of a mirror's folder; whether it has it, finished. Raises UserError where it is damaged.

    What is there already, byte for byte, is not fetched again.
    """
    there = Folder(name_of(folder))
    listed = there.get(FILES)
    if listed is None:
        return False
    note = folder / FILES
    if note.is_file() and note.read_bytes() == listed:
        return True

    def bring(name: str, sha256: str) -> None:
        place = _inside(folder, name)
        if place.is_file() and _sha256(place.read_bytes()) == sha256:
            return
        data = there.get(name)
        if data is None or _sha256(data) != sha256:
            what = "is missing" if data is None else "is not what was written"
            raise UserError(f"{there.place(name)} {what}; delete {there.place(FILES)} and run its stage again.")
        _write(place, data)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(bring, *zip(*json.loads(listed)["files"].items(), strict=True)))
    _write(note, listed)
    return True


def publish(folder: Path) -> None:
    """Put all files of a mirror's folder into the store but hidden ones, `files.json` last. Raises UserError."""
    there = Folder(name_of(folder))

    def put(path: Path) -> tuple[str, str]:
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        there.put(name, data)
        return name, _sha256(data)

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FILES
             and not any(part.startswith(".") for part in path.relative_to(folder).parts)]  # fmt: skip
    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = dict(pool.map(put, paths))
    listed = json.dumps({"format": FORMAT, "files": files}, indent=1).encode()
    there.put(FILES, listed)
    _write(folder / FILES, listed)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While the block runs, no other machine works on a mirror's folder; waits for one that does, unless it is dead.

    Clocks are not compared: who is silent for so long by the clock of who waits is dead. On a store that cannot create
    a file but once, two who begin within a second may both go on.
    """
    there, mine, stop = Folder(name_of(folder)), f"{socket.gethostname()} {folder}", threading.Event()

    def sign(number: int) -> bytes:
        return json.dumps({"format": FORMAT, "who": mine, "pid": os.getpid(), "sign": number}).encode()

    said, seen, since = False, None, time.monotonic()
    while True:
        found = there.get(WORKING)
        if found is None and there.create(WORKING, sign(0)):
            break
        who = json.loads(found)["who"] if found else None
        if found != seen:
            seen, since = found, time.monotonic()
        if who == mine or (who and time.monotonic() - since > SILENT):  # of mine, this process holds the lock
            there.put(WORKING, sign(0))
            break
        if who and not said:
            said = True
            console.print(f"{who.split()[0]} works on {there.uri}; waiting for it.", soft_wrap=True)
        time.sleep(BEAT / 4)

    # Signs of life are not tried for minutes, or the end of the work would wait for a store that is away.
    soon = Folder(there.uri, ASKING)

    def live() -> None:
        number = 0
        while not stop.wait(BEAT):
            number += 1
            with suppress(UserError):  # the work itself says so where it matters
                soon.put(WORKING, sign(number))

    beats = threading.Thread(target=live, daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        with suppress(UserError):
            soon.delete(WORKING)


def records(store: Path, stage: str) -> list[dict[str, Any]]:
    """The records of all finished runs of a stage in a store, in any order, their "folder" among them."""
    name = name_of(store / stage)
    if not is_remote(name):
        found = {file: json.loads(file.read_text(encoding="utf-8")) for file in (store / stage).glob("*/stage.json")}
        return [{**record, "folder": str(file.parent)} for file, record in found.items()]
    if kind(name) == FileType.NotFound:
        return []
    there = Folder(name)
    keys = [file.split("/")[0] for file in list_files(name, recursive=True) if file.count("/") == 1
            and file.endswith("/stage.json")]  # fmt: skip
    return [{**json.loads(there.get(f"{key}/stage.json")), "folder": str(store / stage / key)} for key in keys]


def check_seen(*folders: Path | str) -> None:
    """Raise UserError where a machine of Ray's cluster does not see a local folder that its workers are to use."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    names = [name for name in map(name_of, folders) if not is_remote(name)]
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    others = [node for node in nodes if node != here]
    if not names or not others:
        return

    @ray.remote(num_cpus=0, max_retries=0)
    def lacks() -> list[str]:
        return [name for name in names if not os.path.isdir(name)]

    asked = [lacks.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote() for n in others]
    answers, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER)
    for node, answer in zip(others, asked, strict=True):
        try:
            lacking = ray.get(answer) if answer in answers else []
        except ray.exceptions.RayError:  # it went meanwhile
            continue
        if lacking:
            raise UserError(
                f"The machine {nodes[node]} of the cluster does not see {lacking[0]}; give a store that all of them "
                "reach: --store s3://BUCKET/PREFIX, or a folder on a file system that they share.", 2,
            )  # fmt: skip


def _root() -> Path:
    """Where this machine's mirrors are: DETR_CACHE, or a folder of the user's; of each endpoint one, as bucket/key."""
    given = os.environ.get("DETR_CACHE") or "~/.cache/detr"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "aws"
    return Path(given).expanduser().resolve() / "mirror" / digest(endpoint, 8)


def _mirror(uri: str) -> Path:
    bucket, key = bucket_and_key(Folder(uri).uri)
    return _inside(_root(), f"{bucket}/{key}" if key else str(bucket))


def _inside(folder: Path, name: str) -> Path:
    """A file below a folder; UserError for a name that would leave it."""
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(f"{name!r} is no name of a file in a store; rename it.", 2)
    return folder / name


def _write(place: Path, data: bytes) -> None:
    Folder(place.parent).put(place.name, data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

