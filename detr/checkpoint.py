"""Checkpoints anyone can open safely: a folder of safetensors and JSON; official .pth files; fine-tuning.

A folder holds `model.safetensors`, `config.json` (architecture, label map, preprocessing, thresholds) and
`metrics.json`, and rebuilds the model from itself alone.
"""
from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from detr.backbone import RESNETS
from detr.coco_names import COCO_NAMES
from detr.config import ModelConfig
from detr.model import DETR
from detr.segmentation import DETRsegm, build_model

FORMAT = 1
HEAD = ("class_embed.weight", "class_embed.bias")  # with a row for each class
ANCHOR_CLASSES = (  # with a row for each class
    "decoder.label_embed.weight", "decoder.proposals.class_embed.weight", "decoder.proposals.class_embed.bias",
)  # fmt: skip
QUERIES = ("query_embed.weight", "decoder.content", "decoder.anchors")  # with a row for each query


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which and why."""


class DownloadError(CheckpointError):
    """Weights that the network did not give."""


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
    config, settings, state = _read_folder(Path(folder))
    model = build_model(settings)
    _load_exactly(model.state_dict(), state, str(folder))
    return model.eval(), config


def _read_folder(folder: Path) -> tuple[dict[str, Any], ModelConfig, dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a checkpoint folder: it has no {name}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise CheckpointError(f"{folder} was written by a later version (format {config['format']})")
        return config, ModelConfig.model_validate(config["model"]), load_file(folder / "model.safetensors")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------- official files


def load_official(path: Path | str, **settings: Any) -> DETR | DETRsegm:
    """An official DETR file (weights under the key "model"), or one with masks -> the model of the matching preset.

    What the weights show is read off them: the backbone, the sizes, the numbers of layers, classes and queries,
    pre_norm and learned positions. What they do not show (nheads, dilation, dropout, aux_loss) is taken from the
    options that the official training script stores beside them, else as published; keywords of ModelConfig
    override it: a DC5 file has the very weights of a plain one and wants load_official(path, dilation=True).
    Labels are COCO's category ids (`detr.coco_names`).

    Read with weights_only=True. Raises CheckpointError saying which keys are missing, unexpected or of another
    shape, or which setting does not go with them.
    """
    content = _read_pth(path)
    state = _weights(content, path)
    found = _seen_in_weights({k.removeprefix("detr."): v for k, v in state.items()}, path)
    found["masks"] = "detr.class_embed.weight" in state  # with masks the detector is a part
    stored = content.get("args") if isinstance(content, dict) else None
    if isinstance(stored, argparse.Namespace):
        unseen = ("nheads", "dilation", "dropout", "aux_loss")
        found |= {name: value for name, value in vars(stored).items() if name in unseen}
    try:
        config = ModelConfig(**{**found, **settings})
    except ValidationError as error:
        first = error.errors()[0]
        reason = ".".join(map(str, first["loc"])) + " " + first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{path} does not make a DETR: {reason.strip()}") from error
    model = build_model(config)
    _load_exactly(model.state_dict(), state, str(path))
    return model.eval()


def _seen_in_weights(state: dict[str, Tensor], path: Path | str) -> dict[str, Any]:
    """The settings of ModelConfig that official weights show."""
    try:
        heads, queries = list(state["class_embed.weight"].shape), list(state["query_embed.weight"].shape)
    except KeyError as error:
        raise CheckpointError(f"{path} holds no DETR: it has no {error.args[0]}") from error
    if len(heads) != 2 or len(queries) != 2:
        raise CheckpointError(
            f"{path} holds no DETR: class_embed.weight has the shape {heads}, query_embed.weight {queries}"
        )
    blocks = tuple(_count(state, f"backbone.0.body.layer{i}") for i in (1, 2, 3, 4))
    first = [state.get(f"backbone.0.body.layer1.0.conv{i}.weight") for i in (1, 2)]
    looks = blocks, *(x.shape[i] for x, i in zip(first, (-1, 1), strict=True) if x is not None and x.dim() == 4)
    inner = state.get("transformer.decoder.layers.0.linear1.weight")
    return {
        # Where nothing is recognised the published value stands, and loading names what is missing.
        "backbone": next((name for name, look in RESNETS.items() if look == looks), "resnet50"),
        "enc_layers": _count(state, "transformer.encoder.layers"),
        "dec_layers": _count(state, "transformer.decoder.layers") or 6,
        "dim_feedforward": 2048 if inner is None else len(inner),
        "pre_norm": "transformer.encoder.norm.weight" in state,
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "num_classes": heads[0] - 1,
        "hidden_dim": heads[1],
        "num_queries": queries[0],
    }


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """How many modules are numbered under a name."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for match in map(pattern.match, state) if match), default=-1)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file under the key "model" or at its top; no code is run."""
    if Path(path).suffix != ".safetensors":
        return _weights(_read_pth(path), path)
    try:
        return _weights(load_file(path), path)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _read_pth(path: Path | str) -> Any:
    try:
        # The official training script also stores its options; a namespace of plain values runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except Exception as error:
        # PyTorch's own message goes on to advise reading the file unsafely.
        raise CheckpointError(f"{path} cannot be read safely: it is damaged, or holds more than tensors") from error


