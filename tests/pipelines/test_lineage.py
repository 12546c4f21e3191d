"""From the data to the tables of detections and back, by what stages, MLflow and manifests say of each other."""
from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from jobs.cli import main
from pipelines.ledger import Ledger
from pipelines.lineage import champion_times, lineage, lineage_tree
from pipelines.settings import RunSettings, UserError, load_settings
from pipelines.stage import write_json
from pipelines.tracking import Tracker, tracker

SETTINGS = load_settings()


class World:
    """A store with two datasets. `first` was trained on cats; `second` on dogs, from the weights of `first`.

    Version 1 (of first) was champion until version 2 (of second); both made a table, and a third table is by a
    checkpoint that was never registered.
    """

    def __init__(self, store: Path):
        self.store = store
        self.tracker: Tracker = tracker(SETTINGS, store, "cats")
        self.client = self.tracker.client()
        self.cats, self.dogs = "ca75" * 4, "d095" * 4
        self.latest = {}
        self.stage("ingest", "k1", "2026-01-01", {}, {}, self.dataset("dogs", self.dogs))
        self.stage("ingest", "k2", "2026-01-02", {}, {}, self.dataset("cats", self.cats))
        self.first, self.first_weights = self.train("k1", self.cats, b"one", {})
        self.second, self.second_weights = self.train("k2", self.dogs, b"two", {"init_from": self.first_weights})
        Ledger(self.tracker, "cats")
        self.register(self.first, self.first_weights, self.cats)
        self.register(self.second, self.second_weights, self.dogs)
        self.verdict("1", "promoted", "2026-01-03T00:00:00+00:00", None)
        self.verdict("2", "refused", "2026-01-04T00:00:00+00:00", "1")
        self.verdict("2", "promoted", "2026-01-05T00:00:00+00:00", "1")
        self.client.set_registered_model_alias("cats", "champion", "2")
        self.first_table = self.predict("k1", "cats", "1", self.first_weights)
        self.second_table = self.predict("k2", "cats", "2", self.second_weights)
        self.loose_table = self.predict("k3", "mine", "abc123", sha(b"loose"))

    def dataset(self, name: str, digest: str) -> dict:
        return {"name": name, "digest": digest, "classes": 2, "images": {"train": 8, "val": 2}}

    def stage(self, stage: str, key: str, day: str, settings: dict, inputs: dict, result: dict) -> Path:
        folder = self.store / stage / key
        folder.mkdir(parents=True)
        record = {"format": 1, "stage": stage, "key": key, "settings": settings, "inputs": inputs, "result": result}
        write_json(folder / "stage.json", {**record, "finished": f"{day}T00:00:00+00:00"})
        self.latest[stage] = str(folder)
        write_json(self.store / "latest.json", {"format": 1, **self.latest})
        return folder

    def train(self, key: str, dataset: str, weights: bytes, inputs: dict) -> tuple[str, str]:
        run_id = self.tracker.start_run(f"cats-{key}", tags={"detr.stage": "train", "env.code": f"git {key}"})
        settings = load_settings(None, [f"train.budget={len(weights)} steps", "predict.batch_size=3"])
        self.tracker.log_params(run_id, settings.model_dump(mode="json"))
        self.tracker.training_model(run_id, "cats", {"detr.dataset_digest": dataset})
        self.tracker.end_run(run_id)
        chosen = settings.model_dump(mode="json", include={"seed", "train"})
        folder = self.stage("train", key, "2026-01-02", chosen, {"dataset": dataset, **inputs},
                            {"run_id": run_id, "AP": 0.25, "checkpoint": "checkpoint"})  # fmt: skip
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "model.safetensors").write_bytes(weights)
        return run_id, sha(weights)

    def register(self, run_id: str, weights: str, dataset: str, model: str = "cats") -> None:
        tags = {"model.safetensors_sha256": weights, "dataset_digest": dataset, "ap": "0.25", "split": "val"}
        self.client.create_model_version(model, f"file://{self.store}/somewhere", run_id, tags=tags)

    def verdict(self, version: str, outcome: str, when: str, champion: str | None) -> None:
        """In the ledger, as `promote` leaves it; champion: the one before."""
        ledger = Ledger(self.tracker, "cats")
        if outcome == "promoted":
            number = ledger.write("move", how="promoted", to=version, when=when, **{"from": champion})["number"]
            ledger.write("done", move=number)
        else:
            ledger.write("verdict", outcome=outcome, version=version, when=when)
        self.client.set_model_version_tag("cats", version, "verdict", outcome)

    def predict(self, key: str, model: str, version: str, weights: str) -> str:
        counted = {"images": 10, "detections": {"cat": 3, "dog": 4}}
        folder = self.stage("predict", key, "2026-01-06", {}, {"weights": weights, "model": [model, version]},
                            {**counted, "folder": str(self.store / "predict" / key)})  # fmt: skip
        write_json(folder / "manifest.json", {"model": {"name": model, "version": version}, "weights_sha256": weights,
                                              **counted})  # fmt: skip
        return str(folder)

    def found(self, what: str | None = None) -> dict:
        return lineage(SETTINGS, self.store, what)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ids(found: dict) -> dict[str, set[str]]:
    kinds = ("datasets", "runs", "weights", "versions", "tables")
    return {kind: {node["id"] for node in found[kind]} for kind in kinds}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("lineage") / "store")


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> World:
    """Another one, to which tests add things."""
    return World(tmp_path_factory.mktemp("more") / "store")


