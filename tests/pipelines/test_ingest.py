from __future__ import annotations

import hashlib
import json
import os
import shutil

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from detr.transforms import decode_image
from pipelines.coco import image_place
from pipelines.ingest import ingest, source, write_shard
from pipelines.settings import UserError, override_settings, validate_settings
from pipelines.shards import to_coco
from pipelines.stage import read_json

SETTINGS = validate_settings({"ingest": {"rows_per_shard": 4, "max_reject_fraction": 0.5}})
CATEGORIES = [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}]


def make_images(root, names, size=(40, 30)):
    root.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        pixels = np.random.default_rng(n).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(root / name)


def coco(names, first=1, size=(40, 30)):
    """One image record and two boxes for each name; ids run against the order of the names."""
    images, annotations = [], []
    for n, name in enumerate(names):
        image_id = first + len(names) - n
        images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
        for k, category in enumerate((5, 2)):
            box = [k * 3, 1.5, 10, 11]
            annotations.append(
                {
                    "id": 10 * image_id + k,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": 77.25,
                    "iscrowd": 0,
                }
            )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


@pytest.fixture
def dataset(tmp_path):
    """10 images for training, 3 for validation, nothing wrong with them."""
    folder = tmp_path / "data"
    train, val = [f"t{n}.png" for n in range(10)], [f"v{n}.jpg" for n in range(3)]
    make_images(folder / "images", train + val)
    (folder / "instances_train.json").write_text(json.dumps(coco(train)))
    (folder / "instances_val.json").write_text(json.dumps(coco(val, 100)))
    return folder


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def run(data, out, settings=SETTINGS):
    out.mkdir(parents=True, exist_ok=True)
    result = ingest(settings, source(settings, data), out)
    return result, read_json(out / "dataset.json")


def rows(out, record, split):
    return [r for s in record["splits"][split]["shards"] for r in pq.read_table(out / s["path"]).to_pylist()]


