"""What happens to one image and its boxes, from encoded bytes to a training or inference input.

Images are PIL images in RGB, pixels as stored (an EXIF orientation is not applied). A target is a dict of
`boxes` (float32 [N, 4], xyxy in pixels), `labels` (int64 [N]) and whatever else belongs to the image;
every function returns new objects. Random choices come from the generator that is passed in.
"""
from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, UnidentifiedImageError

from detr.config import ModelConfig

Target = dict[str, Any]


class ImageError(Exception):
    """An image that cannot be used; the message is the reason in words."""


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Encoded bytes -> RGB image, whole or not at all.

    The header's size is checked before any pixel is decoded. 16-bit greys are scaled by 257, alpha is
    dropped. Raises ImageError with the reason.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns at the size we check ourselves, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width < 1 or height < 1:
                raise ImageError(f"its size is {width}x{height}")
            if width * height > max_pixels:
                raise ImageError(f"{width}x{height} is more than the limit of {max_pixels} pixels")
            image.load()
            if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
                grey = np.asarray(image).astype(np.float64) / 257
                image = Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8))
            return image.convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("it is not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"it has more pixels than the limit of {max_pixels}") from error
    except (
        OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError,
        MemoryError, struct.error, zlib.error,
    ) as error:  # fmt: skip
        # What Pillow's format plugins raise on damaged files.
        raise ImageError(f"it cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})") from error


def resized_size(width: int, height: int, size: int, max_size: int | None = None) -> tuple[int, int]:
    """(width, height) after the shorter side becomes `size` with the longer at most `max_size`.

    The official rule: when the longer side would be too long, size = round(max_size * short / long)
    (Python's rounding); the other side is truncated.
    """
    short, long = min(width, height), max(width, height)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
    if short == size:
        return width, height
    if width < height:
        return size, int(size * height / width)
    return int(size * width / height), size


def input_size(config: ModelConfig, width: int, height: int) -> tuple[int, int]:
    """(width, height) at which the model sees an image of this size."""
    size = config.image_size if config.upscale else min(config.image_size, width, height)
    return resized_size(width, height, size, config.image_max_size)


def resize_to(image: Image.Image, target: Target, size: tuple[int, int]) -> tuple[Image.Image, Target]:
    """Resize to (width, height); boxes are scaled by the true ratio of each axis, areas by their product."""
    ratio_w, ratio_h = size[0] / image.width, size[1] / image.height
    resized = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    target = dict(target)
    if "boxes" in target:
        target["boxes"] = target["boxes"] * torch.tensor([ratio_w, ratio_h, ratio_w, ratio_h])
    if "area" in target:
        target["area"] = target["area"] * (ratio_w * ratio_h)
    target["size"] = torch.tensor([size[1], size[0]])
    return resized, target


def resize(
    image: Image.Image, target: Target, size: int, max_size: int | None = None
) -> tuple[Image.Image, Target]:
    """The official resize: shorter side to `size`, longer at most `max_size`."""
    return resize_to(image, target, resized_size(image.width, image.height, size, max_size))


def hflip(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """Mirror left and right."""
    target = dict(target)
    if "boxes" in target:
        x1, y1, x2, y2 = target["boxes"].unbind(-1)
        target["boxes"] = torch.stack([image.width - x2, y1, image.width - x1, y2], -1)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), target


def vflip(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """Mirror top and bottom."""
    target = dict(target)
    if "boxes" in target:
        x1, y1, x2, y2 = target["boxes"].unbind(-1)
        target["boxes"] = torch.stack([x1, image.height - y2, x2, image.height - y1], -1)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), target


def crop(image: Image.Image, target: Target, region: tuple[int, int, int, int]) -> tuple[Image.Image, Target]:
    """Crop to region (top, left, height, width); boxes are clamped, those left without area dropped."""
    top, left, height, width = region
    target = dict(target)
    target["size"] = torch.tensor([height, width])
    if "boxes" in target:
        boxes = target["boxes"] - torch.tensor([left, top, left, top])
        limit = torch.tensor([width, height, width, height])
        boxes = torch.min(boxes, limit).clamp(min=0)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        target["boxes"] = boxes[keep]
        if "area" in target:
            target["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(1)[keep]
        for key in ("labels", "iscrowd"):
            if key in target:
                target[key] = target[key][keep]
    return image.crop((left, top, left + width, top + height)), target


TRAIN_SIZES = tuple(range(480, 801, 32))


def augment_detr(
    image: Image.Image, target: Target, rng: np.random.Generator, max_size: int
) -> tuple[Image.Image, Target]:
    """The published training recipe: flip, then resize, or resize, crop and resize.

    As published, sizes are those of 800-pixel training whatever the model's own input size.
    """
    if rng.random() < 0.5:
        image, target = hflip(image, target)
    if rng.random() < 0.5:
        image, target = resize(image, target, int(rng.choice((400, 500, 600))))
        width = int(rng.integers(min(384, image.width), min(image.width, 600) + 1))
        height = int(rng.integers(min(384, image.height), min(image.height, 600) + 1))
        top = int(rng.integers(0, image.height - height + 1))
        left = int(rng.integers(0, image.width - width + 1))
        image, target = crop(image, target, (top, left, height, width))
    return resize(image, target, int(rng.choice(TRAIN_SIZES)), max_size)


def augment_light(
    image: Image.Image,
    target: Target,
    rng: np.random.Generator,
    *,
    horizontal_flip: bool,
    vertical_flip: bool,
    scale: float,
) -> tuple[Image.Image, Target]:
    """Flips, and a crop that zooms in; boxes of which little is left are dropped.

    The result keeps its own scale; resizing to the model's input follows.
    """
    if horizontal_flip and rng.random() < 0.5:
        image, target = hflip(image, target)
    if vertical_flip and rng.random() < 0.5:
        image, target = vflip(image, target)
    if scale > 0 and rng.random() < 0.5:
        share_w, share_h = 1 - scale * rng.random(2)
        width, height = max(1, round(image.width * share_w)), max(1, round(image.height * share_h))
        top = int(rng.integers(0, image.height - height + 1))
        left = int(rng.integers(0, image.width - width + 1))
        image, target = _crop_keeping_visible(image, target, (top, left, height, width))
    return image, target


def jitter_colour(image: Image.Image, rng: np.random.Generator, amount: float) -> Image.Image:
    """Brightness and contrast changed by up to this share."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = enhance(image).enhance(float(1 + amount * rng.uniform(-1, 1)))
    return image


def _crop_keeping_visible(
    image: Image.Image, target: Target, region: tuple[int, int, int, int], visible: float = 0.4
) -> tuple[Image.Image, Target]:
    """Crop, dropping boxes of which less than `visible` is left: a sliver teaches nothing."""
    top, left, height, width = region
    boxes = target["boxes"]
    low = torch.tensor([left, top], dtype=boxes.dtype)
    high = torch.tensor([left + width, top + height], dtype=boxes.dtype)
    inside = (torch.min(boxes[:, 2:], high) - torch.max(boxes[:, :2], low)).clamp(min=0).prod(1)
    keep = inside >= visible * (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = {k: v[keep] if k in ("boxes", "labels", "area", "iscrowd") else v for k, v in target.items()}
    return crop(image, kept, region)


def to_uint8(image: Image.Image) -> torch.Tensor:
    """RGB image -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def boxes_to_targets(boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """xyxy in pixels [N, 4] -> cxcywh in 0..1 of the image [N, 4], as the model predicts them."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    scaled = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)
    return scaled / torch.tensor([width, height, width, height], dtype=boxes.dtype)
