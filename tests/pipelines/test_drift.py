"""What is said of a run beside the one before it."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest

from jobs.predict import _summary
from pipelines.drift import drift
from pipelines.settings import RunSettings, override_settings
from pipelines.stage import read_json, write_json
from pipelines.workflow import predict_stage

USUAL = {"images": 1000, "ok": 990, "detections": {"cat": 600, "dog": 1400},
         "scores": [0, 0, 0, 0, 0, 100, 200, 300, 600, 800], "squares": {"detections": 6000}}  # fmt: skip
NOTHING = {"images": 0, "ok": 0, "detections": {}, "scores": [0] * 10, "squares": {"detections": 0}}
NAMES = tuple("abcdefghijkl")


def source(
    random: np.random.Generator, images: int, names: tuple[str, ...] = NAMES, mean: float = 8, level: float = 0.7,
    shape: float = np.inf,
) -> dict:  # fmt: skip
    """The counts of images with 8 detections each on average, most of an image's of its main class, its scores alike.

    Numbers of detections are Poisson's, or, with a finite `shape`, a negative binomial's: most images have few, and
    some have dozens.
    """
    each = random.poisson(mean * (random.gamma(shape, 1 / shape, images) if np.isfinite(shape) else np.ones(images)))
    of = np.repeat(np.arange(images), each)
    common = 1 / np.arange(1, len(names) + 1)
    main = random.choice(len(names), images, p=common / common.sum())
    label = np.where(random.random(len(of)) < 0.6, main[of], random.integers(len(names), size=len(of)))
    scores = random.normal(level, 0.12, len(of)) + random.normal(0, 0.08, images)[of]
    return {
        "images": images, "ok": images,
        "detections": {name: int(number) for name, number in zip(names, np.bincount(label, minlength=12), strict=True)},
        "scores": np.histogram(scores.clip(0, 1), 10, (0, 1))[0].tolist(),
        "squares": {"detections": int((each**2).sum())},
    }  # fmt: skip


def test_the_same_is_no_drift():
    found = drift(USUAL, USUAL)
    assert (found["scores"], found["classes"], found["words"]) == (0, 0, [])
    assert found["detections_per_image"] == [pytest.approx(2.02, abs=0.01)] * 2 and found["rejected"] == [0.01, 0.01]


@pytest.mark.parametrize("shape", [np.inf, 0.5])
@pytest.mark.parametrize("images", [2, 10, 50, 100, 200, 400, 1000])
def test_two_samples_of_one_source_are_no_drift(images, shape):
    """Though their detections, were they independent, would differ by more than chance in most pairs."""
    random = np.random.default_rng(images)
    before = source(random, 2000, shape=shape)
    said = [drift(source(random, images, shape=shape), source(random, images, shape=shape))["words"] for _ in range(60)]
    said += [drift(source(random, images, shape=shape), before)["words"] for _ in range(60)]
    assert sum(map(bool, said)) < 0.05 * len(said), [words for words in said if words]


def test_crowds_of_one_class_in_some_images_are_no_drift():
    random = np.random.default_rng(0)

    def flocks(images: int) -> dict:
        """One image in a hundred has a hundred sheep, the others four dogs."""
        with_sheep = random.binomial(images, 0.01)
        detections = {"sheep": 100 * with_sheep, "dog": 4 * (images - with_sheep)}
        scores = [0] * 9 + [sum(detections.values())]
        return {"images": images, "ok": images, "detections": detections, "scores": scores,
                "squares": {"detections": 10_000 * with_sheep + 16 * (images - with_sheep)}}  # fmt: skip

    for images in (50, 100, 200):
        assert sum(bool(drift(flocks(images), flocks(images))["words"]) for _ in range(100)) < 5


@pytest.mark.parametrize("change, words", [
    ({"names": NAMES[::-1]}, r"Classes are mixed otherwise than before: [al] was "),
    ({"level": 0.5}, r"Scores are spread otherwise than before: mean 0\.70, now 0\.5"),
    ({"mean": 4}, r"An image has (4\.[01]|3\.9) detections, before (8|7\.9)"),
])  # fmt: skip
def test_a_change_in_a_thousand_images_is_said(change, words):
    for seed in range(5):
        random = np.random.default_rng(seed)
        said = drift(source(random, 1000, **change), source(random, 1000))["words"]
        assert len(said) == 1 and re.match(words, said[0])


@pytest.mark.parametrize("change, words", [
    ({"scores": [0] * 5 + [800, 600, 300, 200, 100]}, "Scores are spread otherwise than before: mean 0.84, now 0.66."),
    ({"detections": {"cat": 1400, "dog": 600}}, "Classes are mixed otherwise than before: cat was 30% of the "
     "detections, now 70%."),
    ({"detections": {"cat": 600, "dog": 1400, "emu": 1000}}, "Classes are mixed otherwise than before: emu was 0%"),
    ({"detections": {"cat": 180, "dog": 420}}, "An image has 0.6 detections, before 2.0."),
    ({"ok": 900}, "10.0% of the images were rejected, before 1.0%."),
])  # fmt: skip
def test_each_kind_of_change_is_a_sentence(change, words):
    said = drift({**USUAL, **change}, USUAL)["words"]
    assert len(said) == 1 and said[0].startswith(words)


def test_images_without_variance_differ_too():
    """One plate in every image, then two."""
    one = {"images": 100, "ok": 100, "detections": {"plate": 100}, "scores": [0] * 9 + [100],
           "squares": {"detections": 100}}  # fmt: skip
    two = {**one, "detections": {"plate": 200}, "scores": [0] * 9 + [200], "squares": {"detections": 400}}
    assert drift(two, one)["words"] == ["An image has 2.0 detections, before 1.0."]
    assert drift(one, one)["words"] == []


def test_a_run_without_detections_has_no_mix():
    empty = {**NOTHING, "images": 5, "ok": 5}
    found = drift(empty, USUAL)
    assert found["scores"] is None and found["classes"] is None
    assert drift(empty, empty)["words"] == []


def test_a_run_without_images_has_no_rates():
    found = drift(NOTHING, USUAL)
    assert found["rejected"] == [0.01, None] and found["detections_per_image"] == [pytest.approx(2.02, abs=0.01), None]
    assert found["words"] == []
    bad = drift({**NOTHING, "images": 100}, USUAL)
    assert bad["rejected"] == [0.01, 1.0] and bad["words"] == ["100.0% of the images were rejected, before 1.0%."]


def test_counts_of_an_older_version_are_not_compared():
    older = {key: value for key, value in USUAL.items() if key != "squares"}
    assert drift({**USUAL, "ok": 500}, older) is None and drift(older, USUAL) is None


@pytest.fixture
def night(tmp_path, monkeypatch):
    """Runs predict_stage as if it had detected what it is given; returns the record."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("pipelines.tracking.tracker", lambda *args: None)

    def run(day, found=USUAL, version="1", input="/in", name="m", threshold=0.5, of_classes=None, **chosen):
        config = {"score_threshold": threshold, "score_thresholds": of_classes or {}, "categories": [], "model": {}}
        write_json(checkpoint / "config.json", config)
        result = {
            "images": 2000, "ok": 1990, "rejected": 10, "rejects": {}, "detections": {}, "folder": "out", "seconds": 1,
            "new": found, "reused_images": 1000, "output_digest": day, "input_digest": day, "images_per_second": 3,
            "cost_per_1000_images": None, "score_threshold": threshold, "score_thresholds": of_classes or {},
        }  # fmt: skip
        monkeypatch.setattr("pipelines.predict.predict", lambda *args: json.loads(json.dumps(result)))
        settings = override_settings(RunSettings(), {f"predict.{key}": value for key, value in chosen.items()})
        record = predict_stage(settings, tmp_path / "store", input, checkpoint, name, version)
        file = tmp_path / "store" / "predict" / record["folder"].rpartition("/")[2] / "stage.json"
        write_json(file, read_json(file) | {"finished": f"2026-03-{day}T01:30:00+00:00"})
        return record["result"]

    return run


