"""The stream of training images: a pure function of seed, epoch and position, for any number of workers."""
from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from detr.config import ModelConfig
from pipelines import feed as module
from pipelines.feed import Arrivals, _Preparer, first_model, open_feed
from pipelines.settings import AugmentSettings, TrainSettings
from pipelines.stage import write_json

ROWS = (5, 4, 2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eleven images in three shards; image i is grey of value 10 * i, holds i % 3 boxes, and is upright if i is odd."""
    folder = tmp_path_factory.mktemp("dataset")
    shards, n = [], 0
    for k, rows in enumerate(ROWS):
        records = []
        for _ in range(rows):
            data = io.BytesIO()
            width, height = (48, 64) if n % 2 else (64, 48)
            Image.new("RGB", (width, height), (10 * n,) * 3).save(data, "PNG")
            boxes = [[8.0 * j, 4.0, 8.0 * j + 16, 36.0] for j in range(n % 3)]
            records.append({"image_id": 100 + n, "image": data.getvalue(), "boxes": boxes, "labels": [1] * len(boxes),
                            "width": width, "height": height})  # fmt: skip
            n += 1
        boxes = pa.list_(pa.list_(pa.float32(), 4))
        labels = pa.list_(pa.int32())
        schema = pa.schema({"image_id": pa.int64(), "image": pa.binary(), "boxes": boxes, "labels": labels,
                            "width": pa.int32(), "height": pa.int32()})  # fmt: skip
        pq.write_table(pa.Table.from_pylist(records, schema), folder / f"train-{k}.parquet")
        shards.append({"path": f"train-{k}.parquet", "rows": rows})
    write_json(folder / "dataset.json", {"splits": {"train": {"shards": shards}}})
    return folder


def feed(dataset, batch_size=2, rank=0, workers=1, seed=0, **augment):
    model = ModelConfig.model_validate("tiny")
    settings = AugmentSettings(**{"recipe": "none", **augment})
    return open_feed(dataset, "train", model, settings, 10**7, batch_size, seed, workers, (rank,))


def test_every_epoch_is_a_permutation_and_no_two_are_alike(dataset):
    one = feed(dataset, batch_size=3)
    orders = [one.order(epoch) for epoch in range(4)]
    for order in orders:
        assert sorted(order) == list(range(sum(ROWS)))
    assert len({tuple(o) for o in orders}) == 4
    assert list(feed(dataset, batch_size=3).order(2)) == list(orders[2])
    assert list(feed(dataset, batch_size=3, seed=1).order(0)) != list(orders[0])


def test_batches_hold_images_of_like_shape_in_every_epoch(dataset):
    one = feed(dataset, batch_size=2)
    mixed = sum(len({row % 2 for _, row in one.indices(step)}) > 1 for step in range(55))  # ten epochs
    assert mixed <= 20  # where shapes meet, and where epochs meet: two of an epoch's five or six batches at most


def test_a_large_jpeg_is_decoded_in_part_and_its_boxes_stay_on_their_object(tmp_path, monkeypatch):
    pixels = np.zeros((1203, 1601, 3), np.uint8)
    pixels[300:900, 800:1200] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=95)
    row = {"image_id": 1, "image": data.getvalue(), "boxes": [[800.0, 300.0, 1200.0, 900.0]], "labels": [0],
           "width": 1601, "height": 1203}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train-0.parquet")
    write_json(tmp_path / "dataset.json", {"splits": {"train": {"shards": [{"path": "train-0.parquet", "rows": 1}]}}})
    decoded, decode = [], module.decode_image

    def watched(*arguments):
        decoded.append(decode(*arguments).size)
        return decode(*arguments)

    monkeypatch.setattr(module, "decode_image", watched)
    batches = {}
    for recipe in ("light", "none", "detr"):
        one = feed(tmp_path, 1, recipe=recipe, scale=0, colour=0, horizontal_flip=False)
        batches[recipe] = one.batch(0)
    assert decoded == [(801, 602), (1601, 1203), (1601, 1203)]
    light, none = batches["light"], batches["none"]
    assert light["images"].shape == none["images"].shape and light["sizes"].tolist() == none["sizes"].tolist()
    assert (light["images"].int() - none["images"].int()).abs().float().mean() < 1
    torch.testing.assert_close(light["boxes"], none["boxes"], rtol=0, atol=2e-3)
    height, width = light["sizes"][0].tolist()
    ys, xs = np.nonzero(light["images"][0, 0].numpy() > 127)
    shown = np.array([(xs.min() + xs.max() + 1) / 2 / width, (ys.min() + ys.max() + 1) / 2 / height,
                      (xs.max() + 1 - xs.min()) / width, (ys.max() + 1 - ys.min()) / height])  # fmt: skip
    assert np.abs(light["boxes"][0].numpy() - shown).max() * width <= 1


def test_images_stay_in_the_file_and_only_a_group_of_rows_is_read_for_one(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.bytes(10_000) for _ in range(50)]
    lists = {"boxes": pa.array([[]] * 50, pa.list_(pa.list_(pa.float32(), 4))), "labels": pa.array([[]] * 50)}
    table = pa.table({"image_id": range(50), "width": [8] * 50, "height": [8] * 50, **lists, "image": images})
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=16, use_dictionary=False)
    shard = module._shard(str(tmp_path), "train-0.parquet")
    assert [shard.encoded(row) for row in (0, 15, 16, 49)] == [images[row] for row in (0, 15, 16, 49)]
    assert shard.table.nbytes < 10_000


def test_the_published_recipe_mirrors_only_where_it_may(tmp_path):
    data = io.BytesIO()
    half = Image.new("RGB", (600, 600))
    half.paste((255, 255, 255), (0, 0, 300, 600))  # white on the left
    half.save(data, "PNG")
    row = {"image_id": 1, "image": data.getvalue(), "boxes": [], "labels": [], "width": 600, "height": 600}
    schema = pa.schema({"image_id": pa.int64(), "image": pa.binary(), "boxes": pa.list_(pa.list_(pa.float32(), 4)),
                        "labels": pa.list_(pa.int32()), "width": pa.int32(), "height": pa.int32()})  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row], schema), tmp_path / "train-0.parquet")
    write_json(tmp_path / "dataset.json", {"splits": {"train": {"shards": [{"path": "train-0.parquet", "rows": 1}]}}})
    for allowed in (True, False):
        one = feed(tmp_path, 1, recipe="detr", horizontal_flip=allowed)
        left = [float(b[0, 0, :, 0].float().mean() - b[0, 0, :, -1].float().mean()) for b in
                (one.batch(step)["images"] for step in range(12))]  # fmt: skip
        assert min(left) >= 0 if not allowed else min(left) < -200 < 200 < max(left)


def test_nothing_is_dropped_where_epochs_meet(dataset):
    one = feed(dataset, batch_size=4)
    steps = 11  # 44 images are exactly four epochs of eleven
    seen = Counter(row for step in range(steps) for _, row in one.indices(step))
    assert seen == {row: 4 for row in range(11)}


def test_what_came_of_an_epoch_is_counted_and_a_lost_image_is_noticed(dataset):
    """Eleven images with ten boxes, two workers with batches of two: an epoch ends in the midst of a batch."""
    feeds = [feed(dataset, batch_size=2, rank=rank, workers=2) for rank in (0, 1)]

    def come(one, step):
        rows = [row for _, row in one.indices(step)]
        values = {"image_ids": rows, "counts": [row % 3 for row in rows], "position": [one.position(step, one.mine[0])]}
        return {key: torch.tensor(value) for key, value in values.items()}

    def run(first, lost=None):
        """As the first worker sees it, which here adds the other's itself."""
        one, other = (Arrivals(one, first) for one in feeds)
        found = []
        for step in range(first, 9):
            mine, theirs = (come(each, step) for each in feeds)
            if step == lost:
                mine["image_ids"][1] = mine["image_ids"][0]  # one comes twice, another not at all
            for position, image in enumerate(theirs["image_ids"].tolist(), step * 4 + 2):
                other.seen.setdefault(position // 11, {})[image] = image % 3

            def both(numbers):
                seen = other.seen.pop(one.epoch)
                return [numbers[0] + len(seen), numbers[1] + sum(seen.values())]

            found += one.add(step, [mine], both)
        return found

    assert run(0) == [{"epoch": n, "images": 11, "boxes": 10} for n in (1, 2, 3)]
    rest = run(4)  # 16 images were before, 5 of them of the second epoch
    assert [(seen["epoch"], seen["images"]) for seen in rest] == [(2, 6), (3, 11)] and rest[0]["boxes"] < 10
    with pytest.raises(RuntimeError, match="In epoch 2 10 of 11 images came to the training"):
        run(0, lost=3)


def test_two_workers_see_what_one_worker_with_twice_the_batch_sees(dataset):
    whole = feed(dataset, batch_size=4, recipe="light", scale=0.3, colour=0.2)
    halves = [feed(dataset, batch_size=2, rank=r, workers=2, recipe="light", scale=0.3, colour=0.2) for r in (0, 1)]
    for step in (0, 1, 5):
        full, parts = whole.batch(step), [half.batch(step) for half in halves]
        for key in ("image_ids", "boxes", "labels", "counts", "sizes"):
            assert torch.equal(full[key], torch.cat([p[key] for p in parts])), key


def test_a_worker_that_does_the_part_of_a_missing_one_sees_what_that_would_have_seen(dataset):
    one, both = feed(dataset, rank=1, workers=2), feed(dataset, workers=2)
    both = replace(both, mine=(0, 1))
    preparer = object.__new__(_Preparer)  # as in a process of its own, whose priority it lowers
    preparer.feed = both
    made = preparer.batches(3, 5, False)
    assert [int(batch["position"][0]) for batch in made] == [12, 14, 16, 18]
    for step, batch in ((3, made[1]), (4, made[3])):
        assert all(torch.equal(value, torch.from_numpy(batch[key])) for key, value in one.batch(step).items())


def test_a_batch_depends_on_the_step_alone(dataset):
    a, b = feed(dataset, recipe="light"), feed(dataset, recipe="light")
    for step in range(3):
        a.batch(step)
    for key, value in a.batch(3).items():
        assert torch.equal(value, b.batch(3)[key]), key


def test_pixels_and_boxes_arrive_as_stored(dataset):
    one = feed(dataset, batch_size=11)
    batch = one.batch(0)
    assert batch["images"].shape == (11, 3, 64, 64) and batch["images"].dtype == torch.uint8
    at = 0
    for image, size, image_id, count in zip(
        batch["images"], batch["sizes"], batch["image_ids"], batch["counts"], strict=True
    ):
        n = int(image_id) - 100
        width, height = (48, 64) if n % 2 else (64, 48)
        assert size.tolist() == [height, width]
        assert (image[:, :height, :width] == 10 * n).all()
        assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()
        assert count == n % 3
        for j, box in enumerate(batch["boxes"][at : at + count]):
            expected = [(8 * j + 8) / width, 20 / height, 16 / width, 32 / height]
            np.testing.assert_allclose(box, expected, atol=1e-6)
        at += int(count)


def test_mosaics_begin_when_images_are_known_and_keep_their_shape(dataset):
    mosaic, plain = (feed(dataset, batch_size=11, recipe="light", scale=0, mosaic=share) for share in (1.0, 0.0))
    first, tenth = 0, 10  # a step is an epoch
    assert torch.equal(mosaic.batch(first)["counts"], plain.batch(first)["counts"])
    ours, theirs = mosaic.batch(tenth), plain.batch(tenth)
    assert torch.equal(ours["sizes"], theirs["sizes"]) and torch.equal(ours["image_ids"], theirs["image_ids"])
    assert not torch.equal(ours["images"], theirs["images"]) and len(ours["labels"]) != len(theirs["labels"])
    greys = [len(image[:, :h, :w].unique()) for image, (h, w) in zip(ours["images"], ours["sizes"], strict=True)]
    assert max(greys) > 1, "no image is made of several"


def test_images_are_smaller_in_the_first_part(dataset):
    full = ModelConfig(preset="tiny", image_size=48, image_max_size=64)
    first = first_model(full, TrainSettings(first_image_size=24))
    assert (first.image_size, first.image_max_size) == (24, 32)
    for options in ({}, {"first_image_size": 48}, {"first_image_size": 24, "first_share": 0}):
        assert first_model(full, TrainSettings(**options)) is None
    settings = AugmentSettings(recipe="none")
    one = open_feed(dataset, "train", full, settings, 10**6, 3, 0, first=first)
    small, large = one.batch(2, small=True), one.batch(2)
    assert torch.equal(small["sizes"] * 2, large["sizes"]) and torch.equal(small["boxes"], large["boxes"])
    assert 0.25 < one.first_cost() < 0.5 and feed(dataset).first_cost() == 1


class Asked:
    """Stands for an actor: notes what it was asked, and gives (step, small) for a batch."""

    def __init__(self):
        self.pieces = []
        self.batches = self

    def remote(self, first, end, small):
        self.pieces.append((first, end, small))
        return [(step, small) for step in range(first, end)]


@pytest.fixture
def asked(monkeypatch):
    import ray

    actors, cancelled = [Asked(), Asked()], []
    actors[0].cancelled = cancelled
    monkeypatch.setattr(module, "_start_preparers", lambda feed, number: actors)
    monkeypatch.setattr(module, "_as_tensors", lambda batch: batch)
    monkeypatch.setattr(ray, "get", lambda piece: piece)
    monkeypatch.setattr(ray, "cancel", lambda piece: cancelled.append(piece))
    return actors


@pytest.mark.parametrize("decided", [1, 2, 5, 17, 60, 99])
@pytest.mark.parametrize("later", [0, 1, 2, 30])
def test_images_have_their_full_size_from_the_step_that_is_decided_on_the_way(dataset, asked, decided, later):
    """However much is prepared ahead by then."""
    known, given = [None], []
    for step, small in feed(dataset).stream(0, 150, lambda: known[0]):
        given.append((step, small))
        if step + 1 == decided:
            known[0] = decided + later
    assert given == [(step, step < decided + later) for step in range(150)]
    left = [batch for piece in asked[0].cancelled for batch in piece]  # what nobody wants is not prepared first
    assert left and all(small and step >= decided + later for step, small in left)


def test_so_much_is_prepared_ahead_as_fits_in_turns(dataset, asked, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 3 * 256**2 * 2 * 4)  # four steps of two images
    monkeypatch.setattr(module, "AHEAD_BYTES", 3 * 256**2 * 2 * 20)
    stream = feed(dataset, batch_size=2).stream(3, 1000)
    assert next(stream) == (3, False)
    assert [actor.pieces for actor in asked] == [
        [(3, 7, False), (11, 15, False), (19, 23, False)], [(7, 11, False), (15, 19, False)]
    ]  # fmt: skip
    for _ in range(4):
        step, _ = next(stream)
    assert step == 7 and asked[1].pieces[-1] == (23, 27, False)
    assert [step for step, _ in stream] == list(range(8, 1000))


@pytest.mark.ray
def test_ray_streams_the_same_batches_from_any_step_to_the_last(dataset, ray_cluster, monkeypatch):
    monkeypatch.setattr("pipelines.feed.PIECE_BYTES", 3 * 256**2 * 2 * 5)  # several pieces
    one = feed(dataset, batch_size=2, recipe="light")
    steps = []
    for batch in one.stream(3, 60):
        steps.append(int(batch["step"]))
        assert batch.keys() == one.batch(3).keys() and all(torch.is_tensor(value) for value in batch.values())
        assert torch.equal(batch["images"], one.batch(steps[-1])["images"])
    assert steps == list(range(3, 60))
    small = ModelConfig(preset="tiny", image_size=24)
    one = open_feed(dataset, "train", one.model, one.augment, 10**6, 2, 0, first=small)
    for batch in one.stream(0, 12, lambda: 5):
        step = int(batch["step"])
        assert torch.equal(batch["images"], one.batch(step, small=step < 5)["images"])
