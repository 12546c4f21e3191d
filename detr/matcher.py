"""Bipartite matching between predictions and targets, for all decoder layers at once (paper, section 3.1)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
        self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], masks: Tensor | None = None,
        log_softmax: Tensor | None = None,
    ) -> Matches:  # fmt: skip
        """logits [L, B, Q, C], boxes [L, B, Q, 4] and B targets -> Matches.

        Costs are computed for each image with its own targets, padded to the longest, and go to the host
        in one copy. log_softmax: that of the logits, where it has been computed already. Raises NonFiniteOutputs
        when a cost is not finite, or a value of `masks` [B, Q, h, w], which have no other part in the matching.
        """
        layers, batch, queries = logits.shape[:3]
        counts = [len(t["labels"]) for t in targets]
        longest = max(counts, default=0)
        if longest == 0:
            cost = logits.new_zeros(layers, batch, 0, queries, dtype=torch.float32)
        else:
            labels = nn.utils.rnn.pad_sequence([t["labels"] for t in targets], batch_first=True)
            truth = nn.utils.rnn.pad_sequence([t["boxes"] for t in targets], batch_first=True, padding_value=0.5)
            if self.class_loss == "softmax" and log_softmax is None:
                log_softmax = at_least_float32(logits).log_softmax(-1)
            cost = self._cost(logits if log_softmax is None else log_softmax, boxes, labels, truth)
        # Outputs of an image without targets are looked at, too. A sum is finite when its terms are, since costs and
        # outputs are far too small to overflow.
        probe = sum(x.sum((2, 3), dtype=torch.float32) for x in (logits, boxes))
        if masks is not None:
            probe = probe + masks.sum((1, 2, 3), dtype=torch.float32)
        host = torch.cat([cost.flatten(2), probe[..., None].to(cost.dtype)], -1).cpu().numpy()
        finite = np.isfinite(host.sum((0, 2), dtype=np.float64))
        if not finite.all():
            raise NonFiniteOutputs(np.flatnonzero(~finite).tolist())

        cost_host = host[..., :-1].reshape(layers, batch, longest, queries)
        found = []
        for of_layer in cost_host:
            first = 0
            for of_image, count in zip(of_layer, counts, strict=True):
                query, target = linear_sum_assignment(of_image[:count].T)
                found.append((query, target + first))
                first += count
        images = np.repeat(np.arange(batch), [min(count, queries) for count in counts])
        rows = [np.repeat(np.arange(layers), len(images)), np.tile(images, layers)]
        rows += [np.concatenate(column) for column in zip(*found, strict=True)]
        return Matches(*torch.from_numpy(np.stack(rows)).to(logits.device))

    def _cost(self, scores: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        """[L, B, T, Q] for the classes' log-probabilities (or logits, with a sigmoid), labels [B, T], truth [B, T, 4].

        Queries come last, for every step to run over long stretches of memory.
        """
        boxes = at_least_float32(boxes)
        truth = truth.to(boxes.dtype)
        index = labels[None, :, None, :].expand(len(scores), -1, scores.shape[2], -1)
        found = at_least_float32(scores.gather(-1, index)).mT.contiguous()
        if self.class_loss == "softmax":
            class_cost = found.exp_().neg_()
        else:
            p, gamma = found.sigmoid(), self.focal_gamma
            positive = self.focal_alpha * (1 - p) ** gamma * -(p + 1e-8).log()
            negative = (1 - self.focal_alpha) * p**gamma * -(1 - p + 1e-8).log()
            class_cost = positive - negative
        box_cost = torch.cdist(truth, boxes, p=1)
        giou = generalized_iou(_by_coordinate(cxcywh_to_xyxy(boxes)[:, :, None]), cxcywh_to_xyxy(truth)[:, :, None])
        cost = class_cost.mul_(self.cost_class)
        return cost.add_(box_cost, alpha=self.cost_bbox).sub_(giou, alpha=self.cost_giou)


def _by_coordinate(boxes: Tensor) -> Tensor:
    """The same boxes [..., 4], each coordinate in contiguous memory."""
    return boxes.movedim(-1, 0).contiguous().movedim(0, -1)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32: costs and losses are never computed in less."""
    return x if x.dtype == torch.float64 else x.float()
