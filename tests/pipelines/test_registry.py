"""The registry on SQLite: who becomes champion, who does not and why, and what a consumer gets."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image

from pipelines import registry
from pipelines.registry import champion, download, promote, register, registered_name, rollback
from pipelines.settings import UserError, load_settings
from pipelines.stage import read_json
from pipelines.tracking import Tracker, tracker

SETTINGS = load_settings(None, ["gate.min_ap=0.1", "gate.margin=0"])
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


def scored(ap: float | None, data: str = "val-1") -> dict:
    return {"AP": ap, "split": "val", "split_digest": data}


@pytest.fixture
def add(tracked, run_id, name, tmp_path):
    """add(weights, ap) -> version of a checkpoint with these weights."""

    def make(weights: bytes, ap: float, categories=CATEGORIES) -> str:
        folder = checkpoint(tmp_path / weights.decode(), weights, categories)
        return register(SETTINGS, tracked, run_id, folder, scored(ap), "data", name)["version"]

    return make


@pytest.fixture
def judge(tracked, name, tmp_path):
    def run(version: str, evaluation: dict, settings=SETTINGS) -> dict:
        return promote(settings, tracked, name, version, evaluation, tmp_path / "promote")

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


def test_the_champion_must_be_beaten(tracked, name, add, judge):
    first = add(b"one", 0.3)
    judge(first, scored(0.3))
    second = add(b"two", 0.3)

    equal = judge(second, scored(0.3))
    assert failed(equal) == ["AP is above the champion's"]
    assert "AP 0.3000 is not above 0.3000, the bar set by champion version 1" in equal["reason"]
    assert (equal["champion"], champion(tracked, name)["version"]) == (first, first)

    margin = judge(second, scored(0.34), load_settings(None, ["gate.min_ap=0.1", "gate.margin=0.05"]))
    assert failed(margin) == ["AP is above the champion's"]

    better = judge(second, scored(0.34))
    assert better["promoted"] and (better["previous"], better["champion"]) == (first, second)
    assert "beats the 0.3000 of version 1" in better["reason"]
    assert champion(tracked, name)["version"] == second


def test_numbers_from_other_data_or_classes_do_not_count(tracked, name, add, judge):
    judge(add(b"one", 0.3), scored(0.3))
    verdict = judge(add(b"two", 0.9), scored(0.9, "val-2"))
    assert failed(verdict) == ["measured on the champion's data"]
    assert "val-2" in verdict["reason"] and "val-1" in verdict["reason"]

    verdict = judge(add(b"three", 0.9, CATEGORIES[::-1]), scored(0.9))
    assert failed(verdict) == ["has the champion's label map"]
    assert champion(tracked, name)["version"] == "1"


def test_the_champion_stays_champion_and_takes_on_new_data(tracked, name, add, judge):
    first = add(b"one", 0.3)
    judge(first, scored(0.3))
    again = judge(first, scored(0.25, "val-2"))
    assert again["promoted"] and "already is the champion" in again["reason"]
    assert champion(tracked, name)["split_digest"] == "val-2"
    # now a candidate measured on the new data can be compared
    assert judge(add(b"two", 0.26), scored(0.26, "val-2"))["promoted"]


def test_every_verdict_is_kept_with_its_version(tracked, name, add, judge):
    judge(add(b"one", 0.3), scored(0.3))
    second = add(b"two", 0.2)
    judge(second, scored(0.2))
    judge(second, scored(0.4))
    tags = tracked.client().get_model_version(name, second).tags
    dated = [json.loads(tags[key]) for key in sorted(tags) if key.startswith("verdict.")]
    assert [entry["outcome"] for entry in dated] == ["refused", "promoted"]
    assert [entry["previous"] for entry in dated] == ["1", "1"]
    assert all(entry["who"] and entry["when"] and entry["reason"] for entry in dated)
    assert dated[0]["rules"][-2]["figure"] == 0.2
    assert (tags["verdict"], tags["previous_champion"], tags["ap"]) == ("promoted", "1", "0.4")


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


def test_rollback_gives_the_alias_back_and_the_gate_remembers(tracked, name, add, judge):
    with pytest.raises(UserError, match="no champion"):
        add(b"one", 0.3)
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


def test_a_crash_before_the_alias_leaves_the_old_champion(tracked, name, add, judge, monkeypatch):
    judge(add(b"one", 0.3), scored(0.3))
    second = add(b"two", 0.4)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_move_champion", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            judge(second, scored(0.4))
    assert champion(tracked, name)["version"] == "1"
    assert judge(second, scored(0.4))["promoted"]  # and nothing stays locked


def test_only_one_at_a_time_judges(tracked, name, add, judge, monkeypatch):
    version = add(b"one", 0.3)
    lock = FileLock(tracked.uri.removeprefix("sqlite:///") + ".lock")
    done = threading.Event()
    with lock:
        thread = threading.Thread(target=lambda: (judge(version, scored(0.3)), done.set()))
        thread.start()
        assert not done.wait(0.5)
        assert champion(tracked, name) is None
    thread.join(30)
    assert champion(tracked, name)["version"] == version


def test_the_lease_on_a_server_is_exclusive_and_expires(tracked, name, add, monkeypatch):
    add(b"one", 0.3)
    client = tracked.client()
    second = registry._tag_lease(client, name, wait=0.05, settle=0.01)
    with registry._tag_lease(client, name, settle=0.01), pytest.raises(Timeout):
        second.__enter__()
    assert "lease" not in client.get_registered_model(name).tags
    client.set_registered_model_tag(name, "lease", f"dead {time.time() - 1:.0f}")  # its holder was killed
    with registry._tag_lease(client, name, wait=0.05, settle=0.01):
        assert not client.get_registered_model(name).tags["lease"].startswith("dead")


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


def test_the_registered_model_detects_on_its_own(tracked, run_id, name, tiny_checkpoint, tmp_path):
    """Loaded by MLflow in a fresh process that knows nothing of this repository."""
    made = register(SETTINGS, tracked, run_id, tiny_checkpoint, scored(0.3), "data", name)
    package = stored(tracked, name, made["version"]).parents[1]
    text = (package / "MLmodel").read_text()
    assert str(tiny_checkpoint) not in text and str(Path(registry.__file__).parent) not in text
    assert "/detr-model-" not in text  # the temporary folder it was packed in
    assert not [path for path in package.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".pyc")]
    assert "mlflow==" in (package / "requirements.txt").read_text()

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    (tmp_path / "a.bin").write_bytes(stream.getvalue())
    script = f"""
