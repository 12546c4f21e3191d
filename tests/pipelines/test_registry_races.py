"""The registry under many processes at once, and under kills: on SQLite and on a server with PostgreSQL."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipelines.ledger import Ledger
from pipelines.registry import champion, history, promote, register, rollback
from pipelines.settings import UserError, load_settings
from pipelines.tracking import Tracker, tracker

SETTINGS = load_settings()
WRITES = (
    "log_param", "set_tag", "set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias",
    "log_dict",
)  # fmt: skip

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mlflow", "mlflow.pyfunc", "pipelines.registry"])


@pytest.fixture(scope="module", params=["sqlite", "server"])
def tracked(request, tmp_path_factory) -> Tracker:
    if request.param == "sqlite":
        return tracker(SETTINGS, tmp_path_factory.mktemp("store"), "races")
    server = request.getfixturevalue("mlflow_server")
    settings = load_settings(None, [f"tracking.uri={server.url}"])
    return tracker(settings, tmp_path_factory.mktemp("store"), "races")


def add(tracked: Tracker, name: str, run_id: str, ap: float, folder: Path) -> str:
    """A version whose weights are its AP in words."""
    folder = folder / f"{name}-{ap}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(repr(ap))
    (folder / "config.json").write_text(json.dumps({"format": 1, "categories": [{"id": 1, "name": "cat"}]}))
    return register(SETTINGS, tracked, run_id, folder, scored(ap), "data", name)["version"]


def scored(ap: float) -> dict:
    data = {"seen": None, "base_known": True, "rejected": 0.0}
    return {"AP": ap, "split": "val", "split_digest": "val", "data": data}


def ask(tracked: Tracker, name: str, version: str, ap: float, folder: Path) -> dict:
    def compare(place: Path) -> dict:
        first = float((place / "model.safetensors").read_text())
        figures = {"first": first, "second": ap, "difference": ap - first, "low": ap - first, "high": ap - first}
        found = {"images": 1, "confidence": 0.95, "resamples": 9, "split_digest": "val", "seen_by_first": None}
        return found | {"AP": figures, "per_class": []}

    places = (folder / f"promote-{version}", folder / "models")
    return promote(SETTINGS, tracked, name, version, scored(ap), compare, *places)


def credentials() -> dict[str, str]:
    """For a child: the server that forks it was started before they were set."""
    return {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_TRACKING_")}


def _race(known_as: dict, tracked: Tracker, name: str, run_id: str, ap: float, folder: Path, start) -> None:
    os.environ.update(known_as)
    start.wait(120)
    ask(tracked, name, add(tracked, name, run_id, ap, folder), ap, folder / str(os.getpid()))


@pytest.mark.parametrize(
    ("tracked", "number"), [("sqlite", 20), ("server", 6), pytest.param("server", 20, marks=pytest.mark.long)],
    indirect=["tracked"],
)  # fmt: skip
def test_many_promotions_at_once_leave_one_champion_and_the_whole_history(tracked, number, tmp_path):
    name, run_id = f"raced-{number}", tracked.start_run("train")
    start = PROCESSES.Event()
    aps = [(7 * n % number + 1) / (number + 1) for n in range(number)]  # each once, in no order
    racers = [PROCESSES.Process(target=_race, args=(credentials(), tracked, name, run_id, ap, tmp_path, start))
              for ap in aps]  # fmt: skip
    for racer in racers:
        racer.start()
    seen, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            now = champion(tracked, name)
            if now and now["version"] not in seen[-1:]:
                seen.append(now["version"])

    start.set()
    while not tracked.client().search_registered_models(f"name = '{name}'"):
        assert any(racer.is_alive() for racer in racers)
        time.sleep(0.05)
    watcher = threading.Thread(target=watch)
    watcher.start()
    for racer in racers:
        racer.join(240)
    over.set()
    watcher.join()
    assert [racer.exitcode for racer in racers] == [0] * number

    versions = tracked.client().search_model_versions(f"name = '{name}'")
    found = {str(v.version): float(v.tags["ap"]) for v in versions}
    assert sorted(map(int, found)) == list(range(1, number + 1)) and sorted(found.values()) == sorted(aps)
    assert all("verdict" in v.tags for v in versions)
    rows = history(tracked, name)
    assert sorted(row["version"] for row in rows) == sorted(found)  # each asked once, and nothing is lost
    chain = [row for row in rows if row["what"] == "promoted"]
    assert [row["from"] for row in chain] == [None, *(row["version"] for row in chain[:-1])]
    gains = [found[row["version"]] for row in chain]
    assert gains == sorted(gains) and gains[-1] == max(aps)
    assert champion(tracked, name)["version"] == chain[-1]["version"]
    order = [row["version"] for row in chain]
    assert [version for version in order if version in seen] == seen  # one at a time, and none came back


def _killed(known_as: dict, tracked: Tracker, after: int, counted, work, *arguments) -> None:
    """Do work(tracked, *arguments), and die when its `after`-th write was done; counted: how many there were."""
    from mlflow import MlflowClient

    os.environ.update(known_as)

    def dying(write):
        def call(*arguments, **more):
            if counted.value == after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = write(*arguments, **more)
            counted.value += 1
            return answer

        return call

    for write in WRITES:
        setattr(MlflowClient, write, dying(getattr(MlflowClient, write)))
    work(tracked, *arguments)


def killed_after(writes: int, tracked: Tracker, work, *arguments) -> int | None:
    """Do work(tracked, *arguments) in a child that is killed after so many writes; how many it made, if it lived."""
    counted = PROCESSES.Value("i", 0)
    child = PROCESSES.Process(target=_killed, args=(credentials(), tracked, writes, counted, work, *arguments))
    child.start()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return counted.value if child.exitcode == 0 else None


# What a kill leaves does not depend on the database; on the server it is tried at every step, too, where there is time.
BOTH = pytest.mark.parametrize("tracked", ["sqlite", pytest.param("server", marks=pytest.mark.long)], indirect=True)


@BOTH
def test_killed_at_any_step_the_next_promotion_goes_on_without_repair(tracked, tmp_path):
    run_id = tracked.start_run("train")
    outcomes, steps = [], 0
    while True:
        name = f"killed-{steps}"
        ask(tracked, name, add(tracked, name, run_id, 0.1, tmp_path), 0.1, tmp_path)
        second = add(tracked, name, run_id, 0.2, tmp_path)
        third = add(tracked, name, run_id, 0.3, tmp_path)
        writes = killed_after(steps, tracked, ask, name, second, 0.2, tmp_path / name)
        if writes is not None:
            break
        standing = champion(tracked, name)["version"]
        told = history(tracked, name)
        moves = [row["version"] for row in told if row["what"] == "promoted"]
        assert moves[-1] == standing and standing in ("1", second)  # before it is settled, too
        asked = time.monotonic()
        assert ask(tracked, name, third, 0.3, tmp_path)["previous"] == standing
        assert time.monotonic() - asked < 30  # nobody waits for the dead
        assert champion(tracked, name)["version"] == third
        rows = [(row["what"], row["from"], row["version"]) for row in history(tracked, name)]
        verdict = tracked.client().get_model_version(name, second).tags.get("verdict")
        assert verdict == ("promoted" if standing == second else None)  # of what was not done nothing is told
        assert rows[-1] == ("promoted", standing, third) and rows[0] == ("promoted", None, "1")
        assert rows[1:-1] in ([], [("abandoned", "1", second)], [("promoted", "1", second)])
        assert rollback(tracked, name, "for the test")["version"] == standing
        outcomes.append(rows[1][0] if len(rows) == 3 else "nothing")
        steps += 1
    # nothing at first, then what was meant, then what was done
    assert outcomes == sorted(outcomes, key=["nothing", "abandoned", "promoted"].index)
    assert set(outcomes) == {"nothing", "abandoned", "promoted"} and steps == writes


@BOTH
def test_a_rollback_killed_at_any_step_is_done_or_not(tracked, tmp_path):
    run_id = tracked.start_run("train")
    outcomes, steps = [], 0
    while True:
        name = f"back-{steps}"
        for ap in (0.1, 0.2):
            ask(tracked, name, add(tracked, name, run_id, ap, tmp_path), ap, tmp_path)
        writes = killed_after(steps, tracked, rollback, name, "small cats")
        if writes is not None:
            break
        standing = champion(tracked, name)["version"]
        verdict = ask(tracked, name, "2", 0.2, tmp_path)  # what a scheduled run would do next
        assert verdict["promoted"] == (standing == "2") and ("small cats" in verdict["reason"]) == (standing == "1")
        assert champion(tracked, name)["version"] == standing
        outcomes.append(standing)
        steps += 1
    assert outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {"1", "2"} and steps == writes


def test_the_lease_is_exclusive_and_outlives_no_holder(tracked, monkeypatch):
    name = "leased"
    first, second = Ledger(tracked, name), Ledger(tracked, name)
    assert first.run_id == second.run_id
    with first.lease():
        with pytest.raises(UserError, match="Somebody else is changing model 'leased'"), second.lease(wait=0.3):
            pass
        first.check_lease()
    with second.lease(wait=0):
        second.check_lease()
        # its holder sleeps too long, somebody on another machine takes over, and it must not write any more
        with monkeypatch.context() as patch:
            patch.setattr("pipelines.ledger.LEASE_SECONDS", -1)
            patch.setattr("pipelines.ledger._is_over", lambda holder: True)
            with first.lease(wait=0), pytest.raises(UserError, match="took longer"):
                second.check_lease()


def test_what_is_written_cannot_be_written_again(tracked):
    from mlflow.exceptions import MlflowException

    ledger = Ledger(tracked, "written")
    number = ledger.write("verdict", outcome="refused", version="1", reason="x" * 100_000)["number"]
    entry = ledger.entries()[-1]
    assert entry["number"] == number and entry["outcome"] == "refused" and entry["reason"].startswith("xxx")
    with pytest.raises(MlflowException):
        tracked.client().log_param(ledger.run_id, f"entry.{number:06d}", "{}")
    tracked.client().delete_run(ledger.run_id)  # MLflow keeps what is deleted, and so do we
    assert Ledger(tracked, "written").entries() == ledger.entries()
