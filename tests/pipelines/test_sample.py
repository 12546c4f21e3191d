from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pipelines.coco import read_coco
from pipelines.sample import _digits, draw_scene, write_sample
from pipelines.settings import SampleSettings, UserError

SMALL = SampleSettings(train=30, val=8, test=5, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(SMALL, folder)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    write_sample(SMALL, tmp_path)
    assert contents(tmp_path) == contents(folder)
    assert len(contents(folder)) == 30 + 8 + 5 + 3


def test_an_image_depends_on_its_place_not_on_the_number_of_images(folder, tmp_path):
    write_sample(SMALL.model_copy(update={"train": 3, "test": 0}), tmp_path)
    small, large = contents(tmp_path), contents(folder)
    images = [name for name in small if name.endswith(".jpg")]
    assert len(images) == 11 and all(small[name] == large[name] for name in images)
    assert "instances_test.json" not in small


def test_another_seed_gives_other_images():
    assert draw_scene(0, "train", 1, 5)[0].tobytes() != draw_scene(1, "train", 1, 5)[0].tobytes()
    assert draw_scene(0, "train", 1, 5)[0].tobytes() != draw_scene(0, "val", 1, 5)[0].tobytes()
    draw_scene(-1, "train", 1, 5)


def test_it_is_a_coco_folder_without_a_fault(folder):
    ids = []
    for split, count in (("train", 30), ("val", 8), ("test", 5)):
        coco = read_coco(folder / f"instances_{split}.json", folder / "images")
        assert len(coco.images) == count and not list(coco.rejects()) and coco.clamped == 0
        assert coco.categories == [{"id": d + 1, "name": str(d)} for d in range(10)]
        for position, image in enumerate(coco.images):
            assert Image.open(folder / "images" / image["file_name"]).size == (image["width"], image["height"])
            assert 96 <= max(image["width"], image["height"]) <= 160
            rows = coco.annotations(position)
            assert len(rows) <= 5
            for row in rows:
                x, y, w, h = row["bbox"]
                assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"]
                assert row["area"] == w * h and not row["iscrowd"] and 15 <= h <= 70
        raw = json.loads((folder / f"instances_{split}.json").read_text())
        ids = [a["id"] for a in raw["annotations"]]
        assert ids == list(range(1, len(ids) + 1)) and raw["format"] == 1


def test_digits_of_the_splits_are_different_handwriting():
    which, _, labels = _digits(0)
    train, val, test = (set(which[split].tolist()) for split in ("train", "val", "test"))
    assert train.isdisjoint(val) and train.isdisjoint(test) and val.isdisjoint(test)
    assert len(train | val | test) == 1797
    assert all(set(labels[list(part)]) == set(range(10)) for part in (train, val, test))


def test_boxes_hold_the_ink_and_digits_are_visible():
    """The same scene with one digit less differs inside that digit's box only."""
    checked = 0
    for index in range(60):
        bare = np.asarray(draw_scene(0, "train", index, 0)[0], np.int16)
        image, objects = draw_scene(0, "train", index, 1)
        if not objects:
            continue
        if image.size != bare.shape[1::-1]:
            pytest.fail("the background must not depend on the number of objects")
        change = np.abs(np.asarray(image, np.int16) - bare).max(2)
        (_, (x, y, w, h)), = objects
        inside = np.zeros(change.shape, bool)
        inside[y : y + h, x : x + w] = True
        assert change[~inside].max() == 0
        rows, columns = np.nonzero((change * inside).max(1) > 8)[0], np.nonzero((change * inside).max(0) > 8)[0]
        assert rows[0] <= y + 2 and rows[-1] >= y + h - 3 and columns[0] <= x + 2 and columns[-1] >= x + w - 3
        assert np.percentile(change[inside], 90) > 60
        checked += 1
    assert checked > 15


def test_objects_overlap_little():
    for index in range(40):
        boxes = [box for _, box in draw_scene(0, "train", index, 9)[1]]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
                h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
                both = max(w, 0) * max(h, 0)
                assert both / (a[2] * a[3] + b[2] * b[3] - both) < 0.1


def test_written_already_nothing_is_redone_and_a_lost_image_comes_back(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jpg")}
    first = write_sample(SMALL, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.jpg")} == before
    lost = folder / "images" / "val_000002.jpg"
    data = lost.read_bytes()
    lost.unlink()
    assert write_sample(SMALL, folder) == first
    assert lost.read_bytes() == data


def test_another_datasets_folder_is_left_alone(tmp_path):
    (tmp_path / "instances_train.json").write_text('{"images": [], "info": {}}')
    with pytest.raises(UserError, match="belongs to another dataset") as error:
        write_sample(SMALL, tmp_path)
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "instances_train.json"]