def test_a_run_is_compared_with_the_newest_of_its_kind_and_says_which(night):
    assert night("01")["drift"] is None
    night("02", version="2")
    # Later, but of others: none of these is what the next night is compared with.
    for number, other in enumerate([
        {"input": "/other"}, {"name": "n"}, {"threshold": 0.4}, {"of_classes": {"3": 0.2}}, {"tile": 640},
        {"precision": "bfloat16"},
    ]):  # fmt: skip
        assert night(f"1{number}", {**USUAL, "ok": 500}, **other)["drift"] is None
    same = night("20", version="3")
    assert (same["drift"]["since"][:10], same["drift"]["version"], same["drift"]["words"]) == ("2026-03-02", "2", [])
    assert _summary(None, same)[-1] == (
        "No more change since the run of 2026-03-02 01:30 UTC by version 2 than chance makes."
    )
    changed = night("21", {**USUAL, "ok": 900}, version="3")  # the same output, a night later
    assert _summary(None, changed)[-2:] == [
        "Compared with the run of 2026-03-20 01:30 UTC by version 3:",
        "  10.0% of the images were rejected, before 1.0%.",
    ]


def test_nothing_is_said_beside_a_run_of_an_older_version(night):
    night("01", {key: value for key, value in USUAL.items() if key != "squares"})
    result = night("02", {**USUAL, "ok": 500})
    assert result["drift"] is None and not any("2026" in line for line in _summary(None, result))
