"""What of a model's settings follows from the data: how large it sees the images, and how many queries it has."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from detr.backbone import build_backbone
from pipelines.settings import RunSettings, UserError, override_settings
from pipelines.shards import flat_values, read_split
from pipelines.stage import read_json

SMALL_SHARE = 0.1  # fewer small boxes than one in ten cost less than what larger images cost
LARGEST = 2.5  # a model sees images at most so many times as wide as its preset has them
SIDE_STEP = 32
QUERIES_PER_OBJECT, QUERIES_STEP, FEWEST_QUERIES, MOST_QUERIES = 2, 10, 30, 500


def fit_to_data(settings: RunSettings, dataset_folder: Path | str) -> tuple[RunSettings, list[str]]:
    """Settings whose model fits an ingested dataset, and what was chosen, in words.

    The number of classes is that of the label map. With `fit.image_size` images are shown larger than the preset says
    until all but a tenth of the boxes are as large (the root of their area) as a cell of the map that proposals come
    from, after a first part of the training at the preset's size, unless another is told; with `fit.num_queries` there
    are two queries to each object of the fullest image. Both switches are off in what is returned: a sweep may then try
    other values. Raises UserError for a backbone that there is not.
    """
    dataset = read_json(Path(dataset_folder) / "dataset.json")
    model, said = settings.model, []
    changes: dict[str, object] = {"model.num_classes": len(dataset["categories"])}
    if settings.fit.num_queries:
        most = max(record["max_objects"] for record in dataset["splits"].values())
        wanted = QUERIES_STEP * math.ceil(QUERIES_PER_OBJECT * most / QUERIES_STEP)
        queries = min(max(wanted, FEWEST_QUERIES), MOST_QUERIES)
        changes["model.num_queries"] = queries
        said.append(f"{queries} queries, for {most} objects in the fullest image")
    if settings.fit.image_size:
        try:
            with torch.device("meta"):  # without weights
                cell = build_backbone(model)[0].strides[-min(2, model.levels)]
        except ValueError as error:
            raise UserError(f"model.backbone: {error}.", 2) from error
        ratio = model.image_size / model.image_max_size
        train = read_split(dataset_folder, "train", ["width", "height", "boxes"])
        wanted = _size_for(train, cell, ratio, model.upscale)
        long = SIDE_STEP * math.ceil(min(wanted / ratio, LARGEST * model.image_max_size) / SIDE_STEP)
        long = max(long, model.image_max_size)
        changes |= {"model.image_size": round(long * ratio), "model.image_max_size": long}
        said.append(f"images of up to {long}x{round(long * ratio)} pixels")
        if long > model.image_max_size:
            said[-1] += ", for small boxes"
            if settings.train.first_image_size is None:
                changes["train.first_image_size"] = model.image_size
                share = settings.train.first_share
                said[-1] += f" ({model.image_max_size}x{model.image_size} for {share:.0%} of the time)" * (share > 0)
    return override_settings(settings, changes), said


def _size_for(train: pa.Table, cell: int, ratio: float, upscale: bool) -> float:
    """The model.image_size at which all but a tenth of the boxes are as large as a cell; 0 without boxes.

    ratio: image_size over image_max_size, both of which limit what a model sees. Where nothing is enlarged, no more
    than the largest image has.
    """
    counts = pc.list_value_length(train["boxes"]).to_numpy()
    boxes = flat_values(train["boxes"]).reshape(-1, 4)
    if not len(boxes):
        return 0.0
    sides = np.sort(np.stack([train["width"].to_numpy(), train["height"].to_numpy()]), 0)
    whole = np.maximum(sides[0], sides[1] * ratio)  # model.image_size at which an image is seen as it is
    size = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
    wanted = float(np.quantile(cell / size * np.repeat(whole, counts), 1 - SMALL_SHARE))
    return wanted if upscale else min(wanted, float(whole.max()))
