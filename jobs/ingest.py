"""Check a COCO folder and write it as Parquet shards."""
from __future__ import annotations

from pathlib import Path

from jobs.common import job, ray_session


@job("detr ingest data.path=path/to/coco")
def main(settings, store: Path) -> dict:
    """Check annotations and images of data.path and write Parquet shards, with a table of rejects."""
    from pipelines.ingest import source
    from pipelines.workflow import data_path, ingest_stage

    found = source(settings, data_path(settings, store))  # what is wrong is said before Ray starts
    with ray_session(settings):
        record = ingest_stage(settings, store, found)
    return {**record["result"], "folder": record["folder"], "reused": record["reused"], "text": record["folder"]}


if __name__ == "__main__":
    main()
