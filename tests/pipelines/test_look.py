"""What in the data will hurt: found where it is, and not where it is not."""
from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from pipelines.alike import find_alike, thumbnail
from pipelines.ingest import SCHEMA, ingest, source
from pipelines.look import findings_table, look_at_data
from pipelines.settings import RunSettings, UserError, load_settings, override_settings
from pipelines.stage import read_json, write_json

RNG = np.random.default_rng(0)
WIDE = [10.0, 10.0, 60.0, 60.0]


def photo(seed, size=(160, 120)):
    """A picture of soft shapes, unlike that of another seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def again(image, quality=75, scale=1.0):
    """The picture resized and encoded anew."""
    data = io.BytesIO()
    image.resize([round(side * scale) for side in image.size]).save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def dataset(folder, names, **splits):
    """A dataset folder without the images' bytes; per split the images as [(box xyxy, label), ...], or with a size."""
    record = {"format": 1, "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)], "splits": {}}
    for split, images in splits.items():
        rows, per_class = [], np.zeros(len(names), int)
        for n, image in enumerate(images):
            (width, height), objects = image if isinstance(image, tuple) else ((160, 120), image)
            labels = [label for _, label in objects]
            per_class += np.bincount(labels, minlength=len(names))
            rows.append({"image_id": n, "file_name": f"{split}{n}.jpg", "width": width, "height": height,
                         "thumbnail": RNG.bytes(64), "labels": labels,
                         "boxes": [box for box, _ in objects]})  # fmt: skip
        shards = []
        for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            shards.append({"path": f"{split}-{len(shards)}.parquet", "rows": len(part)})
            pq.write_table(pa.Table.from_pylist(part, SCHEMA), folder / shards[-1]["path"])
        record["splits"][split] = {"per_class": per_class.tolist(), "shards": shards, "images": len(rows),
                                    "max_objects": max((len(row["labels"]) for row in rows), default=0)}
    write_json(folder / "dataset.json", record)
    return folder


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


def applied(settings, finding):
    """The settings with what the finding says to change."""
    return load_settings(None, [f"model={json.dumps(settings.model.model_dump())}", *finding.settings])


def test_nothing_is_said_of_good_data(tmp_path):
    many = [[(WIDE, 0), (WIDE, 1)]] * 20
    assert look_at_data(dataset(tmp_path, ["cat", "dog"], train=many, val=many[:3]), RunSettings()) == []


def test_classes_are_named_with_their_counts(tmp_path):
    train = [[(WIDE, 0)]] * 30 + [[(WIDE, 1)] * 9] * 3 + [[(WIDE, 2)]] * 20
    val = [[(WIDE, 0), (WIDE, 3), (WIDE, 3)]] * 2 + [[(WIDE, 4)]]
    names = ["cat", "dog", "cow", "emu", "fox", "gnu"]
    folder = dataset(tmp_path, names, train=train, val=val, test=[[(WIDE, 4)]] * 2)
    without, unseen, few = look_at_data(folder, RunSettings())
    assert without.which == ("gnu",) and "without a single box" in without.what
    assert unseen.which == ("emu, 4 in val", "fox, 1 in val, 2 in test") and "only in val or test" in unseen.what
    assert few.which == ("dog: 3 images",)  # 27 boxes, but in three images
    assert "fewer than 20" in few.what


def test_boxes_below_a_cell_are_told_per_class_and_the_setting_mends_it(tmp_path):
    """640x480 is seen at 256x192 by tiny, a cell being 4 pixels: 10 of the image's."""
    narrow, wide = [0.0, 0.0, 200.0, 9.0], [0.0, 0.0, 11.0, 200.0]
    images = [((640, 480), [(wide, 0), (narrow, 1)])] * 3 + [((640, 480), [(wide, 0), (wide, 1)])] * 17
    folder = dataset(tmp_path, ["cat", "dog"], train=images, val=images)
    settings = RunSettings()
    found = only(look_at_data(folder, settings))
    # 4 / 9 of 480 are 213.3 pixels, one more for rounding: the next multiple of 4 is 216.
    assert found.which == ("dog: 15% of 20 boxes, wants image_size 216",)
    assert found.settings == ("model.image_size=216", "model.image_max_size=288")
    assert look_at_data(folder, applied(settings, found)) == []
    fewer = images[2:] + images[-2:]  # one in twenty
    assert look_at_data(dataset(tmp_path, ["cat", "dog"], train=fewer, val=images), settings) == []


@pytest.mark.parametrize(
    ("model", "cell"),
    [
        ({"preset": "tiny"}, 4),
        ({"preset": "tiny", "levels": 2}, 8),
        ({"preset": "tiny", "queries": "learned", "two_stage": False, "denoising": {"groups": 0}}, 16),
        ({"preset": "detr_resnet50"}, 32),
        ({"preset": "detr_resnet50_dc5"}, 16),
        ({"preset": "detr_resnet50", "queries": "anchors"}, 8),
    ],
)
def test_the_cell_is_that_of_the_finest_map_the_model_uses(tmp_path, model, cell):
    settings = RunSettings.model_validate({"model": {**model, "image_size": 200, "image_max_size": 400}})
    for side, small in ((cell - 1.0, True), (cell + 1.0, False)):
        images = [((400, 200), [([5.0, 5.0, 5.0 + side, 90.0], 0)])] * 20
        findings = look_at_data(dataset(tmp_path, ["cat"], train=images, val=images), settings)
        assert any(f"narrower than {cell} pixels" in finding.what for finding in findings) == small


def test_enlarging_is_suggested_only_where_nothing_less_helps(tmp_path):
    tiny_boxes = [((100, 80), [([0.0, 0.0, 3.0, 3.0], 0)])] * 20
    folder = dataset(tmp_path, ["cat"], train=tiny_boxes, val=tiny_boxes)
    found = only(look_at_data(folder, RunSettings()))
    assert "model.upscale=true" in found.settings
    assert look_at_data(folder, applied(RunSettings(), found)) == []
    large = override_settings(RunSettings(), {"model.image_size": 90, "model.upscale": True})
    found = only(look_at_data(folder, large))
    assert not any("upscale" in setting for setting in found.settings)


def test_more_objects_than_queries(tmp_path):
    settings = override_settings(RunSettings(), {"model.num_queries": 8})
    train = [[(WIDE, 0)]] * 20 + [[(WIDE, 0)] * 8, [(WIDE, 0)] * 9, [(WIDE, 0)] * 40]
    folder = dataset(tmp_path, ["cat"], train=train, val=[[(WIDE, 0)] * 10])
    found = only(look_at_data(folder, settings))
    assert found.which == ("train22.jpg (train): 40 objects", "val0.jpg (val): 10 objects",
                           "train21.jpg (train): 9 objects")  # fmt: skip
    assert found.settings == ("model.num_queries=50",)
    assert look_at_data(folder, applied(settings, found)) == []


def test_learned_queries_from_random_weights(tmp_path):
    folder = dataset(tmp_path, ["cat"], train=[((800, 800), [([0.0, 0.0, 90.0, 90.0], 0)])] * 20, val=[[(WIDE, 0)]])
    found = only(look_at_data(folder, load_settings(None, ["model=detr_resnet50", "train.backbone_weights=imagenet"])))
    assert found.which == ("20 images in train",)
    assert look_at_data(folder, load_settings(None, ["model=detr_resnet50", "train.init_from=detr-r50.pth"])) == []


def test_shards_of_an_older_version_are_one_sentence(tmp_path):
    folder = dataset(tmp_path, ["cat"], train=[[(WIDE, 0)]], val=[[(WIDE, 0)]])
    shard = next(folder.glob("train-1*"))
    pq.write_table(pq.read_table(shard).drop_columns("thumbnail"), shard)
    with pytest.raises(UserError, match="ingest the data anew"):
        look_at_data(folder, RunSettings())


def test_the_table_shows_few_examples_whole_settings_and_names_as_they_are(tmp_path):
    names = [f"[red]{n}[/red]" for n in range(8)]
    settings = override_settings(RunSettings(), {"model.num_queries": 1})
    findings = look_at_data(dataset(tmp_path, names, train=[[(WIDE, n) for n in range(8)]], val=[[]]), settings)
    console = Console(file=io.StringIO(), width=80)
    console.print(findings_table(findings))
    text = console.file.getvalue()
    assert "[red]0[/red]" in text and "[red]5[/red]" not in text and "and 3 more" in text
    assert "model.num_queries=10 " in text


def test_a_backbone_that_there_is_not_is_one_sentence(tmp_path):
    folder = dataset(tmp_path, ["cat"], train=[[(WIDE, 0)]], val=[[]])
    with pytest.raises(UserError, match=r"model\.backbone: .*resnet99.*resnet50") as error:
        look_at_data(folder, load_settings(None, ["model.backbone=resnet99"]))
    assert error.value.exit_code == 2


def test_the_gates_refusal_is_foretold_of_val_alone_and_the_setting_that_lifts_it(tmp_path):
    folder = dataset(tmp_path, ["cat"], **{split: [[(WIDE, 0)]] * 20 for split in ("train", "val", "test")})
    same = pq.read_table(folder / "train-0.parquet").slice(0, 3)
    for split in ("val", "test"):
        path = folder / f"{split}-0.parquet"
        table = pq.read_table(path)
        pq.write_table(pa.concat_tables([same, table.slice(3)]), path)
    of_val, *others = look_at_data(folder, RunSettings())
    assert of_val.what.startswith("3 of 20 images of val nearly the same as one of train; its AP comes out too high, ")
    assert "the gate will refuse the model (more than gate.max_seen=0.01 of them)" in of_val.what
    assert of_val.change.endswith("move one of each pair, or take it out. Or accept that AP is too high: "
                                  "gate.max_seen=0.15.")  # fmt: skip
    assert len(others) == 2 and not any("gate" in one.what + one.change for one in others)
    allowed = look_at_data(folder, load_settings(None, ["gate.max_seen=0.15"]))
    assert len(allowed) == 3 and not any("gate" in one.what + one.change for one in allowed)


def stacked(images):
    return np.frombuffer(b"".join(map(thumbnail, images)), np.uint8).reshape(len(images), 64)


@pytest.mark.parametrize(("quality", "scale"), [(30, 1.0), (75, 0.5), (90, 0.95), (75, 1.3)])
def test_a_copy_is_found_and_other_pictures_are_not(quality, scale):
    originals = [photo(seed) for seed in range(60)]
    copies = [again(image, quality, scale) for image in originals[40:]]
    found = [near.tolist() for near in find_alike(stacked(copies), stacked(originals))]
    assert found == [[n] for n in range(40, 60)]


def test_dim_pictures_of_different_things_are_not_alike():
    """Grey values hardly differ in dim pictures, whatever they show."""
    dim = [Image.eval(photo(seed), lambda value: 100 + value // 32) for seed in range(60)]
    found = [near.tolist() for near in find_alike(stacked(dim), stacked(dim))]
    assert found == [[n] for n in range(60)]


@pytest.mark.ray
def test_the_same_image_in_two_splits(ray_cluster, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "images").mkdir(parents=True)
    out.mkdir()
    splits = {
        "train": [photo(n) for n in range(25)],
        "val": [photo(101), again(photo(7)), photo(102)],
        "test": [again(photo(12), scale=0.9), photo(103), again(photo(101), quality=40)],
    }
    for split, images in splits.items():
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        for n, image in enumerate(images, 1):
            name = f"{split}{n}.png"
            image.save(data / "images" / name)
            content["images"].append({"id": n, "file_name": name, "width": image.width, "height": image.height})
            content["annotations"].append({"id": n, "image_id": n, "category_id": 1, "bbox": [5, 5, 50, 50]})
        write_json(data / f"instances_{split}.json", content)
    ingest(RunSettings(), source(RunSettings(), data), out)
    findings = look_at_data(out, RunSettings())
    assert [finding.which for finding in findings] == [
        ("val2.png and train8.png",), ("test1.png and train13.png",), ("test3.png and val1.png",)
    ]  # fmt: skip
    assert findings[0].what.startswith("1 of 3 images of val ")


@pytest.mark.ray
def test_blood_cells_have_one_field_photographed_twice(ray_cluster, shared_data, tmp_path):
    settings = RunSettings()
    ingest(settings, source(settings, shared_data / "bccd"), tmp_path)
    assert set(read_json(tmp_path / "dataset.json")["splits"]) == {"train", "val", "test"}
    found = only(look_at_data(tmp_path, settings))
    assert found.which == ("BloodImage_00037.jpg and BloodImage_00038.jpg",)
