"""Anchor boxes as queries, refined layer by layer, and denoising queries for training.

After Liu et al. 2022 (DAB-DETR: anchor boxes as queries), Gao et al. 2021 (SMCA: attention drawn to a place) and
Li et al. 2022 (DN-DETR: denoising).
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from detr.attention import MultiheadAttention
from detr.boxes import inverse_sigmoid
from detr.config import DenoisingConfig, ModelConfig
from detr.position import sine_of_boxes, sine_of_points


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, layers: int):
        super().__init__()
        dims = [dim_in] + [dim_hidden] * (layers - 1) + [dim_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

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
    targets: list[dict[str, Tensor]], config: DenoisingConfig, num_classes: int, generator: torch.Generator,
    device: torch.device | None = None,
) -> DenoisingQueries | None:  # fmt: skip
    """`config.groups` noised copies of every image's boxes, or None when the batch has no box.

    Noise is drawn on the CPU from the generator: labels are replaced with probability label_noise; each
    corner moves by up to box_noise times half the box's size. device: where the queries go, by default where
    the targets are.
    """
    counts = [len(t["labels"]) for t in targets]
    slots = max(counts, default=0)
    if slots == 0 or config.groups == 0:
        return None
    device = device or targets[0]["boxes"].device
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
    """Self-attention, cross-attention drawn to places in and around the query's box, feed-forward.

    Each head looks at a place given in units of the box, with a reach in the same units: the logits of the
    cross-attention lose the squared distance to that place (Gao et al. 2021, SMCA; places as in Zhu et al.
    2021). At the start one head sees the whole image, one the box, and the others its centre and sides.
    """

    def __init__(self, dim: int, heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.self_attn = MultiheadAttention(dim, heads, dropout)
        self.multihead_attn = MultiheadAttention(dim, heads, dropout)
        self.place = nn.Linear(dim, heads * 3)  # x, y and log of the sharpness of every head
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def reset_places(self) -> None:
        """Set every head's place and reach at the start."""
        heads = self.place.out_features // 3
        angle = torch.arange(max(0, heads - 3)) / max(1, heads - 3) * 2 * math.pi
        place = torch.zeros(heads, 3)
        place[:3, 2] = torch.tensor([-3.0, 0.0, 2.0])[:heads]  # far, the box, its centre
        place[3:] = torch.stack([0.4 * angle.cos(), 0.4 * angle.sin(), torch.full_like(angle, 2.0)], 1)
        nn.init.zeros_(self.place.weight)
        with torch.no_grad():
            self.place.bias.copy_(place.flatten())

    def forward(
        self, tgt: Tensor, query_pos: Tensor, anchors: Tensor, memory: Tensor, pos: Tensor, cells: Tensor,
        mask: Tensor, self_mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """tgt, query_pos [B, Q, D], anchors [B, Q, 4], memory, pos [B, N, D], cells from `_cell_features`,
        mask [B, 1, 1, N] true where the memory is not padding -> [B, Q, D]."""
        x = tgt + query_pos
        tgt = self.norm1(tgt + self.dropout(self.self_attn(x, x, tgt, self_mask)))
        place = self.place(tgt).float().unflatten(-1, (-1, 3)).transpose(1, 2)  # [B, heads, Q, 3]
        x = self.multihead_attn(tgt + query_pos, memory + pos, memory, mask, (_pull(place, anchors), cells))
        tgt = self.norm2(tgt + self.dropout(x))
        x = self.linear2(self.dropout(self.linear1(tgt).relu()))
        return self.norm3(tgt + self.dropout(x))


class AnchorDecoder(nn.Module):
    """Decoder whose queries are boxes: each layer looks in and around its box and moves it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dim = dim = config.hidden_dim
        self.layers = nn.ModuleList(
            AnchorDecoderLayer(dim, config.nheads, config.dim_feedforward, config.dropout)
            for _ in range(config.dec_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.box_position = MLP(2 * dim, dim, dim, 2)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.layers:
            layer.reset_places()
        self.content = nn.Parameter(torch.randn(config.num_queries, dim) * 0.02)
        self.label_embed = nn.Embedding(config.num_classes, dim)  # content of denoising queries
        nn.init.normal_(self.label_embed.weight, std=0.02)
        self.anchors = nn.Parameter(inverse_sigmoid(_grid_of_anchors(config.num_queries)))

    def forward(
        self, memory: Tensor, mask: Tensor, centres: Tensor, bbox_embed: nn.Module,
        denoising: DenoisingQueries | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """memory [B, D, h, w], mask [B, h, w] true where padded, centres [B, h * w, 2] of its cells
        -> (normalised outputs [L, B, P + Q, D], boxes [L, B, P + Q, 4])."""
        batch = memory.shape[0]
        pos = sine_of_points(centres, self.dim // 2).to(memory.dtype)
        cells = _cell_features(centres)
        key_mask = ~mask.flatten(1)[:, None, None, :]
        memory = memory.flatten(2).transpose(1, 2)
        tgt = self.content.expand(batch, -1, -1)
        anchors = self.anchors.sigmoid().expand(batch, -1, -1)
        self_mask = None
        if denoising is not None:
            tgt = torch.cat([self.label_embed(denoising.labels), tgt], 1)
            anchors = torch.cat([denoising.boxes.to(anchors.dtype), anchors], 1)
            slots = denoising.labels.shape[1] // denoising.groups
            self_mask = denoising_mask(len(self.content), denoising.groups, slots, memory.device)
        elif self.training:
            tgt = tgt + 0 * self.label_embed.weight.sum()  # every worker's graph holds every parameter
        outputs, boxes = [], []
        for layer in self.layers:
            query_pos = self.box_position(sine_of_boxes(anchors, self.dim // 2).to(memory.dtype))
            tgt = layer(tgt, query_pos, anchors, memory, pos, cells, key_mask, self_mask)
            normed = self.norm(tgt)
            box = (bbox_embed(normed).float() + inverse_sigmoid(anchors)).sigmoid()
            outputs.append(normed)
            boxes.append(box)
            anchors = box.detach()
        return torch.stack(outputs), torch.stack(boxes)


def _cell_features(centres: Tensor) -> Tensor:
    """x², x, y², y, 1 of the cells' centres [B, N, 2], x and y counted from the image's middle: [B, N, 5]."""
    x, y = (centres - 0.5).unbind(-1)
    return torch.stack([x.square(), x, y.square(), y, torch.ones_like(x)], -1)


def _pull(place: Tensor, anchors: Tensor) -> Tensor:
    """What, times `_cell_features`, is minus the sharp squared distance from each head's place in box units.

    place [B, heads, Q, 3] (x, y in units of the box, log sharpness), anchors [B, Q, 4] -> [B, heads, Q, 5].
    """
    size = anchors[:, None, :, 2:].clamp(min=0.02)
    target = anchors[:, None, :, :2] - 0.5 + place[..., :2] * size
    weight = -place[..., 2:].exp() / size.square()  # of each axis' squared distance in the image
    constant = (weight * target.square()).sum(-1)
    (wx, wy), (tx, ty) = weight.unbind(-1), target.unbind(-1)
    return torch.stack([wx, -2 * wx * tx, wy, -2 * wy * ty, constant], -1)


def _grid_of_anchors(number: int) -> Tensor:
    """Boxes a quarter of the image wide and high, centred on a grid: [number, 4]."""
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    index = torch.arange(number)
    x = (index % columns + 0.5) / columns
    y = (index // columns + 0.5) / rows
    size = torch.full((number,), 0.25)
    return torch.stack([x, y, size, size], 1)
