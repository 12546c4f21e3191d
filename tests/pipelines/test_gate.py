"""What the gate asks of the data: whether a model was trained on what it is measured on."""
from __future__ import annotations

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.alike import thumbnail
from pipelines.gate import TRAINED_ON, rejected_share, seen_in_training, write_trained_on
from pipelines.ingest import REJECTS, SCHEMA
from pipelines.stage import write_json


def photo(seed: int) -> Image.Image:
    """A picture of soft shapes, unlike that of another seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120))


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()


def dataset(folder, rejected: int = 0, **splits: list[bytes]):
    """A dataset folder of these encoded images; `rejected` more of val were rejected."""
    folder.mkdir()
    record = {"format": 1, "splits": {}}
    for split, images in splits.items():
        rows = [
            {"image_id": n, "sha256": hashlib.sha256(data).hexdigest(),
             "thumbnail": thumbnail(Image.open(io.BytesIO(data)))}
            for n, data in enumerate(images)
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"{split}.parquet")
        record["splits"][split] = {"images": len(rows), "shards": [{"path": f"{split}.parquet"}]}
    table = pa.Table.from_pylist([{"split": "val", "reason": "broken"}] * rejected, REJECTS)
    pq.write_table(table, folder / "rejects.parquet")
    write_json(folder / "dataset.json", record)
    return folder


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_trained_on(dataset(tmp_path / "first", train=[encoded(photo(n)) for n in range(8)]), folder)
    return folder


def test_the_same_images_and_nearly_the_same_are_seen(trained, tmp_path):
    fresh = [encoded(photo(n)) for n in range(100, 106)]
    assert seen_in_training(trained, dataset(tmp_path / "none", val=fresh), "val") == (0, True)
    same, again = encoded(photo(3)), encoded(photo(4), quality=60)
    assert seen_in_training(trained, dataset(tmp_path / "two", val=[*fresh, same, again]), "val") == (0.25, True)
    assert seen_in_training(trained, dataset(tmp_path / "empty", val=[]), "val") == (0, True)


def test_a_model_that_began_from_another_has_seen_its_images(trained, tmp_path):
    data = dataset(tmp_path / "second", train=[encoded(photo(50))], val=[encoded(photo(n)) for n in (3, 50, 60, 61)])
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    write_trained_on(data, tuned, base=str(trained))
    assert seen_in_training(tuned, data, "val") == (0.5, True)
    write_trained_on(data, tuned, base=str(tmp_path / "official.pth"))  # a file that says nothing of its images
    assert seen_in_training(tuned, data, "val") == (0.25, False)
    again = tmp_path / "again"
    again.mkdir()
    write_trained_on(data, again, base=str(tuned))  # nor does what began from it
    assert seen_in_training(again, data, "val") == (0.25, False)
    (tuned / TRAINED_ON).unlink()
    assert seen_in_training(tuned, data, "val") == (None, True)


def test_the_share_of_rejected_images(tmp_path):
    data = dataset(tmp_path / "data", rejected=3, train=[encoded(photo(0))], val=[encoded(photo(n)) for n in range(9)])
    assert rejected_share(data, "val") == 0.25 and rejected_share(data, "train") == 0
