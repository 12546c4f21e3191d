"""Shards -> augmented, padded batches, streamed by Ray Data.

The training images are one endless stream: epoch after epoch, each a permutation of the dataset. Step s
takes the images [s * global batch, (s + 1) * global batch), and worker r of n takes its n-th part. What a
batch holds is a pure function of seed, dataset, step and worker, so that a resumed run sees what a straight
run would have seen, and nothing is dropped at the end of an epoch. Images of like shape share a batch, so that
little of it is padding.
"""
from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from detr.batch import SHAPE_STEP, pad_images
from detr.config import ModelConfig
from detr.transforms import (
    augment_detr,
    augment_light,
    boxes_to_targets,
    decode_image,
    input_size,
    jitter_colour,
    resize_to,
    to_uint8,
)
from pipelines.settings import AugmentSettings
from pipelines.stage import read_json

SHUFFLE_SHARDS = 8  # rows are shuffled among this many shards at a time, so that few are open at once
SEGMENT_BYTES = 2**28  # of pixels prepared ahead, at the most twice
SEGMENT_TASKS = 8  # tasks that prepare a segment


@dataclass(frozen=True)
class Feed:
    """All that decides what worker `rank` of `workers` sees at each step."""

    folder: str
    shards: tuple[str, ...]
    rows: tuple[int, ...]
    model: ModelConfig
    augment: AugmentSettings
    max_pixels: int
    batch_size: int
    seed: int
    rank: int = 0
    workers: int = 1

    @property
    def images(self) -> int:
        """Images per epoch."""
        return sum(self.rows)

    def steps_per_epoch(self) -> float:
        return self.images / (self.batch_size * self.workers)

    def indices(self, step: int) -> list[tuple[int, int]]:
        """(epoch, row of the dataset) of each image of this worker's batch at a step."""
        first = (step * self.workers + self.rank) * self.batch_size
        positions = range(first, first + self.batch_size)
        return [(p // self.images, int(self.order(p // self.images)[p % self.images])) for p in positions]

    def order(self, epoch: int) -> np.ndarray:
        """The dataset's rows in the order of an epoch."""
        return _epoch_order(self.folder, self.shards, self.seed, epoch, self.batch_size * self.workers)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step: `images` uint8 [B, 3, H, W], `sizes` [B, 2] (h, w), `counts` [B], `labels` [T],
        `boxes` [T, 4] (cxcywh in 0..1), `image_ids` [B], `step` [1]."""
        images, labels, boxes, ids = [], [], [], []
        starts = np.cumsum((0, *self.rows))
        for epoch, index in self.indices(step):
            shard = int(np.searchsorted(starts, index, side="right")) - 1
            row = _shard(self.folder, self.shards[shard]).slice(index - int(starts[shard]), 1)
            # Each image draws from a generator of its own: the same whichever worker or task prepares it.
            rng = np.random.default_rng((self.seed, epoch, index))
            image, target = self._prepare(row, rng)
            images.append(image)
            labels.append(target["labels"])
            boxes.append(target["boxes"])
            ids.append(row["image_id"][0].as_py())
        batch, sizes = pad_images(images, SHAPE_STEP)
        return {
            "images": batch,
            "sizes": sizes,
            "counts": torch.tensor([len(x) for x in labels]),
            "labels": torch.cat(labels),
            "boxes": torch.cat(boxes),
            "image_ids": torch.tensor(ids),
            "step": torch.tensor([step]),
        }

    def _prepare(self, row: pa.Table, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        image = decode_image(row["image"][0].as_buffer().to_pybytes(), self.max_pixels)
        target: dict[str, Any] = {
            "boxes": torch.tensor(row["boxes"][0].as_py(), dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(row["labels"][0].as_py(), dtype=torch.int64),
        }
        augment = self.augment
        if augment.recipe == "detr":
            image, target = augment_detr(image, target, rng, self.model.image_max_size)
        else:
            if augment.recipe == "light":
                image, target = augment_light(
                    image, target, rng, horizontal_flip=augment.horizontal_flip,
                    vertical_flip=augment.vertical_flip, scale=augment.scale,
                )  # fmt: skip
            image, target = resize_to(image, target, input_size(self.model, *image.size))
            if augment.recipe == "light" and augment.colour:
                image = jitter_colour(image, rng, augment.colour)  # last: of the fewest pixels
        target["boxes"] = boxes_to_targets(target["boxes"], *image.size)
        return to_uint8(image), target

    def stream(self, first_step: int, last_step: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Batches from a step on, up to last_step or without end, prepared by Ray Data a segment ahead.

        A segment is a dataset of its own, whose execution is over before its first batch is used: an executor that
        lives on beside the training takes the interpreter's lock from it. The first segments are short, so that
        training starts soon.
        """
        import ray

        most = max(2, SEGMENT_BYTES // (3 * self.model.image_max_size**2 * self.batch_size))
        bounds = _segments(first_step, last_step, most)
        with ThreadPoolExecutor(1) as ahead:
            due = ahead.submit(_prepare_segment, self, *next(bounds))
            while due is not None:
                blocks = due.result()
                following = next(bounds, None)
                due = ahead.submit(_prepare_segment, self, *following) if following else None
                for i in range(len(blocks)):
                    block, blocks[i] = ray.get(blocks[i]), None  # used once, then let go
                    for batch in block["batch"]:
                        yield load_tensors(batch.as_py())


def open_feed(
    folder: Path, split: str, model: ModelConfig, augment: AugmentSettings, max_pixels: int, batch_size: int,
    seed: int, rank: int = 0, workers: int = 1,
) -> Feed:  # fmt: skip
    """A feed over a split of an ingested dataset."""
    shards = read_json(folder / "dataset.json")["splits"][split]["shards"]
    return Feed(
        str(folder), tuple(s["path"] for s in shards), tuple(s["rows"] for s in shards), model, augment,
        max_pixels, batch_size, seed, rank, workers,
    )  # fmt: skip


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
def _shard(folder: str, name: str) -> pa.Table:
    # Memory-mapped: what is not used is not read, and workers on one machine share the pages.
    return pq.read_table(Path(folder) / name, columns=["image_id", "image", "boxes", "labels"], memory_map=True)


def _segments(first: int, last: int | None, most: int) -> Iterator[tuple[int, int]]:
    """(first step, step after the last) of one segment after another, growing to `most` steps."""
    steps = max(2, most // 8)
    while last is None or first < last:
        end = first + steps if last is None else min(first + steps, last)
        yield first, end
        first, steps = end, min(most, 2 * steps)


def _prepare_segment(feed: Feed, first: int, end: int) -> list:
    """References to Arrow blocks that hold the batches of these steps, in order, as safetensors bytes."""
    import ray

    chunk = math.ceil((end - first) / SEGMENT_TASKS)

    def prepare(rows: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        torch.set_num_threads(1)
        os.setpriority(os.PRIO_PROCESS, 0, 19)  # on a machine with few cores the training step goes first
        start = first + int(rows["id"][0]) * chunk
        return {"batch": [save_tensors(feed.batch(step)) for step in range(start, min(start + chunk, end))]}

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    tasks = math.ceil((end - first) / chunk)
    # Half of a machine's cores prepare at the most: the steps need the others.
    most = max(1, (os.cpu_count() or 1) // 2 // feed.workers)
    data = ray.data.range(tasks, override_num_blocks=tasks).map_batches(prepare, batch_size=1, concurrency=most)
    return data.to_arrow_refs()
