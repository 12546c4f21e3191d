"""A dataset in figures: known ones of known boxes, in words, and as a picture."""
from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from pipelines.describe import CLASSES, describe, description_tables, draw_dataset
from pipelines.ingest import REJECTS, SCHEMA
from pipelines.settings import UserError
from pipelines.stage import write_json


@pytest.fixture
def folder(tmp_path):
    """train: 100x100 with two cats and a dog, 200x50 with none, turned by EXIF; val: 100x100 with a dog."""
    data = io.BytesIO()
    Image.new("RGB", (100, 100), "grey").save(data, "PNG")
    common = {"image": data.getvalue(), "sha256": "", "thumbnail": bytes(64), "annotations": [], "exif_orientation": 1}
    square, long = {**common, "width": 100, "height": 100}, {**common, "width": 200, "height": 50}
    splits = {
        "train": [
            # shares of the side: 0.01, 0.5, and the square root of 0.05 * 0.2
            {**square, "boxes": [[0, 0, 1, 1], [0, 0, 50, 50], [10, 10, 15, 30]], "labels": [0, 0, 1]},
            {**long, "boxes": [], "labels": [], "exif_orientation": 6},
        ],
        "val": [{**square, "boxes": [[0, 0, 20, 20]], "labels": [1]}],
    }
    record = {"name": "pets", "digest": "d", "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "[dog]$_$"}]}
    record["splits"] = {split: {"shards": [{"path": f"{split}.parquet"}]} for split in splits}
    for split, rows in splits.items():
        rows = [{**row, "image_id": n, "file_name": f"{split}{n}$_$.png"} for n, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / f"{split}.parquet")
    lost = [("a.jpg", None, "it is truncated"), ("b.jpg", 4, "crowd"), ("c.jpg", 5, "crowd")]
    rows = [dict(zip(REJECTS.names, ("train", *row, None), strict=True)) for row in lost]
    pq.write_table(pa.Table.from_pylist(rows, REJECTS), tmp_path / "rejects.parquet")
    write_json(tmp_path / "dataset.json", record)
    return tmp_path


def test_the_figures_are_those_of_the_boxes(folder):
    found = describe(folder)
    assert found["splits"]["train"] == {
        "images": 2, "empty": 1, "boxes": 3, "boxes_per_image": {"median": 1.5, "most": 3},
        "image_sizes": [[100, 100, 1], [200, 50, 1]], "turned": 1,
    }  # fmt: skip
    assert found["classes"] == [
        {"name": "cat", "train": {"boxes": 2, "images": 1}, "val": {"boxes": 0, "images": 0}},
        {"name": "[dog]$_$", "train": {"boxes": 1, "images": 1}, "val": {"boxes": 1, "images": 1}},
    ]
    shares = {(row["from"], row["to"]): (row["train"], row["val"]) for row in found["box_sizes"]}
    assert {key: counts for key, counts in shares.items() if any(counts)} == {
        (0.0, 0.02): (1, 0), (0.1, 0.2): (1, 0), (0.2, 0.4): (0, 1), (0.4, None): (1, 0),
    }  # fmt: skip
    assert found["rejected"] == [
        {"split": "train", "kind": "annotation", "reason": "crowd", "count": 2},
        {"split": "train", "kind": "image", "reason": "it is truncated", "count": 1},
    ]


def test_the_tables_say_them_and_take_names_as_they_are(folder):
    page = Console(file=io.StringIO(), width=120)
    for table in description_tables(describe(folder)):
        page.print(table)
    said = [" ".join(line.replace("│", " ").split()) for line in page.file.getvalue().splitlines()]
    assert "train 2 1 1 3 1.5, 3 at most 100x100 (1), 200x50 (1)" in said
    assert any(line.startswith("[dog]$_$ 1 (1) 1 (1) 50.0%") for line in said)
    assert any(line.startswith("40% and more 1 0 25.0%") for line in said)
    assert "train annotation crowd 2" in said


def test_the_picture_shows_boxes_of_the_images_asked_for(folder):
    found = describe(folder)
    none, one, two = (draw_dataset(folder, found, "train", images, 0, 10**6) for images in (0, 1, 2))
    assert none.height < one.height == two.height and none.width == one.width
    assert np.asarray(one).tolist() != np.asarray(two).tolist()
    assert np.array_equal(two, draw_dataset(folder, found, "train", 9, 0, 10**6))  # there are but two
    with pytest.raises(UserError, match="no split 'test'"):
        draw_dataset(folder, found, "test", 2, 0, 10**6)


def test_many_classes_do_not_make_the_picture_endless(folder):
    found = describe(folder)
    row = found["classes"][0]
    sizes = set()
    for many in (CLASSES, 300):
        found["classes"] = [{**row, "name": str(n)} for n in range(many)]
        sizes.add(draw_dataset(folder, found, "val", 0, 0, 1).size)
    assert len(sizes) == 1
