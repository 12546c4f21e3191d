"""A look at the data before training: what in it will hurt, and what to change."""
from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text

from detr.backbone import build_backbone
from detr.config import ModelConfig
from detr.transforms import input_size
from pipelines.alike import find_alike
from pipelines.fit import SMALL_SHARE, fit_to_data
from pipelines.settings import RunSettings, UserError
from pipelines.shards import flat_values, parents, read_split
from pipelines.stage import read_json

# Few-shot benchmarks end at 10 to 30 examples of a class; with fewer, ordinary training hardly finds it.
MIN_IMAGES = 20
# The authors of DETR "had success with 10-15k" images from scratch, and none told of with 2,000 (facebookresearch/detr,
# issue 125); fine-tuning needs far fewer.
MIN_IMAGES_FROM_SCRATCH = 10_000
QUERIES_STEP = 10  # a number of queries is suggested in tens
SHOWN = 5  # examples in a table; a finding has them all
CHANGE_WIDTH = 30  # characters of a table's line that says what to change

COLUMNS = ["file_name", "width", "height", "boxes", "labels", "thumbnail"]


class Finding(BaseModel):
    """Something in the data that will hurt the training, or what is measured of it."""

    model_config = ConfigDict(frozen=True)

    what: str
    which: tuple[str, ...]  # all of them: classes, images or pairs of images
    change: str  # what to do, in words
    settings: tuple[str, ...] = ()  # the same as key=value, where settings do it

    def examples(self) -> str:
        """The first of them."""
        more = len(self.which) - SHOWN
        return "; ".join(self.which[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def look_at_data(dataset_folder: Path | str, settings: RunSettings) -> list[Finding]:
    """What in an ingested dataset will hurt a training with these settings, fitted to it; images are not read.

    Raises UserError where an older version made it, and for a backbone that there is not.
    """
    dataset = read_json(Path(dataset_folder) / "dataset.json")
    settings, _ = fit_to_data(settings, dataset_folder)
    try:
        splits = {split: read_split(dataset_folder, split, COLUMNS) for split in dataset["splits"]}
    except pa.ArrowInvalid as error:
        raise UserError(f"The shards in {dataset_folder} are of an older version; ingest the data anew.", 2) from error
    return [
        *_classes(dataset, splits["train"]),
        *_from_scratch(settings, splits["train"].num_rows),
        *_small_boxes(dataset, splits["train"], settings.model),
        *_queries(splits, settings.model),
        *_lookalikes(splits, settings.gate.max_seen),
    ]


def findings_table(findings: Sequence[Finding]) -> Table:
    """The findings for a terminal."""
    table = Table(title="What in the data will hurt", title_justify="left", show_lines=True)
    table.add_column("what", overflow="fold")
    table.add_column("which", overflow="fold")
    table.add_column("what to change", no_wrap=True)  # a setting is copied: it stays in one line
    for finding in findings:
        change = "\n".join([*textwrap.wrap(finding.change, CHANGE_WIDTH), *finding.settings])
        table.add_row(*(Text(part) for part in (finding.what, finding.examples(), change)))
    return table


def _classes(dataset: dict[str, Any], train: pa.Table) -> Iterator[Finding]:
    """Classes with too few images to learn from."""
    names = [category["name"] for category in dataset["categories"]]
    counts = {split: np.array(record["per_class"]) for split, record in dataset["splits"].items()}
    elsewhere = sum(count for split, count in counts.items() if split != "train")
    absent = counts["train"] == 0
    if never := [name for name, none in zip(names, absent & (elsewhere == 0), strict=True) if none]:
        yield Finding(
            what=f"{_many(len(never), 'class', 'classes')} without a single box",
            which=never,
            change="Take them out of the categories, or look for their annotations: a file may be missing.",
        )
    if unseen := np.flatnonzero(absent & (elsewhere > 0)).tolist():
        yield Finding(
            what=f"{_many(len(unseen), 'class', 'classes')} only in val or test; not learnt, and counted with AP 0",
            which=[
                ", ".join([names[k], *(f"{count[k]} in {split}" for split, count in counts.items() if count[k])])
                for k in unseen
            ],
            change="Move some of their images to train, or take the classes out of the categories.",
        )
    image, labels = parents(train["labels"]), flat_values(train["labels"])
    pairs = np.unique(image * len(names) + labels)
    images = np.bincount(pairs % len(names), minlength=len(names))
    if few := [k for k in np.argsort(images, kind="stable").tolist() if 0 < images[k] < MIN_IMAGES]:
        yield Finding(
            what=f"{_many(len(few), 'class', 'classes')} with fewer than {MIN_IMAGES} training images",
            which=[f"{names[k]}: {_many(int(images[k]), 'image', 'images')}" for k in few],
            change="Label more images of them, or join them with a class that looks alike.",
        )


def _from_scratch(settings: RunSettings, images: int) -> Iterator[Finding]:
    """DETR as published, from random weights, learns nothing from little data."""
    if settings.model.queries == "learned" and not settings.train.init_from and images < MIN_IMAGES_FROM_SCRATCH:
        yield Finding(
            what=f"Learned queries from random weights want {MIN_IMAGES_FROM_SCRATCH:,} training images",
            which=[f"{_many(images, 'image', 'images')} in train"],
            change="Start from trained weights, or take anchors as queries (model=tiny).",
            settings=["train.init_from=detr-r50.pth"],
        )


def _small_boxes(dataset: dict[str, Any], train: pa.Table, model: ModelConfig) -> Iterator[Finding]:
    """Boxes narrower than a cell of the finest feature map, as the model sees them."""
    try:
        with torch.device("meta"):  # without weights
            body = build_backbone(model)[0]
    except ValueError as error:
        raise UserError(f"model.backbone: {error}.", 2) from error
    cell = body.strides[-model.levels if model.queries == "anchors" else -1]
    sizes = np.stack([train["width"].to_numpy(), train["height"].to_numpy()], 1)
    different, which = np.unique(sizes, axis=0, return_inverse=True)
    seen = np.array([input_size(model, *size) for size in different.tolist()])[which]
    boxes, image = flat_values(train["boxes"]).reshape(-1, 4), parents(train["boxes"])
    sides = boxes[:, 2:] - boxes[:, :2]
    small = (sides * (seen / sizes)[image]).min(1) < cell
    # model.image_size, and image_max_size in the same proportion, at which each box is as wide as a cell.
    scale = cell / sides.min(1)
    whole = sizes[image]
    wanted = scale * np.maximum(whole.min(1), whole.max(1) * model.image_size / model.image_max_size)
    reachable = np.where(scale > 1, np.inf, wanted)  # where nothing is enlarged

    def size_for(chosen: np.ndarray) -> tuple[int, bool]:
        """model.image_size for these boxes, and whether smaller images must be enlarged to it."""
        enlarge = model.upscale or math.isinf(_all_but(reachable[chosen]))
        enough = _all_but((wanted if enlarge else reachable)[chosen])
        return cell * math.ceil((enough + 1) / cell), enlarge

    labels = flat_values(train["labels"])
    total = np.bincount(labels, minlength=len(dataset["categories"]))
    narrow = np.bincount(labels[small], minlength=len(total))
    order = np.argsort(-narrow, kind="stable").tolist()
    found = [k for k in order if narrow[k] and narrow[k] >= SMALL_SHARE * total[k]]
    if not found:
        return
    size, enlarge = size_for(np.isin(labels, found))
    settings = [
        f"model.image_size={size}",
        f"model.image_max_size={math.ceil(size * model.image_max_size / model.image_size)}",
    ]
    names = [category["name"] for category in dataset["categories"]]
    yield Finding(
        what=f"Boxes narrower than {cell} pixels, a cell of the feature map, at the model's input size",
        which=[
            f"{names[k]}: {narrow[k] / total[k]:.0%} of {_many(int(total[k]), 'box', 'boxes')}, "
            f"wants image_size {size_for(labels == k)[0]}"
            for k in found
        ],
        change="Show the model larger images, which takes memory and time, or cut the images into tiles.",
        settings=settings + ["model.upscale=true"] * (enlarge and not model.upscale),
    )


def _queries(splits: dict[str, pa.Table], model: ModelConfig) -> Iterator[Finding]:
    """Images with more objects than there are queries to find them."""
    found = []
    for split, table in splits.items():
        counts = pc.list_value_length(table["labels"]).to_numpy()
        for row in np.flatnonzero(counts > model.num_queries).tolist():
            found.append((int(counts[row]), table["file_name"][row].as_py(), split))
    if found:
        found.sort(key=lambda image: -image[0])
        queries = QUERIES_STEP * (found[0][0] // QUERIES_STEP + 1)
        yield Finding(
            what=f"{_many(len(found), 'image', 'images')} with more objects than the {model.num_queries} queries",
            which=[f"{name} ({split}): {count} objects" for count, name, split in found],
            change="Take more queries than any image has objects.",
            settings=[f"model.num_queries={queries}"],
        )


def _lookalikes(splits: dict[str, pa.Table], max_seen: float) -> Iterator[Finding]:
    """Nearly the same image in two splits; of train and val more than max_seen is what the gate refuses a model for."""
    looks = {split: _thumbnails(table["thumbnail"]) for split, table in splits.items()}
    for first, second in combinations(splits, 2):
        names, others = splits[second]["file_name"], splits[first]["file_name"]
        found = [
            f"{names[i].as_py()} and {others[int(near[0])].as_py()}"
            for i, near in enumerate(find_alike(looks[second], looks[first]))
            if len(near)
        ]
        share = len(found) / max(1, len(names))
        what, change = "", ""
        if (first, second) == ("train", "val") and share > max_seen:
            what = f", and the gate will refuse the model (more than gate.max_seen={max_seen:g} of them)"
            change = f" Or accept that AP is too high: gate.max_seen={math.ceil(100 * share) / 100:g}."
        if found:
            yield Finding(
                what=f"{len(found):,} of {_many(len(names), 'image', 'images')} of {second} nearly the same as one of "
                f"{first}; its AP comes out too high{what}",
                which=found,
                change=f"Keep images of the same scene in one split: move one of each pair, or take it out.{change}",
            )


def _thumbnails(column: pa.ChunkedArray) -> np.ndarray:
    """uint8 [N, 64]."""
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(len(column), -1)


def _all_but(wanted: np.ndarray) -> float:
    """The size that satisfies all but fewer than SMALL_SHARE of the boxes."""
    spared = math.ceil(SMALL_SHARE * len(wanted)) - 1
    return float(np.sort(wanted)[len(wanted) - 1 - spared])


def _many(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