def _weights(content: Any, path: Path | str) -> dict[str, Tensor]:
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no weights under the key 'model'")
    return {k: v for k, v in state.items() if not _is_counter(k)}


def _load_exactly(own: dict[str, Tensor], state: dict[str, Tensor], where: str) -> None:
    """Copy a state dict into the tensors of another; CheckpointError unless names and shapes agree."""
    problems = [
        f"{word} {_shortened(keys)} ({len(keys)} in all)"
        for word, keys in (
            ("missing", sorted(own.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - own.keys())),
            ("of another shape", sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"the weights of {where} do not fit: {'; '.join(problems)}")
    for key, value in own.items():
        value.copy_(state[key])


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


# ---------------------------------------------------------------- weights to start from


def load_backbone(model: DETR | DETRsegm, source: Path | str) -> str:
    """Load a classifier's weights into the model's ResNet, in place; a sentence that says what was loaded.

    source: "imagenet" (torchvision's IMAGENET1K_V1 of this backbone, downloaded by torchvision) or a file of such
    weights, .pth or .safetensors, whose classification head is left out. Call it on every worker.
    Raises DownloadError when there is no network, CheckpointError when the weights do not fit.
    """
    name = model.config.backbone
    if name not in RESNETS:
        raise CheckpointError(f"the backbone {name!r} has no weights of ImageNet; it starts from random ones")
    state = _imagenet_weights(name) if source == "imagenet" else read_weights(source)
    where = f"{name} of torchvision" if source == "imagenet" else str(source)
    own = {k.partition("backbone.0.body.")[2]: v for k, v in model.state_dict().items() if "backbone.0.body." in k}
    own = {k: v for k, v in own.items() if not _is_counter(k)}
    _load_exactly(own, {k: v for k, v in state.items() if k not in ("fc.weight", "fc.bias")}, where)
    return f"backbone: {len(own)} weights of {where}"


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)["IMAGENET1K_V1"]
    try:
        state = weights.get_state_dict(check_hash=True, weights_only=True, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: what came is not what torchvision published
        raise DownloadError(
            f"the weights of {name} could not be downloaded ({error}); fetch {weights.url} where there is a network "
            f"and give the file instead of 'imagenet': backbone_weights=path/to/{weights.url.rpartition('/')[2]}"
        ) from error
    return _weights(state, weights.url)


def init_from(model: DETR | DETRsegm, path: Path | str, class_names: list[str]) -> str:
    """Fine-tuning: load everything of a checkpoint that fits, in place; a sentence that says what was taken.

    path: a checkpoint folder, or a file of official DETR weights. class_names: of the model's labels, in order.
    A weight is taken where name and shape agree; of a backbone all or nothing. The rows of the class heads and of
    the denoising queries' labels are taken by the names of the classes (case aside), the softmax head's no-object
    row always; a head trained with the other class loss is not taken. Of the queries the first are taken; of
    anchors, which stand on a grid, evenly many from everywhere. All else keeps its initialisation.

    Said as well: settings that differ and that no weight's shape shows. Raises CheckpointError when the checkpoint
    cannot be read, or nothing in it fits.
    """
    state, names, source = _read_source(Path(path))
    class_loss = source.class_loss
    own = {k.removeprefix("detr."): v for k, v in model.state_dict().items()}
    whole = (..., ...)
    taken = {k: whole for k, v in own.items() if k in state and state[k].shape == v.shape}  # rows: own, the source's
    if any(k.startswith("backbone.0.") and k not in taken and not _is_counter(k) for k in own):
        taken = {k: v for k, v in taken.items() if not k.startswith("backbone.0.")}
    said = []

    place = {name.casefold(): i for i, name in reversed(list(enumerate(names or ()))) if name}
    known = [i for i, name in enumerate(class_names) if name.casefold() in place]
    rows = known, [place[class_names[i].casefold()] for i in known]
    if names is not None:
        taken |= dict.fromkeys(_of_like_rows(own, state, ANCHOR_CLASSES), rows)
    if class_loss != model.config.class_loss or not _of_like_rows(own, state, HEAD[:1]):
        taken = {k: v for k, v in taken.items() if k not in HEAD}
    elif names is not None:
        if class_loss == "softmax":
            rows = [*known, len(class_names)], [*rows[1], len(names)]
        taken |= dict.fromkeys(HEAD, rows)
        new = [name for i, name in enumerate(class_names) if i not in known]
        said.append(f"{len(known)} of {len(class_names)} classes by name")
        said += [f"new classes {_shortened(new)}"] if new else []
    for key in _of_like_rows(own, state, QUERIES):
        number, there = len(own[key]), len(state[key])
        first = torch.arange(min(number, there))
        evenly = torch.linspace(0, there - 1, len(first)).round().long()
        taken[key] = first, first if key == "query_embed.weight" else evenly
        if number != there and key != "decoder.anchors":
            said.append(f"{len(first)} of {there} queries for {number}")

    if not taken:
        raise CheckpointError(f"nothing in {path} fits this model")
    for key, (to, rows) in taken.items():
        own[key][to] = state[key][rows].to(own[key].dtype)
    left = sorted(k for k in own.keys() - taken.keys() if not _is_counter(k))
    unused = sorted(state.keys() - taken.keys())
    said.insert(0, f"{len(taken)} of {len(own)} weights")
    said += [f"initialised anew {_shortened(left)} ({len(left)} in all)"] if left else []
    said += [f"not used {_shortened(unused)} ({len(unused)} in all)"] if unused else []
    both = model.config.queries == source.queries == "anchors"
    for key in ("nheads", "pre_norm", *(("levels", "points") if both else ())):  # what no weight's shape shows
        here, there = getattr(model.config, key), getattr(source, key)
        if here != there:
            said.append(f"careful, they were trained with model.{key}={there}, and here it is {here}")
    return f"started from {path}: {'; '.join(said)}"


def _read_source(path: Path) -> tuple[dict[str, Tensor], list[str | None] | None, ModelConfig]:
    """Weights to start from, the names of their labels where they are known, and the model they are of."""
    if path.is_dir():
        config, settings, state = _read_folder(path)
        names = [category["name"] for category in config["categories"]]
    else:
        state, names, settings = read_weights(path), None, None
    state = {k.removeprefix("detr."): v for k, v in state.items()}
    if names is None and len(state.get("class_embed.bias", ())) in (92, 251):
        # Both official label spaces, of boxes and of panoptic segmentation, begin with COCO's ids.
        names = [COCO_NAMES.get(i) for i in range(len(state["class_embed.bias"]) - 1)]
    # A file is an official one: but for what its weights show, as published.
    return state, names, settings or ModelConfig(pre_norm="transformer.encoder.norm.weight" in state)


def _of_like_rows(own: dict[str, Tensor], state: dict[str, Tensor], names: tuple[str, ...]) -> list[str]:
    return [k for k in names if k in own and k in state and own[k].shape[1:] == state[k].shape[1:]]


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
