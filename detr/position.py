"""Position encodings computed from the padding mask (paper, section A.4; Parmar et al. 2018)."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine_features(position: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Angles [...] -> [..., dim]: sine and cosine interleaved over geometric frequencies."""
    i = torch.arange(dim, dtype=torch.float32, device=position.device)
    frequency = temperature ** (2 * torch.div(i, 2, rounding_mode="floor") / dim)
    angle = position[..., None] / frequency
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Fixed encoding of a feature map's cells, counted over the unpadded part and scaled to 2 pi."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim  # of each axis; the encoding has twice as many channels

    def forward(self, mask: Tensor) -> Tensor:
        """mask [B, H, W], true where padded -> [B, 2 * dim, H, W], y first, float32."""
        valid = ~mask
        y = valid.cumsum(1, dtype=torch.float32)
        x = valid.cumsum(2, dtype=torch.float32)
        y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
        return torch.cat([sine_features(y, self.dim), sine_features(x, self.dim)], dim=3).permute(0, 3, 1, 2)


class PositionEmbeddingLearned(nn.Module):
    """Learned encoding of up to 50 rows and 50 columns."""

    def __init__(self, dim: int):
        super().__init__()
        self.row_embed = nn.Embedding(50, dim)
        self.col_embed = nn.Embedding(50, dim)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """mask [B, H, W] -> [B, 2 * dim, H, W], x first. Raises ValueError beyond 50 rows or columns."""
        batch, height, width = mask.shape
        if max(height, width) > 50:
            raise ValueError(f"learned positions reach 50 x 50 cells; this feature map has {height} x {width}")
        x = self.col_embed.weight[:width].expand(height, width, -1)
        y = self.row_embed.weight[:height, None].expand(height, width, -1)
        return torch.cat([x, y], dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1)


def cell_centres(sizes: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Centres of the cells of a feature map: x and y in 0..1 of the unpadded image, [B, height * width, 2].

    sizes [B, 2]: width and height of the images. Counting cells instead (as published) puts things up to half a
    cell from where their boxes are, because the last cell may be part padding: much, where cells are few.
    """
    x = torch.arange(width, device=sizes.device).expand(height, width)
    y = torch.arange(height, device=sizes.device)[:, None].expand(height, width)
    return (torch.stack([x, y], -1).flatten(0, 1) + 0.5) * stride / sizes[:, None]


def image_sizes(mask: Tensor) -> Tensor:
    """Width and height of the unpadded part of masks [B, H, W], at least 1: [B, 2]."""
    valid = ~mask
    return torch.stack([valid.any(1).sum(1), valid.any(2).sum(1)], -1).clamp(min=1)


def sine_of_points(points: Tensor, dim: int) -> Tensor:
    """Points [..., 2] as x, y in 0..1 -> [..., 2 * dim], y first: as `sine_of_boxes` encodes a box's centre."""
    x, y = (points * (2 * math.pi)).unbind(-1)
    return torch.cat([sine_features(y, dim), sine_features(x, dim)], dim=-1)


def sine_of_boxes(boxes: Tensor, dim: int) -> Tensor:
    """Boxes [..., 4] as cxcywh in 0..1 -> [..., 4 * dim] in the order y, x, w, h (Liu et al. 2022, DAB-DETR)."""
    cx, cy, w, h = (boxes * (2 * math.pi)).float().unbind(-1)
    return torch.cat([sine_features(v, dim) for v in (cy, cx, w, h)], dim=-1)
