"""Padding images into a batch, and normalising and masking it on the device."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from detr.config import ModelConfig
from detr.transforms import input_size, resize_to, to_uint8

SHAPE_STEP = 16  # batches are padded to multiples of this many pixels, so that few shapes occur
LARGE_STEP, LARGE = 32, 512  # in inference of this many, where the model sees images at least so large
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


def shape_step(config: ModelConfig) -> int:
    """Of how many pixels the sides of an image are multiples, once it is padded for inference."""
    return LARGE_STEP if config.image_size >= LARGE else SHAPE_STEP


def padded_shape(config: ModelConfig, width: int, height: int) -> tuple[int, int]:
    """(H, W) of the batch in which the model is given an image of this size.

    It follows from the image and the model alone, so that what is found does not depend on the images beside it.
    """
    step = shape_step(config)
    width, height = input_size(config, width, height)
    return -(-height // step) * step, -(-width // step) * step


def same_shape_batches(shapes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Places in `shapes` in batches of one shape, at most batch_size each: shapes ascending, and in the given order."""
    order = sorted(range(len(shapes)), key=lambda i: shapes[i])
    groups = (list(group) for _, group in groupby(order, key=lambda i: shapes[i]))
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def prepare(image: Image.Image, config: ModelConfig) -> Tensor:
    """An RGB image at the model's size of it: uint8 [3, h, w]. It takes no weights, so any worker can do it."""
    return to_uint8(resize_to(image, {}, input_size(config, *image.size))[0])


def prepare_images(
    images: list[Image.Image], config: ModelConfig, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """RGB images -> what the model takes: (images [B, 3, H, W], mask [B, H, W], true where padded) on the device."""
    batch, sizes = pad_images([prepare(image, config) for image in images], shape_step(config))
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
