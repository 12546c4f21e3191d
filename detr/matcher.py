"""Bipartite matching between predictions and targets, for all decoder layers at once (paper, section 3.1)."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detr.boxes import cxcywh_to_xyxy, generalized_iou


class NonFiniteOutputs(FloatingPointError):
    """The model's outputs hold NaN or infinity; `images` are the positions in the batch."""

    def __init__(self, images: list[int]):
        super().__init__(f"the model's outputs are not finite for images {images} of the batch")
        self.images = images


@dataclass
class Matches:
    """Pairs of all layers, flat [M]: layer, image, query, and target as index into the concatenated targets.

    In the order of the layers, then of the images; as many in every layer.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


class HungarianMatcher(nn.Module):
    """Assigns each target to one query at the least total cost.

    The class cost is minus the probability of the target's class (softmax), or the focal form of
    Deformable DETR (sigmoid).
    """

    def __init__(
        self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1, class_loss: str = "softmax",
        focal_alpha: float = 0.25, focal_gamma: float = 2.0,
    ):  # fmt: skip
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("all matching costs are zero")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.class_loss, self.focal_alpha, self.focal_gamma = class_loss, focal_alpha, focal_gamma

    def forward(self, outputs: dict, targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """One layer's outputs and targets -> per image (queries, targets), int64, min(Q, T) pairs."""
        matches = self.match(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)
        first, result = 0, []
        for i, target in enumerate(targets):
            mine = matches.image == i
            result.append((matches.query[mine].cpu(), matches.target[mine].cpu() - first))
            first += len(target["labels"])
        return result

    @torch.no_grad()
    def match(
        self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], masks: Tensor | None = None
    ) -> Matches:
        """logits [L, B, Q, C], boxes [L, B, Q, 4] and B targets -> Matches.

        Costs are computed for each image with its own targets, padded to the longest, and go to the host
        in one copy. Raises NonFiniteOutputs when a cost is not finite, or a value of `masks` [B, Q, h, w], which
        have no other part in the matching.
        """
        layers, batch, queries = logits.shape[:3]
        counts = [len(t["labels"]) for t in targets]
        longest = max(counts, default=0)
        if longest == 0:
            cost = logits.new_zeros(layers, batch, queries, 0, dtype=torch.float32)
        else:
            labels = nn.utils.rnn.pad_sequence([t["labels"] for t in targets], batch_first=True)
            truth = nn.utils.rnn.pad_sequence([t["boxes"] for t in targets], batch_first=True, padding_value=0.5)
            cost = self._cost(logits, boxes, labels, truth)
        # Outputs of an image without targets are looked at, too: NaN times zero is NaN, infinity as well.
        probe = (logits.detach().float() * 0).sum((2, 3)) + (boxes.detach().float() * 0).sum((2, 3))
        if masks is not None:
            probe = probe + masks.detach().float().sum((1, 2, 3)) * 0
        host = torch.cat([cost.flatten(2), probe[..., None].to(cost.dtype)], -1).cpu().numpy()
        cost_host, probe_host = host[..., :-1].reshape(layers, batch, queries, longest), host[..., -1]
        bad = [i for i in range(batch) if not _finite(probe_host[:, i]) or not _finite(cost_host[:, i, :, : counts[i]])]
        if bad:
            raise NonFiniteOutputs(bad)

        rows: list[list[int]] = [[], [], [], []]
        for layer in range(layers):
            first = 0
            for i, count in enumerate(counts):
                query, target = linear_sum_assignment(cost_host[layer, i, :, :count])
                rows[0] += [layer] * len(query)
                rows[1] += [i] * len(query)
                rows[2] += query.tolist()
                rows[3] += (target + first).tolist()
                first += count
        return Matches(*torch.tensor(rows, dtype=torch.int64).to(logits.device))

    def _cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        """[L, B, Q, T] for labels [B, T] and truth [B, T, 4]."""
        if logits.dtype != torch.float64:
            logits, boxes, truth = logits.float(), boxes.float(), truth.float()
        index = labels[None, :, None, :].expand(len(logits), -1, logits.shape[2], -1)
        if self.class_loss == "softmax":
            class_cost = -logits.softmax(-1).gather(-1, index)
        else:
            p, gamma = logits.gather(-1, index).sigmoid(), self.focal_gamma
            positive = self.focal_alpha * (1 - p) ** gamma * -(p + 1e-8).log()
            negative = (1 - self.focal_alpha) * p**gamma * -(1 - p + 1e-8).log()
            class_cost = positive - negative
        # One coordinate at a time: no tensor of all pairs is four times as large.
        box_cost = sum((boxes[..., None, i] - truth[None, :, None, :, i]).abs() for i in range(4))
        giou = generalized_iou(
            cxcywh_to_xyxy(boxes)[..., None, :], cxcywh_to_xyxy(truth)[None, :, None]
        )
        return self.cost_bbox * box_cost + self.cost_class * class_cost - self.cost_giou * giou


def _finite(values) -> bool:
    # A sum is finite when its terms are; costs are far too small to overflow.
    return bool(abs(values.sum(dtype="float64")) < float("inf"))
