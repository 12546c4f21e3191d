"""Checkpoints anyone can open safely: a folder of safetensors and JSON; official .pth files; fine-tuning.

A folder holds `model.safetensors`, `config.json` (architecture, label map, preprocessing, thresholds) and
`metrics.json`, and rebuilds the model from itself alone.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from detr.config import PRESETS, ModelConfig
from detr.model import DETR
from detr.segmentation import DETRsegm, build_model

FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which and why."""


def save_checkpoint(
    folder: Path | str,
    model: DETR | DETRsegm,
    categories: list[dict[str, Any]],
    *,
    score_threshold: float = 0.5,
    dataset_digest: str | None = None,
    trained: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> None:
    """Write the model and what is needed to use it: categories ({"id", "name"} in label order) and threshold."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "format": FORMAT,
        "model": model.config.model_dump(mode="json"),
        "categories": categories,
        "score_threshold": score_threshold,
        "dataset_digest": dataset_digest,
        "trained": trained or {},
    }
    for name, value in (("config.json", config), ("metrics.json", {"format": FORMAT, **(metrics or {})})):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def load_checkpoint(folder: Path | str) -> tuple[DETR | DETRsegm, dict[str, Any]]:
    """A checkpoint folder -> (the model, ready to detect; its config.json).

    Raises CheckpointError when a file is missing, damaged, from a later version, or does not fit.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a checkpoint folder: it has no {name}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise CheckpointError(f"{folder} was written by a later version (format {config['format']})")
        model = build_model(ModelConfig.model_validate(config["model"]))
        state = load_file(folder / "model.safetensors")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {' '.join(str(error).split())}") from error
    _load_exactly(model, state, str(folder))
    return model.eval(), config


def load_official(path: Path | str) -> DETR | DETRsegm:
    """An official DETR .pth (weights under the key "model"), or one with masks -> the model of the matching preset.

    Read with weights_only=True. Raises CheckpointError saying which keys are missing, unexpected or of
    another shape. DC5 has the same weights as its plain model; set `dilation` on the configuration for it.
    """
    state = read_pth(path)
    detr = "detr." if "detr.class_embed.weight" in state else ""  # with masks the detector is a part
    preset = "detr_resnet101" if f"{detr}backbone.0.body.layer3.22.conv1.weight" in state else "detr_resnet50"
    try:
        heads, queries = (list(state[f"{detr}{name}_embed.weight"].shape) for name in ("class", "query"))
        classes, hidden = heads
        config = ModelConfig(
            **{**PRESETS[preset], "num_classes": classes - 1, "hidden_dim": hidden, "num_queries": queries[0]},
            masks=bool(detr),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} holds no DETR: it has no {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} holds no DETR: class_embed.weight has the shape {heads}, query_embed.weight {queries}"
        ) from error
    model = build_model(config)
    _load_exactly(model, state, str(path))
    return model.eval()


def read_pth(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a .pth file, under the key "model" or at its top; no code in it is run."""
    try:
        # The official training script also stores its options; a namespace of plain values runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except Exception as error:
        # PyTorch's own message goes on to advise reading the file unsafely.
        raise CheckpointError(f"{path} cannot be read safely: it is damaged, or holds more than tensors") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no weights under the key 'model'")
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def fit_weights(model: DETR, state: dict[str, Tensor]) -> list[str]:
    """Load every weight whose name and shape agree, in place; the names left out, for the user to read."""
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def _load_exactly(model: DETR | DETRsegm, state: dict[str, Tensor], where: str) -> None:
    own = model.state_dict()
    problems = [
        f"{word} {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''} ({len(keys)} in all)"
        for word, keys in (
            ("missing", sorted(own.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - own.keys())),
            ("of another shape", sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"the weights of {where} do not fit: {'; '.join(problems)}")
    model.load_state_dict(state)
