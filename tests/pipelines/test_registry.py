"""The registry on SQLite: who becomes champion, who does not and why, and what a consumer gets."""

import json
import re
import shutil
from pathlib import Path

import pytest

from pipelines.registry import champion, check_champion, download, history, promote, register, registered_name, rollback
from pipelines.settings import UserError, load_settings
from pipelines.stage import read_json
from pipelines.tracking import Tracker, tracker

SETTINGS = load_settings(None, ["gate.min_ap=0.1"])
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Tracker:
    return tracker(SETTINGS, tmp_path_factory.mktemp("store"), "digits")


@pytest.fixture(scope="module")
def run_id(tracked) -> str:
    return tracked.start_run("train")


@pytest.fixture
def name(request) -> str:
    """A registered model of its own for every test."""
    return re.sub(r"\W+", "-", request.node.name)


def checkpoint(folder: Path, weights: bytes, categories=CATEGORIES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"format": 1, "categories": categories}))
    return folder


DATA = {"seen": 0.0, "base_known": True, "rejected": 0.0}


def scored(ap: float | None, data: str = "val-1", **more) -> dict:
    return {"AP": ap, "split": "val", "split_digest": data, "data": DATA, **more}


def compared(first: float, second: float, half: float = 0.0, data: str = "val-1", per_class=()) -> dict:
    """What `compare_evaluations` says; half: of the interval's width."""
    difference = second - first
    ap = {"first": first, "second": second, "difference": difference, "low": difference - half,
          "high": difference + half}  # fmt: skip
    return {"images": 100, "confidence": 0.95, "resamples": 1000, "split_digest": data, "seen_by_first": None, "AP": ap,
            "per_class": list(per_class)}  # fmt: skip


APS = {}  # of all weights in a test: what measuring a champion again finds


@pytest.fixture
def add(tracked, run_id, name, tmp_path):
    """add(weights, ap) -> version of a checkpoint with these weights."""

    def make(weights: bytes, ap: float, categories=CATEGORIES) -> str:
        folder = checkpoint(tmp_path / weights[:9].decode(), weights, categories)
        APS[weights] = ap
        return register(SETTINGS, tracked, run_id, folder, scored(ap), "data", name)["version"]

    return make


@pytest.fixture
def judge(tracked, name, tmp_path):
    def run(version: str, evaluation: dict, settings=SETTINGS, half=0.0, per_class=(), data=None, why="") -> dict:
        def compare(place: Path) -> dict:
            first = APS[(place / "model.safetensors").read_bytes()]
            return compared(first, evaluation["AP"], half, data or evaluation["split_digest"], per_class)

        return promote(
            settings, tracked, name, version, evaluation, compare, tmp_path / "promote", tmp_path / "models", why
        )

    return run


def failed(verdict: dict) -> list[str]:
    return [rule["rule"] for rule in verdict["rules"] if not rule["ok"]]


def aliases(tracked, name) -> dict[str, str]:
    return {k: str(v) for k, v in tracked.client().get_registered_model(name).aliases.items()}


def test_a_first_champion_needs_only_the_floor(tracked, name, add, judge, tmp_path):
    version = add(b"one", 0.05)
    assert champion(tracked, name) is None

    refused = judge(version, scored(0.05))
    assert not refused["promoted"] and refused["champion"] is None
    assert aliases(tracked, name) == {"challenger": version}
    assert refused["reason"] == f"Version 1 of {name} was refused: AP 0.0500 is below gate.min_ap 0.1."
    assert champion(tracked, name) is None

    accepted = judge(version, scored(0.1))
    assert accepted["promoted"] and accepted["previous"] is None
    assert champion(tracked, name)["version"] == version
    assert champion(tracked, name)["ap"] == 0.1
    assert aliases(tracked, name) == {"champion": version}
    assert read_json(tmp_path / "promote" / "verdict.json")["reason"] == accepted["reason"]


@pytest.mark.parametrize("ap", [None, float("nan"), -1])
def test_an_ap_that_is_none_is_refused_even_without_a_floor(tracked, name, add, judge, ap):
    settings = load_settings(None, ["gate.min_ap=0"])
    verdict = judge(add(b"one", 0.5), scored(ap), settings)
    assert failed(verdict) == ["AP reaches the floor"]
    assert champion(tracked, name) is None


