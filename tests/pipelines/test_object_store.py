"""A COCO folder in a bucket of a real S3-compatible server (OpenStack Swift), and what is said without it."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
from PIL import Image

from pipelines.ingest import source
from pipelines.predict import list_images, read_rows
from pipelines.settings import RunSettings, UserError, override_settings
from pipelines.storage import _s3

BOX = {"category_id": 1, "bbox": [1, 2, 30, 20], "area": 600, "iscrowd": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swift")
    if why := ObjectStore.unfit(folder):
        pytest.skip(why)
    with ObjectStore(folder) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory, store):
    """The COCO folder that is also s3://data/sets/shapes: six images, one of them broken, and one that is missing."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    (folder / "images" / "a b").mkdir(parents=True)
    for split, numbers in (("train", range(5)), ("val", range(5, 7))):
        images = [{"id": n, "file_name": f"a b/{n}ü.png", "width": 64, "height": 48} for n in numbers]
        for image in images:
            Image.effect_noise((64, 48), 20 + 10 * image["id"]).save(folder / "images" / image["file_name"])
        boxes = [{"id": n, "image_id": n, **BOX} for n in numbers]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "noise"}]}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    (folder / "images" / "a b" / "3ü.png").write_bytes(b"\x89PNG broken")
    (folder / "images" / "a b" / "4ü.png").unlink()
    store.upload(folder, "data", "sets/shapes/")
    return folder


@pytest.fixture
def reachable(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    _s3.cache_clear()
    yield
    _s3.cache_clear()


def detr(tmp_path, *arguments):
    command = [sys.executable, "-m", "jobs.cli", *arguments, "--store", str(tmp_path / "store"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.ray
def test_a_bucket_gives_the_same_dataset_as_the_folder(reachable, folder, tmp_path):
    settings = ["ingest.max_reject_fraction=0.5"]
    found = {}
    for place in ("s3://data/sets/shapes", str(folder)):
        code, found[place], log = detr(tmp_path, "ingest", f"data.path={place}", *settings)
        assert code == 0, log
    bucket, local = found.values()
    assert bucket["digest"] == local["digest"] and bucket["name"] == local["name"] == "shapes"
    assert bucket["images"] == {"train": 3, "val": 2} and bucket["rejected_images"] == 2
    code, again, _ = detr(tmp_path, "ingest", "data.path=s3://data/sets/shapes", *settings)
    assert code == 0 and again["reused"]


def test_images_and_annotations_may_be_apart(reachable, folder):
    settings = override_settings(RunSettings(), {"data.images": "s3://data/sets/shapes/images"})
    found = source(settings, folder)
    assert found.images == "s3://data/sets/shapes/images"
    assert found.inputs["annotations"] == source(RunSettings(), "s3://data/sets/shapes").inputs["annotations"]


def test_other_layouts_in_a_bucket_say_what_they_say_in_a_folder(reachable, store, tmp_path):
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (tmp_path / "yolo" / split / part).mkdir(parents=True)
        Image.effect_noise((64, 48), 50).save(tmp_path / "yolo" / split / "images" / "a.png")
        (tmp_path / "yolo" / split / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    (tmp_path / "yolo" / "data.yaml").write_text("train: train/images\nval: val/images\nnames: [noise]\n")
    (tmp_path / "voc" / "Annotations").mkdir(parents=True)
    (tmp_path / "voc" / "JPEGImages").mkdir()
    Image.effect_noise((64, 48), 50).save(tmp_path / "voc" / "JPEGImages" / "a.png")
    (tmp_path / "voc" / "Annotations" / "a.xml").write_text(
        "<annotation><size><width>64</width><height>48</height></size><object><name>noise</name><bndbox><xmin>1</xmin>"
        "<ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"
    )
    store.upload(tmp_path, "layouts")
    for layout in ("yolo", "voc"):
        bucket, local = (source(RunSettings(), place).files for place in (f"s3://layouts/{layout}", tmp_path / layout))
        assert bucket.keys() == local.keys() and bucket["train"].boxes == 1
        for split, file in bucket.items():
            assert file.images == local[split].images and file.table.equals(local[split].table)
            assert file.sha256 == local[split].sha256


def test_what_is_listed_in_a_bucket_is_read(reachable, store, folder):
    rows = list_images("s3://data/sets/shapes/instances_train.json", RunSettings())
    assert [row["key"] for row in rows] == [f"a b/{n}ü.png" for n in range(5)] and rows[4]["size"] == 0
    read = read_rows(rows).to_pylist()
    assert [row["error"] for row in read] == [None] * 4 + ["there is no such file"]
    assert read[0]["data"] == (folder / "images" / "a b" / "0ü.png").read_bytes()
    store.client().put_object(Bucket="data", Key="sets/shapes/list.txt", Body="images/a b/1ü.png\n".encode())
    assert [row["key"] for row in list_images("s3://data/sets/shapes/list.txt", RunSettings())] == ["images/a b/1ü.png"]


@pytest.mark.parametrize(
    "place,secret,match",
    [
        ("s3://nothing/here", SECRET_KEY, "There is no folder s3://nothing/here"),
        ("s3://data/sets", SECRET_KEY, "There is no images folder s3://data/sets/images"),
        ("s3://data/sets/shapes", "wrong", "s3://data/sets/shapes cannot be read: access is denied; check"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence(reachable, folder, monkeypatch, place, secret, match):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(UserError, match=match) as error:
        source(RunSettings(), place)
    assert error.value.exit_code == 2 and "\n" not in str(error.value) and "wrong" not in str(error.value)


def test_a_store_that_does_not_answer_is_said(reachable, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the object store does not answer"):
        source(RunSettings(), "s3://data/sets/shapes")