@pytest.mark.ray
def test_rows_hold_the_bytes_and_the_boxes(ray_cluster, dataset, tmp_path):
    result, record = run(dataset, tmp_path / "out")
    assert result["images"] == {"train": 10, "val": 3} and result["boxes"] == {"train": 20, "val": 6}
    assert result["rejected_images"] == result["rejected_annotations"] == 0 and result["classes"] == 2
    assert record["categories"] == [{"id": 2, "name": "dog"}, {"id": 5, "name": "cat"}]
    train = record["splits"]["train"]
    assert [(s["path"], s["rows"]) for s in train["shards"]] == [
        ("train-00000.parquet", 4),
        ("train-00001.parquet", 4),
        ("train-00002.parquet", 2),
    ]
    assert train["per_class"] == [10, 10] and train["max_objects"] == 2 and train["images"] == 10
    assert all(s["bytes"] == (tmp_path / "out" / s["path"]).stat().st_size for s in train["shards"])

    table = rows(tmp_path / "out", record, "train")
    assert [row["image_id"] for row in table] == list(range(2, 12))
    for row in table:
        data = (dataset / "images" / row["file_name"]).read_bytes()
        assert row["image"] == data and row["sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["width"], row["height"], row["exif_orientation"]) == (40, 30, 1)
        with Image.open(dataset / "images" / row["file_name"]) as image:
            assert row["thumbnail"] == image.convert("L").resize((8, 8)).tobytes()
        assert row["boxes"] == [[0, 1.5, 10, 12.5], [3, 1.5, 13, 12.5]] and row["labels"] == [1, 0]
        assert [a["id"] for a in row["annotations"]] == [10 * row["image_id"], 10 * row["image_id"] + 1]
        assert row["annotations"][0] == {
            "id": 10 * row["image_id"],
            "category_id": 5,
            "bbox": [0, 1.5, 10, 11],
            "area": 77.25,
            "iscrowd": False,
            "reject": None,
        }
    assert len(pq.read_table(tmp_path / "out" / "rejects.parquet")) == 0
    assert max(g.num_rows for g in row_groups(tmp_path / "out" / "train-00000.parquet")) == 4


@pytest.mark.ray
def test_other_programs_read_the_shards(ray_cluster, dataset, tmp_path):
    run(dataset, tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out" / "train-00002.parquet")
    data = (dataset / "images" / "t0.png").read_bytes()
    row = frame[frame.file_name == "t0.png"].iloc[0]
    assert row.image == data and row.labels.tolist() == [1, 0]
    assert row.annotations[1]["bbox"].tolist() == [3, 1.5, 10, 11]
    shards = str(tmp_path / "out" / "train-*.parquet")
    found = duckdb.sql(
        f"select count(*), count(distinct image_id), sum(len(boxes)), max(boxes[2][3]), bool_or(image = $1), "
        f"sum(list_sum([a.area for a in annotations])) from '{shards}'", params=[data]
    ).fetchall()  # fmt: skip
    assert found == [(10, 10, 20, 13.0, True, 20 * 77.25)]


def row_groups(shard):
    metadata = pq.read_metadata(shard)
    return [metadata.row_group(group) for group in range(metadata.num_row_groups)]


def test_groups_of_rows_are_small_so_that_one_image_is_read_with_few_others(dataset, tmp_path, monkeypatch):
    plan = {**plan_of(dataset), "images": [image for image in plan_of(dataset)["images"] for _ in range(9)]}
    write_shard(plan, tmp_path)
    assert [group.num_rows for group in row_groups(tmp_path / "train-00000.parquet")] == [16, 16, 4]
    monkeypatch.setattr("pipelines.ingest.ROW_GROUP_BYTES", 1)
    write_shard({**plan, "max_pixels": 10**6}, tmp_path)
    assert {group.num_rows for group in row_groups(tmp_path / "train-00000.parquet")} == {1}


@pytest.mark.ray
def test_an_exif_orientation_is_said_and_boxes_are_those_of_the_image_as_stored(ray_cluster, dataset, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = Image.new("RGB", (40, 30))
    pixels.paste((255, 255, 255), (0, 2, 10, 12))  # as the first box of each image
    pixels.save(dataset / "images" / "t9.png", exif=exif)
    _, record = run(dataset, tmp_path / "out")
    assert "1 images have an EXIF orientation, which is not applied" in " ".join(capsys.readouterr().err.split())
    row = next(row for row in rows(tmp_path / "out", record, "train") if row["file_name"] == "t9.png")
    left, top, right, bottom = (round(side) for side in row["boxes"][0])
    inside = np.asarray(decode_image(row["image"], 10**6))[top:bottom, left:right]
    assert row["exif_orientation"] == 6 and inside.size == 3 * 10 * 10 and inside.all()


@pytest.mark.ray
def test_the_digest_tells_content_not_place_or_sharding(ray_cluster, dataset, tmp_path):
    first, _ = run(dataset, tmp_path / "one")
    moved = tmp_path / "moved" / "data"
    shutil.copytree(dataset, moved)
    other = override_settings(SETTINGS, {"ingest.rows_per_shard": 3})
    assert run(moved, tmp_path / "two", other)[0] == first

    digests = {first["digest"]}
    change(moved / "instances_val.json", lambda c: c["annotations"][0]["bbox"].__setitem__(0, 0.5))
    digests.add(run(moved, tmp_path / "three")[0]["digest"])
    Image.new("RGB", (40, 30)).save(moved / "images" / "t3.png")
    digests.add(run(moved, tmp_path / "four")[0]["digest"])
    change(moved / "instances_train.json", lambda c: c["categories"][0].update(name="lion"))
    change(moved / "instances_val.json", lambda c: c["categories"][0].update(name="lion"))
    digests.add(run(moved, tmp_path / "five")[0]["digest"])
    assert len(digests) == 4


def break_things(folder):
    """Five training images with a fault each, and three annotations; returns the reasons expected."""
    images = folder / "images"
    data = (images / "v0.jpg").read_bytes()
    (images / "t0.png").write_bytes(data[: len(data) // 2])
    (images / "t1.png").unlink()
    Image.new("RGB", (30, 40)).save(images / "t2.png")
    (images / "t3.png").unlink()
    os.mkfifo(images / "t3.png")
    (images / "t4.png").write_bytes(b"")

    def edit(content):
        content["annotations"][10]["bbox"] = [39, 29, 0, 0]  # t5
        content["annotations"][11]["iscrowd"] = 1  # t5
        content["annotations"][12]["bbox"] = [30, 1, 20, 5]  # t6, over the edge
        content["annotations"][13]["image_id"] = 999

    change(folder / "instances_train.json", edit)
    return {
        "t0.png": "cannot be decoded",
        "t1.png": "no such file",
        "t2.png": "the image is 30x40, the annotations say 40x30",
        "t3.png": "not a file",
        "t4.png": "empty",
    }


@pytest.mark.ray
def test_every_reject_has_its_reason(ray_cluster, dataset, tmp_path):
    expected = break_things(dataset)
    result, record = run(dataset, tmp_path / "out")
    assert result["rejected_images"] == 5 and result["rejected_annotations"] == 3
    assert result["images"] == {"train": 5, "val": 3} and result["boxes"] == {"train": 7, "val": 6}
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    whole = {r["file_name"]: r["reason"] for r in rejects if r["annotation_id"] is None}
    assert whole.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in whole.items())
    # t5 has the id 6, t6 the id 5; the id of an annotation is ten times its image's, plus its number
    single = {(r["file_name"], r["annotation_id"]): r["reason"] for r in rejects if r["annotation_id"] is not None}
    assert single == {
        ("t5.png", 60): "the box has no area",
        ("t5.png", 61): "crowd",
        ("", 51): "there is no image 999",
    }
    table = {row["file_name"]: row for row in rows(tmp_path / "out", record, "train")}
    assert table["t5.png"]["boxes"] == [] and table["t5.png"]["labels"] == []
    assert [a["reject"] for a in table["t5.png"]["annotations"]] == ["the box has no area", "crowd"]
    assert table["t6.png"]["boxes"] == [[30, 1, 40, 6]]
    assert table["t6.png"]["annotations"][0]["bbox"] == [30, 1, 20, 5]


@pytest.mark.ray
def test_too_many_rejects_stop_the_run(ray_cluster, dataset, tmp_path):
    break_things(dataset)
    strict = override_settings(SETTINGS, {"ingest.max_reject_fraction": 0.2})
    with pytest.raises(UserError, match=r"5 of 13 images were rejected.*t\d\.png: .*rejects\.parquet") as error:
        run(dataset, tmp_path / "out", strict)
    assert error.value.exit_code == 2 and not (tmp_path / "out" / "dataset.json").exists()
    assert pq.read_table(tmp_path / "out" / "rejects.parquet").num_rows == 8

    for n in range(3):
        (dataset / "images" / f"v{n}.jpg").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="Not one image of val can be used"):
        run(dataset, tmp_path / "out2")


def test_too_many_faulty_annotations_stop_the_run_before_images_are_read(dataset, tmp_path):
    """Without Ray, which reads them."""
    change(dataset / "instances_train.json", lambda c: [a["bbox"].__setitem__(3, 0) for a in c["annotations"][:13]])
    change(dataset / "instances_train.json", lambda c: [a.update(iscrowd=1) for a in c["annotations"][13:18]])
    with pytest.raises(UserError, match=r"13 of 21 annotations were rejected.*id \d+: the box has no area; .*reject"):
        run(dataset, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "rejects.parquet").num_rows == 18


@pytest.mark.ray
def test_val_is_split_off_where_there_is_no_file(ray_cluster, dataset, tmp_path):
    (dataset / "instances_val.json").unlink()
    result, record = run(dataset, tmp_path / "out")
    assert result["images"] == {"train": 8, "val": 2}
    ids = {split: {row["image_id"] for row in rows(tmp_path / "out", record, split)} for split in result["images"]}
    assert ids["train"].isdisjoint(ids["val"]) and ids["train"] | ids["val"] == set(range(2, 12))
    first = source(SETTINGS, dataset).inputs
    assert first != source(override_settings(SETTINGS, {"seed": 1}), dataset).inputs
    assert first != source(override_settings(SETTINGS, {"data.val_fraction": 0.3}), dataset).inputs


def plan_of(folder, **changes):
    from pipelines.ingest import _plans

    found = source(SETTINGS, folder)
    return {**next(iter(_plans(SETTINGS, found, found.files))), **changes}


def test_a_finished_shard_is_not_redone_but_a_broken_one_is(dataset, tmp_path):
    plan, shard = plan_of(dataset), tmp_path / "train-00000.parquet"
    result = write_shard(plan, tmp_path)
    data, written = shard.read_bytes(), shard.stat().st_mtime_ns
    assert write_shard(plan, tmp_path) == result and shard.stat().st_mtime_ns == written

    shard.write_bytes(data[:-10])  # cut short
    assert write_shard(plan, tmp_path) == result and shard.read_bytes() == data
    shard.with_suffix(".json").unlink()  # killed before the note
    assert write_shard(plan, tmp_path) == result and shard.read_bytes() == data
    assert write_shard({**plan, "labels": [5, 2]}, tmp_path)["digests"] != result["digests"]  # another plan


def test_a_mended_image_is_looked_at_again(dataset, tmp_path):
    image = dataset / "images" / "t9.png"
    data = image.read_bytes()
    image.unlink()
    assert [r["file_name"] for r in write_shard(plan_of(dataset), tmp_path)["rejects"]] == ["t9.png"]
    image.write_bytes(data)
    assert write_shard(plan_of(dataset), tmp_path)["rows"] == 4


def test_a_shard_of_rejects_only_is_no_file(dataset, tmp_path):
    for n in range(6, 10):
        (dataset / "images" / f"t{n}.png").write_bytes(b"nothing")
    result = write_shard(plan_of(dataset), tmp_path)
    assert result["rows"] == 0 and len(result["rejects"]) == 4
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["train-00000.json"]


def test_images_are_capped_before_decoding_and_orientation_is_flagged(dataset, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(dataset / "images" / "t9.png") as image:
        image.convert("RGB").save(dataset / "images" / "t9.png", exif=exif)
    write_shard(plan_of(dataset), tmp_path)
    row = pq.read_table(tmp_path / "train-00000.parquet").to_pylist()[0]
    assert (row["file_name"], row["exif_orientation"], row["width"], row["height"]) == ("t9.png", 6, 40, 30)

    with Image.open(dataset / "images" / "t9.png") as image:  # the annotations are of the image as it is shown
        image.resize((30, 40)).save(dataset / "images" / "t9.png", exif=exif)
    result = write_shard(plan_of(dataset, max_pixels=10**6), tmp_path)
    assert "the image is 30x40, the annotations say 40x30 (its EXIF orientation" in result["rejects"][0]["reason"]

    result = write_shard(plan_of(dataset, max_pixels=1000), tmp_path)
    assert result["rows"] == 0 and "more than the limit of 1000 pixels" in result["rejects"][0]["reason"]


def test_inputs_follow_the_content(dataset):
    first = source(SETTINGS, dataset).inputs
    assert json.loads(json.dumps(first)) == first == source(SETTINGS, dataset).inputs
    (dataset / "images" / "unnamed.txt").write_text("not in the annotations")
    assert source(SETTINGS, dataset).inputs == first
    Image.new("RGB", (40, 30)).save(dataset / "images" / "v1.jpg")
    second = source(SETTINGS, dataset).inputs
    assert second != first
    (dataset / "images" / "v1.jpg").unlink()
    assert source(SETTINGS, dataset).inputs not in (first, second)


def refused(folder, match, exit_code, **data):
    settings = override_settings(SETTINGS, {f"data.{key}": value for key, value in data.items()})
    with pytest.raises(UserError, match=match) as error:
        source(settings, folder)
    assert error.value.exit_code == exit_code and "\n" not in str(error.value)


def test_a_file_uri_is_a_path_and_no_way_out(dataset, tmp_path):
    found = source(SETTINGS, dataset.as_uri())
    assert found.inputs == source(SETTINGS, dataset).inputs and found.path == str(dataset)
    (tmp_path / "secret.png").write_bytes((dataset / "images" / "t1.png").read_bytes())
    for name in ("%2e%2e/%2e%2e/secret.png", "a%20b.png"):  # names, not escapes
        change(dataset / "instances_train.json", lambda c, name=name: c["images"][0].update(file_name=name))
        found = source(override_settings(SETTINGS, {"data.images": (dataset / "images").as_uri()}), dataset.as_uri())
        assert found.images == str(dataset / "images")
        image = next(image for image in found.files["train"].images if image["file_name"] == name)
        assert image_place(found.images, name) == str(dataset / "images" / name) and image["width"] == 40


def test_what_is_missing_is_named(dataset, tmp_path):
    refused(tmp_path / "none", "There is no folder .*none", 2)
    refused(dataset, "no images folder .*pictures; set data.images", 2, images="pictures")
    refused(dataset, "no annotation file .*x.json; set data.train to one of instances_train.json", 2, train="x.json")
    refused(dataset, "no annotation file .*x.json, which data.val names", 2, val="x.json")
    refused(dataset, "no annotation file .*x.json, which data.test names", 2, test="x.json")
    assert set(source(SETTINGS, dataset).files) == {"train", "val"}


def test_categories_must_agree(dataset):
    path = dataset / "instances_val.json"
    change(path, lambda c: c["categories"].reverse())
    change(path, lambda c: c["categories"].pop(0) and c.update(annotations=[]))
    source(SETTINGS, dataset)  # another order, one left out: fine
    change(path, lambda c: c["categories"].append({"id": 9, "name": "emu"}))
    refused(dataset, r"instances_val.json has the category 'emu' \(id 9\), which .*train.json lacks; add", 2)
    change(path, lambda c: c.update(categories=[{"id": 2, "name": "cat"}]))
    refused(dataset, "Category 2 is 'dog' in .*train.json, but 'cat' in .*val.json", 2)


def test_annotations_without_a_usable_box_are_refused(dataset):
    def edit(content):
        for annotation in content["annotations"]:
            annotation["bbox"][2] = 0

    change(dataset / "instances_train.json", edit)
    refused(dataset, r"train.json has no box that can be trained on \(the first of 20: the box has no area\)", 2)


def content(document):
    """A COCO file's content, whatever the order of images and annotations."""
    lists = {key: sorted(document[key], key=lambda record: record["id"]) for key in ("images", "annotations")}
    return {**document, **lists}


@pytest.mark.ray
@pytest.mark.parametrize("name,splits", [("bccd", ["train", "val", "test"]), ("coco128", ["train", "val"])])
def test_annotations_come_back_as_they_were(ray_cluster, shared_data, tmp_path, name, splits):
    """Polygons, crowds, boxes without area; of coco128 val is a copy of train."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "images").symlink_to(shared_data / name / "images")
    for split in splits:
        source_file = shared_data / name / f"instances_{split}.json"
        source_file = source_file if source_file.exists() else shared_data / name / "instances_train.json"
        shutil.copy(source_file, folder / f"instances_{split}.json")
    result, _ = run(folder, tmp_path / "out", validate_settings({}))
    assert result["rejected_images"] == 0 and result["rejected_annotations"] == (2 if name == "bccd" else 20)
    for split in splits:
        given = json.loads((folder / f"instances_{split}.json").read_text())
        assert content(to_coco(tmp_path / "out", split)) == content(given)
        # and by pyarrow alone
        shards = sorted((tmp_path / "out").glob(f"{split}-*.parquet"))
        table = [row for path in shards for row in pq.read_table(path).to_pylist()]
        assert [row["image_id"] for row in table] == sorted(image["id"] for image in given["images"])
        back = {a["id"]: (row["image_id"], a) for row in table for a in row["annotations"]}
        for annotation in given["annotations"]:
            image_id, kept = back.pop(annotation["id"])
            assert image_id == annotation["image_id"] and kept["bbox"] == annotation["bbox"]
            assert kept["category_id"] == annotation["category_id"] and kept["area"] == annotation["area"]
            assert kept["iscrowd"] == bool(annotation.get("iscrowd", 0))
            assert (kept["reject"] == "the box has no area") == (0 in annotation["bbox"][2:])
        assert not back


@pytest.mark.ray
def test_what_is_rejected_and_what_is_odd_comes_back_too(ray_cluster, dataset, tmp_path):
    break_things(dataset)

    def edit(content):
        content["info"], content["licenses"], content["more"] = {"year": 2026}, [{"id": 1}], 4
        content["images"][0] |= {"license": 1, "coco_url": "http://example.com/ü"}
        content["categories"][0]["supercategory"] = "animal"
        box, *others = content["annotations"]
        box |= {"segmentation": [[1, 1.5, 3, 4, 5, 6]], "score": 0.5, "attributes": {"a": [None]}}
        others[0] |= {"iscrowd": 1, "segmentation": {"counts": "abc", "size": [30, 40]}}
        del others[1]["area"]
        others[2] |= {"area": None, "iscrowd": None}
        others[3]["bbox"] = [1, 2, 10**400, 4]
        others[4]["category_id"] = 99
        others[5]["id"] = others[6]["id"]

    change(dataset / "instances_train.json", edit)
    run(dataset, tmp_path / "out", override_settings(SETTINGS, {"ingest.max_reject_fraction": 1}))
    given = json.loads((dataset / "instances_train.json").read_text())
    back = to_coco(tmp_path / "out", "train")
    for document in (given, back):  # two have one id
        document["annotations"].sort(key=lambda a: (a["id"], a["image_id"], a["category_id"]))
    assert back["annotations"] == given["annotations"]
    given["annotations"] = back["annotations"] = []
    assert content(back) == content(given)


@pytest.mark.ray
def test_segmentation_is_left_out_when_not_wanted(ray_cluster, dataset, tmp_path):
    change(dataset / "instances_train.json", lambda c: c["annotations"][0].update(segmentation=[[1, 1, 3, 4, 5, 6]]))
    for keep in (True, False):
        out = tmp_path / str(keep)
        result, _ = run(dataset, out, override_settings(SETTINGS, {"ingest.segmentation": keep}))
        assert sum("segmentation" in a for a in to_coco(out, "train")["annotations"]) == keep
        assert result["boxes"] == {"train": 20, "val": 6}


@pytest.mark.ray
def test_odd_images_are_rows_or_rejects(ray_cluster, shared_data, tmp_path):
    """42 files of odd formats and damage: the 34 that Pillow decodes are rows, 8 are rejected."""
    manifest = json.loads((shared_data / "edge_cases" / "manifest.json").read_text())
    images = [
        {
            "id": n,
            "file_name": entry["file"],
            "width": entry["size"][0] if entry["size"] else 10,
            "height": entry["size"][1] if entry["size"] else 10,
        }
        for n, entry in enumerate(manifest)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "images").symlink_to(shared_data / "edge_cases" / "images")
    boxes = [{"id": n, "image_id": n, "category_id": 2, "bbox": [0, 0, 1, 1]} for n in range(len(images))]
    content = {"images": images, "annotations": boxes, "categories": CATEGORIES}
    for split in ("train", "val"):
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    result, record = run(folder, tmp_path / "out", validate_settings({"ingest": {"max_reject_fraction": 0.2}}))
    assert result["images"]["train"] == 34 and result["rejected_images"] == 16
    table = {row["file_name"]: row for row in rows(tmp_path / "out", record, "train")}
    assert table.keys() == {entry["file"] for entry in manifest if entry["pillow"] == "decodes"}
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet", columns=["split", "file_name", "reason"]).to_pylist()
    cut, short, stream = (f"it cannot be decoded ({why}" for why in ("image file is trun", "Truncated", "unrecognized"))
    no_image = "it is not an image of a known format"
    expected = {
        "truncated_jpeg.jpg": cut, "raccoon-99.jpg": cut, "ultrahdr.jpg": cut, "truncated_image.png": cut,
        "truncated_end_chunk.png": short, "broken_data_stream.png": stream, "broken.png": no_image,
        "zero_width.gif": no_image,
    }  # fmt: skip
    for split in ("train", "val"):
        reasons = {row["file_name"]: row["reason"] for row in rejects if row["split"] == split}
        assert reasons.keys() == expected.keys()
        assert {name: reason for name, reason in reasons.items() if expected[name] not in reason} == {}
    for entry in manifest:
        if entry["file"] in table:
            row = table[entry["file"]]
            assert row["exif_orientation"] == (entry["exif_orientation"] or 1), entry["file"]
            assert hashlib.md5(row["image"]).hexdigest() == entry["md5"]
