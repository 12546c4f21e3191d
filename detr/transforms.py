"""What happens to one image and its boxes, from encoded bytes to a training or inference input.

Images are in RGB, pixels as stored (an EXIF orientation is not applied): PIL's, as the official code has them, or uint8
tensors [3, H, W], which are resized several times as fast (a grey level apart at the most). A target is a dict of
`boxes` (float32 [N, 4], xyxy in pixels), `labels` (int64 [N]) and whatever else belongs to the image, such as
`masks` (bool [N, H, W]); every function returns new objects. Random choices come from the generator that is passed in.
"""
from __future__ import annotations

import functools
import io
import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from detr.config import ModelConfig

Picture = Image.Image | torch.Tensor
Target = dict[str, Any]
# Of what Pillow opens: no others, some of which decode before their size can be asked, or start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")
STRIP = 2**18  # pixels of a 16-bit grey that are scaled at a time
PER_OBJECT = ("boxes", "labels", "area", "iscrowd", "masks")


class ImageError(Exception):
    """An image that cannot be used; the message is the reason in words."""


def decode_image(data: bytes, max_pixels: int, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Encoded bytes -> RGB image, whole or not at all.

    The header's size is checked before any pixel is decoded. 16-bit greys are scaled by 257, alpha is
    dropped. at_least: a JPEG may come at a half, a quarter or an eighth of its size, but no smaller than this width and
    height, which takes a fraction of the time. Raises ImageError with the reason.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns at the size we check ourselves, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=picture_formats())
            width, height = image.size
            if width < 1 or height < 1:
                raise ImageError(f"its size is {width}x{height}")
            if width * height > max_pixels:
                raise ImageError(f"{width}x{height} is more than the limit of {max_pixels} pixels")
            if at_least is not None:
                image.draft(None, at_least)
            image.load()
            if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
                image = _to_8_bits(image)
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


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey divided by 257 and rounded, in strips: the small file of a large image must not fill the memory."""
    width, height = image.size
    pixels = np.empty((height, width), np.uint8)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = np.asarray(image.crop((0, top, width, min(top + rows, height))))
        pixels[top : top + rows] = (np.clip(strip, 0, 65535).astype(np.uint32) + 128) // 257
    return Image.fromarray(pixels)


@functools.cache
def picture_formats() -> list[str]:
    """Of FORMATS those that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def size_of(image: Picture) -> tuple[int, int]:
    """(width, height)"""
    return image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])


