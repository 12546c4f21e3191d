"""The set-prediction loss (paper, section 3.1), for all decoder layers at once.

Loss names are the official ones: loss_ce, loss_bbox, loss_giou for the last layer, with the suffix _i for
layer i before it, with _enc for proposals and _dn for denoising queries; of masks loss_mask and loss_dice, for the
last layer alone.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detr.boxes import cxcywh_to_xyxy, generalized_iou, iou
from detr.config import LossConfig, ModelConfig
from detr.matcher import HungarianMatcher, Matches, at_least_float32
from detr.model import all_layers
from detr.queries import DenoisingQueries


class Window(NamedTuple):
    """What an optimiser step sees in all: every micro-batch of every worker. Numbers of the host, not of a device."""

    boxes: int
    images: int
    found: int  # boxes that are matched: no image has more than it has queries
    most: int  # boxes of the fullest image
    parts: int  # micro-batches
    workers: int


class SetCriterion(nn.Module):
    """Matches predictions to targets, then classifies every query and pulls matched boxes to their targets.

    Box losses are divided by the number of boxes of the window, averaged over the workers. The softmax class loss is a
    weighted mean over the micro-batch's queries (as published), or with class_norm "window" over all of the window;
    the focal loss, and MAL in its place, are divided by the number of boxes. So the gradients, summed over a worker's
    micro-batches and averaged over the workers, are those of one batch.
    """

    def __init__(self, model: ModelConfig, loss: LossConfig):
        super().__init__()
        self.num_classes = model.num_classes
        self.class_loss = model.class_loss
        self.negatives = model.denoising.negatives
        self.config = loss
        self.matcher = HungarianMatcher(
            loss.cost_class, loss.cost_bbox, loss.cost_giou, model.class_loss, loss.focal_alpha, loss.focal_gamma
        )
        weight = torch.ones(model.num_classes + 1)
        weight[-1] = loss.eos_coef
        self.register_buffer("empty_weight", weight, persistent=False)
        names = ("loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice")
        self.loss_weights = {name: getattr(loss, name) for name in names}

    def forward(
        self, outputs: dict, targets: list[dict[str, Tensor]], denoising: DenoisingQueries | None = None,
        window: Window | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """outputs of DETR and B targets (`labels` [T], `boxes` [T, 4] cxcywh in 0..1) -> unweighted losses.

        With `pred_masks` the targets have `masks` [T, H, W] bool as well, H and W those of the padded batch (or
        each image's own, where the batch is padded to the largest of them alone).

        window: what the step sees in all; by default a batch like this one on every worker, all of which have to call.
        Also class_error (last layer) and cardinality_error, which have no gradient. Raises
        NonFiniteOutputs from the matcher.
        """
        logits, boxes = (at_least_float32(x) for x in all_layers(outputs))
        labels = torch.cat([t["labels"] for t in targets])
        truth = torch.cat([t["boxes"] for t in targets]).to(boxes.dtype)
        log_softmax = logits.log_softmax(-1) if self.class_loss == "softmax" else None
        matches = self.matcher.match(logits, boxes, targets, outputs.get("pred_masks"), log_softmax)
        window = window or find_window([len(t["labels"]) for t in targets], logits.shape[2])
        num_boxes = max(window.boxes, 1) / window.workers
        share = window.workers / window.parts  # of a mean over the micro-batch
        norm = None  # a micro-batch's own
        if self.config.class_norm == "window":
            norm = window.found + self.config.eos_coef * (window.images * logits.shape[2] - window.found)
            norm, share = norm / window.workers, 1.0

        scores = logits if log_softmax is None else log_softmax
        losses = self._losses(scores, boxes, labels, truth, matches, num_boxes, norm, share, "")
        pairs = len(matches.layer) // len(logits)  # every layer has as many, the last layer's come last
        last = Matches(*(x[len(x) - pairs :] for x in vars(matches).values()))
        with torch.no_grad():
            errors = self._errors(logits, labels, last, targets)
            losses |= {name: error * window.workers / window.parts for name, error in errors.items()}
        if "pred_masks" in outputs:
            losses |= _mask_losses(outputs["pred_masks"], [t["masks"] for t in targets], last, num_boxes)
        if "proposals" in outputs:
            scores, boxes = (at_least_float32(outputs["proposals"][key])[None] for key in ("pred_logits", "pred_boxes"))
            found = self.matcher.match(scores, boxes, targets)
            losses |= self._losses(scores, boxes, labels, truth, found, num_boxes, norm, share, "_enc")
        if denoising is not None:
            dn = outputs["denoising"]
            layers = dn["pred_logits"].shape[0]
            repeat = torch.arange(layers, device=labels.device).repeat_interleave(len(denoising.image))
            given = Matches(repeat, *(x.repeat(layers) for x in (denoising.image, denoising.query, denoising.target)))
            scores = at_least_float32(dn["pred_logits"])
            copies = num_boxes * denoising.groups
            if norm is not None:
                norm = copies * (1 + self.config.eos_coef * self.negatives)
            losses |= self._losses(
                scores.log_softmax(-1) if self.class_loss == "softmax" else scores,
                at_least_float32(dn["pred_boxes"]), labels, truth, given, copies, norm, share, "_dn", denoising.real,
            )  # fmt: skip
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised; every layer, the proposals and the denoising part weigh the same."""
        names = [name for name in losses if name.startswith("loss_")]
        values = torch.stack([losses[name] for name in names])
        return values @ values.new_tensor([self.loss_weights["_".join(name.split("_")[:2])] for name in names])

    def _losses(
        self, scores: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor, matches: Matches,
        num_boxes: float, norm: float | None, share: float, suffix: str, real: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """boxes [L, B, Q, 4], scores [L, B, Q, C] -> the three losses of every layer.

        scores: the classes' log-probabilities, or logits with a sigmoid. norm: what the softmax loss is divided by, or
        None for the queries' own weights; then it counts for a share. real [B, Q]: false where a query is padding.
        """
        layers = scores.shape[0]
        at = (matches.layer, matches.image, matches.query)
        predicted, target = boxes[at], truth[matches.target]
        if self.class_loss == "softmax":
            ce = share * self._softmax_loss(scores, labels, matches, norm, real)
        else:
            aim, at_label = torch.zeros_like(scores), (*at, labels[matches.target])
            if self.config.mal_gamma:
                overlap = iou(cxcywh_to_xyxy(predicted.detach()), cxcywh_to_xyxy(target))
                ce = self._quality_loss(scores, aim, at_label, overlap)
            else:
                aim[at_label] = 1
                ce = sigmoid_focal_loss(scores, aim, self.config.focal_alpha, self.config.focal_gamma)
            ce = (ce if real is None else ce * real[..., None]).flatten(1).sum(1) / num_boxes

        l1 = (predicted - target).abs().sum(-1)
        giou = 1 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
        sums = boxes.new_zeros(2, layers).index_add(1, matches.layer, torch.stack([l1, giou])) / num_boxes
        losses = {}
        for name, values in (("loss_ce", ce), ("loss_bbox", sums[0]), ("loss_giou", sums[1])):
            for i, value in enumerate(values):
                losses[f"{name}{suffix}" if i == layers - 1 else f"{name}{suffix}_{i}"] = value
        return losses

    def _quality_loss(
        self, scores: Tensor, aim: Tensor, at_label: tuple[Tensor, ...], overlap: Tensor
    ) -> Tensor:
        """Binary cross entropy of every score to 0, or for a match to its IoU to the power mal_gamma (DEIM's MAL)."""
        weight = scores.detach().sigmoid() ** self.config.mal_gamma
        weight[at_label] = 1
        aim[at_label] = overlap.to(scores.dtype) ** self.config.mal_gamma
        return F.binary_cross_entropy_with_logits(scores, aim, weight, reduction="none")

    def _softmax_loss(
        self, log_softmax: Tensor, labels: Tensor, matches: Matches, norm: float | None, real: Tensor | None
    ) -> Tensor:
        """Cross entropy over all queries, weighted by class, mean per layer: [L]."""
        classes = labels.new_full(log_softmax.shape[:3], self.num_classes)
        classes[matches.layer, matches.image, matches.query] = labels[matches.target]
        weight = self.empty_weight.to(log_softmax.dtype)
        ce = F.nll_loss(log_softmax.flatten(0, 2), classes.flatten(), weight, reduction="none").view_as(classes)
        weights = weight[classes]
        if real is not None:
            ce, weights = ce * real, weights * real
        return ce.flatten(1).sum(1) / (weights.flatten(1).sum(1) if norm is None else norm)

    def _errors(
        self, logits: Tensor, labels: Tensor, last: Matches, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """class_error of the last layer (whose matches are given) in percent, cardinality_error of every layer."""
        layers = logits.shape[0]
        right = logits[-1, last.image, last.query].argmax(-1) == labels[last.target]
        # Without any target the accuracy counts as zero, as published.
        errors = {"class_error": 100 - 100 * right.float().sum() / max(len(right), 1)}
        if self.class_loss == "softmax":
            found = (logits[..., :-1].amax(-1) >= logits[..., -1]).sum(2)  # of equals the first class wins
        else:
            found = (logits.sigmoid().amax(-1) > 0.5).sum(2)
        counts = torch.tensor([len(t["labels"]) for t in targets], device=logits.device)
        cardinality = (found.float() - counts.float()).abs().mean(1)
        for i, value in enumerate(cardinality):
            errors["cardinality_error" if i == layers - 1 else f"cardinality_error_{i}"] = value
        return errors


def find_window(counts: list[int], queries: int, parts: int = 1) -> Window:
    """The window of which this worker has images with so many boxes each, in so many micro-batches.

    queries: of an image. Every worker has to call it.
    """
    found = sum(min(count, queries) for count in counts)
    mine = [sum(counts), len(counts), found, max(counts, default=0), parts]
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Window(*mine, workers=1)
    everyone = [torch.empty(len(mine), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, torch.tensor(mine), group=host_group())
    boxes, images, found, most, parts = torch.stack(everyone).unbind(1)
    return Window(*(int(x) for x in (boxes.sum(), images.sum(), found.sum(), most.max(), parts.sum())), len(everyone))


@functools.lru_cache(maxsize=1)
def host_group() -> dist.ProcessGroup:
    """The workers' group for what lies in the hosts' memory: no device has to wait. All have to ask for it at first."""
    return dist.new_group(backend="gloo")


def _mask_losses(
    masks: Tensor, targets: list[Tensor], matches: Matches, num_boxes: float
) -> dict[str, Tensor]:
    """Focal and dice loss (Milletari et al. 2016, V-Net) of the matched masks at the targets' size (section 4.4)."""
    size = [max(side) for side in zip(*(t.shape[-2:] for t in targets), strict=True)]
    truth = torch.cat([F.pad(t, (0, size[1] - t.shape[-1], 0, size[0] - t.shape[-2])) for t in targets])
    predicted = at_least_float32(masks[matches.image, matches.query])
    truth = truth[matches.target].to(predicted.dtype).flatten(1)
    predicted = F.interpolate(predicted[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
    focal = sigmoid_focal_loss(predicted, truth, alpha=0.25, gamma=2).mean(1)
    p = predicted.sigmoid()
    dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
    return {"loss_mask": focal.sum() / num_boxes, "loss_dice": dice.sum() / num_boxes}