def test_a_dataset_leads_to_all_that_was_made_from_it(world):
    found = world.found(world.cats)
    assert found["asked"] == {"kind": "dataset", "id": world.cats}
    assert ids(found) == {
        "datasets": {world.cats},  # and not the one that the second training used besides
        "runs": {world.first, world.second},
        "weights": {world.first_weights, world.second_weights},
        "versions": {"models:/cats/1", "models:/cats/2"},
        "tables": {world.first_table, world.second_table},
    }
    assert ids(world.found(world.dogs))["tables"] == {world.second_table}


def test_a_table_leads_back_to_all_the_data_that_it_rests_on(world):
    found = world.found(world.second_table)
    assert ids(found) == {
        "datasets": {world.cats, world.dogs},
        "runs": {world.first, world.second},
        "weights": {world.first_weights, world.second_weights},
        "versions": {"models:/cats/2"},  # version 1 is of the same family, but this does not rest on it
        "tables": {world.second_table},
    }
    [table] = found["tables"]
    assert (table["images"], table["detections"], table["when"]) == (10, 7, "2026-01-06T00:00:00+00:00")
    assert ids(world.found(f"{world.second_table}/manifest.json")) == ids(found)
    links = {(tuple(one), tuple(other)) for one, other in found["links"]}
    assert (("weights", world.first_weights), ("run", world.second)) in links
    assert (("version", "models:/cats/2"), ("table", world.second_table)) in links


def test_what_is_in_the_middle_leads_both_ways(world):
    asked = [world.first, world.first[:8], world.first_weights[:10], "models:/cats/1", f"{world.store}/train/k1",
             f"{world.store}/train/k1/checkpoint"]  # fmt: skip
    for what in asked:
        found = ids(world.found(what))
        assert found["datasets"] == {world.cats}
        assert world.first_table in found["tables"]
    assert ids(world.found("models:/cats/1"))["runs"] == {world.first}
    assert ids(world.found(world.first))["runs"] == {world.first, world.second}


def test_without_a_question_it_is_the_champion_of_the_last_dataset(world):
    found = world.found()
    assert found["asked"] == {"kind": "version", "id": "models:/cats/2"}
    assert found == world.found("models:/cats@champion")
    assert len(found["unknown"]) == 1  # nothing is missing in this store; others are out of sight


def test_a_run_says_its_code_and_what_of_its_settings_shaped_the_model(world):
    [run] = world.found("models:/cats/1")["runs"]
    assert (run["code"], run["status"], run["AP"]) == ("git k1", "FINISHED", 0.25)
    assert run["changed"] == {"train.budget": "3 steps"}  # predict.batch_size did not
    assert RunSettings().train.budget != "3 steps"


