"""A loaded model over batches of images: the one engine that validation, evaluation, batch inference and
the registered model share.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detr.attention import MultiheadAttention
from detr.backbone import fold_norms
from detr.batch import normalise, pad_images, padded_shape, prepare, same_shape_batches, shape_step
from detr.checkpoint import load_checkpoint
from detr.model import DETR
from detr.postprocess import PostProcess
from detr.segmentation import DETRsegm

Precision = Literal["float32", "bfloat16"]
Found = dict[str, np.ndarray]


class Detector:
    """Detects on PIL images with a copy of a model, made for inference; the model itself is left as it is.

    What is found on an image does not depend on the images beside it: only images of one padded shape share a batch.

    categories: {"id", "name"} in label order; score_threshold: the model's own over all classes; thresholds: float64
    array, the model's own for each label, from score_thresholds ({category id as text: threshold}), which falls back to
    score_threshold. None of them is applied unless it is given to `detect`.

    precision: bfloat16 halves time and memory of a large model where the hardware has it; what the heads compute stays
    float32, since a box in bfloat16 is off by pixels. compile: torch.compile the backbone and the encoder, which takes
    about a minute at the first batch, and again when shapes change; `compiled` then says what came of it.
    """

    def __init__(
        self, model: DETR | DETRsegm, categories: list[dict[str, Any]], score_threshold: float = 0.5,
        batch_size: int = 16, device: str | torch.device = "cpu", score_thresholds: dict[str, float] | None = None,
        precision: Precision = "float32", compile: bool = False,
    ):  # fmt: skip
        self.device = torch.device(device)
        if isinstance(model, DETRsegm):
            model = model.detr  # boxes do not wait for masks
        self.model = fold_norms(model).to(self.device)
        self.model.config = model.config.model_copy(update={"aux_loss": False})
        self.model.backbone.to(memory_format=torch.channels_last)
        self.precision = precision
        if precision == "bfloat16":
            _to_bfloat16(self.model)
        self.compiled = None
        if compile:
            from detr.compiling import compile_layers  # slow to import, and seldom needed

            self.compiled = compile_layers(self.model)
        self.categories = categories
        self.score_threshold = score_threshold
        self.thresholds = label_thresholds(categories, score_threshold, score_thresholds)
        self.batch_size = batch_size
        self.postprocess = PostProcess(model.config.class_loss)

    @classmethod
    def load(
        cls, folder: Path | str, batch_size: int = 16, device: str | torch.device = "cpu",
        precision: Precision = "float32", compile: bool = False,
    ) -> Detector:  # fmt: skip
        """A detector from a checkpoint folder; raises CheckpointError."""
        model, config = load_checkpoint(folder)
        return cls(
            model, config["categories"], config["score_threshold"], batch_size, device, config.get("score_thresholds"),
            precision, compile,
        )  # fmt: skip

    def detect(self, images: list[Image.Image], least: np.ndarray | None = None) -> list[Found]:
        """RGB images -> per image, in their order, boxes float32 [N, 4] (xyxy, pixels of the image, clipped to it),
        scores float32 [N], labels int64 [N]; by descending score.

        least: float64 [K], the least score of each label; without it nothing is left out.
        """
        config = self.model.config
        results: list[Found] = [{} for _ in images]
        shapes = [padded_shape(config, *image.size) for image in images]
        for indices in same_shape_batches(shapes, self.batch_size):
            some = [images[i] for i in indices]
            batch, sizes = pad_images([prepare(image, config) for image in some], shape_step(config))
            originals = torch.tensor([[image.height, image.width] for image in some])
            for i, found in zip(indices, self.detect_batch(batch, sizes, originals, least), strict=True):
                results[i] = found
        return results

    @torch.inference_mode()
    def detect_batch(
        self, batch: Tensor, sizes: Tensor, originals: Tensor, least: np.ndarray | None = None
    ) -> list[Found]:
        """As `detect`, for images that `detr.batch.prepare` has made and that lie in one batch of their padded shape.

        batch: uint8 [B, 3, H, W], zero right of and below the images; sizes int64 [B, 2]: their h, w in it;
        originals int64 [B, 2]: the height and width of the images themselves, in whose pixels the boxes are.
        """
        # The layout is changed while a value is still one byte.
        batch = batch.to(self.device).contiguous(memory_format=torch.channels_last)
        pixels, mask = normalise(batch, sizes.to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            outputs = self.model(pixels, mask)
        originals = originals.to(self.device)
        found = self.postprocess(outputs, originals)  # of every image as many
        scores, labels, boxes = (torch.stack([one[key] for one in found]) for key in ("scores", "labels", "boxes"))
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        labels, boxes = labels.gather(1, order), boxes.gather(1, order[..., None].expand_as(boxes))
        boxes = torch.minimum(boxes.clamp(min=0), originals.flip(1).repeat(1, 2)[:, None])
        image = torch.arange(len(found), device=self.device)[:, None].expand_as(labels)
        # All in one tensor, that one copy brings to the host; float32 holds such whole numbers exactly.
        rows = torch.cat([torch.stack([image, labels, scores], -1), boxes], -1).float()
        kept = slice(None) if least is None else scores >= torch.from_numpy(least).to(self.device)[labels]
        rows = rows[kept].flatten(0, -2).cpu().numpy()
        ends = np.cumsum(np.bincount(rows[:, 0].astype(np.int64), minlength=len(found)))
        return [
            {"boxes": own[:, 3:].copy(), "scores": own[:, 2].copy(), "labels": own[:, 1].astype(np.int64)}
            for own in np.split(rows, ends[:-1])
        ]


class _InFloat32(nn.Module):
    """A head that computes in float32 where all around it is autocast."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float())


def _to_bfloat16(model: DETR) -> None:
    """Keep in bfloat16 what autocast would cast anew in every batch, all but the heads."""
    owners = [owner for owner in model.modules() if hasattr(owner, "bbox_embed")]  # the model, and its proposals
    heads = {module for owner in owners for head in (owner.class_embed, owner.bbox_embed) for module in head.modules()}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | MultiheadAttention) and module not in heads:
            module.to(torch.bfloat16)
    for owner in owners:
        owner.class_embed, owner.bbox_embed = _InFloat32(owner.class_embed), _InFloat32(owner.bbox_embed)


def label_thresholds(
    categories: list[dict[str, Any]], score_threshold: float, of_classes: dict[str, float] | None = None
) -> np.ndarray:
    """The least score to keep of each label, float64 [K]: that of its category id in of_classes, or score_threshold."""
    own = of_classes or {}
    return np.array([own.get(str(category["id"]), score_threshold) for category in categories], np.float64)
