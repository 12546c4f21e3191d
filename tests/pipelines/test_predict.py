"""Batch inference: what becomes of the images, of the bad ones too, and that none is lost."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import predict as module
from pipelines.predict import DETECTIONS, detect_rows, detections_of, list_images, predict, read_rows
from pipelines.settings import UserError, load_settings
from pipelines.stage import read_json

SETTINGS = load_settings()
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


class FakeDetector:
    """Finds a dog of score 0.9 that fills the image, and a cat of score 0.2."""

    categories = CATEGORIES
    score_threshold = 0.5

    def detect(self, images):
        return [
            {
                "boxes": np.array([[0, 0, image.width, image.height], [0, 0, 1, 1]], np.float32),
                "scores": np.array([0.9, 0.2], np.float32),
                "labels": np.array([1, 0]),
            }
            for image in images
        ]


def picture(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (width % 256, 0, 0)).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"score_threshold": 0.5, "categories": CATEGORIES}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def without_ray(monkeypatch):
    """The Ray part in this process, a few images at a time; returns the keys detected on, in order."""
    seen = []

    def detect_all(settings, images, checkpoint, plan):
        options = {key: plan[key] for key in ("score_threshold", "score_thresholds", "max_pixels")}
        options |= {"model_name": plan["model"]["name"], "model_version": plan["model"]["version"]}
        for start in range(0, len(images), 3):
            batch = images[start : start + 3]
            seen.extend(image["key"] for image in batch)
            yield detect_rows(FakeDetector(), read_rows(batch).to_pylist(), options)

    monkeypatch.setattr(module, "_detect_all", detect_all)
    monkeypatch.setattr(module, "CHUNK", 4)
    return seen


def keys(images) -> list[str]:
    return [image["key"] for image in images]


def test_every_image_is_a_row_and_a_bad_one_has_its_reason(tmp_path, checkpoint, without_ray):
    for number in range(7):
        picture(tmp_path / "in" / f"{number}.png", width=10 + number)
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "in" / "corrupt.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "in" / "empty.jpg").touch()
    (tmp_path / "in" / "text.jpg").write_text("hello")
    picture(tmp_path / "in" / "huge.png", 200, 100)
    settings = load_settings(None, ["predict.max_pixels=10000", "predict.max_reject_fraction=0.6"])
    images = list_images(tmp_path / "in", settings)
    (tmp_path / "in" / "6.png").unlink()  # vanishes after it was listed
    picture(tmp_path / "in" / "5.png", width=200)  # and this one changes
    result = predict(settings, images, checkpoint, "digits", "3", tmp_path / "out")

    table = detections_of(tmp_path / "out")
    assert table.schema.equals(DETECTIONS)
    rows = {row["image_key"]: row for row in table.to_pylist()}
    assert list(rows) == sorted(keys(images)) and table.num_rows == 11
    good = rows["2.png"]
    assert (good["width"], good["height"], good["status"]) == (12, 6, "ok")
    assert good["boxes"] == [[0, 0, 12, 6]] and good["scores"] == pytest.approx([0.9])
    assert (good["category_ids"], good["category_names"]) == ([7], ["dog"])
    assert (good["model_name"], good["model_version"]) == ("digits", "3")
    for key, words in {
        "corrupt.jpg": "cannot be decoded",
        "empty.jpg": "the file is empty",
        "text.jpg": "not an image",
        "huge.png": "200x100 is more than the limit of 10000 pixels",
        "6.png": "there is no such file",
        "5.png": "it changed after it was listed",
    }.items():
        assert words in rows[key]["status"]
        assert rows[key]["boxes"] == [] and rows[key]["width"] is None
    assert (result["images"], result["ok"], result["rejected"]) == (11, 5, 6)
    assert sum(result["rejects"].values()) == 6
    assert result["detections"] == {"dog": 5}


def test_the_threshold_is_the_models_own_unless_set(tmp_path, checkpoint, without_ray):
    images = list_images(picture(tmp_path / "a.png"), SETTINGS)
    assert predict(SETTINGS, images, checkpoint, "m", "1", tmp_path / "a")["score_threshold"] == 0.5
    low = predict(load_settings(None, ["predict.score_threshold=0.1"]), images, checkpoint, "m", "1", tmp_path / "b")
    assert low["detections"] == {"cat": 1, "dog": 1}


def test_a_class_may_have_a_threshold_of_its_own(tmp_path, checkpoint, without_ray):
    config = {"score_threshold": 0.5, "score_thresholds": {"3": 0.2, "7": 0.95}, "categories": CATEGORIES}
    (checkpoint / "config.json").write_text(json.dumps(config))  # the cat's score is 0.2, the dog's 0.9
    images = list_images(picture(tmp_path / "a.png"), SETTINGS)
    own = predict(SETTINGS, images, checkpoint, "m", "1", tmp_path / "a")
    assert own["detections"] == {"cat": 1} and own["score_thresholds"] == {"3": 0.2, "7": 0.95}
    asked = predict(load_settings(None, ["predict.score_threshold=0.5"]), images, checkpoint, "m", "1", tmp_path / "b")
    assert asked["detections"] == {"dog": 1} and asked["score_thresholds"] == {}


def test_too_many_bad_images_fail_but_what_was_done_stays(tmp_path, checkpoint, without_ray):
    picture(tmp_path / "in" / "a.png")
    for name in ("b.png", "c.png"):
        (tmp_path / "in" / name).write_text("hello")
    images = list_images(tmp_path / "in", SETTINGS)
    with pytest.raises(UserError, match=r"2 of 3 images could not be read.*max_reject_fraction 0\.5") as error:
        predict(SETTINGS, images, checkpoint, "m", "1", tmp_path / "out")
    assert error.value.exit_code == 1
    assert detections_of(tmp_path / "out").num_rows == 3


def test_parts_of_a_killed_attempt_are_kept(tmp_path, checkpoint, without_ray, monkeypatch):
    for number in range(10):
        picture(tmp_path / "in" / f"{number}.png")
    images = list_images(tmp_path / "in", SETTINGS)
    whole = tmp_path / "whole"
    predict(SETTINGS, images, checkpoint, "m", "1", whole)

    out, write, written = tmp_path / "out", module._write_part, []

    def killed_at_the_third(path, table, chunk):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, table, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_part", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            predict(SETTINGS, images, checkpoint, "m", "1", out)
    with pytest.raises(UserError, match="no finished prediction"):
        detections_of(out)
    (out / ".detections-00002.parquet.123").write_bytes(b"half")  # what a kill while writing leaves
    (out / written[0]).write_bytes(b"torn")  # and a part that the disk lost
    before = (out / written[1]).stat().st_mtime_ns

    without_ray.clear()
    result = predict(SETTINGS, images, checkpoint, "m", "1", out)
    assert without_ray == ["0.png", "1.png", "2.png", "3.png", "8.png", "9.png"]
    assert (result["images"], result["reused_images"]) == (10, 4)
    assert (out / written[1]).stat().st_mtime_ns == before
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert detections_of(out).equals(detections_of(whole))
    assert read_json(out / "manifest.json") == read_json(whole / "manifest.json")


@pytest.mark.parametrize("change", ["version", "threshold", "weights", "images"])
def test_parts_of_other_work_are_not_kept(tmp_path, checkpoint, without_ray, change):
    for number in range(5):
        picture(tmp_path / "in" / f"{number}.png")
    predict(SETTINGS, list_images(tmp_path / "in", SETTINGS), checkpoint, "m", "1", tmp_path / "out")
    without_ray.clear()
    settings = load_settings(None, ["predict.score_threshold=0.1"]) if change == "threshold" else SETTINGS
    if change == "weights":
        (checkpoint / "model.safetensors").write_bytes(b"others")
    if change == "images":
        picture(tmp_path / "in" / "0.png", width=30)
        (tmp_path / "in" / "4.png").unlink()
    images = list_images(tmp_path / "in", settings)
    predict(settings, images, checkpoint, "m", "2" if change == "version" else "1", tmp_path / "out")
    assert without_ray == keys(images)
    assert detections_of(tmp_path / "out")["image_key"].to_pylist() == keys(images)


@pytest.mark.parametrize("fault", ["lost", "twice", "swapped"])
def test_an_image_lost_or_counted_twice_is_noticed(tmp_path, checkpoint, without_ray, monkeypatch, fault):
    for number in range(6):
        picture(tmp_path / "in" / f"{number}.png")
    honest = module._detect_all

    def faulty(*args):
        table = pa.concat_tables(honest(*args))
        order = {"lost": [0, 1, 2, 3, 4], "twice": [0, 1, 2, 3, 4, 5, 5], "swapped": [1, 0, 2, 3, 4, 5]}
        yield table.take(order[fault])

    monkeypatch.setattr(module, "_detect_all", faulty)
    with pytest.raises(RuntimeError):
        predict(SETTINGS, list_images(tmp_path / "in", SETTINGS), checkpoint, "m", "1", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_changed_part_is_not_read(tmp_path, checkpoint, without_ray):
    images = list_images(picture(tmp_path / "a.png"), SETTINGS)
    predict(SETTINGS, images, checkpoint, "m", "1", tmp_path / "out")
    part = tmp_path / "out" / "detections-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(pa.concat_tables([table, table]), part)
    with pytest.raises(UserError, match="is not what was written"):
        detections_of(tmp_path / "out")


@pytest.mark.ray
def test_on_ray_every_image_is_detected_on_once(tmp_path, ray_cluster):
    import torch

    from detr.checkpoint import save_checkpoint
    from detr.config import ModelConfig
    from detr.model import DETR
    from pipelines.detect import Detector

    torch.manual_seed(0)
    small = {"preset": "tiny", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1, "num_queries": 5}
    config = ModelConfig.model_validate({**small, "dim_feedforward": 32, "image_size": 64, "num_classes": 2})
    save_checkpoint(tmp_path / "checkpoint", DETR(config), CATEGORIES)
    random = np.random.default_rng(0)
    for number in range(300):  # more than one part
        pixels = random.integers(0, 255, (20 + number % 7, 30, 3), dtype=np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number:03d}.png")
    (tmp_path / "in" / "100.png").write_text("hello")
    settings = load_settings(None, ["predict.score_threshold=0", "predict.batch_size=8"])
    images = list_images(tmp_path / "in", settings)
    result = predict(settings, images, tmp_path / "checkpoint", "m", "1", tmp_path / "out")
    assert (result["images"], result["ok"], result["rejected"]) == (300, 299, 1)
    assert len(list((tmp_path / "out").glob("detections-*.parquet"))) == 2
    table = detections_of(tmp_path / "out")
    assert table["image_key"].to_pylist() == keys(images)
    assert result["detections"] == {"cat": 299 * 5, "dog": 299 * 5}  # every query scores every class
    row = table.to_pylist()[7]
    with Image.open(tmp_path / "in" / "007.png") as image:
        expected = Detector.load(tmp_path / "checkpoint").detect([image.convert("RGB")])[0]
    assert row["image_key"] == "007.png"
    np.testing.assert_allclose(row["boxes"], expected["boxes"], atol=1e-2)
    np.testing.assert_allclose(row["scores"], expected["scores"], atol=1e-4)