def test_a_version_says_when_it_was_champion(world):
    one, two = world.found(world.cats)["versions"]
    assert one["champion"] == [{"since": "2026-01-03T00:00:00+00:00", "until": "2026-01-05T00:00:00+00:00"}]
    assert two["champion"] == [{"since": "2026-01-05T00:00:00+00:00", "until": None}]
    assert (one["aliases"], two["aliases"], two["AP"]) == ([], ["champion"], 0.25)


def test_champions_come_go_and_come_back():
    moves = [("1", "promoted"), ("2", "refused"), ("2", "promoted"), ("2", "promoted"), ("1", "rolled back"),
             ("4", "abandoned"), ("3", "found")]  # fmt: skip
    rows = [{"when": str(hour), "what": what, "version": version} for hour, (version, what) in enumerate(moves)]
    assert champion_times(rows, "1", "3") == [{"since": "0", "until": "2"}, {"since": "4", "until": "6"}]
    assert champion_times(rows, "2", "3") == [{"since": "2", "until": "4"}]
    assert champion_times(rows, "3", "3") == [{"since": "6", "until": None}]
    assert champion_times(rows, "4", "3") == champion_times([], "1", None) == []


def test_an_alias_that_was_moved_or_deleted_by_hand_is_no_champion_to_now(tmp_path):
    world = World(tmp_path / "store")
    since, unknown = "2026-01-05T00:00:00+00:00", "unknown"
    world.client.set_registered_model_alias("cats", "champion", "1")
    one, two = world.found(world.cats)["versions"]
    assert two["champion"] == [{"since": since, "until": unknown}]
    assert one["champion"][1:] == [{"since": unknown, "until": None}]
    text = shown(world.found(world.cats))
    assert "until unknown (its alias was moved or deleted by hand)" in text
    assert "champion since unknown to now (the alias was moved to it by hand)" in text
    world.client.delete_registered_model_alias("cats", "champion")
    one, two = world.found(world.cats)["versions"]
    assert two["champion"] == [{"since": since, "until": unknown}] and one["champion"][-1]["until"] is not None
    assert "to now" not in shown(world.found(world.cats))


@pytest.mark.parametrize("ap", ["nan", "inf"])
def test_a_version_without_ground_truth_says_so(tmp_path, ap):
    world = World(tmp_path / "store")
    world.client.set_model_version_tag("cats", "1", "ap", ap)
    one, two = world.found(world.cats)["versions"]
    assert one["AP"] is None and two["AP"] == 0.25
    text = shown(world.found(world.cats))
    assert "no ground truth on val" in text and "AP 0.2500 on val" in text
    world.client.delete_model_version_tag("cats", "1", "ap")
    assert world.found(world.cats)["versions"][0]["AP"] is None


def test_a_checkpoint_that_was_never_registered_has_its_tables(world):
    found = world.found(sha(b"loose")[:12])
    assert ids(found)["tables"] == {world.loose_table}
    assert not any(ids(found)[kind] for kind in ("datasets", "runs", "versions"))


def test_what_another_store_made_is_said_to_be_unknown(more):
    other = more.tracker.start_run("far", tags={"detr.stage": "train", "env.code": "git far"})
    more.tracker.training_model(other, "far", {"detr.dataset_digest": "fa12" * 4})
    more.client.create_registered_model("far")
    more.register(other, sha(b"far"), "fa12" * 4, "far")
    more.register("0" * 32, sha(b"gone"), more.cats, "far")
    table = more.predict("k4", "far", "7", sha(b"far"))

    found = more.found(table)
    assert ids(found)["datasets"] == {"fa12" * 4} and ids(found)["runs"] == {other}
    said = " ".join(found["unknown"])
    assert "has no version 7 of 'far'" in said
    assert f"Run {other} is of another store" in said
    assert f"Dataset {'fa12' * 4} was not read in this store" in said
    gone = more.found("models:/far/2")
    assert f"does not have run {'0' * 32} of models:/far/2" in " ".join(gone["unknown"])
    assert ids(gone)["datasets"] == {more.cats}  # by the version's own tag


