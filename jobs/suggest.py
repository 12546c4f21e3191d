"""Say which batch size and learning rate suit this machine."""
from __future__ import annotations

import io
import shutil
from pathlib import Path

from jobs.common import job, ray_session


@job("detr suggest data.path=path/to/coco model=small")
def main(settings, store: Path) -> dict:
    """Measure training steps with growing batches on this machine; say which batch size and learning rate suit it."""
    from rich.console import Console

    from pipelines.suggest import suggest, suggestion_table
    from pipelines.train import uses_gpu
    from pipelines.workflow import find_data

    read = find_data(settings, store)
    with ray_session(settings):
        data = read()
        advice = suggest(settings, Path(data["folder"]), uses_gpu(settings))
    page = Console(file=io.StringIO(), width=shutil.get_terminal_size((120, 24)).columns)
    page.print(suggestion_table(advice))
    lines = [page.file.getvalue().rstrip(), advice["note"], f"Add to your command: {' '.join(advice['settings'])}"]
    return {**advice, "page": "\n".join(line for line in lines if line)}


if __name__ == "__main__":
    main()
