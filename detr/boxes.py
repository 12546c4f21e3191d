"""What torchvision.ops lacks: GIoU that broadcasts, so that pairs cost N and not N x N."""
from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre, size -> corners, [..., 4]."""
    return box_convert(boxes, "cxcywh", "xyxy")


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al. 2019) of corner boxes a [..., 4] and b [..., 4], broadcast: [...].

    Pairs: a [N, 4], b [N, 4] -> [N]. All with all: a[:, None], b[None] -> [N, M].
    Boxes without any extent give NaN, as in the published code; nothing is checked on the device.
    """
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    low = torch.max(a[..., :2], b[..., :2])
    high = torch.min(a[..., 2:], b[..., 2:])
    size = (high - low).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    union = area_a + area_b - intersection
    hull_size = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).clamp(min=0)
    hull = hull_size[..., 0] * hull_size[..., 1]
    return intersection / union - (hull - union) / hull


def inverse_sigmoid(x: Tensor, eps: float = 1e-4) -> Tensor:
    """logit of x in 0..1, kept finite at both ends."""
    return torch.logit(x, eps=eps)