def test_the_champion_must_be_beaten_surely(tracked, name, add, judge):
    first = add(b"one", 0.3)
    judge(first, scored(0.3))
    second = add(b"two", 0.3)

    equal = judge(second, scored(0.3))
    assert failed(equal) == ["AP is above the champion's"]
    assert "is +0.0000 beside the 0.3000 of champion version 1" in equal["reason"]
    assert (equal["champion"], champion(tracked, name)["version"]) == (first, first)

    chance = judge(second, scored(0.34), half=0.05)  # better, and it may be chance
    assert failed(chance) == ["AP is above the champion's"]
    assert "95% sure -0.0100 to +0.0900; the low end must be above gate.margin 0" in chance["reason"]

    margin = judge(second, scored(0.34), load_settings(None, ["gate.min_ap=0.1", "gate.margin=0.05"]))
    assert failed(margin) == ["AP is above the champion's"]

    better = judge(second, scored(0.34), half=0.03)
    assert better["promoted"] and (better["previous"], better["champion"]) == (first, second)
    assert "its AP 0.3400 is +0.0400 beside the 0.3000 of champion version 1" in better["reason"]
    assert champion(tracked, name)["version"] == second


def test_without_an_interval_the_difference_itself_counts(tracked, name, add, judge, tmp_path):
    judge(add(b"one", 0.3), scored(0.3))
    version = add(b"two", 0.31)

    def compare(_place: Path) -> dict:
        found = compared(0.3, 0.31)
        return found | {"AP": found["AP"] | {"low": None, "high": None}, "resamples": resamples}

    resamples = 1000  # which were made, on too few images
    verdict = promote(SETTINGS, tracked, name, version, scored(0.31), compare, tmp_path, tmp_path / "models")
    assert failed(verdict) == ["AP is above the champion's"] and "too few images with objects" in verdict["reason"]
    resamples = 0
    verdict = promote(SETTINGS, tracked, name, version, scored(0.31), compare, tmp_path, tmp_path / "models")
    assert verdict["promoted"] and "sure" not in verdict["reason"]


def test_a_champion_that_saw_the_images_is_told_of(tracked, name, add, judge, tmp_path):
    judge(add(b"one", 0.3), scored(0.3))
    version = add(b"two", 0.2)

    def compare(_place: Path) -> dict:
        return compared(0.3, 0.2) | {"seen_by_first": 0.4}

    verdict = promote(SETTINGS, tracked, name, version, scored(0.2), compare, tmp_path, tmp_path / "models")
    assert "(which was trained on 40.0% of these images)" in verdict["reason"]


def test_a_class_must_not_be_lost(name, add, judge):
    judge(add(b"one", 0.3), scored(0.3))
    second = add(b"two", 0.4)
    lost = {"name": "dog", "id": 7, "first": 0.5, "second": 0.3, "difference": -0.2, "low": -0.3, "high": -0.1}
    verdict = judge(second, scored(0.4), per_class=[lost])
    assert failed(verdict) == ["no class is much worse"]
    assert "'dog' fell from AP 0.500 to 0.300" in verdict["reason"]
    unsure = lost | {"high": 0.01}
    rare = lost | {"low": None, "high": None}
    little = lost | {"second": 0.45, "difference": -0.05, "high": -0.01}
    unknown = {**dict.fromkeys(lost), "name": "cat", "id": 3}
    assert judge(second, scored(0.4), per_class=[unsure, rare, little, unknown])["promoted"]


@pytest.mark.parametrize(
    "evaluation, override, rule, words",
    [
        ({"data": DATA | {"seen": 0.25}}, None, "was not trained on the images it is measured on",
         "25.0% of the images it was measured on, or nearly the same ones, it was trained on"),
        ({"data": DATA | {"seen": None, "rejected": 0.5}}, None, "data checks passed", "50.0% of the images"),
        ({}, "gate.max_megabytes=0.1", "is small enough", "its weights have 0.2 MB, and gate.max_megabytes is 0.1"),
        ({"images_per_second": 3.0}, "gate.min_images_per_second=5", "is fast enough", "its speed is 3 images/s"),
        ({"images_per_second": None}, "gate.min_images_per_second=5", "is fast enough", "was not measured"),
    ],
)  # fmt: skip
def test_a_first_champion_must_keep_the_other_rules_too(name, add, judge, evaluation, override, rule, words):
    settings = load_settings(None, [override] if override else [])
    version = add(b"one" * 70_000 if override and "mega" in override else b"one", 0.5)
    verdict = judge(version, scored(0.5) | evaluation, settings)
    assert failed(verdict) == [rule] and words in verdict["reason"]


