"""Batch inference: what becomes of every image, on Ray and without, interrupted and straight."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines import predict as module
from pipelines.plan import DETECTIONS, detections_of
from pipelines.predict import BATCHES, DetectBatches, make_recipe, predict, read_shard
from pipelines.settings import UserError, load_settings
from pipelines.stage import read_json

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
MODEL = {"preset": "tiny", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1, "num_queries": 5, "image_size": 64,
         "dim_feedforward": 32, "num_classes": 2}  # fmt: skip


class FakeDetector:
    """Finds a dog of score 0.9 that fills the image, and a cat of score 0.2."""

    categories = CATEGORIES

    def detect_batch(self, pixels, sizes, originals, least):
        assert pixels.shape[0] == len(sizes) == len(originals)
        found = []
        for height, width in originals.tolist():
            boxes = np.array([[0, 0, width, height], [0, 0, 1, 1]], np.float32)
            scores, labels = np.array([0.9, 0.2], np.float32), np.array([1, 0])
            keep = scores >= least[labels]
            found.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return found


def picture(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (width % 256, 0, 0)).save(path)
    return path


def settings_with(*overrides: str):
    return load_settings(None, ["predict.images_per_shard=4", *overrides])


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    from detr.config import ModelConfig

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {"score_threshold": 0.5, "categories": CATEGORIES, "model": ModelConfig(**MODEL).model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def without_ray(monkeypatch):
    """The Ray part in this process; returns the shards that were done, each as often as it was."""
    seen = []

    def stream(settings, todo, folder, plan, recipe, checkpoint):
        from pipelines.detect import label_thresholds

        actor = DetectBatches.__new__(DetectBatches)
        actor.detector = FakeDetector()
        actor.least = label_thresholds(CATEGORIES, recipe["score_threshold"], recipe["score_thresholds"])
        model = read_json(checkpoint / "config.json")["model"]
        for shard in todo:
            seen.append(shard)
            rows = read_shard(pa.table({"shard": [shard]}), folder=folder, plan=plan, model=model, recipe=recipe)
            for row in rows:
                yield from actor(row).to_pylist()

    monkeypatch.setattr(module, "_stream", stream)
    return seen


def run(settings, place: Path, checkpoint: Path, output: Path, version: str = "1") -> dict:
    return predict(settings, str(place), checkpoint, "m", version, output)


def test_every_image_is_a_row_and_a_bad_one_has_its_reason(tmp_path, checkpoint, without_ray, monkeypatch):
    place = tmp_path / "in"
    for number in range(7):
        picture(place / f"{number}.png", width=10 + number)
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (place / "corrupt.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (place / "empty.jpg").touch()
    (place / "text.jpg").write_text("hello")
    picture(place / "huge.png", 200, 100)
    (place / "large.png").write_bytes(b"x" * 5000)
    monkeypatch.setattr(module, "MOST_BYTES", 4999)
    freeze = module.freeze

    def and_then(*args):
        plan = freeze(*args)
        (place / "6.png").unlink()  # vanishes after it was listed
        picture(place / "5.png", width=200)  # and this one changes
        return plan

    monkeypatch.setattr(module, "freeze", and_then)
    settings = settings_with("predict.max_pixels=10000", "predict.max_reject_fraction=0.6")
    result = run(settings, place, checkpoint, tmp_path / "out")

    table = detections_of(str(tmp_path / "out"))
    assert table.schema.equals(DETECTIONS)
    rows = {row["image_key"]: row for row in table.to_pylist()}
    assert list(rows) == sorted(rows) and table.num_rows == 12
    good = rows["2.png"]
    assert (good["width"], good["height"], good["status"]) == (12, 6, "ok")
    assert good["boxes"] == [[0, 0, 12, 6]] and good["scores"] == pytest.approx([0.9])
    assert (good["category_ids"], good["category_names"]) == ([7], ["dog"])
    assert (good["model_name"], good["model_version"], good["plan_id"]) == ("m", "1", result["plan"])
    for key, words in {
        "corrupt.jpg": "cannot be decoded",
        "empty.jpg": "the file is empty",
        "text.jpg": "not an image",
        "huge.png": "200x100 is more than the limit of 10000 pixels",
        "large.png": "the file is larger than",
        "6.png": "there is no such file",
        "5.png": "it changed after it was listed",
    }.items():
        assert words in rows[key]["status"]
        assert rows[key]["boxes"] == [] and rows[key]["width"] is None
    assert (result["images"], result["ok"], result["rejected"]) == (12, 5, 7)
    assert sum(result["rejects"].values()) == 7
    assert result["detections"] == {"dog": 5}
    assert sum(result["scores"]) == 5


def test_the_threshold_is_the_models_own_unless_set(tmp_path, checkpoint, without_ray):
    place = picture(tmp_path / "in" / "a.png").parent
    assert run(settings_with(), place, checkpoint, tmp_path / "a")["score_threshold"] == 0.5
    low = run(settings_with("predict.score_threshold=0.1"), place, checkpoint, tmp_path / "b")
    assert low["detections"] == {"cat": 1, "dog": 1}


def test_a_class_may_have_a_threshold_of_its_own(tmp_path, checkpoint, without_ray):
    config = read_json(checkpoint / "config.json") | {"score_thresholds": {"3": 0.2, "7": 0.95}}
    (checkpoint / "config.json").write_text(json.dumps(config))  # the cat's score is 0.2, the dog's 0.9
    place = picture(tmp_path / "in" / "a.png").parent
    own = run(settings_with(), place, checkpoint, tmp_path / "a")
    assert own["detections"] == {"cat": 1} and own["score_thresholds"] == {"3": 0.2, "7": 0.95}
    asked = run(settings_with("predict.score_threshold=0.5"), place, checkpoint, tmp_path / "b")
    assert asked["detections"] == {"dog": 1} and asked["score_thresholds"] == {}


def test_too_many_bad_images_stop_the_run_until_they_are_mended_or_the_limit_is_raised(
    tmp_path, checkpoint, without_ray
):
    for number in range(12):
        picture(tmp_path / "in" / f"{number:02d}.png")
    for number in range(6):
        (tmp_path / "in" / f"{number:02d}.png").write_text("hello")
    settings = settings_with("predict.max_reject_fraction=0.4")
    words = r"6 of 12 images cannot be used.*max_reject_fraction 0\.4.*6 because it is not an image.*done is kept in"
    with pytest.raises(UserError, match=words) as error:
        run(settings, tmp_path / "in", checkpoint, tmp_path / "out")
    assert error.value.exit_code == 2
    with pytest.raises(UserError, match="no finished prediction"):
        detections_of(str(tmp_path / "out"))
    without_ray.clear()
    raised = run(settings_with("predict.max_reject_fraction=0.5"), tmp_path / "in", checkpoint, tmp_path / "out")
    assert raised["rejected"] == 6 and raised["runs"] == 1
    assert len(without_ray) <= 2  # only what was not done
    with pytest.raises(UserError, match="6 of 12 images cannot be used"):  # again and again
        run(settings, tmp_path / "in", checkpoint, tmp_path / "out")
    picture(tmp_path / "in" / "02.png")
    picture(tmp_path / "in" / "03.png")
    mended = run(settings, tmp_path / "in", checkpoint, tmp_path / "out")
    assert (mended["rejected"], mended["images"], mended["new"]["images"]) == (4, 12, 2)


def test_images_that_are_mended_after_a_stop_are_listed_anew(tmp_path, checkpoint, without_ray):
    for number in range(40):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number:02d}.png").write_text("hello")
    for _ in range(2):  # a loop that tries again does not get by
        with pytest.raises(UserError, match="images cannot be used"):
            run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    for number in range(40):
        picture(tmp_path / "in" / f"{number:02d}.png")
    result = run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    assert (result["images"], result["ok"]) == (40, 40)
    assert detections_of(str(tmp_path / "out")).num_rows == 40


def test_one_bad_image_among_few_new_ones_does_not_stop_a_later_run(tmp_path, checkpoint, without_ray):
    for number in range(8):
        picture(tmp_path / "in" / f"{number}.png")
    run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    (tmp_path / "in" / "8.png").write_text("hello")
    assert run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")["rejected"] == 1


def test_an_image_that_came_back_is_tried_again(tmp_path, checkpoint, without_ray, monkeypatch):
    for number in range(6):
        picture(tmp_path / "in" / f"{number}.png")
    freeze = module.freeze

    def and_then(*args):
        plan = freeze(*args)
        (tmp_path / "in" / "1.png").rename(tmp_path / "1.png")
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(module, "freeze", and_then)
        assert run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")["rejects"] == {
            "there is no such file": 1
        }
    (tmp_path / "1.png").rename(tmp_path / "in" / "1.png")
    again = run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    assert (again["ok"], again["rejected"], again["images_here"]) == (6, 0, 1)


def test_an_image_that_breaks_the_code_is_a_row(tmp_path, checkpoint, without_ray, monkeypatch):
    from detr import transforms

    decode = transforms.decode_image

    def odd(data, most):
        image = decode(data, most)
        if image.width == 13:
            raise AssertionError("thirteen")
        return image

    monkeypatch.setattr(transforms, "decode_image", odd)
    for width in (12, 13, 14):
        picture(tmp_path / "in" / f"{width}.png", width)
    result = run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    assert (result["ok"], result["rejected"]) == (2, 1)
    row = detections_of(str(tmp_path / "out")).to_pylist()[1]
    assert row["status"] == "it cannot be used (AssertionError: thirteen)"


def test_an_interrupted_run_goes_on_as_it_was_planned_and_then_takes_what_is_new(
    tmp_path, checkpoint, without_ray, monkeypatch
):
    place = tmp_path / "in"
    for number in range(20):
        picture(place / f"{number:02d}.png")
    whole = run(settings_with(), place, checkpoint, tmp_path / "whole")
    assert len(without_ray) == 5 and whole["reused_images"] == 0

    commit, written = module.commit, []

    def killed_at_the_third(folder, plan, shard, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        return commit(folder, plan, shard, *args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "commit", killed_at_the_third)
        patch.setattr(module, "COMMITTERS", 1)
        with pytest.raises(KeyboardInterrupt):
            run(settings_with(), place, checkpoint, out)
    picture(place / "20.png")
    picture(place / "03.png", width=30)
    without_ray.clear()
    result = run(settings_with(), place, checkpoint, out)
    first = [shard for shard in range(5) if shard not in written]
    assert sorted(without_ray[:3]) == first and without_ray[3:] == [0]  # the rest, then a run of the two new ones
    assert (result["runs"], result["images"], result["images_here"], result["reused_images"]) == (2, 21, 14, 7)
    assert result["new"]["images"] == 22  # of both runs that it ended
    rows = {row["image_key"]: row for row in detections_of(str(out)).to_pylist()}
    old = {row["image_key"]: row for row in detections_of(str(tmp_path / "whole")).to_pylist()}
    assert {key for key in rows if rows[key] != old.get(key)} == {"03.png", "20.png"}
    assert rows["03.png"]["width"] == 30
    without_ray.clear()
    again = run(settings_with(), place, checkpoint, out)
    assert without_ray == [] and again["new"]["images"] == 0 and again["reused_images"] == 21
    assert again["output_digest"] == result["output_digest"]


@pytest.mark.parametrize("change", ["version", "threshold", "weights", "input"])
def test_an_output_is_one_plans(tmp_path, checkpoint, without_ray, change):
    for number in range(5):
        picture(tmp_path / "in" / f"{number}.png")
    picture(tmp_path / "other" / "x.png")
    run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    settings = settings_with("predict.score_threshold=0.1") if change == "threshold" else settings_with()
    if change == "weights":
        (checkpoint / "model.safetensors").write_bytes(b"others")
    place = tmp_path / ("other" if change == "input" else "in")
    with pytest.raises(UserError, match=r"holds results of another plan.*give another --output") as error:
        run(settings, place, checkpoint, tmp_path / "out", "2" if change == "version" else "1")
    assert error.value.exit_code == 2
    assert detections_of(str(tmp_path / "out")).num_rows == 5


def test_what_lies_in_the_output_is_no_input(tmp_path, checkpoint, without_ray):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "found" / "pictures" / "a.png")
    picture(tmp_path / "in" / "found2" / "b.png")
    assert run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "in" / "found")["images"] == 2


@pytest.mark.parametrize("fault", ["lost", "twice", "mixed up", "a batch that nobody misses"])
@pytest.mark.parametrize("lasting", [False, True])
def test_answers_that_do_not_fit_are_asked_for_again(tmp_path, checkpoint, without_ray, monkeypatch, fault, lasting):
    for number in range(6):
        picture(tmp_path / "in" / f"{number}.png", width=8 + 40 * (number % 2))
    straight = run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "straight")
    honest, calls = module._stream, []

    def faulty(*args):
        rows = list(honest(*args))
        calls.append(1)
        if len(calls) > 1 and not lasting:
            yield from rows
        elif fault == "mixed up":
            shards = {0: 1, 1: 0}
            yield from ({**row, "shard": shards[row["shard"]]} for row in rows)
        elif fault == "a batch that nobody misses":
            yield from ({**row, "batches": row["batches"] and row["batches"] - 1} for row in rows[1:] if row["shard"]
                        == rows[0]["shard"])  # fmt: skip
            yield from (row for row in rows if row["shard"] != rows[0]["shard"])
        else:
            yield from rows[:-2] + rows[-1:] if fault == "lost" else [rows[0], *rows]

    monkeypatch.setattr(module, "_stream", faulty)
    if lasting:
        with pytest.raises((RuntimeError, ValueError)):
            run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()
    else:
        result = run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
        assert result["output_digest"] == straight["output_digest"]


def test_a_batch_is_of_one_shape_and_follows_from_its_shard_alone(tmp_path, checkpoint, monkeypatch):
    from pipelines.listing import Listing, find_images
    from pipelines.plan import freeze
    from pipelines.storage import Folder

    for number in range(24):
        picture(tmp_path / "in" / f"{number:02d}.png", *[(100, 60), (60, 100), (64, 64)][number % 3])
    settings = load_settings(None, ["predict.images_per_shard=12", "predict.batch_size=3"])
    recipe = make_recipe(settings, str(tmp_path / "in"), None, checkpoint, "m", "1")
    folder = Folder(str(tmp_path / "out"))
    with Listing() as listing:
        listing.add(find_images(str(tmp_path / "in"), settings), "in")
        plan = freeze(folder, 1, recipe, listing.images())

    def batches(shard: int) -> list[dict]:
        found = list(read_shard(pa.table({"shard": [shard]}), folder=folder, plan=plan,
                                model=read_json(checkpoint / "config.json")["model"], recipe=recipe))  # fmt: skip
        assert all(table.schema.equals(BATCHES) for table in found)
        return pa.concat_tables(found).to_pylist()

    first = batches(1)
    assert [row["batches"] for row in first] == [None] * 6 + [6]  # four of each shape in threes
    assert sorted(number for row in first[:-1] for number in row["image"]) == list(range(12))
    for row in first[:-1]:
        assert len({number % 3 for number in row["image"]}) == 1
        assert len(row["pixels"]) == len(row["image"]) * 3 * row["shape"][0] * row["shape"][1]
    assert batches(1) == first
    monkeypatch.setattr(module, "MOST_HELD", 1)  # too large to wait for others: each goes alone
    assert [len(row["image"]) for row in batches(1)[:-1]] == [1] * 12


def test_tiles_of_a_large_image_are_put_together(tmp_path, checkpoint, without_ray):
    picture(tmp_path / "in" / "large.png", 300, 200)
    picture(tmp_path / "in" / "small.png", 90, 60)
    result = run(settings_with("predict.tile=128"), tmp_path / "in", checkpoint, tmp_path / "out")
    rows = {row["image_key"]: row for row in detections_of(str(tmp_path / "out")).to_pylist()}
    # The fake finds a dog in every tile, which fills it: what a tile cuts is part of the one in the whole image.
    assert rows["large.png"]["boxes"] == [[0, 0, 300, 200]] and rows["small.png"]["boxes"] == [[0, 0, 90, 60]]
    assert result["images"] == 2


def test_each_run_is_one_in_mlflow_with_digests_of_what_went_in_and_came_out(
    tmp_path, checkpoint, without_ray, monkeypatch
):
    from pipelines.tracking import Tracker

    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "found", (tmp_path / "artifacts").as_uri())
    for number in range(6):
        picture(tmp_path / "in" / f"{number}.png")

    def tracked() -> dict:
        return predict(settings_with(), str(tmp_path / "in"), checkpoint, "m", "1", tmp_path / "out", tracker=tracker)

    def of_stage() -> list:
        return tracker.client().search_runs([tracker.experiment_id()], "tags.`detr.stage` = 'predict'")

    with monkeypatch.context() as patch:
        patch.setattr(module, "commit", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tracked()
    (run_before,) = of_stage()
    assert run_before.info.status == "KILLED" and "detr.output_digest" not in run_before.data.tags
    with monkeypatch.context() as patch:  # killed when all is done but what MLflow is told
        patch.setattr(module, "_end_run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tracked()
    result = tracked()
    (found,) = of_stage()
    assert found.info.run_id == run_before.info.run_id and found.info.status == "FINISHED"
    assert found.data.tags["detr.input_digest"] == result["input_digest"]
    assert found.data.tags["detr.output_digest"] == result["output_digest"]
    assert found.data.params["model.version"] == "1" and found.data.metrics["images_in_table"] == 6
    picture(tmp_path / "in" / "6.png")
    second = tracked()
    runs = {one.info.run_id: one for one in of_stage()}
    assert len(runs) == 2 and runs[second["run_id"]].data.metrics["images"] == 1
    assert runs[second["run_id"]].data.metrics["images_in_table"] == 7


@pytest.mark.ray
def test_on_ray_every_image_is_detected_on_once(tmp_path, ray_cluster):
    import torch

    from detr.checkpoint import save_checkpoint
    from detr.config import ModelConfig
    from detr.model import DETR
    from pipelines.detect import Detector

    torch.manual_seed(0)
    save_checkpoint(tmp_path / "checkpoint", DETR(ModelConfig.model_validate(MODEL)), CATEGORIES)
    random = np.random.default_rng(0)
    for number in range(60):
        pixels = random.integers(0, 255, (20 + number % 7, 30, 3), dtype=np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number:03d}.png")
    (tmp_path / "in" / "010.png").write_text("hello")
    settings = load_settings(None, ["predict.score_threshold=0", "predict.batch_size=8", "predict.images_per_shard=16"])
    result = run(settings, tmp_path / "in", tmp_path / "checkpoint", tmp_path / "out")
    assert (result["images"], result["ok"], result["rejected"]) == (60, 59, 1)
    table = detections_of(str(tmp_path / "out"))
    assert table["image_key"].to_pylist() == sorted(os.listdir(tmp_path / "in"))
    assert result["detections"] == {"cat": 59 * 5, "dog": 59 * 5}  # every query scores every class
    row = table.to_pylist()[7]
    with Image.open(tmp_path / "in" / "007.png") as image:
        expected = Detector.load(tmp_path / "checkpoint").detect([image.convert("RGB")])[0]
    assert row["image_key"] == "007.png"
    np.testing.assert_allclose(row["boxes"], expected["boxes"], atol=1e-2)
    np.testing.assert_allclose(row["scores"], expected["scores"], atol=1e-4)
    again = run(settings, tmp_path / "in", tmp_path / "checkpoint", tmp_path / "twice")
    assert again["output_digest"] == result["output_digest"]  # the same bytes
