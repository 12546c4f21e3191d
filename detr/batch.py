"""Padding images into a batch, and normalising and masking it on the device."""
from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from detr.config import ModelConfig
from detr.transforms import input_size, resize_to, to_uint8

SHAPE_STEP = 16  # batches are padded to multiples of this many pixels, so that few shapes occur
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def pad_images(images: list[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """uint8 images [3, h, w] -> (batch [B, 3, H, W] zero-padded right and below, sizes [B, 2] as h, w).

    H and W are the largest of the batch, rounded up to `multiple` so that few shapes occur.
    """
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-int(side) // multiple) * multiple for side in sizes.amax(0))
    batch = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    for slot, image in zip(batch, images, strict=True):
        _, h, w = image.shape
        slot[:, :h, :w] = image
        slot[:, h:] = 0
        slot[:, :h, w:] = 0
    return batch, sizes


def prepare_images(
    images: list[Image.Image], config: ModelConfig, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """RGB images -> what the model takes: (images [B, 3, H, W], mask [B, H, W], true where padded) on the device."""
    resized = [to_uint8(resize_to(image, {}, input_size(config, *image.size))[0]) for image in images]
    batch, sizes = pad_images(resized, SHAPE_STEP)
    return normalise(batch.to(device), sizes.to(device))


def normalise(batch: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 batch [B, 3, H, W] and sizes -> (float32 images, zero where padded; mask [B, H, W], true where padded)."""
    height, width = batch.shape[-2:]
    mean = torch.tensor(MEAN, device=batch.device).view(3, 1, 1)
    std = torch.tensor(STD, device=batch.device).view(3, 1, 1)
    rows = torch.arange(height, device=batch.device) >= sizes[:, :1]
    columns = torch.arange(width, device=batch.device) >= sizes[:, 1:]
    mask = rows[:, :, None] | columns[:, None, :]
    images = batch.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)  # in place: large blocks are slow to get
    return images.masked_fill_(mask[:, None], 0.0), mask
