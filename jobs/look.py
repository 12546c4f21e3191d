"""Say what in the data will hurt a training."""
from __future__ import annotations

import io
import shutil
from pathlib import Path

from jobs.common import job, ray_session


@job("detr look data.path=path/to/coco model.image_size=320")
def main(settings, store: Path) -> dict:
    """Say what in data.path will hurt a training with these settings, and what to change; `train` says it, too."""
    from rich.console import Console

    from pipelines.ingest import source
    from pipelines.look import findings_table, look_at_data
    from pipelines.workflow import data_path, ingest_stage

    source(settings, data_path(settings, store))
    with ray_session(settings):
        data = ingest_stage(settings, store)
    findings = look_at_data(data["folder"], settings)
    text = "Nothing in the data looks as if it would hurt."
    if findings:
        page = Console(file=io.StringIO(), width=shutil.get_terminal_size((120, 24)).columns)
        page.print(findings_table(findings))
        text = page.file.getvalue().rstrip()
    return {"findings": [finding.model_dump() for finding in findings], "text": text}


if __name__ == "__main__":
    main()