def test_numbers_from_other_images_do_not_count(tracked, name, add, judge):
    judge(add(b"one", 0.3), scored(0.3))
    verdict = judge(add(b"two", 0.9), scored(0.9), data="val-2")
    assert failed(verdict) == ["measured on the same images"]
    assert champion(tracked, name)["version"] == "1"


@pytest.mark.parametrize(
    "categories, words",
    [
        ([{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}], "it lacks 'cat', 'dog'"),  # swapped
        (CATEGORIES[:1], "it lacks 'dog'"),
    ],
)
def test_a_label_map_that_does_not_fit_is_refused(tracked, name, add, judge, categories, words):
    judge(add(b"one", 0.3), scored(0.3))
    verdict = judge(add(b"two", 0.9, categories), scored(0.9))
    assert failed(verdict) == ["has the champion's classes"] and words in verdict["reason"]
    assert champion(tracked, name)["version"] == "1"


def test_order_and_additions_do_not_spoil_a_label_map(name, add, judge):
    judge(add(b"one", 0.3), scored(0.3))
    assert judge(add(b"two", 0.4, [{"id": 9, "name": "cow"}, *CATEGORIES[::-1]]), scored(0.4))["promoted"]


def test_the_champion_stays_champion_and_takes_on_new_data(tracked, name, add, judge):
    first = add(b"one", 0.3)
    judge(first, scored(0.3))
    again = judge(first, scored(0.25, "val-2"))
    assert again["promoted"] and "already is the champion" in again["reason"]
    assert champion(tracked, name)["split_digest"] == "val-2"
    assert judge(add(b"two", 0.36), scored(0.36, "val-2"))["promoted"]


def test_every_verdict_is_kept_with_its_version(tracked, name, add, judge, tmp_path):
    judge(add(b"one", 0.3), scored(0.3))
    second = add(b"two", 0.2)
    many = [{"name": f"class {n} " + 300 * "x", "id": n, "first": 0.9, "second": 0.1, "difference": -0.8, "low": -0.9,
             "high": -0.7} for n in range(500)]  # fmt: skip
    judge(second, scored(0.2), per_class=many)
    judge(second, scored(0.4), why="more night images")
    tags = tracked.client().get_model_version(name, second).tags
    dated = [json.loads(tags[key]) for key in sorted(tags) if key.startswith("verdict.")]
    assert [entry["outcome"] for entry in dated] == ["refused", "promoted"]
    assert [entry["previous"] for entry in dated] == ["1", "1"]
    assert all(entry["who"] and entry["when"] and entry["reason"] for entry in dated)
    assert dated[0]["rules"][1]["figure"] == 0.2 and dated[1]["why"] == "more night images"
    assert dated[1]["comparison"]["AP"]["first"] == 0.3
    assert (tags["verdict"], tags["ap"]) == ("promoted", "0.4")
    # what is too long for a tag is whole in the ledger
    client = tracked.client()
    ledger = client.get_registered_model(name).tags["detr.ledger"]
    files = [file.path for file in client.list_artifacts(ledger, "verdicts")]
    assert len(files) == 3
    whole = read_json(client.download_artifacts(ledger, next(f for f in files if "000003" in f), str(tmp_path)))
    assert len(whole["comparison"]["per_class"]) == 500

    rows = history(tracked, name)
    assert [(row["what"], row["from"], row["version"]) for row in rows] == [
        ("promoted", None, "1"), ("refused", None, "2"), ("promoted", "1", "2"),
    ]  # fmt: skip
    assert rows[2]["why"] == "more night images" and all(row["who"] and row["when"] for row in rows)


def test_the_thresholds_of_the_evaluation_become_the_models_own(tracked, run_id, name, tmp_path):
    best = {"threshold": 0.4, "f1": 0.8, "precision": 0.8, "recall": 0.8}
    classes = [{"name": "cat", "id": 3, "truth": 200, "best_f1": best | {"threshold": 0.37}},
               {"name": "dog", "id": 7, "truth": 3, "best_f1": best | {"threshold": 0.99}}]  # fmt: skip
    evaluation = scored(0.5, best_f1=best, per_class=classes)
    folder = checkpoint(tmp_path / "one", b"one")
    register(SETTINGS, tracked, run_id, folder, evaluation, "data", name)
    config = read_json(download(tracked, f"models:/{name}/1", tmp_path / "got")[0] / "config.json")
    assert config["score_threshold"] == 0.4
    assert config["score_thresholds"] == {"3": 0.37}  # three dogs say little
    assert "score_thresholds" not in read_json(folder / "config.json")
    assert register(SETTINGS, tracked, run_id, folder, evaluation, "data", name)["reused"]


