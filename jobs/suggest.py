"""Say which batch size and learning rate suit this machine."""
from __future__ import annotations

import io
import shutil
from pathlib import Path

from jobs.common import job, ray_session


@job("detr suggest data.path=path/to/coco model=small")
def main(settings, store: Path) -> dict:
    """Measure training steps with growing batches on this machine; say which batch size and learning rate suit it."""
    import torch
    from rich.console import Console

    from pipelines.ingest import source
    from pipelines.suggest import suggest, suggestion_table
    from pipelines.workflow import data_path, ingest_stage

    source(settings, data_path(settings, store))
    with ray_session(settings):
        data = ingest_stage(settings, store)
    use_gpu = torch.cuda.is_available() if settings.train.use_gpu is None else settings.train.use_gpu
    found = suggest(settings, Path(data["folder"]), torch.device("cuda" if use_gpu else "cpu"))
    page = Console(file=io.StringIO(), width=shutil.get_terminal_size((120, 24)).columns)
    page.print(suggestion_table(found))
    command = f"detr train {' '.join(found['settings'])}"
    return {**found, "text": f"{page.file.getvalue().rstrip()}\nSuggested: {command}"}


if __name__ == "__main__":
    main()
