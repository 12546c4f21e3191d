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
from pipelines.shards import read_split
from pipelines.stage import read_json

SMALL_SHARE = 0.1  # this share of the boxes may be smaller than a cell
MOST_PIXELS = 2.5  # a model sees images at most so many times as wide as its preset has them
SIDE_STEP = 32
QUERIES_PER_OBJECT, QUERIES_STEP, FEWEST_QUERIES, MOST_QUERIES = 2, 10, 30, 500


def fit_to_data(settings: RunSettings, dataset_folder: Path | str) -> tuple[RunSettings, list[str]]:
    """Settings whose model fits an ingested dataset, and what was chosen, in words.

    The number of classes is that of the label map. With `fit.image_size` images are enlarged over the preset's size
    until all but a tenth of the boxes are as large (the root of their area) as a cell of the map that proposals come
    from; with `fit.num_queries` there are two queries to each object of the fullest image. Both switches are off in
    what is returned: a sweep may then try other values. Raises UserError for a backbone that there is not.
    """
    dataset = read_json(Path(dataset_folder) / "dataset.json")
    model, said = settings.model, []
    changes: dict[str, object] = {"model.num_classes": len(dataset["categories"])}
    if settings.fit.num_queries:
        most = max(record["max_objects"] for record in dataset["splits"].values())
        wanted = QUERIES_STEP * math.ceil(QUERIES_PER_OBJECT * most / QUERIES_STEP)
        queries = min(max(wanted, FEWEST_QUERIES), MOST_QUERIES)
        changes["model.num_queries"] = queries
        said.append(f"{queries} queries, for up to {most} objects in an image")
    if settings.fit.image_size:
        try:
            with torch.device("meta"):  # without weights
                cell = build_backbone(model)[0].strides[-min(2, model.levels)]
        except ValueError as error:
            raise UserError(f"model.backbone: {error}.", 2) from error
        train = read_split(dataset_folder, "train", ["width", "height", "boxes"])
        share = _share_of_small(train)
        wanted = cell / share if share else 0
        if not model.upscale:
            wanted = min(wanted, max(pc.max(train["width"]).as_py(), pc.max(train["height"]).as_py()))
        wanted = SIDE_STEP * math.ceil(wanted / SIDE_STEP)
        long = min(max(wanted, model.image_max_size), round(MOST_PIXELS * model.image_max_size))
        short = round(long * model.image_size / model.image_max_size)
        changes |= {"model.image_size": short, "model.image_max_size": long}
        said.append(f"images of up to {long}x{short} pixels" + (
            f", for a tenth of the boxes is smaller than {share:.1%} of the longer side" if share else ""
        ))  # fmt: skip
    return override_settings(settings, changes), said


def _share_of_small(train: pa.Table) -> float:
    """The size, as a share of the image's longer side, that a tenth of the boxes does not reach; 0 without boxes."""
    counts = pc.list_value_length(train["boxes"]).to_numpy()
    flat = train["boxes"]
    while pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        flat = pc.list_flatten(flat)
    boxes = flat.to_numpy().reshape(-1, 4)
    if not len(boxes):
        return 0.0
    long = np.repeat(np.maximum(train["width"].to_numpy(), train["height"].to_numpy()), counts)
    sizes = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)) / long
    return float(np.quantile(sizes, SMALL_SHARE))
