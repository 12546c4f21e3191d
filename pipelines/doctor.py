"""A look at what a run would use, before it does: Ray, storage, MLflow, clocks, GPUs, disks, versions, ports.

The checks, in `services` and `machine`, are plain functions that ask the real thing and return findings. Each runs
here in a process of its own, all side by side, and is ended at its limit: a store may hang for ever, a driver may take
its process along.
"""
from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import machine, services
from pipelines.findings import NOT_ASKED, OK, WARNING, WRONG, Finding, one_line, wrong
from pipelines.settings import RunSettings, UserError

if TYPE_CHECKING:
    from rich.table import Table

LIMIT = 30.0  # seconds a check may take; a few are enough where nothing hangs
CLEANING = 10.0  # seconds to delete what a check that was ended has left
SECRET = re.compile(r"(SECRET|PASSWORD|PASSWD|TOKEN|KEY|KEY_ID)$", re.IGNORECASE)  # variables
IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@")
SHORTEST = 4  # characters of what is taken for a secret


def look_around(settings: RunSettings, store: str, limit: float = LIMIT) -> list[Finding]:
    """What a run with these settings would meet. store: a folder, or an s3:// prefix.

    It takes `limit` and `CLEANING` seconds at most, whatever hangs, and leaves nothing behind. No secret of the
    environment is in what comes back.
    """
    checks = list(checks_of(settings, store))
    with ThreadPoolExecutor(len(checks)) as pool:
        found = list(pool.map(lambda check: apart(*check, limit), checks))
    hidden = secrets_here()
    return [without(hidden, finding) for findings in found for finding in findings]


def checks_of(settings: RunSettings, store: str) -> Iterator[tuple[str, Callable[[], list[Finding]]]]:
    """The checks for a run, by name."""
    yield "Ray", partial(services.check_ray, settings, store)
    if url := os.environ.get("RAY_API_SERVER_ADDRESS"):
        yield "Ray's token", partial(services.check_jobs_api, url)
    places = services.places(settings, store)
    for place in places:
        name = f"storage: {place.name}"
        if place.write:
            yield name, partial(services.check_writing, place, f"detr-doctor-{uuid.uuid4().hex}")
        else:
            yield name, partial(services.check_reading, place)
    yield "MLflow", partial(services.check_mlflow, settings, store)
    yield "ledger", partial(services.check_ledger, settings)
    yield "pickles", services.check_pickles
    yield "clock", partial(services.check_clocks, settings, store)
    yield "GPU", partial(machine.check_gpu, settings)
    folders = {place.name: place.uri for place in places if place.write and "://" not in place.uri}
    yield "disk", partial(machine.check_disks, settings, folders)
    yield "versions", machine.check_versions
    yield "open ports", machine.check_ports


def apart(name: str, check: Callable[[], list[Finding]], limit: float = LIMIT) -> list[Finding]:
    """What a check finds in a process of its own; that it broke, crashed or did not end is a finding, too."""
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(theirs, name, check, dict(os.environ)), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            return [Finding(**finding) for finding in json.loads(ours.recv_bytes())]
        found = wrong(name, f"it did not answer within {limit:.0f} seconds",
                      "See whether what is asked is up, and what lies between (a firewall, a proxy).")  # fmt: skip
    except EOFError:
        process.join()
        code = process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        found = wrong(name, f"looking at it ended the process ({how})",
                      "A run may end like that, too: update or install anew what is asked there.")  # fmt: skip
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(check, partial) and check.func is services.check_writing:
        cleaned = apart(name, partial(services.check_cleaning, *check.args), CLEANING)
        return [found, *(finding for finding in cleaned if finding.verdict != OK)]
    return [found]


def _in_child(pipe: Any, name: str, check: Callable[[], list[Finding]], environment: dict[str, str]) -> None:
    os.environ.clear()  # the process that this one was forked off is older
    os.environ.update(environment)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries print what they like
        os.dup2(nowhere, stream)
    try:
        found = check()
    except UserError as error:
        found = [wrong(name, str(error), "Mend that, and look again.")]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
        said = f"{type(error).__name__}: {one_line(error)}"
        found = [wrong(name, f"the look at it failed ({said})", "A run may stumble over it, too.")]
    pipe.send_bytes(json.dumps([finding.model_dump() for finding in found]).encode())
    os._exit(0)  # some libraries would wait for their own threads


def secrets_here() -> set[str]:
    """What must not be printed: passwords, keys and tokens of the environment, and Ray's token."""
    found = {value for name, value in os.environ.items() if SECRET.search(name)}
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError, UnicodeDecodeError):
        found.add(file.read_text().strip())
    return {secret for secret in found if len(secret) >= SHORTEST}


def without(hidden: set[str], finding: Finding) -> Finding:
    """The finding with *** for each secret, and for whoever is named in a URL with a password."""

    def clean(text: str) -> str:
        for secret in sorted(hidden, key=len, reverse=True):
            text = text.replace(secret, "***")
        return IN_URL.sub("://***@", text)

    return finding.model_copy(update={"found": clean(finding.found), "advice": clean(finding.advice)})


def findings_table(findings: Sequence[Finding]) -> Table:
    """The findings for a terminal."""
    from rich.table import Table
    from rich.text import Text

    styles = {OK: "green", WARNING: "yellow", WRONG: "bold red", NOT_ASKED: "dim"}
    table = Table(title="What a run would meet", title_justify="left", show_lines=True)
    table.add_column("check", overflow="fold")
    table.add_column("what was found", overflow="fold", ratio=3)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what to do", overflow="fold", ratio=2)
    for finding in findings:
        verdict = Text(finding.verdict, styles[finding.verdict])
        table.add_row(Text(finding.check), Text(finding.found), verdict, Text(finding.advice))
    return table
