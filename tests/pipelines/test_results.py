"""What is made of a table of detections: COCO's results as COCO's own tools read them, and pictures."""
from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pycocotools.coco import COCO
from test_predict import CATEGORIES, checkpoint, picture, run, settings_with, without_ray

from jobs.predict import main
from pipelines import results
from pipelines.listing import list_images
from pipelines.plan import detections_of
from pipelines.results import coco_ids, picture_name, save_pictures, write_coco
from pipelines.settings import UserError

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
    named, left_out = write_coco(found, tmp_path / "found.json", CATEGORIES, None)
    assert left_out == 0 and named == tmp_path / "found.images.json"
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
    ids = coco_ids(str(listed))
    assert ids == {image.key: image.image_id for image in list_images(listed, settings_with())}
    assert write_coco(str(tmp_path / "out"), tmp_path / "found.json", CATEGORIES, ids) == (None, 0)
    assert [one["image_id"] for one in json.loads((tmp_path / "found.json").read_text())] == [70, 69, 68]
    # The table keeps the images that the file named when it was made.
    listed.write_text(json.dumps({"images": [{"id": 70, "file_name": "0.png"}]}))
    run(settings_with(), listed, checkpoint, tmp_path / "out")
    ids = coco_ids(str(listed))
    assert write_coco(str(tmp_path / "out"), tmp_path / "found.json", CATEGORIES, ids) == (None, 2)
    assert [one["image_id"] for one in json.loads((tmp_path / "found.json").read_text())] == [70]


def test_images_are_numbered_as_the_table_has_them(tmp_path, checkpoint, without_ray):
    """Those of a later run come last, whatever their names."""
    for names in ("cd", "ab"):
        for name in names:
            picture(tmp_path / "in" / f"{name}.png")
        run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    named, _ = write_coco(str(tmp_path / "out"), tmp_path / "found.json", CATEGORIES, None)
    said = {image["id"]: image["file_name"] for image in json.loads(named.read_text())["images"]}
    assert said == {1: "c.png", 2: "d.png", 3: "a.png", 4: "b.png"}
    assert [one["image_id"] for one in json.loads((tmp_path / "found.json").read_text())] == [1, 2, 3, 4]


@pytest.mark.parametrize("content, words", [
    ({"images": [{"id": 1, "file_name": "a.png"}, {"file_name": "b.png"}]}, r"images\[1\] has no id .*--coco needs"),
    ({"images": [{"id": "a", "file_name": "a.png"}]}, r"images\[0\] has no id \(a whole number\)"),
    ({"images": [{"id": 1}]}, r"images\[0\] has no file_name"),
    ({"images": [{"id": 5, "file_name": "a.png"}, {"id": 5, "file_name": "b.png"}]}, "2 images have the id 5"),
    ([], "not a COCO file"),
    ("{", "not JSON"),
])  # fmt: skip
def test_ids_that_coco_cannot_do_with_are_said(tmp_path, content, words):
    listed = tmp_path / "val.json"
    listed.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=words) as error:
        coco_ids(str(listed))
    assert error.value.exit_code == 2 and str(listed) in str(error.value)


@pytest.mark.parametrize("target, words", [
    ("nowhere/found.json", "there is no folder"), ("images", "is a folder"), ("found.json", "images[0] has no id"),
])  # fmt: skip
def test_what_coco_needs_is_looked_at_before_anything_runs(tmp_path, monkeypatch, target, words):
    def run_anyway(*args):
        raise AssertionError("it was run")

    monkeypatch.setattr("pipelines.workflow.find_model", run_anyway)
    picture(tmp_path / "images" / "0.png")
    listed = tmp_path / "val.json"
    listed.write_text(json.dumps({"images": [{"file_name": "0.png"}]}))
    result = CliRunner().invoke(main, [str(listed), "--coco", str(tmp_path / target), "--store", str(tmp_path / "s")])
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_command_says_what_it_left_out(tmp_path, checkpoint, without_ray, monkeypatch):
    """The commands of two nights, on a COCO file that lost an image; Ray and MLflow left out."""
    monkeypatch.setattr("pipelines.workflow.find_model", lambda *args: (checkpoint, "m", "4"))
    monkeypatch.setattr("pipelines.tracking.tracker", lambda *args: None)
    monkeypatch.setattr("jobs.predict.ray_session", lambda settings: nullcontext())
    listed, names = tmp_path / "val.json", ["a.png", "b.png", "c.png"]
    for name in names:
        picture(tmp_path / "images" / name)
    for night in (names, names[:1]):
        listed.write_text(json.dumps({"images": [{"id": at, "file_name": name} for at, name in enumerate(night)]}))
        result = CliRunner().invoke(main, [str(listed), "--coco", str(tmp_path / "found.json"),
                                           "--store", str(tmp_path / "store")])  # fmt: skip
        assert result.exit_code == 0, result.output
        left_out = "2 images of the table are no longer in the COCO file, and not in"
        assert (left_out in result.stdout) == (night != names)
    assert [one["image_id"] for one in json.loads((tmp_path / "found.json").read_text())] == [0]


