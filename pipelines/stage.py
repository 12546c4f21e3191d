"""A stage's result is addressed by what went in: inputs, settings, and a version raised by hand.

A finished stage leaves `stage.json` in its folder; asked again for the same work it is read, not redone.
That holds without any ledger: the workflow engine only remembers what this file proves.
"""
from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipelines.mirror import alone, fetch, name_of, publish
from pipelines.progress import about
from pipelines.settings import digest
from pipelines.storage import Folder, is_remote, not_done

FORMAT = 1


def run_stage(
    store: Path | str,
    stage: str,
    version: int,
    settings: dict[str, Any],
    inputs: dict[str, Any],
    work: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """Do `work(folder)` once for these inputs and settings, and return its record.

    The record is {"format", "stage", "version", "key", "folder", "settings", "inputs", "result",
    "seconds", "finished", "reused"}; `result` is what work returned (JSON-like). A lock keeps two
    processes from doing the same work side by side. What work raises is passed on, and nothing is
    recorded then. Raises UserError where the folder cannot be made.
    """
    key = digest({"stage": stage, "version": version, "settings": settings, "inputs": inputs})
    folder = Path(store).resolve() / stage / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_done(folder, "made", error) from error
    record_path = folder / "stage.json"
    mirrored = is_remote(name_of(folder))
    with about(stage=stage, key=key), FileLock(str(folder / ".lock")), ExitStack() as ends:
        there = mirrored and fetch(folder)  # it may have been done elsewhere
        if mirrored and not there:
            ends.enter_context(alone(folder))
            there = fetch(folder)  # or is by now
        if record_path.is_file():
            if mirrored and not there:  # this machine was stopped before it was put up
                publish(folder)
            record = json.loads(record_path.read_text(encoding="utf-8"))
            return {**record, "folder": str(folder), "result": _here(record["result"], folder), "reused": True}
        started = time.monotonic()
        result = work(folder)
        record = {
            "format": FORMAT,
            "stage": stage,
            "version": version,
            "key": key,
            "settings": settings,
            "inputs": inputs,
            "result": result,
            "seconds": round(time.monotonic() - started, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(record_path, record)
        if mirrored:
            publish(folder)
    return {**record, "folder": str(folder), "reused": False}


def _here(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A result's paths of files in its folder, which may have been another machine's or have been moved."""
    key = f"/{folder.parent.name}/{folder.name}/"
    return {
        name: str(folder / value.partition(key)[2]) if isinstance(value, str) and key in value else value
        for name, value in result.items()
    }


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON to a file, or an object at s3://, so that a reader sees the old one or the whole new one."""
    if is_remote(path):
        folder, _, name = str(path).rpartition("/")
        Folder(folder).put(name, json.dumps(value, indent=1, ensure_ascii=False).encode())
        return
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path | str) -> Any:
    """The JSON value in a file, or an object at s3://. Raises FileNotFoundError where there is none."""
    if is_remote(path):
        folder, _, name = str(path).rpartition("/")
        data = Folder(folder).get(name)
        if data is None:
            raise FileNotFoundError(path)
        return json.loads(data)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def printed_result(line: str) -> dict[str, Any] | None:
    """The result that a command with --json printed as this line, perhaps behind a piece of its log; or None."""
    start = line.find('{"exit_code": ')
    try:
        value = json.loads(line[start:]) if start >= 0 else None
    except ValueError:
        return None
    return value if value is not None and isinstance(value["exit_code"], int) else None
