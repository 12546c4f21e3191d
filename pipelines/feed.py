"""Shards -> augmented, padded batches, prepared ahead by Ray.

The training images are one endless stream: epoch after epoch, each a permutation of the dataset. Step s
takes the images [s * global batch, (s + 1) * global batch), in as many parts as there are to be workers. What a
part holds is a pure function of seed, dataset, step and part, so that a resumed run sees what a straight run would
have seen, also with fewer workers, which take more parts each; and nothing is dropped at the end of an epoch.
Images of like shape share a batch, so that little of it is padding.
"""
from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from joblib import cpu_count  # of what a container or an affinity leaves
from torch import Tensor

from detr.batch import SHAPE_STEP, pad_images
from detr.config import ModelConfig
from detr.transforms import (
    augment_detr,
    boxes_to_targets,
    decode_image,
    input_size,
    jitter_colour,
    mosaic,
    random_flips,
    random_zoom,
    resize_to,
    size_of,
    to_uint8,
)
from pipelines.settings import AugmentSettings, TrainSettings
from pipelines.stage import read_json

SHUFFLE_SHARDS = 8  # rows are shuffled among this many shards at a time, so that few are open at once
PIECE_BYTES = 2**24  # of pixels prepared by one call, where a batch is not larger
AHEAD_BYTES = 2**28  # of pixels prepared ahead, but a piece more than there are processes
MOST_PREPARERS = 16  # for a worker: more than a training uses up, and each takes half a GiB
PLAIN_EPOCHS = 10  # before the first mosaic: images seen less often are new enough, and learnt from sooner
COST_POWER = 0.85  # of the number of pixels: measured on two cores, 256x192 to 384x288
DECODED_AT_LEAST = 2  # times as wide as the model sees it: a crop or a mosaic shows a part of it enlarged by 1.5
COLUMNS = ["image_id", "width", "height", "boxes", "labels"]


class Piece(NamedTuple):
    """The batches of the steps from `first` to `end`, which is not one of them."""

    first: int
    end: int
    small: bool
    batches: Any  # reference to a list of batches


@dataclass(frozen=True)
class _Shard:
    """An open shard: `table` has all but the images, which stay in the file; groups[g] is the first row of a group."""

    table: pa.Table
    file: pq.ParquetFile
    groups: np.ndarray

    def encoded(self, row: int) -> bytes:
        """An image's bytes. Its row group is read for it, and not kept: what is kept of 8 shards would be gigabytes."""
        group = int(np.searchsorted(self.groups, row, side="right")) - 1
        column = self.file.read_row_group(group, columns=["image"]).column(0)
        return column[row - int(self.groups[group])].as_buffer().to_pybytes()


