"""What is made of a table of detections: COCO's results as COCO's own tools read them, and pictures."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from test_predict import CATEGORIES, checkpoint, picture, run, settings_with, without_ray

from pipelines.listing import list_images
from pipelines.plan import detections_of
from pipelines.results import save_pictures, write_coco

__all__ = ["checkpoint", "without_ray"]  # fixtures


@pytest.fixture
def found(tmp_path, checkpoint, without_ray) -> str:
    """Six images, one of them bad, in two shards: a dog fills each."""
    for number in range(6):
        picture(tmp_path / "in" / "a" / f"{number}.png", 20 + number, 10)
    (tmp_path / "in" / "a" / "3.png").write_text("hello")
    run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    return str(tmp_path / "out")


def test_coco_results_are_read_by_coco(found, tmp_path):
    named = write_coco(found, tmp_path / "found.json", CATEGORIES, None)
    assert named == tmp_path / "found.images.json"
    truth = COCO(str(named))
    results = truth.loadRes(str(tmp_path / "found.json"))
    assert [truth.imgs[n]["file_name"] for n in sorted(truth.imgs)] == [f"a/{n}.png" for n in range(6)]
    boxes = {truth.imgs[one["image_id"]]["file_name"]: one for one in results.anns.values()}
    assert boxes.keys() == {f"a/{n}.png" for n in (0, 1, 2, 4, 5)}
    assert boxes["a/4.png"]["bbox"] == [0, 0, 24, 10] and boxes["a/4.png"]["category_id"] == 7
    assert boxes["a/4.png"]["score"] == pytest.approx(0.9)
    assert {category["name"] for category in truth.cats.values()} == {"cat", "dog"}


def test_coco_results_keep_the_ids_of_a_coco_input(tmp_path, checkpoint, without_ray):
    for number in range(3):
        picture(tmp_path / "images" / f"{number}.png")
    listed = tmp_path / "val.json"
    listed.write_text(json.dumps({"images": [{"id": 70 - n, "file_name": f"{n}.png"} for n in range(3)]}))
    run(settings_with(), listed, checkpoint, tmp_path / "out")
    ids = {image.key: image.image_id for image in list_images(listed, settings_with())}
    assert write_coco(str(tmp_path / "out"), tmp_path / "found.json", CATEGORIES, ids) is None
    assert [one["image_id"] for one in json.loads((tmp_path / "found.json").read_text())] == [70, 69, 68]


def test_no_detection_is_an_empty_list(tmp_path, checkpoint, without_ray):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("hello")
    run(settings_with("predict.max_reject_fraction=1"), tmp_path / "in", checkpoint, tmp_path / "out")
    named = write_coco(str(tmp_path / "out"), tmp_path / "found.json", CATEGORIES, None)
    assert json.loads((tmp_path / "found.json").read_text()) == []
    assert json.loads(named.read_text())["images"][0]["width"] is None


def test_pictures_are_spread_over_the_images_and_show_boxes(found, tmp_path):
    places = save_pictures(found, 3, 10**6, ["cat", "dog"])
    assert [Path(place).name for place in places] == ["a__0.png.jpg", "a__1.png.jpg", "a__4.png.jpg"]
    assert all(np.asarray(Image.open(place).convert("L")).std() > 5 for place in places)  # not of one colour
    assert len(save_pictures(found, 100, 10**6, ["cat", "dog"])) == 5
    (tmp_path / "in" / "a" / "0.png").unlink()
    assert len(save_pictures(found, 3, 10**6, ["cat", "dog"])) == 2
    assert len(detections_of(found)) == 6
