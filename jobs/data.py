"""Show a dataset, and say what in it will hurt a training."""
from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import click

from jobs.common import job, ray_session


@click.option("--split", default="train", show_default=True, help="Of the images in the picture.")
@click.option("--images", type=click.IntRange(0, 200), default=12, show_default=True, help="How many are drawn.")
@click.option("--coco", metavar="FILE", help="Write this split as the COCO file that it was made from, too.")
@click.option("--output", metavar="FILE", help="The picture, a .png or .jpg; by default data.png beside the shards.")
@job("detr data data.path=path/to/coco model.image_size=320 --split val")
def main(settings, store: Path, split: str, images: int, coco: str | None, output: str | None) -> dict:
    """Show what data.path holds: figures, boxes of each class, sizes of boxes, what was rejected and why, and, in a
    picture, images with their boxes (others with another `seed`). Then say what in it will hurt a training with these
    settings, and what to change; `train` says that, too."""
    from rich.console import Console

    from pipelines.describe import describe, description_tables, draw_dataset
    from pipelines.look import findings_table, look_at_data
    from pipelines.settings import UserError
    from pipelines.shards import to_coco
    from pipelines.storage import not_done
    from pipelines.workflow import find_data

    read = find_data(settings, store)
    with ray_session(settings):
        data = read()
    folder = Path(data["folder"])
    shown, findings = describe(folder), look_at_data(folder, settings)
    picture = Path(output) if output else folder / "data.png"
    drawn = draw_dataset(folder, shown, split, images, settings.seed, settings.ingest.max_pixels)
    written = [picture]
    try:
        drawn.save(picture)
        if coco is not None:
            written.append(Path(coco))
            written[-1].write_text(json.dumps(to_coco(folder, split)), encoding="utf-8")
    except OSError as error:
        raise not_done(written[-1], "written", error) from error
    except ValueError as error:  # of Pillow: an extension that it does not know
        raise UserError(f"{written[-1]} cannot be written: {error}.", 2) from error
    page = Console(file=io.StringIO(), markup=False, width=shutil.get_terminal_size((120, 24)).columns)
    for table in description_tables(shown):
        page.print(table)
    page.print(findings_table(findings) if findings else "Nothing in the data looks as if it would hurt.")
    for file in written:
        page.print(str(file), soft_wrap=True, highlight=False)
    return {
        **shown, "findings": [finding.model_dump() for finding in findings], "folder": str(folder),
        "picture": str(picture), "coco": coco, "page": page.file.getvalue().rstrip(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
