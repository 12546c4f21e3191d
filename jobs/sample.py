"""Write the built-in COCO dataset."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import job


@click.option("--output", metavar="FOLDER", help="Where to write it; by default into the store.")
@job("detr sample --output digits sample.train=200 sample.val=50")
def main(settings, store: Path, output: str | None) -> dict:
    """Write the built-in dataset: handwritten digits on photographs, as a COCO folder."""
    if output is not None:
        from pipelines.sample import write_sample

        return {**(made := write_sample(settings.sample, Path(output))), "text": made["folder"]}
    from pipelines.workflow import sample_stage

    record = sample_stage(settings, store)
    folder = str(Path(record["folder"]) / record["result"]["folder"])
    return {**record["result"], "folder": folder, "reused": record["reused"], "text": folder}


if __name__ == "__main__":
    main()