def test_a_checkpoint_from_elsewhere_is_bound_to_the_data_that_it_was_measured_on(more):
    run_id = more.tracker.start_run("cats-import", tags={"detr.stage": "import"})
    more.client.create_registered_model("given")
    more.register(run_id, sha(b"given"), more.cats, "given")
    found = more.found("models:/given/1")
    assert ids(found)["datasets"] == {more.cats} and ids(found)["runs"] == {run_id}
    links = [(one[0], other[0]) for one, other in found["links"]]
    assert sorted(links) == [("dataset", "version"), ("run", "version"), ("weights", "version")]  # no run made them


def test_weights_that_are_gone_are_said_to_be(more):
    (more.store / "train" / "k2" / "checkpoint" / "model.safetensors").unlink()
    said = " ".join(more.found(more.second)["unknown"])
    assert "is gone: which weights" in said
    assert ids(more.found(more.second))["tables"] == {more.second_table}  # the version's tag knows them


@pytest.mark.parametrize(
    "what, words",
    [
        ("feedfacefeedface", "knows 'feedfacefeedface'; give the digest"),
        ("no such thing", "give the digest"),
        ("abc", "give the digest"),  # too short
        ("models:/cats", "write models:/NAME@champion"),
        ("models:/cats/9", "no model 'cats' version 9"),
        ("models:/cats@best", "with the alias 'best'"),
        (".", "is no prediction, checkpoint"),
    ],
)
def test_what_is_not_there_is_one_sentence(world, what, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        world.found(what)
    assert error.value.exit_code == 2


def test_what_could_be_several_is_asked_back(more):
    more.stage("ingest", "k3", "2026-01-07", {}, {}, more.dataset("more", "ca75ffff"))
    with pytest.raises(UserError, match=r"ca75 could be dataset ca75.* or dataset ca75ffff; write more of it"):
        more.found("ca75")
    assert more.found("ca75f")["asked"]["id"] == "ca75ffff"


def test_an_empty_store_has_nothing_to_follow(tmp_path):
    with pytest.raises(UserError, match="holds no dataset"):
        lineage(SETTINGS, tmp_path / "store")


def shown(found: dict) -> str:
    page = Console(file=io.StringIO(), width=200)
    page.print(lineage_tree(found))
    return page.file.getvalue()


def test_the_tree_goes_from_the_data_to_the_tables(world):
    text = shown(world.found(world.second_table))
    lines = text.splitlines()
    upper = [f"dataset {world.dogs}", f"run {world.second}", f"weights {world.second_weights}", "version 2 of cats",
             f"table {world.second_table}  <- asked for"]  # fmt: skip
    lower = [f"dataset {world.cats}", f"run {world.first}", f"weights {world.first_weights}",
             f"run {world.second}  (see above)"]  # fmt: skip
    places = [next(n for n, line in enumerate(lines) if words in line) for words in [*upper, *lower]]
    assert places == sorted(places)  # the dogs were read first
    for chain in (places[: len(upper)], places[len(upper) :]):
        depths = [min(k for k, letter in enumerate(lines[place]) if letter.isalpha()) for place in chain]
        assert depths == sorted(set(depths))
    assert "champion from 2026-01-05T00:00:00+00:00 to now" in text and "train.budget=3 steps" in text


def test_the_command_prints_the_tree_or_json(world):
    asked = ["lineage", "--store", str(world.store), "models:/cats/1"]
    text = CliRunner().invoke(main, asked)
    assert text.exit_code == 0
    assert "version 1 of cats  <- asked for" in text.output and "What other stores" in text.output
    answer = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    assert answer["exit_code"] == 0 and answer["asked"] == {"kind": "version", "id": "models:/cats/1"}
    wrong = CliRunner().invoke(main, ["lineage", "--store", str(world.store), "a", "b"])
    assert wrong.exit_code == 2 and "one thing" in wrong.output