def test_registering_the_same_checkpoint_again_finds_its_version(tracked, run_id, name, tmp_path):
    folder = checkpoint(tmp_path / "one", b"one")
    first = register(SETTINGS, tracked, run_id, folder, scored(0.3), "data", name)
    again = register(SETTINGS, tracked, run_id, checkpoint(tmp_path / "copy", b"one"), scored(0.3), "data", name)
    assert not first["reused"] and again == {**first, "reused": True}
    other = register(
        SETTINGS, tracked, run_id, checkpoint(tmp_path / "x", b"one", CATEGORIES[:1]), scored(0.3), "data", name
    )
    assert other["version"] == "2"  # the same weights with another label map are another model
    assert champion(tracked, name) is None
    tags = tracked.client().get_model_version(name, "1").tags
    assert (tags["dataset_digest"], tags["split"], tags["run_id"]) == ("data", "val", run_id)
    assert [model.model_id for model in tracked.client().get_run(run_id).outputs.model_outputs]


def test_the_alias_survives_later_versions_and_refusals(tracked, name, add, judge, tmp_path):
    judge(add(b"one", 0.3), scored(0.3))
    judge(add(b"two", 0.2), scored(0.2))
    fresh = Tracker(tracked.uri, tracked.experiment, tracked.artifact_root)
    place, model, version = download(fresh, f"models:/{name}@champion", tmp_path / "got")
    assert (model, version, (place / "model.safetensors").read_bytes()) == (name, "1", b"one")
    assert download(fresh, f"models:/{name}/2", tmp_path / "got")[2] == "2"
    # whoever pinned version 1 keeps it when the alias moves on
    judge(add(b"three", 0.5), scored(0.5))
    assert (place / "model.safetensors").read_bytes() == b"one"
    assert download(fresh, f"models:/{name}@champion", tmp_path / "got")[2] == "3"


def stored(tracked: Tracker, name: str, version: str) -> Path:
    source = tracked.client().get_model_version(name, version).source
    return Path(source.removeprefix("file://")) / "artifacts" / "checkpoint"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_tampered_file_is_neither_promoted_nor_handed_out(tracked, name, add, judge, tmp_path, file):
    version = add(b"one", 0.3)
    target = stored(tracked, name, version) / file
    good = target.read_bytes()
    target.write_bytes(good + b" ")
    with pytest.raises(UserError, match=f"{file} of '{name}' version 1 is not what was registered"):
        download(tracked, f"models:/{name}/1", tmp_path / "got")
    verdict = judge(version, scored(0.3))
    assert failed(verdict) == ["files are those registered"]
    assert champion(tracked, name) is None
    target.write_bytes(good)  # mended, it is fetched anew
    assert download(tracked, f"models:/{name}/1", tmp_path / "got")[2] == "1"


@pytest.mark.parametrize("file", ["registered_model.py", "MLmodel", "code/detr/model.py", "code/detr/new.py"])
def test_tampered_code_is_not_promoted(tracked, name, add, judge, file):
    """MLflow runs it on the machine of whoever loads the model."""
    version = add(b"one", 0.3)
    with (stored(tracked, name, version).parents[1] / file).open("a") as stream:
        stream.write("\nprint('here I am')\n")
    verdict = judge(version, scored(0.3))
    assert failed(verdict) == ["files are those registered"] and "The code of" in verdict["reason"]


