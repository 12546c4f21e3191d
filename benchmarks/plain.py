"""A straightforward reading of the DETR paper, to measure against: no thought was given to its speed.

Its weights have the names of `detr`'s, so that both compute the same from one state dict.
"""
from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import box_convert, generalized_box_iou
from torchvision.ops.misc import FrozenBatchNorm2d

from detr.config import LossConfig, ModelConfig


class Backbone(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        net = get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)
        for key, parameter in net.named_parameters():
            parameter.requires_grad_(key.startswith(("layer2", "layer3", "layer4")))
        self.num_channels = net.fc.in_features
        self.body = IntermediateLayerGetter(net, {"layer4": "last"})

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)["last"]


def sine_positions(mask: Tensor, dim: int) -> Tensor:
    """mask [B, h, w] -> [B, 2 * dim, h, w]."""
    frequency = 10000 ** (2 * (torch.arange(dim, device=mask.device) // 2) / dim)
    parts = []
    for axis in (1, 2):
        place = (~mask).cumsum(axis, dtype=torch.float32)
        last = place[:, -1:, :] if axis == 1 else place[:, :, -1:]
        angle = (place / (last + 1e-6) * 2 * math.pi)[..., None] / frequency
        parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(3))
    return torch.cat(parts, 3).permute(0, 3, 1, 2)


class EncoderLayer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(c.hidden_dim, c.nheads, c.dropout)
        self.linear1, self.linear2 = (
            nn.Linear(c.hidden_dim, c.dim_feedforward),
            nn.Linear(c.dim_feedforward, c.hidden_dim),
        )
        self.norm1, self.norm2 = nn.LayerNorm(c.hidden_dim), nn.LayerNorm(c.hidden_dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, pos: Tensor, padding: Tensor) -> Tensor:
        """x and pos [N, B, D], padding [B, N]."""
        q = k = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(q, k, x, key_padding_mask=padding)[0]))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DecoderLayer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(c.hidden_dim, c.nheads, c.dropout)
        self.multihead_attn = nn.MultiheadAttention(c.hidden_dim, c.nheads, c.dropout)
        self.linear1, self.linear2 = (
            nn.Linear(c.hidden_dim, c.dim_feedforward),
            nn.Linear(c.dim_feedforward, c.hidden_dim),
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c.hidden_dim) for _ in range(3))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, pos: Tensor, padding: Tensor) -> Tensor:
        """x and queries [Q, B, D], memory and pos [N, B, D], padding [B, N]."""
        q = k = x + queries
        x = self.norm1(x + self.dropout(self.self_attn(q, k, x)[0]))
        seen = self.multihead_attn(x + queries, memory + pos, memory, key_padding_mask=padding)[0]
        x = self.norm2(x + self.dropout(seen))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class PlainDETR(nn.Module):
    """The paper's detector: sine positions, post-norm, learned queries, losses after every decoder layer."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.backbone = nn.Sequential(Backbone(c.backbone))
        self.input_proj = nn.Conv2d(self.backbone[0].num_channels, c.hidden_dim, 1)
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = nn.Module(), nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.enc_layers))
        self.transformer.decoder.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.dec_layers))
        self.transformer.decoder.norm = nn.LayerNorm(c.hidden_dim)
        self.query_embed = nn.Embedding(c.num_queries, c.hidden_dim)
        self.class_embed = nn.Linear(c.hidden_dim, c.num_classes + 1)
        self.bbox_embed = nn.Module()
        widths = [c.hidden_dim] * 3 + [4]
        self.bbox_embed.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, images: Tensor, mask: Tensor) -> dict:
        features = self.backbone(images)
        mask = F.interpolate(mask[None].float(), size=features.shape[-2:])[0].bool()
        pos = sine_positions(mask, self.config.hidden_dim // 2).to(features.dtype)
        x, pos = (t.flatten(2).permute(2, 0, 1) for t in (self.input_proj(features), pos))
        padding = mask.flatten(1)
        for layer in self.transformer.encoder.layers:
            x = layer(x, pos, padding)
        queries = self.query_embed.weight[:, None].repeat(1, images.shape[0], 1)
        y, outputs = torch.zeros_like(queries), []
        for layer in self.transformer.decoder.layers:
            y = layer(y, queries, x, pos, padding)
            outputs.append(self.transformer.decoder.norm(y))
        hs = torch.stack(outputs).transpose(1, 2)
        logits, boxes = self.class_embed(hs), hs
        for layer in self.bbox_embed.layers[:-1]:
            boxes = F.relu(layer(boxes))
        boxes = self.bbox_embed.layers[-1](boxes).sigmoid()
        out = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        layers = zip(logits[:-1], boxes[:-1], strict=True)
        return {**out, "aux_outputs": [{"pred_logits": a, "pred_boxes": b} for a, b in layers]}


def corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


@torch.no_grad()
def match(outputs: dict, targets: list[dict], weights: LossConfig) -> list[tuple[Tensor, Tensor]]:
    """One layer's outputs -> (queries, targets) of every image, from one matrix of all queries and all targets."""
    batch, queries = outputs["pred_logits"].shape[:2]
    probability, boxes = outputs["pred_logits"].flatten(0, 1).softmax(-1), outputs["pred_boxes"].flatten(0, 1)
    labels, truth = torch.cat([t["labels"] for t in targets]), torch.cat([t["boxes"] for t in targets])
    cost = (
        weights.cost_bbox * torch.cdist(boxes, truth, p=1)
        - weights.cost_class * probability[:, labels]
        - weights.cost_giou * generalized_box_iou(corners(boxes), corners(truth))
    )
    parts = cost.view(batch, queries, -1).cpu().split([len(t["labels"]) for t in targets], -1)
    pairs = [linear_sum_assignment(part[i]) for i, part in enumerate(parts)]
    return [(torch.as_tensor(q), torch.as_tensor(t)) for q, t in pairs]


