"""Anchor boxes as queries, refined layer by layer, and denoising queries for training.

After Liu et al. 2022 (DAB-DETR: anchor boxes as queries), Meng et al. 2021 (Conditional DETR: content and
position side by side in the cross-attention) and Li et al. 2022 (DN-DETR: denoising).
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.attention import MultiheadAttention, merge_heads, split_heads
from detr.boxes import inverse_sigmoid
from detr.config import DenoisingConfig
from detr.position import sine_of_boxes


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, layers: int):
        super().__init__()
        dims = [dim_in] + [dim_hidden] * (layers - 1) + [dim_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


@dataclass
class DenoisingQueries:
    """Noised truth, padded to the same number per image.

    labels [B, P], boxes [B, P, 4] (cxcywh), groups: P = groups * slots; `image`, `query` and `target` [M]
    say which query stands for which of the batch's concatenated targets.
    """

    labels: Tensor
    boxes: Tensor
    groups: int
    image: Tensor
    query: Tensor
    target: Tensor


def make_denoising_queries(
    targets: list[dict[str, Tensor]], config: DenoisingConfig, num_classes: int, generator: torch.Generator
) -> DenoisingQueries | None:
    """`config.groups` noised copies of every image's boxes, or None when the batch has no box.

    Noise is drawn on the CPU from the generator: labels are replaced with probability label_noise; each
    corner moves by up to box_noise times half the box's size.
    """
    counts = [len(t["labels"]) for t in targets]
    slots = max(counts, default=0)
    if slots == 0 or config.groups == 0:
        return None
    device = targets[0]["boxes"].device
    batch, width = len(targets), config.groups * slots
    labels = torch.zeros(batch, width, dtype=torch.long)
    boxes = torch.full((batch, width, 4), 0.5)
    image, query, target = [], [], []
    first = 0
    for i, (count, t) in enumerate(zip(counts, targets, strict=True)):
        truth, names = t["boxes"].cpu().float(), t["labels"].cpu()
        for group in range(config.groups):
            at = group * slots
            flip = torch.rand(count, generator=generator) < config.label_noise
            other = torch.randint(num_classes, (count,), generator=generator)
            move = (torch.rand(count, 4, generator=generator) * 2 - 1) * config.box_noise
            half = truth[:, 2:] / 2
            low = (truth[:, :2] - half + move[:, :2] * half).clamp(0, 1)
            high = (truth[:, :2] + half + move[:, 2:] * half).clamp(0, 1)
            labels[i, at : at + count] = torch.where(flip, other, names)
            boxes[i, at : at + count] = torch.cat([(low + high) / 2, (high - low).clamp(min=1e-3)], 1)
            image.append(torch.full((count,), i))
            query.append(torch.arange(at, at + count))
            target.append(torch.arange(first, first + count))
        first += count
    indices = (torch.cat(parts).to(device) for parts in (image, query, target))
    return DenoisingQueries(labels.to(device), boxes.to(device), config.groups, *indices)


def denoising_mask(num_queries: int, groups: int, slots: int, device: torch.device) -> Tensor:
    """Who may attend to whom in self-attention [P + Q, P + Q], true where allowed, denoising queries first.

    Everybody sees the matched queries; a denoising query also sees its own group.
    """
    group = torch.arange(groups * slots, device=device) // slots
    group = torch.cat([group, torch.full((num_queries,), -1, device=device)])
    return (group[None, :] == -1) | (group[:, None] == group[None, :])


class AnchorDecoderLayer(nn.Module):
    """Self-attention, cross-attention with content and position side by side in each head, feed-forward."""

    def __init__(self, dim: int, heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.self_attn = MultiheadAttention(dim, heads, dropout)
        self.query_content = nn.Linear(dim, dim)
        self.query_position = nn.Linear(dim, dim)
        self.key_content = nn.Linear(dim, dim)
        self.key_position = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tgt: Tensor, query_pos: Tensor, centre: Tensor, memory: Tensor, pos: Tensor,
        mask: Tensor | None, self_mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """tgt, query_pos, centre [B, Q, D] (centre: the anchor's sine encoding, scaled), memory, pos [B, N, D]."""
        x = tgt + query_pos
        tgt = self.norm1(tgt + self.dropout(self.self_attn(x, x, tgt, self_mask)))

        content = split_heads(self.query_content(tgt), self.heads)
        position = split_heads(self.query_position(centre), self.heads)
        query = torch.cat([content, position], dim=-1)
        key_parts = (self.key_content(memory), self.key_position(pos))
        key = torch.cat([split_heads(part, self.heads) for part in key_parts], dim=-1)
        value = split_heads(self.value(memory), self.heads)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tgt = self.norm2(tgt + self.dropout(self.out_proj(merge_heads(x))))

        x = self.linear2(self.dropout(self.linear1(tgt).relu()))
        return self.norm3(tgt + self.dropout(x))


class AnchorDecoder(nn.Module):
    """Decoder whose queries are boxes: each layer looks around its box and moves it."""

    def __init__(
        self, layers: int, dim: int, heads: int, dim_feedforward: int, dropout: float,
        num_queries: int, num_classes: int,
    ):  # fmt: skip
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(
            AnchorDecoderLayer(dim, heads, dim_feedforward, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.content_scale = MLP(dim, dim, dim, 2)  # how the content widens or narrows the position part
        self.box_position = MLP(2 * dim, dim, dim, 2)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.content = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.label_embed = nn.Embedding(num_classes, dim)  # content of denoising queries
        nn.init.normal_(self.label_embed.weight, std=0.02)
        self.anchors = nn.Parameter(inverse_sigmoid(_grid_of_anchors(num_queries)))

    def forward(
        self,
        memory: Tensor,
        pos: Tensor,
        mask: Tensor | None,
        bbox_embed: nn.Module,
        denoising: DenoisingQueries | None,
    ) -> tuple[Tensor, Tensor]:
        """memory and pos [B, N, D] -> (normalised outputs [L, B, P + Q, D], boxes [L, B, P + Q, 4])."""
        batch = memory.shape[0]
        tgt = self.content.expand(batch, -1, -1)
        anchors = self.anchors.sigmoid().expand(batch, -1, -1)
        self_mask = None
        if denoising is not None:
            tgt = torch.cat([self.label_embed(denoising.labels), tgt], 1)
            anchors = torch.cat([denoising.boxes.to(anchors.dtype), anchors], 1)
            slots = denoising.labels.shape[1] // denoising.groups
            self_mask = denoising_mask(len(self.content), denoising.groups, slots, memory.device)
        outputs, boxes = [], []
        for i, layer in enumerate(self.layers):
            sine = sine_of_boxes(anchors, self.dim // 2).to(memory.dtype)
            query_pos = self.box_position(sine)
            centre = sine[..., : self.dim]
            if i > 0:
                centre = centre * self.content_scale(tgt)
            tgt = layer(tgt, query_pos, centre, memory, pos, mask, self_mask)
            normed = self.norm(tgt)
            box = (bbox_embed(normed).float() + inverse_sigmoid(anchors)).sigmoid()
            outputs.append(normed)
            boxes.append(box)
            anchors = box.detach()
        return torch.stack(outputs), torch.stack(boxes)


def _grid_of_anchors(number: int) -> Tensor:
    """Boxes a quarter of the image wide and high, centred on a grid: [number, 4]."""
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    index = torch.arange(number)
    x = (index % columns + 0.5) / columns
    y = (index // columns + 0.5) / rows
    size = torch.full((number,), 0.25)
    return torch.stack([x, y, size, size], 1)