def test_what_does_not_exist_is_said(tracked, name, add, judge, tmp_path):
    add(b"one", 0.3)
    for uri, words in [
        (f"models:/{name}@champion", "no model .* with the alias 'champion'"),
        ("models:/nothing@champion", "no model 'nothing'"),
        (f"models:/{name}/9", "no version 9"),
        ("models:/nothing", "write models:/NAME@champion"),
        (str(tmp_path / "nowhere"), "no checkpoint folder: it has no model.safetensors"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            download(tracked, uri, tmp_path / "got")
        assert error.value.exit_code == 2
    with pytest.raises(UserError, match="no version 9"):
        judge("9", scored(0.3))


def test_a_plain_folder_is_a_model_too(tracked, tmp_path):
    folder = checkpoint(tmp_path / "mine", b"one")
    place, model, version = download(tracked, str(folder), tmp_path / "got")
    assert (place, model) == (folder.resolve(), "mine")
    assert version == "7692c3ad3540"  # sha256(b"one")


def test_where_there_is_no_champion_it_is_said_why_and_what_can_be_had(tracked, name, add, judge):
    with pytest.raises(UserError, match="run `detr register` first"):
        check_champion(tracked, name)
    add(b"one", 0.3)
    with pytest.raises(UserError, match="Version 1 was not promoted"):
        check_champion(tracked, name)
    judge("1", scored(0.05))
    with pytest.raises(UserError, match=f"was refused: AP .* is below .*--model models:/{name}/1") as error:
        check_champion(tracked, name)
    assert error.value.exit_code == 2
    judge(add(b"two", 0.4), scored(0.4))
    check_champion(tracked, name)


def test_rollback_gives_the_alias_back_and_the_gate_remembers(tracked, name, add, judge):
    with pytest.raises(UserError, match="no registered model"):
        rollback(tracked, name, "why not")
    add(b"one", 0.3)
    with pytest.raises(UserError, match="no champion"):
        rollback(tracked, name, "why not")
    judge("1", scored(0.3))
    with pytest.raises(UserError, match="first champion"):
        rollback(tracked, name, "why not")
    judge(add(b"two", 0.4), scored(0.4))
    assert rollback(tracked, name, "misses small cats")["version"] == "1"
    assert champion(tracked, name)["version"] == "1"
    verdict = judge("2", scored(0.4))  # what a scheduled run would do next
    assert failed(verdict) == ["was not rolled back"] and "misses small cats" in verdict["reason"]
    assert judge(add(b"three", 0.35), scored(0.35))["previous"] == "1"
    judge(add(b"four", 0.5), scored(0.5))
    assert rollback(tracked, name, "a")["version"] == "3"  # and not to the one that was rolled back
    assert rollback(tracked, name, "b")["version"] == "1"
    moves = [(row["what"], row["from"], row["version"]) for row in history(tracked, name) if row["what"] != "refused"]
    assert moves == [
        ("promoted", None, "1"), ("promoted", "1", "2"), ("rolled back", "2", "1"), ("promoted", "1", "3"),
        ("promoted", "3", "4"), ("rolled back", "4", "3"), ("rolled back", "3", "1"),
    ]  # fmt: skip


def test_a_champion_that_was_deleted_is_noticed(tracked, name, add, judge):
    """MLflow deletes its alias with it, and the next version would pass as a first champion, whatever it can."""
    judge(add(b"one", 0.3), scored(0.3))
    judge(add(b"two", 0.6), scored(0.6))
    third = add(b"three", 0.2)
    tracked.client().delete_model_version(name, "2")
    verdict = judge(third, scored(0.2))
    assert failed(verdict) == ["the champion is there"] and verdict["champion"] is None
    assert "champion version 2 was deleted" in verdict["reason"] and "`detr rollback`" in verdict["reason"]
    assert rollback(tracked, name, "2 is gone")["version"] == "1"
    assert failed(judge(third, scored(0.2))) == ["AP is above the champion's"]

    tracked.client().delete_model_version(name, "1")  # and now there is none to go back to
    assert failed(judge(third, scored(0.2))) == ["the champion is there"]
    assert rollback(tracked, name, "begin anew")["version"] is None
    assert judge(third, scored(0.2))["promoted"]
    assert champion(tracked, name)["version"] == third


def test_a_version_rolled_back_while_it_is_judged_stays_so(tracked, name, add, judge, tmp_path):
    judge(add(b"one", 0.3), scored(0.3))
    second = add(b"two", 0.4)

    def compare(_place: Path) -> dict:
        """Takes a while, in which somebody else promotes it, and takes it back."""
        judge(second, scored(0.4))
        rollback(tracked, name, "misses small cats")
        return compared(0.3, 0.4)

    verdict = promote(SETTINGS, tracked, name, second, scored(0.4), compare, tmp_path, tmp_path / "models")
    assert failed(verdict) == ["was not rolled back"]
    assert champion(tracked, name)["version"] == "1"


def test_an_alias_moved_by_hand_is_found_and_told(tracked, name, add, judge):
    judge(add(b"one", 0.3), scored(0.3))
    second = add(b"two", 0.2)
    tracked.client().set_registered_model_alias(name, "champion", second)
    assert judge(add(b"three", 0.25), scored(0.25))["previous"] == second  # measured against the one that stands
    assert [(row["what"], row["version"]) for row in history(tracked, name)] == [
        ("promoted", "1"), ("found", "2"), ("promoted", "3"),
    ]  # fmt: skip
    assert rollback(tracked, name, "a")["version"] == "2"
    tracked.client().delete_registered_model_alias(name, "champion")
    bared = judge("1", scored(0.3))
    assert failed(bared) == ["the champion is there"] and "`detr promote --version 2`" in bared["reason"]
    assert judge("2", scored(0.3))["promoted"]  # it is the one, and has its alias again
    assert champion(tracked, name)["version"] == "2"


def test_a_champion_whose_files_are_spoilt_bars_the_way(tracked, name, add, judge):
    version = add(b"one", 0.3)
    judge(version, scored(0.3))
    (stored(tracked, name, version) / "model.safetensors").write_bytes(b"ONE")
    verdict = judge(add(b"two", 0.4), scored(0.4))
    assert failed(verdict) == ["the champion is there"]
    assert "model.safetensors of" in verdict["reason"] and verdict["champion"] == version
    assert "`detr rollback`" in verdict["reason"] and "/" not in verdict["reason"].replace("models/", "")
    assert rollback(tracked, name, "spoilt")["version"] is None  # there is none before it
    assert champion(tracked, name) is None
    assert judge("2", scored(0.4))["promoted"]
    judge(add(b"three", 0.5), scored(0.5))
    shutil.rmtree(stored(tracked, name, "2"))
    with pytest.raises(UserError, match="was the first champion"):  # the one before it is of no use
        rollback(tracked, name, "why not")


def test_a_checkpoint_whose_version_was_spoilt_is_registered_anew(tracked, run_id, name, add, judge, tmp_path):
    judge(add(b"one", 0.3), scored(0.3))
    (stored(tracked, name, "1") / "config.json").write_text("{}")
    verdict = judge("1", scored(0.3))
    assert "register the checkpoint again" in verdict["reason"] and len(verdict["rules"]) == 1
    again = register(SETTINGS, tracked, run_id, tmp_path / "one", scored(0.3), "data", name)
    assert (again["version"], again["reused"]) == ("2", False)
    assert register(SETTINGS, tracked, run_id, tmp_path / "one", scored(0.3), "data", name)["version"] == "2"


def test_a_version_that_cannot_be_measured_is_refused_all_the_same(tracked, name, add, tmp_path):
    version = add(b"one", 0.3)
    with pytest.raises(UserError, match="could not be had before; try again"):
        promote(SETTINGS, tracked, name, version, None, None, tmp_path, tmp_path / "models")
    shutil.rmtree(stored(tracked, name, version))
    verdict = promote(SETTINGS, tracked, name, version, None, None, tmp_path, tmp_path / "models")
    assert failed(verdict) == ["files are those registered"] and "cannot be fetched" in verdict["reason"]
    assert [row["what"] for row in history(tracked, name)] == ["refused"]
    assert tracked.client().get_model_version(name, version).tags["verdict"] == "refused"


def test_what_a_model_began_from_may_not_be_known(name, add, judge):
    verdict = judge(add(b"one", 0.3), scored(0.3) | {"data": DATA | {"base_known": False}})
    (rule,) = [rule for rule in verdict["rules"] if "trained on" in rule["rule"]]
    assert rule["ok"] and "that it began from is not known" in rule["words"]


def test_a_list_of_training_images_cannot_be_taken_away(tracked, run_id, name, judge, tmp_path):
    folder = checkpoint(tmp_path / "one", b"one")
    (folder / "trained_on.parquet").write_bytes(b"rows")
    register(SETTINGS, tracked, run_id, folder, scored(0.3), "data", name)
    (stored(tracked, name, "1") / "trained_on.parquet").unlink()
    verdict = judge("1", scored(0.3))
    assert failed(verdict) == ["files are those registered"] and "trained_on.parquet" in verdict["reason"]


@pytest.mark.parametrize(
    "dataset, override, expected",
    [
        ("digits", None, "digits"),
        ("my data/v2:x", None, "my-data-v2-x"),
        ("digits", "a", "a"),
        ("v1.2", None, "v1-2"),
        ("::", None, "detector"),
    ],
)
def test_the_model_is_named_after_the_dataset(dataset, override, expected):
    settings = load_settings(None, [f"tracking.model_name={override}"] if override else [])
    assert registered_name(settings, dataset) == expected
