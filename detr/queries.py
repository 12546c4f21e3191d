"""Anchor boxes as queries, refined layer by layer, and denoising queries for training.

After Liu et al. 2022 (DAB-DETR: anchor boxes as queries), Zhu et al. 2021 (Deformable DETR: attention to a few places,
the best of dense proposals as anchors) and Li et al. 2022 (DN-DETR: denoising).
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.attention import MultiheadAttention
from detr.boxes import inverse_sigmoid
from detr.config import DenoisingConfig, ModelConfig
from detr.memory import run
from detr.position import cell_centres, sine_of_boxes

MOST_DENOISING = 400  # queries of an image, where one group has no more
NO_SCORE, FAR = -20.0, 10.0  # the logit and the box' coordinates of a proposal that is none


class Pyramid(NamedTuple):
    """Maps of one image batch at several strides, coarse to fine."""

    strides: tuple[int, ...]
    maps: list[Tensor]  # [B, D, h, w] each, zero where padded
    sizes: Tensor  # [B, 2], width and height of the images in pixels


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

    labels [B, P], boxes [B, P, 4] (cxcywh), real [B, P] (false where padded), P a multiple of groups; `image`, `query`
    and `target` [M] say which query stands for which of the batch's concatenated targets; others are to find nothing.
    """

    labels: Tensor
    boxes: Tensor
    real: Tensor
    groups: int
    image: Tensor
    query: Tensor
    target: Tensor