import json, sys, mlflow, pandas
mlflow.set_tracking_uri({tracked.uri!r})
model = mlflow.pyfunc.load_model("models:/{name}/1")
data = open({str(tmp_path / "a.bin")!r}, "rb").read()
by_bytes = model.predict(pandas.DataFrame({{"image": [data, b"broken"]}}), params={{"score_threshold": 0.0}})
by_path = model.predict(pandas.DataFrame({{"path": [{str(tmp_path / "a.png")!r}]}}), params={{"score_threshold": 0.0}})
none = model.predict(pandas.DataFrame({{"image": [data]}}), params={{"score_threshold": 1.0}})
import pipelines, detr
json.dump([by_bytes.to_dict("records"), by_path.to_dict("records"), none.to_dict("records"),
           pipelines.__file__, detr.__file__], sys.stdout)
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=180
    )
    assert done.returncode == 0, done.stderr
    by_bytes, by_path, none, *files = json.loads(done.stdout)
    assert all(str(package) in file for file in files)

    from pipelines.detect import Detector

    expected = Detector.load(tiny_checkpoint).detect([image])[0]
    assert by_bytes[0]["status"] == "ok"
    np.testing.assert_allclose(by_bytes[0]["boxes"], expected["boxes"], atol=1e-3)
    np.testing.assert_allclose(by_bytes[0]["scores"], expected["scores"], atol=1e-5)
    assert by_bytes[0]["category_ids"] == [CATEGORIES[label]["id"] for label in expected["labels"]]
    assert by_bytes[0]["category_names"] == [CATEGORIES[label]["name"] for label in expected["labels"]]
    assert by_path[0] == by_bytes[0]
    assert by_bytes[1]["boxes"] == [] and "not an image" in by_bytes[1]["status"]
    assert none[0]["boxes"] == [] and none[0]["status"] == "ok"


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory) -> Path:
    import torch

    from detr.checkpoint import save_checkpoint
    from detr.config import ModelConfig
    from detr.model import DETR

    torch.manual_seed(0)
    small = {"preset": "tiny", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1, "num_queries": 5}
    config = ModelConfig.model_validate({**small, "dim_feedforward": 32, "image_size": 64, "num_classes": 2})
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, DETR(config), CATEGORIES)
    return folder