def annotations_to_target(
    annotations: list[dict[str, Any]], image_id: int, width: int, height: int, masks: torch.Tensor | None = None
) -> Target:
    """COCO annotations of one image -> target, by the official rules.

    Crowds are left out; boxes [x, y, width, height] become corners clamped to the image, and those without area
    are dropped. masks: [N, height, width] of the N annotations, decoded; the target's are uint8. `labels` are
    category ids, `size` and `orig_size` are (height, width). As published, `iscrowd` is float where there is no
    annotation.
    """
    used = [i for i, a in enumerate(annotations) if not a.get("iscrowd")]
    boxes = torch.tensor([annotations[i]["bbox"] for i in used], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = torch.min(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
    target = {
        "boxes": boxes,
        "labels": torch.tensor([annotations[i]["category_id"] for i in used], dtype=torch.int64),
        "area": torch.tensor([float(annotations[i]["area"]) for i in used]),
        "iscrowd": torch.tensor([annotations[i].get("iscrowd", 0) for i in used]),
    }
    if masks is not None:
        target["masks"] = masks[used].to(torch.uint8)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    target = {k: v[keep] for k, v in target.items()}
    size = torch.tensor([height, width])
    return {**target, "image_id": torch.tensor([image_id]), "orig_size": size, "size": size.clone()}


def resized_size(width: int, height: int, size: int, max_size: int | None = None) -> tuple[int, int]:
    """(width, height) after the shorter side becomes `size` with the longer at most `max_size`.

    The official rule: when the longer side would be too long, size = round(max_size * short / long)
    (Python's rounding); the other side is truncated. Where that is no pixel, it is one, and the longer `max_size`.
    """
    short, long = min(width, height), max(width, height)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
        if size == 0:
            return (1, max_size) if width < height else (max_size, 1)
    if short == size:
        return width, height
    if width < height:
        return size, int(size * height / width)
    return int(size * width / height), size


def input_size(config: ModelConfig, width: int, height: int) -> tuple[int, int]:
    """(width, height) at which the model sees an image of this size."""
    size = config.image_size if config.upscale else min(config.image_size, width, height)
    return resized_size(width, height, size, config.image_max_size)


def resize_to(image: Picture, target: Target, size: tuple[int, int]) -> tuple[Picture, Target]:
    """Resize to (width, height); boxes are scaled by the true ratio of each axis, areas by their product.

    Masks take the nearest pixel.
    """
    width, height = size_of(image)
    ratio_w, ratio_h = size[0] / width, size[1] / height
    resized = image
    if size != (width, height):
        resized = TF.resize(image, [size[1], size[0]], InterpolationMode.BILINEAR, antialias=True)
    target = dict(target)
    if "boxes" in target:
        target["boxes"] = target["boxes"] * torch.tensor([ratio_w, ratio_h, ratio_w, ratio_h])
    if "area" in target:
        target["area"] = target["area"] * (ratio_w * ratio_h)
    if "masks" in target:
        target["masks"] = F.interpolate(target["masks"][:, None].float(), (size[1], size[0]))[:, 0] > 0.5
    target["size"] = torch.tensor([size[1], size[0]])
    return resized, target


def resize(
    image: Picture, target: Target, size: int, max_size: int | None = None
) -> tuple[Picture, Target]:
    """The official resize: shorter side to `size`, longer at most `max_size`."""
    return resize_to(image, target, resized_size(*size_of(image), size, max_size))


def hflip(image: Picture, target: Target) -> tuple[Picture, Target]:
    """Mirror left and right."""
    target = dict(target)
    if "boxes" in target:
        x1, y1, x2, y2 = target["boxes"].unbind(-1)
        width, _ = size_of(image)
        target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], -1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return TF.horizontal_flip(image), target


def vflip(image: Picture, target: Target) -> tuple[Picture, Target]:
    """Mirror top and bottom."""
    target = dict(target)
    if "boxes" in target:
        x1, y1, x2, y2 = target["boxes"].unbind(-1)
        _, height = size_of(image)
        target["boxes"] = torch.stack([x1, height - y2, x2, height - y1], -1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(-2)
    return TF.vertical_flip(image), target


def crop(image: Picture, target: Target, region: tuple[int, int, int, int]) -> tuple[Picture, Target]:
    """Crop to region (top, left, height, width); boxes are clamped, those left without area dropped.

    A target without boxes keeps what its masks still show.
    """
    top, left, height, width = region
    target = dict(target)
    target["size"] = torch.tensor([height, width])
    keep = None
    if "masks" in target:
        target["masks"] = target["masks"][:, top : top + height, left : left + width]
        keep = target["masks"].flatten(1).any(1)
    if "boxes" in target:
        boxes = target["boxes"] - torch.tensor([left, top, left, top])
        limit = torch.tensor([width, height, width, height])
        target["boxes"] = boxes = torch.min(boxes, limit).clamp(min=0)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if "area" in target:
            target["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    if keep is not None:
        target |= {k: target[k][keep] for k in PER_OBJECT if k in target}
    return TF.crop(image, top, left, height, width), target


def center_crop(image: Picture, target: Target, size: tuple[int, int]) -> tuple[Picture, Target]:
    """Crop the middle to size (height, width); Python's rounding of the halves, as published."""
    (height, width), (whole_w, whole_h) = size, size_of(image)
    return crop(image, target, (round((whole_h - height) / 2), round((whole_w - width) / 2), height, width))


def pad(image: Picture, target: Target, right: int, below: int) -> tuple[Picture, Target]:
    """Black pixels right and below, so that boxes stay as they are."""
    target = dict(target)
    width, height = size_of(image)
    if "masks" in target:
        target["masks"] = F.pad(target["masks"], (0, right, 0, below))
    target["size"] = torch.tensor([height + below, width + right])
    return TF.pad(image, [0, 0, right, below]), target


def random_crop(
    image: Picture, target: Target, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[Picture, Target]:
    """Crop to size (height, width) at a uniformly random place."""
    (height, width), (whole_w, whole_h) = size, size_of(image)
    top = int(rng.integers(0, whole_h - height + 1))
    left = int(rng.integers(0, whole_w - width + 1))
    return crop(image, target, (top, left, height, width))


def random_size_crop(
    image: Picture, target: Target, rng: np.random.Generator, low: int, high: int
) -> tuple[Picture, Target]:
    """Crop to a width and a height of their own, each uniform from `low` to `high`, both included.

    A side shorter than `high` ends the range; one shorter than `low` is kept whole.
    """
    width, height = (int(rng.integers(min(low, side), min(high, side) + 1)) for side in size_of(image))
    return random_crop(image, target, rng, (height, width))


def random_resize(
    image: Picture, target: Target, rng: np.random.Generator, sizes: Sequence[int], max_size: int | None = None
) -> tuple[Picture, Target]:
    """The official resize to one of the sizes."""
    return resize(image, target, int(rng.choice(sizes)), max_size)


def random_pad(
    image: Picture, target: Target, rng: np.random.Generator, max_pad: int
) -> tuple[Picture, Target]:
    """Pad right and below by up to `max_pad` pixels each, included."""
    return pad(image, target, int(rng.integers(0, max_pad + 1)), int(rng.integers(0, max_pad + 1)))


def random_hflip(image: Picture, target: Target, rng: np.random.Generator) -> tuple[Picture, Target]:
    """Mirror every second time."""
    return hflip(image, target) if rng.random() < 0.5 else (image, target)


def random_flips(
    image: Picture, target: Target, rng: np.random.Generator, *, horizontal: bool, vertical: bool
) -> tuple[Picture, Target]:
    """Mirror left and right, top and bottom, each every second time where it is allowed."""
    if horizontal:
        image, target = random_hflip(image, target, rng)
    if vertical and rng.random() < 0.5:
        image, target = vflip(image, target)
    return image, target


TRAIN_SIZES = tuple(range(480, 801, 32))


def augment_detr(
    image: Picture, target: Target, rng: np.random.Generator, max_size: int, *, horizontal: bool = True,
    vertical: bool = False,
) -> tuple[Picture, Target]:  # fmt: skip
    """The published training recipe: flip, then resize, or resize, crop and resize.

    As published, sizes are those of 800-pixel training whatever the model's own input size. horizontal and vertical:
    which flips are allowed, as published only the first.
    """
    image, target = random_flips(image, target, rng, horizontal=horizontal, vertical=vertical)
    if rng.random() < 0.5:
        image, target = random_resize(image, target, rng, (400, 500, 600))
        image, target = random_size_crop(image, target, rng, 384, 600)
    return random_resize(image, target, rng, TRAIN_SIZES, max_size)


def random_zoom(
    image: Picture, target: Target, rng: np.random.Generator, amount: float
) -> tuple[Picture, Target]:
    """Every second time a crop, each side shorter by up to this share; boxes of which little is left are dropped.

    The result keeps its own scale; resizing to the model's input follows.
    """
    if amount == 0 or rng.random() < 0.5:
        return image, target
    whole_w, whole_h = size_of(image)
    share_w, share_h = 1 - amount * rng.random(2)
    width, height = max(1, round(whole_w * share_w)), max(1, round(whole_h * share_h))
    top = int(rng.integers(0, whole_h - height + 1))
    left = int(rng.integers(0, whole_w - width + 1))
    return _crop_keeping_visible(image, target, (top, left, height, width))


def jitter_colour(image: Picture, rng: np.random.Generator, amount: float) -> Picture:
    """Brightness and contrast changed by up to this share."""
    for adjust in (TF.adjust_brightness, TF.adjust_contrast):
        image = adjust(image, float(1 + amount * rng.uniform(-1, 1)))
    return image


TILE_SCALES = (0.7, 1.5)  # of how large the model sees the image when it is alone


def mosaic(
    parts: Sequence[tuple[torch.Tensor, Target]], rng: np.random.Generator, config: ModelConfig
) -> tuple[torch.Tensor, Target]:
    """Crops of four images around a point near the middle of one, which is of the first image's input size.

    Images are uint8 [3, H, W]. After Bochkovskiy et al. 2020 (YOLOv4). Objects stay about as large as the model sees
    them otherwise; what would not fill its place is enlarged. A box of which little is left is dropped.
    """
    width, height = input_size(config, *size_of(parts[0][0]))
    x, y = (round(side * rng.uniform(0.3, 0.7)) for side in (width, height))
    places = (0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)
    canvas, found = torch.zeros(3, height, width, dtype=torch.uint8), []
    for k, (left, top, right, bottom) in zip(rng.permutation(len(parts)), places, strict=True):
        w, h = right - left, bottom - top
        if min(w, h) == 0:  # of an image one pixel wide or high
            continue
        image, target = parts[k]
        whole_w, whole_h = size_of(image)
        scale = input_size(config, whole_w, whole_h)[0] / whole_w
        scale *= math.exp(rng.uniform(*np.log(TILE_SCALES)))
        scale = max(scale, w / whole_w, h / whole_h)
        crop_w, crop_h = (min(max(1, round(place / scale)), side) for place, side in ((w, whole_w), (h, whole_h)))
        at = int(rng.integers(0, whole_h - crop_h + 1)), int(rng.integers(0, whole_w - crop_w + 1))
        image, target = resize_to(*_crop_keeping_visible(image, target, (*at, crop_h, crop_w)), (w, h))
        canvas[:, top:bottom, left:right] = image
        found.append({**target, "boxes": target["boxes"] + torch.tensor([left, top, left, top])})
    return canvas, {key: torch.cat([target[key] for target in found]) for key in ("boxes", "labels")}


def _crop_keeping_visible(
    image: Picture, target: Target, region: tuple[int, int, int, int], visible: float = 0.4
) -> tuple[Picture, Target]:
    """Crop, dropping boxes of which less than `visible` is left: a sliver teaches nothing."""
    top, left, height, width = region
    boxes = target["boxes"]
    low = torch.tensor([left, top], dtype=boxes.dtype)
    high = torch.tensor([left + width, top + height], dtype=boxes.dtype)
    inside = (torch.min(boxes[:, 2:], high) - torch.max(boxes[:, :2], low)).clamp(min=0).prod(1)
    keep = inside >= visible * (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = {k: v[keep] if k in PER_OBJECT else v for k, v in target.items()}
    return crop(image, kept, region)


def to_uint8(image: Image.Image) -> torch.Tensor:
    """PIL's RGB image -> uint8 [3, H, W], the channels of a pixel side by side, which is resized fastest."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def boxes_to_targets(boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """xyxy in pixels [N, 4] -> cxcywh in 0..1 of the image [N, 4], as the model predicts them."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    scaled = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)
    return scaled / torch.tensor([width, height, width, height], dtype=boxes.dtype)