def make_denoising_queries(
    targets: list[dict[str, Tensor]], config: DenoisingConfig, num_classes: int,
    generators: Iterable[torch.Generator], most: int = 0,
) -> DenoisingQueries | None:  # fmt: skip
    """`config.groups` noised copies of every image's boxes, or None when the batch has no box.

    Fewer where that would make more queries than MOST_DENOISING for an image; one copy always. most: boxes of the
    fullest image anywhere in the step, where that is none of these, so that all workers make as many copies.
    Noise is drawn on the CPU, each image's from a generator of its own: labels are replaced with probability
    label_noise; each corner moves by up to box_noise times half the box's size, those of negatives by once to twice as
    much. Nothing is copied back from the targets' device.
    """
    counts = [len(t["labels"]) for t in targets]
    slots = max(counts, default=0)
    if slots == 0 or config.groups == 0:
        return None
    device = targets[0]["boxes"].device
    width = slots * (1 + config.negatives)
    groups = min(config.groups, max(1, MOST_DENOISING // (max(slots, most) * (1 + config.negatives))))
    drawn, positives = [], []
    first = made = 0
    for i, (count, generator) in enumerate(zip(counts, generators, strict=False)):
        for start in range(0, groups * width, slots):
            negative = config.negatives and start % width > 0
            flip = torch.rand(count, generator=generator) < config.label_noise
            other = torch.randint(num_classes, (count,), generator=generator)
            move = (torch.rand(count, 4, generator=generator) * 2 - 1) * config.box_noise
            move = move + move.sign() * config.box_noise * negative
            slot = torch.arange(count)
            drawn.append((flip, other, move, torch.full((count,), i), start + slot, first + slot))
            positives += [] if negative else [made + slot]
            made += count
        first += count
    columns = [*zip(*drawn, strict=True), positives]
    flip, other, move, image, query, target, positive = (torch.cat(x).to(device) for x in columns)

    truth = torch.cat([t["boxes"] for t in targets]).float()[target]
    half = truth[:, 2:] / 2
    low = (truth[:, :2] - half + move[:, :2] * half).clamp(0, 1)
    high = (truth[:, :2] + half + move[:, 2:] * half).clamp(0, 1)
    labels = torch.zeros(len(targets), groups * width, dtype=torch.long, device=device)
    boxes = torch.full((*labels.shape, 4), 0.5, device=device)
    labels[image, query] = torch.where(flip, other, torch.cat([t["labels"] for t in targets])[target])
    boxes[image, query] = torch.cat([(low + high) / 2, (high - low).clamp(min=1e-3)], 1)
    real = torch.zeros_like(labels, dtype=torch.bool)
    real[image, query] = True
    return DenoisingQueries(labels, boxes, real, groups, image[positive], query[positive], target[positive])


def denoising_mask(num_queries: int, denoising: DenoisingQueries) -> Tensor:
    """Who may attend to whom in self-attention [B, 1, P + Q, P + Q], true where allowed, denoising queries first.

    Everybody sees the matched queries; a denoising query also sees its own group, as far as it is no padding.
    """
    slots = denoising.real.shape[1] // denoising.groups
    group = torch.arange(denoising.real.shape[1], device=denoising.real.device) // slots
    group = F.pad(group, (0, num_queries), value=-1)
    allowed = (group[None, :] == -1) | (group[:, None] == group[None, :])
    return (allowed & F.pad(denoising.real, (0, num_queries), value=True)[:, None])[:, None]


class DeformableAttention(nn.Module):
    """Each head of a query looks at a few places in and around the query's box, on every map.

    After Zhu et al. 2021 (Deformable DETR): places, in units of the box, and their shares come from the query. As in
    Peng et al. 2024 (D-FINE) heads take their channels from the maps as they are, without a projection.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.places = nn.Linear(dim, heads * levels * points * 2)
        self.shares = nn.Linear(dim, heads * levels * points)
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def reset_places(self) -> None:
        """Every head looks along a ray of its own, from the box's centre to its border; all shares are equal."""
        angle = torch.arange(self.heads) / self.heads * 2 * math.pi
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        places = 0.5 * ray[:, None, None] * (torch.arange(1, self.points + 1) / self.points)[:, None]
        for linear in (self.places, self.shares):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.places.bias.copy_(places.expand(-1, self.levels, -1, -1).flatten())

    def forward(self, query: Tensor, boxes: Tensor, pyramid: Pyramid) -> Tensor:
        """query [B, Q, D], boxes [B, Q, 4] (cxcywh in 0..1) -> [B, Q, D]."""
        places, shares = self.look(query, boxes, pyramid.sizes)
        read = []
        for level, (stride, x) in enumerate(zip(pyramid.strides, pyramid.maps, strict=True)):
            channels = x.unflatten(1, (self.heads, -1)).flatten(0, 1)  # [B * heads, d, h, w]
            whole = torch.tensor([x.shape[3] * stride, x.shape[2] * stride], device=x.device)
            grid = (places[:, :, :, level] / whole * 2 - 1).transpose(1, 2).flatten(0, 1)  # [B * heads, Q, points, 2]
            read.append(F.grid_sample(channels.to(grid.dtype), grid, align_corners=False))
        shares = shares.transpose(1, 2).flatten(3).flatten(0, 1)[:, None]  # [B * heads, 1, Q, levels * points]
        x = (torch.cat(read, -1) * shares).sum(-1).unflatten(0, (-1, self.heads))  # [B, heads, d, Q]
        return self.out_proj(x.flatten(1, 2).transpose(1, 2).to(query.dtype))

    def look(self, query: Tensor, boxes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Where every head looks: places [B, Q, heads, levels, points, 2] (x, y in pixels), and their shares."""
        shares = self.shares(query).unflatten(-1, (self.heads, -1))
        shares = shares.to(boxes.dtype).softmax(-1).unflatten(-1, (self.levels, self.points))
        places = self.places(query).unflatten(-1, (self.heads, self.levels, self.points, 2)).to(boxes.dtype)
        boxes = boxes[:, :, None, None, None]
        return (boxes[..., :2] + places * boxes[..., 2:]) * sizes[:, None, None, None, None], shares


class AnchorDecoderLayer(nn.Module):
    """Self-attention, cross-attention to places in and around the query's box, feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, heads, dropout = config.hidden_dim, config.nheads, config.dropout
        self.self_attn = MultiheadAttention(dim, heads, dropout)
        self.cross_attn = DeformableAttention(dim, heads, config.levels, config.points)
        self.linear1 = nn.Linear(dim, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tgt: Tensor, query_pos: Tensor, anchors: Tensor, pyramid: Pyramid, self_mask: Tensor | None
    ) -> Tensor:
        """tgt, query_pos [B, Q, D], anchors [B, Q, 4] -> [B, Q, D]."""
        x = tgt + query_pos
        tgt = self.norm1(tgt + self.dropout(self.self_attn(x, x, tgt, self_mask)))
        tgt = self.norm2(tgt + self.dropout(self.cross_attn(tgt + query_pos, anchors, pyramid)))
        x = self.linear2(self.dropout(self.linear1(tgt).relu()))
        return self.norm3(tgt + self.dropout(x))


class Proposals(nn.Module):
    """A box and class scores for every cell of a map; the best become the decoder's anchors ("two-stage").

    After Zhu et al. 2021 (Deformable DETR). As in Zhang et al. 2022 (DINO, mixed query selection) the boxes alone
    are taken: what a query starts with stays learned.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, self.number = config.hidden_dim, config.num_queries
        self.class_embed = nn.Linear(dim, config.num_classes)
        nn.init.constant_(self.class_embed.bias, -math.log(99))
        self.bbox_embed = MLP(dim, dim, 4, 3)
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)

    def forward(self, stride: int, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A map [B, D, h, w] and the images' sizes [B, 2] -> (logits [B, N, C], boxes [B, N, 4], anchors [B, Q, 4]).

        A box starts at its cell's centre, four cells wide and high. Cells in padding have no score, and boxes far away,
        so that no target is matched to them; where there are too few others, an anchor is the image's middle.
        """
        centres = cell_centres(sizes, *x.shape[2:], stride)
        side = (4 * stride / sizes).clamp(max=0.9)[:, None].expand_as(centres)
        start = inverse_sigmoid(torch.cat([centres.clamp(max=1), side], -1))
        outside = (centres >= 1).any(-1, keepdim=True)
        x = x.flatten(2).transpose(1, 2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        boxes = (self.bbox_embed(x).to(dtype) + start).sigmoid()
        logits = self.class_embed(x).to(dtype).masked_fill(outside, NO_SCORE)
        more = self.number  # candidates, so that there are always enough
        best = F.pad(logits.detach().amax(-1), (0, more), value=NO_SCORE).topk(self.number)[1]
        candidates = F.pad(boxes.detach().masked_fill(outside, 0.5), (0, 0, 0, more), value=0.5)
        return logits, boxes.masked_fill(outside, FAR), candidates.gather(1, best[..., None].expand(-1, -1, 4))


class AnchorDecoder(nn.Module):
    """Decoder whose queries are boxes: each layer looks in and around its box and moves it.

    The first boxes are the best proposals (two_stage), or learned, a grid at the start (Liu et al. 2022, DAB-DETR).
    """

    recompute = False  # see detr.memory

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dim = dim = config.hidden_dim
        self.layers = nn.ModuleList(AnchorDecoderLayer(config) for _ in range(config.dec_layers))
        self.norm = nn.LayerNorm(dim)
        self.box_position = MLP(2 * dim, dim, dim, 2)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.layers:
            layer.cross_attn.reset_places()
        self.content = nn.Parameter(torch.randn(config.num_queries, dim) * 0.02)
        self.label_embed = nn.Embedding(config.num_classes, dim)  # content of denoising queries
        nn.init.normal_(self.label_embed.weight, std=0.02)
        if config.two_stage:
            self.proposals = Proposals(config)
        else:
            self.anchors = nn.Parameter(inverse_sigmoid(_grid_of_anchors(config.num_queries)))

    def forward(
        self, pyramid: Pyramid, bbox_embed: nn.Module, denoising: DenoisingQueries | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """-> (normalised outputs [L, B, P + Q, D], boxes [L, B, P + Q, 4], logits and boxes of the proposals)."""
        batch, dtype = pyramid.sizes.shape[0], pyramid.maps[0].dtype
        tgt = self.content.expand(batch, -1, -1)
        proposed = None
        if hasattr(self, "proposals"):
            level = min(1, len(pyramid.maps) - 1)  # finer ones would cost more than all else
            logits, proposals, anchors = self.proposals(pyramid.strides[level], pyramid.maps[level], pyramid.sizes)
            proposed = logits, proposals
        else:
            anchors = self.anchors.sigmoid().expand(batch, -1, -1)
        self_mask = None
        if denoising is not None:
            tgt = torch.cat([self.label_embed(denoising.labels), tgt], 1)
            anchors = torch.cat([denoising.boxes.to(anchors.dtype), anchors], 1)
            self_mask = denoising_mask(len(self.content), denoising)
        elif self.training:
            tgt = tgt + 0 * self.label_embed.weight.sum()  # every worker's graph holds every parameter
        outputs, boxes = [], []
        for layer in self.layers:
            query_pos = self.box_position(sine_of_boxes(anchors, self.dim // 2).to(dtype))
            tgt = run(self, layer, tgt, query_pos, anchors, pyramid, self_mask)
            normed = self.norm(tgt)
            box = (bbox_embed(normed).to(anchors.dtype) + inverse_sigmoid(anchors)).sigmoid()
            outputs.append(normed)
            boxes.append(box)
            anchors = box.detach()
        return torch.stack(outputs), torch.stack(boxes), proposed


def _grid_of_anchors(number: int) -> Tensor:
    """Boxes a quarter of the image wide and high, centred on a grid: [number, 4]."""
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    index = torch.arange(number)
    x = (index % columns + 0.5) / columns
    y = (index // columns + 0.5) / rows
    size = torch.full((number,), 0.25)
    return torch.stack([x, y, size, size], 1)
