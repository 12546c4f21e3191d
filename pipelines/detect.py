"""A loaded model over batches of images: the one engine that validation, evaluation, batch inference and
the registered model share.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from detr.backbone import fold_norms
from detr.batch import prepare_images
from detr.checkpoint import load_checkpoint
from detr.model import DETR
from detr.postprocess import PostProcess
from detr.segmentation import DETRsegm


class Detector:
    """Detects on PIL images with a copy of a model, made for inference; the model itself is left as it is.

    categories: {"id", "name"} in label order; score_threshold: the model's own over all classes; thresholds: float64
    array, the model's own for each label, from score_thresholds ({category id as text: threshold}), which falls back to
    score_threshold. None of them is applied by `detect`.
    """

    def __init__(
        self, model: DETR | DETRsegm, categories: list[dict[str, Any]], score_threshold: float = 0.5,
        batch_size: int = 16, device: str | torch.device = "cpu", score_thresholds: dict[str, float] | None = None,
    ):  # fmt: skip
        self.device = torch.device(device)
        if isinstance(model, DETRsegm):
            model = model.detr  # boxes do not wait for masks
        self.model = fold_norms(model).to(self.device)
        self.model.backbone.to(memory_format=torch.channels_last)
        self.categories = categories
        self.score_threshold = score_threshold
        self.thresholds = label_thresholds(categories, score_threshold, score_thresholds)
        self.batch_size = batch_size
        self.postprocess = PostProcess(model.config.class_loss)

    @classmethod
    def load(cls, folder: Path | str, batch_size: int = 16, device: str | torch.device = "cpu") -> Detector:
        """A detector from a checkpoint folder; raises CheckpointError."""
        model, config = load_checkpoint(folder)
        return cls(
            model, config["categories"], config["score_threshold"], batch_size, device, config.get("score_thresholds")
        )

    def detect(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        """RGB images -> per image boxes float32 [N, 4] (xyxy, pixels of the image, clipped to it), scores
        float32 [N], labels int64 [N]; by descending score, no threshold applied."""
        # Images of like shape share a batch, so that little is padded; results keep the given order.
        order = sorted(range(len(images)), key=lambda i: (images[i].height / images[i].width, i))
        results: list[dict[str, np.ndarray]] = [{} for _ in images]
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            for i, found in zip(indices, self._detect_batch([images[i] for i in indices]), strict=True):
                results[i] = found
        return results

    @torch.inference_mode()
    def _detect_batch(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        pixels, mask = prepare_images(images, self.model.config, self.device)
        outputs = self.model(pixels.contiguous(memory_format=torch.channels_last), mask)
        original = torch.tensor([[image.height, image.width] for image in images], device=self.device)
        results = []
        for found, (height, width) in zip(self.postprocess(outputs, original), original.tolist(), strict=True):
            order = found["scores"].argsort(descending=True, stable=True)
            limit = torch.tensor([width, height, width, height], device=self.device)
            boxes = torch.minimum(found["boxes"][order].clamp(min=0), limit)
            results.append(
                {
                    "boxes": boxes.float().cpu().numpy(),
                    "scores": found["scores"][order].float().cpu().numpy(),
                    "labels": found["labels"][order].cpu().numpy(),
                }
            )
        return results


def label_thresholds(
    categories: list[dict[str, Any]], score_threshold: float, of_classes: dict[str, float] | None = None
) -> np.ndarray:
    """The least score to keep of each label, float64 [K]: that of its category id in of_classes, or score_threshold."""
    own = of_classes or {}
    return np.array([own.get(str(category["id"]), score_threshold) for category in categories], np.float64)
