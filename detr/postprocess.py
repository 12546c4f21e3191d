"""Outputs of the model -> detections in pixels."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from detr.boxes import cxcywh_to_xyxy


class PostProcess(nn.Module):
    """Scores, labels and boxes for each image.

    With softmax the best real class of every query (as published); with the focal loss the best pairs of
    query and class, as many as there are queries but at least 100 (Zhu et al. 2021).
    """

    def __init__(self, class_loss: str = "softmax"):
        super().__init__()
        self.class_loss = class_loss

    @torch.no_grad()
    def forward(self, outputs: dict, target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """target_sizes [B, 2]: the original (height, width) -> dicts of scores, labels, boxes (xyxy, not clipped)."""
        logits, boxes = outputs["pred_logits"], cxcywh_to_xyxy(outputs["pred_boxes"])
        if self.class_loss == "softmax":
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        else:
            queries, classes = logits.shape[1:]
            number = min(max(100, queries), queries * classes)
            scores, index = logits.sigmoid().flatten(1).topk(number, dim=1)
            labels = index % classes
            boxes = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
        height, width = target_sizes.to(boxes).unbind(1)
        boxes = boxes * torch.stack([width, height, width, height], 1)[:, None]
        return [
            {"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)
        ]