def test_no_detection_is_an_empty_list(tmp_path, checkpoint, without_ray):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("hello")
    run(settings_with("predict.max_reject_fraction=1"), tmp_path / "in", checkpoint, tmp_path / "out")
    named, _ = write_coco(str(tmp_path / "out"), tmp_path / "found.json", CATEGORIES, None)
    assert json.loads((tmp_path / "found.json").read_text()) == []
    assert json.loads(named.read_text())["images"][0]["width"] is None


def test_pictures_are_spread_over_the_images_and_show_boxes(found, tmp_path):
    places = save_pictures(found, 3, 10**6, ["cat", "dog"])
    assert [Path(place).name[:9] for place in places] == ["a__0.png-", "a__1.png-", "a__4.png-"]
    assert all(np.asarray(Image.open(place).convert("L")).std() > 5 for place in places)  # not of one colour
    assert len(save_pictures(found, 100, 10**6, ["cat", "dog"])) == 5
    (tmp_path / "in" / "a" / "0.png").unlink()
    assert len(save_pictures(found, 3, 10**6, ["cat", "dog"])) == 2
    assert len(detections_of(found)) == 6


def test_pictures_cost_the_parts_that_they_are_in(tmp_path, checkpoint, without_ray, monkeypatch):
    for number in range(40):
        picture(tmp_path / "in" / f"{number:02d}.png")
    for number in range(20, 24):  # all of a part
        (tmp_path / "in" / f"{number}.png").write_text("hello")
    out = str(tmp_path / "out")
    run(settings_with("predict.max_reject_fraction=1"), tmp_path / "in", checkpoint, tmp_path / "out")
    monkeypatch.setattr(results, "tables", lambda *args: pytest.fail("the whole table was read"))
    read, whole = [], results.read_part
    monkeypatch.setattr(results, "read_part", lambda folder, part: read.append(part["shard"]) or whole(folder, part))
    places = save_pictures(out, 2, 10**6, ["cat", "dog"])
    assert [Path(place).name[:2] for place in places] == ["00"] and read == [0, 5]
    read.clear()
    places = save_pictures(out, 4, 10**6, ["cat", "dog"])
    assert [Path(place).name[:2] for place in places] == ["00", "08", "28", "30"]  # the bad part's is made up for
    assert read == [0, 2, 5, 7]
    assert len(save_pictures(out, 40, 10**6, ["cat", "dog"])) == 36
    (part,) = Path(out).glob("0001/part-00000-*")
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not what was written"):
        save_pictures(out, 4, 10**6, ["cat", "dog"])


def test_every_key_has_a_picture_of_its_own_that_a_disk_takes(tmp_path, checkpoint, without_ray):
    keys = ["a/b.jpg", "a__b.jpg", "b.png", "b.png.jpg", "ä" * 70 + "1.jpg", "ä" * 70 + "2.jpg", ".b.jpg", "b.JPG",
            "/".join(["x" * 100] * 4) + ".jpg", "/".join(["x" * 100] * 4) + ".png"]  # fmt: skip
    for key in keys:
        path = tmp_path / "in" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path, "JPEG")
    run(settings_with(), tmp_path / "in", checkpoint, tmp_path / "out")
    places = save_pictures(str(tmp_path / "out"), 20, 10**6, ["cat", "dog"])
    files = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert len(places) == len(files) == len(keys)
    assert {"a__b.jpg", "b.png.jpg", "b.JPG"} < set(files)  # as they are called
    assert max(len(name.encode()) for name in files) <= 120
    assert picture_name("s3://bucket/a/b.jpg") != picture_name("s3://bucket/a__b.jpg")
