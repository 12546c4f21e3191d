"""What is said of a run beside the one before it."""
from __future__ import annotations

import pytest

from pipelines.drift import drift

USUAL = {"images": 1000, "ok": 990, "detections": {"cat": 600, "dog": 1400},
         "scores": [0, 0, 0, 0, 0, 100, 200, 300, 600, 800]}  # fmt: skip


def test_the_same_is_no_drift():
    found = drift(USUAL, USUAL)
    assert (found["scores"], found["classes"], found["words"]) == (0, 0, [])
    assert found["detections_per_image"] == [pytest.approx(2.02, abs=0.01)] * 2 and found["rejected"] == [0.01, 0.01]


def test_a_tenth_of_the_images_is_no_drift():
    part = {"images": 100, "ok": 98, "detections": {"cat": 63, "dog": 130}, "scores": [0] * 5 + [12, 18, 31, 57, 75]}
    assert drift(part, USUAL)["words"] == []


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


def test_a_run_without_detections_has_no_mix():
    empty = {"images": 5, "ok": 5, "detections": {}, "scores": [0] * 10}
    found = drift(empty, USUAL)
    assert found["scores"] is None and found["classes"] is None
    assert drift(empty, empty)["words"] == []
    assert drift({"images": 0, "ok": 0, "detections": {}, "scores": [0] * 10}, empty)["words"] == []
