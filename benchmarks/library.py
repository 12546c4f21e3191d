"""The transformers library's DETR with our weights and sizes. Imported only where the library is installed."""
from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from detr.config import ModelConfig
from detr.model import DETR

DEPTHS = {"resnet18": ("basic", [2, 2, 2, 2]), "resnet50": ("bottleneck", [3, 4, 6, 3])}


def library_config(config: ModelConfig) -> DetrConfig:
    """The library's configuration of the same model: dropout in all the published places, auxiliary losses on."""
    kind, depths = DEPTHS[config.backbone]
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    return DetrConfig(
        backbone_config=ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=widths, out_features=["stage4"]),
        num_labels=config.num_classes, num_queries=config.num_queries, d_model=config.hidden_dim,
        encoder_layers=config.enc_layers, decoder_layers=config.dec_layers,
        encoder_attention_heads=config.nheads, decoder_attention_heads=config.nheads,
        encoder_ffn_dim=config.dim_feedforward, decoder_ffn_dim=config.dim_feedforward,
        dropout=config.dropout, attention_dropout=config.dropout, activation_dropout=config.dropout,
        auxiliary_loss=True,
    )  # fmt: skip


def library_model(source: DETR) -> DetrForObjectDetection:
    """The library's model with the weights of ours, and the same of them frozen."""
    model = DetrForObjectDetection(library_config(source.config))
    weights = source.state_dict()
    own = model.state_dict()
    state = {}
    for name in own:
        key, part = our_name(name)
        value = weights[key]
        state[name] = value if part is None else value.chunk(3)[part]
    model.load_state_dict(state)
    trains = {name: parameter.requires_grad for name, parameter in source.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[our_name(name)[0]])
    return model


RENAMED = (
    (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
    (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
    (r"^model\.input_projection", "input_proj"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^class_labels_classifier", "class_embed"),
    (r"^bbox_predictor", "bbox_embed"),
    (r"^model\.decoder\.layernorm", "transformer.decoder.norm"),
    (r"^model\.(en|de)coder\.", r"transformer.\1coder."),
    (r"\.self_attn_layer_norm", ".norm1"),
    (r"\.encoder_attn_layer_norm", ".norm2"),
    (r"(transformer\.encoder.*)\.final_layer_norm", r"\1.norm2"),
    (r"(transformer\.decoder.*)\.final_layer_norm", r"\1.norm3"),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"\.mlp\.fc", ".linear"),
    (r"\.o_proj\.", ".out_proj."),
)


def our_name(name: str) -> tuple[str, int | None]:
    """A weight of the library's -> (ours, and which third of it: query, key or value)."""
    found = re.match(r"model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)\.(\w+)$", name)
    if found:
        stage, block, place, leaf = found.groups()
        if place.startswith("shortcut"):
            inner = "downsample.0" if place.endswith("convolution") else "downsample.1"
        else:
            number = int(place.split(".")[1]) + 1
            inner = f"conv{number}" if place.endswith("convolution") else f"bn{number}"
        return f"backbone.0.body.layer{int(stage) + 1}.{block}.{inner}.{leaf}", None
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    found = re.match(r"(.*)\.([qkv])_proj\.(weight|bias)$", name)
    if found:
        return f"{found[1]}.in_proj_{found[3]}", "qkv".index(found[2])
    return name, None


def our_gradients(model: DetrForObjectDetection) -> dict[str, Tensor]:
    """The gradients of the library's model under our names."""
    thirds: dict[str, list[Tensor]] = {}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        key, part = our_name(name)
        if part is None:
            found[key] = parameter.grad
        else:
            thirds.setdefault(key, [parameter.grad] * 3)[part] = parameter.grad
    return found | {key: torch.cat(parts) for key, parts in thirds.items()}


def library_targets(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]


def library_losses(
    logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], config: DetrConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """logits [L, B, Q, C], boxes [L, B, Q, 4] and the library's targets -> (the weighted total, all losses)."""
    total, losses, _ = ForObjectDetectionLoss(
        logits[-1], targets, logits.device, boxes[-1], config, outputs_class=logits, outputs_coord=boxes
    )
    return total, losses
