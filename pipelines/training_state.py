"""What a training goes on from after a stop: written as one folder, verified where it was put, and read again."""
from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from detr.checkpoint import save_checkpoint
from detr.model import DETR
from detr.optimizer import MuonAdamW
from pipelines.settings import RunSettings, UserError
from pipelines.stage import write_json
from pipelines.storage import copy_verified, explain

STATE, MODEL = "state.pt", "model"
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of the checkpoints it knows


class Diverged(UserError):
    """Outputs or weights are not finite any more, which would only happen again."""


class StorageError(UserError):
    """A checkpoint could not be stored; it may be better soon."""


@contextmanager
def checkpoint_folder(
    model: DETR, ema: torch.optim.swa_utils.AveragedModel, optimizer: torch.optim.AdamW | MuonAdamW,
    rng: list[dict[str, Any]], progress: dict[str, Any], metrics: dict[str, Any] | None, dataset: dict[str, Any],
    settings: RunSettings,
) -> Iterator[Path]:  # fmt: skip
    """A folder, for as long as it is uploaded, with all of a training's state and the averaged model to detect with.

    rng: of every worker. metrics: of the model on "val", None where that is not known (yet). Raises Diverged for
    weights that are not finite: what is kept is to be good.
    """
    if not all(bool(torch.isfinite(x).all()) for x in model.state_dict().values()):
        raise Diverged(
            f"The weights stopped being finite before step {progress['step']}; the last good checkpoint is kept. Lower "
            f"train.lr (it is {settings.train.lr:g}) or train.clip_max_norm and start again."
        )
    with tempfile.TemporaryDirectory() as place:
        torch.save(
            {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng,
             "progress": progress},
            Path(place) / STATE,
        )  # fmt: skip
        best = (metrics or {}).get("best_f1") or {}
        save_checkpoint(
            Path(place) / MODEL, ema.module, dataset["categories"], score_threshold=best.get("threshold") or 0.5,
            dataset_digest=dataset["digest"],
            trained={"step": progress["step"], "seed": settings.seed,
                     "images_per_step": settings.train.batch_size * settings.train.num_workers},
            metrics={k: v for k, v in (metrics or {}).items() if k != "precision_recall"},
        )  # fmt: skip
        yield Path(place)


def load_state(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU: "model", "ema", "optimizer", "rng" and "progress"."""
    return torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)


def random_state() -> dict[str, Any]:
    """This process' random numbers to come (dropout)."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """As they were when `random_state` was asked for."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def upload(checkpoint, name: str):
    """Ray Train's `checkpoint_upload_fn`: every file is read back. (pyarrow's own copying may fail without a word.)"""
    import ray.train

    storage = ray.train.get_context().get_storage()
    place = storage.build_checkpoint_path_from_name(name)
    try:
        copy_verified(Path(checkpoint.path), storage.storage_filesystem, place)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise StorageError(
            f"A checkpoint could not be stored: {explain(error)} Run the same command to go on from the last one."
        ) from error
    return ray.train.Checkpoint(place, storage.storage_filesystem)


def finish_model(folder: Path, metrics: dict[str, Any]) -> None:
    """Put what its validation found into a checkpoint folder that was written before it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    best = metrics.get("best_f1") or {}
    write_json(folder / "config.json", {**config, "score_threshold": best.get("threshold") or 0.5})
    write_json(folder / "metrics.json", {"format": 1, **{k: v for k, v in metrics.items() if k != "precision_recall"}})


def sweep_orphans(fs: pafs.FileSystem, run: str) -> list[str]:
    """Delete checkpoints in a run's folder that Ray Train does not know: of uploads that were cut off. Their names.

    For a run that is over: a controller that still lives may be about to name them.
    """
    if fs.get_file_info(run).type == pafs.FileType.NotFound:
        return []
    known = ""
    if fs.get_file_info(f"{run}/{SNAPSHOT}").type == pafs.FileType.File:
        with fs.open_input_stream(f"{run}/{SNAPSHOT}") as file:
            known = file.read().decode()
    found = [info for info in fs.get_file_info(pafs.FileSelector(run)) if info.type == pafs.FileType.Directory]
    orphans = [x.base_name for x in found if x.base_name.startswith("checkpoint_") and f'"{x.base_name}"' not in known]
    for name in orphans:
        fs.delete_dir(f"{run}/{name}")
    return sorted(orphans)
