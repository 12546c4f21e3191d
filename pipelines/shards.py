"""Reading an ingested dataset: its shards and their rows."""
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.coco import image_record, to_record
from pipelines.settings import UserError
from pipelines.stage import read_json


def split_shards(dataset_folder: Path | str, split: str) -> list[str]:
    """Paths of the Parquet shards of a split. Raises UserError where there is no dataset or no such split."""
    folder = Path(dataset_folder)
    if not (folder / "dataset.json").is_file():
        raise UserError(f"{folder} holds no dataset.json; make a dataset with the ingest command.", 2)
    splits = read_json(folder / "dataset.json")["splits"]
    if split not in splits:
        raise UserError(f"The dataset in {folder} has no split {split!r}; it has {', '.join(splits)}.", 2)
    return [str(folder / shard["path"]) for shard in splits[split]["shards"]]


def read_split(dataset_folder: Path | str, split: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a split, in order of image_id; columns None reads them all, the images too. Raises UserError."""
    return pa.concat_tables([pq.read_table(shard, columns=columns) for shard in split_shards(dataset_folder, split)])


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a column of lists, however deep."""
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = pc.list_flatten(column)
    return column.to_numpy()


def parents(column: pa.ChunkedArray) -> np.ndarray:
    """The row of each item of a column of lists."""
    return np.repeat(np.arange(len(column)), pc.list_value_length(column).to_numpy())


def to_coco(dataset_folder: Path | str, split: str) -> dict[str, Any]:
    """A split as the COCO file it was made from: images, annotations and all else that the file held.

    Rejected images and annotations are in it, too; images come in order of id, an image's annotations in the file's
    order. Segmentations are there if the ingest kept them (`ingest.segmentation`). Raises UserError where there is no
    such split, or an older version made the dataset.
    """
    shards, folder = split_shards(dataset_folder, split), Path(dataset_folder)
    columns = ["image_id", "file_name", "width", "height", "annotations", "extra", "segmentations", "extras", "absent"]
    images, annotations = [], []
    try:
        for shard in shards:
            for row in pq.read_table(shard, columns=columns).to_pylist():
                images.append(image_record({**row, "id": row["image_id"]}))
                more = zip(row["segmentations"], row["extras"], row["absent"], strict=True)
                for annotation, (segmentation, extra, absent) in zip(row["annotations"], more, strict=True):
                    annotation |= {"segmentation": segmentation, "extra": extra, "absent": absent}
                    annotations.append(to_record(annotation, row["image_id"]))
        rejects = pq.read_table(folder / "rejects.parquet", columns=["split", "record"]).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"The shards in {folder} are of an older version; ingest the data anew.", 2) from error
    for record in (json.loads(row["record"]) for row in rejects if row["split"] == split and row["record"]):
        if "image" in record:
            images.append(record["image"])
            annotations += record["annotations"]
        else:
            annotations.append(record)
    images.sort(key=lambda image: image["id"])
    document = json.loads(read_json(folder / "dataset.json")["splits"][split]["document"])
    return {**document, "images": images, "annotations": annotations}


def count_rejects(dataset_folder: Path | str) -> list[dict[str, Any]]:
    """How many images and annotations were rejected for each reason, the commonest first.

    [{"split", "kind": "image" or "annotation", "reason", "count"}, ...]
    """
    path = Path(dataset_folder) / "rejects.parquet"
    if not path.is_file():
        return []
    rows = pq.read_table(path, columns=["split", "annotation_id", "reason"]).to_pylist()
    kinds = Counter(
        (row["split"], "image" if row["annotation_id"] is None else "annotation", row["reason"]) for row in rows
    )
    return [{**dict(zip(("split", "kind", "reason"), key, strict=True)), "count": n} for key, n in kinds.most_common()]
