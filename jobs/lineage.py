"""Say what a result was made from, and what was made from it."""
from __future__ import annotations

import io
import shutil
from pathlib import Path

from jobs.common import job


@job("detr lineage models:/digits@champion", takes_input=True)
def main(settings, store: Path, inputs: list[str]) -> dict:
    """Follow dataset, run, weights, registered version and tables of detections both ways from INPUT.

    INPUT is a dataset's or weights' digest or a run's id (the first characters do), models:/NAME/3,
    models:/NAME@champion, a folder of the store, such as store/predict/KEY, or a checkpoint; by default the champion of
    the store's last dataset.
    """
    from rich.console import Console

    from pipelines.lineage import lineage, lineage_tree
    from pipelines.settings import UserError

    if len(inputs) > 1:
        raise UserError("Say what to follow as one thing: detr lineage models:/NAME@champion.", 2)
    found = lineage(settings, store, inputs[0] if inputs else None)
    page = Console(file=io.StringIO(), markup=False, width=shutil.get_terminal_size((120, 24)).columns)
    page.print(lineage_tree(found), highlight=False)
    for sentence in found["unknown"]:
        page.print(sentence, soft_wrap=True, highlight=False)
    return {**found, "page": page.file.getvalue().rstrip()}


if __name__ == "__main__":
    main()