def layer_losses(outputs: dict, targets: list[dict], weights: LossConfig, num_boxes: float) -> dict[str, Tensor]:
    """The losses of one layer, and the errors that are logged beside them."""
    logits, device = outputs["pred_logits"], outputs["pred_logits"].device
    pairs = match(outputs, targets, weights)
    image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
    query = torch.cat([q for q, _ in pairs])
    labels = torch.cat([t["labels"][j.to(device)] for t, (_, j) in zip(targets, pairs, strict=True)])
    truth = torch.cat([t["boxes"][j.to(device)] for t, (_, j) in zip(targets, pairs, strict=True)])

    none = logits.shape[-1] - 1
    classes = torch.full(logits.shape[:2], none, device=device)
    classes[image, query] = labels
    weight = torch.ones(none + 1, device=device)
    weight[none] = weights.eos_coef
    predicted = outputs["pred_boxes"][image, query]
    giou = torch.diag(generalized_box_iou(corners(predicted), corners(truth)))
    with torch.no_grad():
        right = (logits[image, query].argmax(-1) == labels).float()
        counts = torch.tensor([len(t["labels"]) for t in targets], device=device)
        found = (logits.argmax(-1) != none).sum(1)
    return {
        "loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, weight),
        "loss_bbox": F.l1_loss(predicted, truth, reduction="none").sum() / num_boxes,
        "loss_giou": (1 - giou).sum() / num_boxes,
        "class_error": 100 - 100 * right.sum() / max(len(right), 1),
        "cardinality_error": F.l1_loss(found.float(), counts.float()),
    }


def plain_losses(outputs: dict, targets: list[dict], weights: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(the weighted total, all losses under their official names), layer after layer."""
    total = torch.tensor([float(sum(len(t["labels"]) for t in targets))], device=outputs["pred_logits"].device)
    num_boxes = total.clamp(min=1).item()
    losses = layer_losses(outputs, targets, weights, num_boxes)
    for i, layer in enumerate(outputs.get("aux_outputs", [])):
        losses |= {f"{name}_{i}": value for name, value in layer_losses(layer, targets, weights, num_boxes).items()}
    factors = {"loss_ce": weights.loss_ce, "loss_bbox": weights.loss_bbox, "loss_giou": weights.loss_giou}
    return sum(v * factors["_".join(k.split("_")[:2])] for k, v in losses.items() if k.startswith("loss")), losses