class Arrivals:
    """What of every epoch came, and to all workers together, from a step on."""

    def __init__(self, feed: Feed, first_step: int):
        self.feed, self.global_batch = feed, feed.batch_size * feed.workers
        self.since = first_step * self.global_batch  # images before
        self.epoch = self.since // feed.images
        self.seen: dict[int, dict[int, int]] = {}  # of every epoch, the boxes of each image by its id

    def add(
        self, step: int, batches: list[dict[str, Tensor]], sum_over_workers: Callable[[list[int]], list[int]]
    ) -> list[dict[str, int]]:
        """Count the batches of a step -> {"epoch": from 1, "images", "boxes"} of every epoch that is over with it,
        boxes as they are after augmentation.

        Every worker has to call it for every step. After a restart in the middle of an epoch only the rest of it is
        counted. Raises RuntimeError if images of an epoch did not come, or one came twice to a worker.
        """
        for batch in batches:
            rows = zip(batch["image_ids"].tolist(), batch["counts"].tolist(), strict=True)
            for position, (image, boxes) in enumerate(rows, int(batch["position"])):
                self.seen.setdefault(position // self.feed.images, {})[image] = boxes
        found = []
        while (self.epoch + 1) * self.feed.images <= (step + 1) * self.global_batch:
            mine = self.seen.pop(self.epoch, {})
            images, boxes = sum_over_workers([len(mine), sum(mine.values())])
            due = (self.epoch + 1) * self.feed.images - max(self.since, self.epoch * self.feed.images)
            if images != due:
                raise RuntimeError(f"In epoch {self.epoch + 1} {images} of {due} images came to the training.")
            self.epoch += 1
            found.append({"epoch": self.epoch, "images": images, "boxes": boxes})
        return found


@dataclass(frozen=True)
class Feed:
    """All that decides what a worker sees at each step, which `workers` share.

    mine: this worker's parts of a step, of as many as there are to be workers: more than one where some are missing.
    first: the model as it sees smaller images in the first part of the training, or None (progressive resizing, Howard
    2018, DAWNBench; a network learns sooner from few pixels, and small objects need more of them at the end).
    preparing: so many processes of this machine prepare the worker's batches, no more than MOST_PREPARERS; by default
    one for every second core, since a training on CPU needs the others.
    """

    folder: str
    shards: tuple[str, ...]
    rows: tuple[int, ...]
    model: ModelConfig
    augment: AugmentSettings
    max_pixels: int
    batch_size: int
    seed: int
    workers: int = 1
    mine: tuple[int, ...] = (0,)
    first: ModelConfig | None = None
    preparing: int | None = None

    @property
    def images(self) -> int:
        """Images per epoch."""
        return sum(self.rows)

    def steps_per_epoch(self) -> float:
        return self.images / (self.batch_size * self.workers)

    def first_cost(self) -> float:
        """What a step of the first part costs, about, where one at full size costs 1."""
        return (self.first.image_size / self.model.image_size) ** (2 * COST_POWER) if self.first else 1.0

    def position(self, step: int, part: int) -> int:
        """Images of the stream before those of a part of a step."""
        return (step * self.workers + part) * self.batch_size

    def indices(self, step: int, part: int | None = None) -> list[tuple[int, int]]:
        """(epoch, row of the dataset) of each image of a part of a step, by default this worker's first."""
        first = self.position(step, self.mine[0] if part is None else part)
        positions = range(first, first + self.batch_size)
        return [(p // self.images, int(self.order(p // self.images)[p % self.images])) for p in positions]

    def order(self, epoch: int) -> np.ndarray:
        """The dataset's rows in the order of an epoch."""
        return _epoch_order(self.folder, self.shards, self.seed, epoch, self.batch_size * self.workers)

    def batch(self, step: int, small: bool = False, part: int | None = None) -> dict[str, Tensor]:
        """A part of a step, by default this worker's first; small as in the first part of the training, or full size.

        `images` uint8 [B, 3, H, W], `sizes` [B, 2] (h, w), `counts` [B], `labels` [T], `boxes` [T, 4] (cxcywh in 0..1),
        `image_ids` [B], `step` [1], `position` [1] (images of the stream before these).
        """
        images, labels, boxes, ids = [], [], [], []
        part = self.mine[0] if part is None else part
        model = self.first if small and self.first else self.model
        starts = np.cumsum((0, *self.rows))
        for epoch, index in self.indices(step, part):
            shard = int(np.searchsorted(starts, index, side="right")) - 1
            opened = _shard(self.folder, self.shards[shard])
            row = index - int(starts[shard])
            # Each image draws from a generator of its own: the same whichever worker or task prepares it.
            rng = np.random.default_rng((self.seed, epoch, index))
            image, target = self._prepare(model, opened, row, epoch, rng)
            images.append(image)
            labels.append(target["labels"])
            boxes.append(target["boxes"])
            ids.append(opened.table["image_id"][row].as_py())
        batch, sizes = pad_images(images, SHAPE_STEP)
        return {
            "images": batch,
            "sizes": sizes,
            "counts": torch.tensor([len(x) for x in labels]),
            "labels": torch.cat(labels),
            "boxes": torch.cat(boxes),
            "image_ids": torch.tensor(ids),
            "step": torch.tensor([step]),
            "position": torch.tensor([self.position(step, part)]),
        }

    def _prepare(
        self, model: ModelConfig, shard: _Shard, row: int, epoch: int, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A row of a shard -> what the model is trained on, with others of the shard in a mosaic."""
        augment = self.augment
        image, target = self._read(model, shard, row)
        flips = {"horizontal": augment.horizontal_flip, "vertical": augment.vertical_flip}
        if augment.recipe == "light" and epoch >= PLAIN_EPOCHS and rng.random() < augment.mosaic:
            others = (self._read(model, shard, int(other)) for other in rng.integers(0, len(shard.table), 3))
            parts = [random_flips(*part, rng, **flips) for part in ((image, target), *others)]
            image, target = mosaic(parts, rng, model)
        else:
            if augment.recipe == "light":
                image, target = random_zoom(*random_flips(image, target, rng, **flips), rng, augment.scale)
            elif augment.recipe == "detr":
                image, target = augment_detr(image, target, rng, model.image_max_size, **flips)
            if augment.recipe != "detr":
                image, target = resize_to(image, target, input_size(model, *size_of(image)))
        if augment.recipe == "light" and augment.colour:
            image = jitter_colour(image, rng, augment.colour)  # last: of the fewest pixels
        target["boxes"] = boxes_to_targets(target["boxes"], *size_of(image))
        return image, target

    def _read(self, model: ModelConfig, shard: _Shard, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An image and its target; where the recipe is our own, large JPEGs at a part of their size."""
        table = shard.table
        width, height = table["width"][row].as_py(), table["height"][row].as_py()
        at_least = None
        if self.augment.recipe == "light":
            at_least = tuple(DECODED_AT_LEAST * side for side in input_size(model, width, height))
        image = decode_image(shard.encoded(row), self.max_pixels, at_least)
        scale = torch.tensor([image.width / width, image.height / height] * 2)
        return to_uint8(image), {
            "boxes": torch.tensor(table["boxes"][row].as_py(), dtype=torch.float32).reshape(-1, 4) * scale,
            "labels": torch.tensor(table["labels"][row].as_py(), dtype=torch.int64),
        }

    def stream(
        self, first_step: int, last_step: int | None = None, full_from: Callable[[], int | None] = lambda: 0
    ) -> Iterator[dict[str, Tensor]]:
        """This worker's batches from a step on, to last_step or without end, prepared ahead by actors of this machine.

        As many for each step as it has parts, one after another.
        `images` must not be written to: they are Ray's own memory. full_from: gives the step from which images have
        their full size. As long as it gives None they are small. When it is known, what was prepared too small is left,
        and prepared anew.

        Actors that are asked for a few steps each, and no Ray Data: its executor, living on beside the training, takes
        the interpreter's lock from it, and started anew for every segment runs one task at a time for its first second.
        """
        import ray

        pixels = 3 * self.model.image_max_size**2 * self.batch_size * len(self.mine)
        steps = min(max(1, PIECE_BYTES // pixels), 16)
        actors = _start_preparers(self, min(MOST_PREPARERS, self.preparing or max(1, cpu_count() // 2)))
        ahead = max(len(actors) + 1, AHEAD_BYTES // (steps * pixels))
        due: deque[Piece] = deque()
        turns = itertools.cycle(actors)
        step, asked, batches = first_step, first_step, None
        try:
            while last_step is None or step < last_step:
                full = full_from()
                asked = _leave_too_small(due, step, asked, full, ray.cancel)
                while len(due) < ahead and (last_step is None or asked < last_step):
                    small = full is None or asked < full
                    ends = [end for end in (asked + steps, last_step, full if small else None) if end is not None]
                    due.append(Piece(asked, min(ends), small, next(turns).batches.remote(asked, min(ends), small)))
                    asked = due[-1].end
                if step == due[0].first or batches is None:
                    batches = ray.get(due[0].batches)
                at = (step - due[0].first) * len(self.mine)
                for batch in batches[at : at + len(self.mine)]:
                    yield _as_tensors(batch)
                step += 1
                if step == due[0].end:
                    due.popleft()
                    batches = None
        finally:
            for piece in due:  # the actors end when nobody knows them any more and nothing is left to do
                ray.cancel(piece.batches)


def open_feed(
    folder: Path, split: str, model: ModelConfig, augment: AugmentSettings, max_pixels: int, batch_size: int,
    seed: int, workers: int = 1, mine: tuple[int, ...] = (0,), first: ModelConfig | None = None,
    preparing: int | None = None,
) -> Feed:  # fmt: skip
    """A feed over a split of an ingested dataset."""
    shards = read_json(folder / "dataset.json")["splits"][split]["shards"]
    return Feed(
        str(folder), tuple(s["path"] for s in shards), tuple(s["rows"] for s in shards), model, augment,
        max_pixels, batch_size, seed, workers, mine, first, preparing,
    )  # fmt: skip


def first_model(model: ModelConfig, options: TrainSettings) -> ModelConfig | None:
    """The model as it sees the images in the first part of a training, None where it always sees them the same."""
    size = options.first_image_size
    if not size or not options.first_share or size >= model.image_size:
        return None
    longer = round(model.image_max_size * size / model.image_size)
    return model.model_copy(update={"image_size": size, "image_max_size": longer})


@functools.lru_cache(maxsize=4)
def _epoch_order(folder: str, shards: tuple[str, ...], seed: int, epoch: int, batch: int) -> np.ndarray:
    """Shards permuted, rows shuffled among a few shards at a time, and there put into batches by aspect ratio."""
    aspects = _aspects(folder, shards)
    starts = np.cumsum([0, *(len(a) for a in aspects)])
    aspect = np.concatenate(aspects)
    rng = np.random.default_rng((seed, epoch))
    permuted = rng.permutation(len(shards))
    parts, left = [], np.empty(0, np.int64)
    # The first images complete the batch that the epoch before began.
    head = -epoch * len(aspect) % batch
    for i in range(0, len(permuted), SHUFFLE_SHARDS):
        window = [np.arange(starts[s], starts[s + 1]) for s in permuted[i : i + SHUFFLE_SHARDS]]
        pool = rng.permutation(np.concatenate([left, *window]))
        if head:
            parts.append(pool[:head])
            pool, head = pool[head:], max(0, head - len(pool))
        whole = len(pool) // batch * batch
        sorted_pool, left = pool[:whole][np.argsort(aspect[pool[:whole]], kind="stable")], pool[whole:]
        parts.append(rng.permutation(sorted_pool.reshape(-1, batch)).flatten())
    return np.concatenate([*parts, left])


@functools.lru_cache(maxsize=4)
def _aspects(folder: str, shards: tuple[str, ...]) -> list[np.ndarray]:
    """Width over height of every row, by shard."""
    tables = [pq.read_table(Path(folder) / name, columns=["width", "height"]) for name in shards]
    return [t["width"].to_numpy() / t["height"].to_numpy() for t in tables]


@functools.lru_cache(maxsize=2 * SHUFFLE_SHARDS)
def _shard(folder: str, name: str) -> _Shard:
    file = pq.ParquetFile(Path(folder) / name, memory_map=True)
    rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return _Shard(file.read(COLUMNS), file, np.cumsum([0, *rows]))


def _leave_too_small(
    due: deque[Piece], step: int, asked: int, full: int | None, cancel: Callable[[Any], None]
) -> int:
    """Leave what is due of small images from step `full` on; returns the step from which to ask (anew).

    Steps before `step` were used.
    """
    while full is not None and due and due[-1].small and due[-1].end > max(full, step):
        piece, asked = due.pop(), max(full, step)
        if piece.first < asked:
            due.append(piece._replace(end=asked))
            if asked == step:  # all that is left of it was used
                due.pop()
            return asked
        cancel(piece.batches)
        asked = piece.first
    return asked


def _start_preparers(feed: Feed, number: int) -> list[Any]:
    """Actors beside this process, which answer one after another what they are asked."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # They take no CPU of Ray's count: the training's own cores are theirs.
    # One that dies is started again, but not for ever: what kills it may be an image.
    actor = ray.remote(num_cpus=0, max_restarts=3, max_task_retries=3, scheduling_strategy=here)(_Preparer)
    return [actor.remote(feed) for _ in range(number)]


class _Preparer:
    """Prepares batches of a feed in a process of its own."""

    def __init__(self, feed: Feed):
        torch.set_num_threads(1)
        os.setpriority(os.PRIO_PROCESS, 0, 19)  # on a machine with few cores the training step goes first
        self.feed = feed

    def batches(self, first: int, end: int, small: bool) -> list[dict[str, np.ndarray]]:
        """As NumPy arrays, which Ray hands over without copying them."""
        found = (self.feed.batch(step, small, part) for step in range(first, end) for part in self.feed.mine)
        return [{key: value.numpy() for key, value in batch.items()} for batch in found]


def _as_tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        images = torch.from_numpy(batch["images"])
    return {"images": images, **{key: torch.tensor(value) for key, value in batch.items() if key != "images"}}
