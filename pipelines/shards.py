"""Reading an ingested dataset: its shards and their rows."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
