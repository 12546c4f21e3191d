"""Images from bytes, and boxes that stay where their objects are."""
from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from detr import transforms
from detr.batch import pad_images
from detr.config import ModelConfig
from detr.transforms import (
    TRAIN_SIZES,
    ImageError,
    annotations_to_target,
    augment_detr,
    boxes_to_targets,
    center_crop,
    crop,
    decode_image,
    hflip,
    input_size,
    jitter_colour,
    mosaic,
    pad,
    random_crop,
    random_flips,
    random_pad,
    random_size_crop,
    random_zoom,
    resize,
    size_of,
    to_uint8,
    vflip,
)

LIMIT = 1_000_000
COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (20, 250, 250)]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_images_come_out_as_they_are(kind):
    decoded = decode_image(encode(noise(), kind), LIMIT)
    assert decoded.mode == "RGB" and np.array_equal(np.asarray(decoded), np.asarray(noise()))


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that promises pixels and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_the_limit_of_pixels_holds_before_anything_is_decoded():
    with pytest.raises(ImageError, match="2000x501 is more than the limit of 1000000 pixels"):
        decode_image(png_header_only(2000, 501), LIMIT)
    with pytest.raises(ImageError, match="cannot be decoded"):  # within the limit the pixels are missed
        decode_image(png_header_only(2000, 500), LIMIT)
    with pytest.raises(ImageError, match="limit of 1000000"):  # where Pillow itself refuses
        decode_image(png_header_only(60000, 60000), LIMIT)
    assert decode_image(encode(Image.new("L", (1000, 1000))), LIMIT).size == (1000, 1000)


@pytest.mark.parametrize(("kind", "share"), [("PNG", 0.5), ("JPEG", 0.3), ("JPEG", 0.9), ("BMP", 0.5), ("GIF", 0.5)])
def test_truncated_files_are_refused(kind, share):
    data = encode(noise(200, 150), kind)
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * share)], LIMIT)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image at all", "not an image of a known format"),
        (b"\x89PNG\r\n\x1a\n", "image"),
        # Pillow would run another program for this one, and decode this icon's picture before it says how large it is.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF", "not an image of a known"),
        (b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\x10\0\0\0\x16\0\0\0" + bytes(16), "not an image of a known"),
    ],
)
def test_what_is_no_image_says_so(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data, LIMIT)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_give_an_image_or_a_reason_and_nothing_else():
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        data = encode(noise(24, 20), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, rng.choice([60, len(data)]), rng.integers(1, 8)):
                damaged[at] = rng.integers(256)
            try:
                assert decode_image(bytes(damaged), LIMIT).mode == "RGB"
            except ImageError as error:
                assert str(error)
                refused += 1
    assert refused > 60


def test_errors_of_decoders_are_reasons(monkeypatch):
    """AVIF's decoder raises RuntimeError, TIFF's struct.error, on damaged files."""
    for error in (RuntimeError("Decoding of color planes failed"), struct.error("unpack requires 2"), KeyError(3)):

        def fail(self, error=error):
            raise error

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(ImageError, match="cannot be decoded"):
            decode_image(encode(noise()), LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled_and_not_clipped(kind):
    values = np.array([[0, 257, 128 * 257, 200 * 257 + 100, 65535]], dtype=np.uint16)
    decoded = decode_image(encode(Image.fromarray(values), kind), LIMIT)
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 1, 128, 200, 255]
    assert decoded.mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "32-bit TIFF"])
def test_every_sixteen_bit_grey_is_rounded_to_the_nearest(kind, monkeypatch):
    monkeypatch.setattr(transforms, "STRIP", 300 * 7)  # the last strip is lower
    values = np.random.default_rng(0).permutation(65536)[: 300 * 218].reshape(218, 300)
    values = np.concatenate([values, np.arange(65536 - 300, 65536)[None]])
    if kind == "32-bit TIFF":
        values[0, :4] = -5, -(2**31), 65536, 2**31 - 1
        image = Image.fromarray(values.astype(np.int32))
    elif kind == "big-endian TIFF":
        image = Image.frombytes("I;16B", (300, 219), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values.astype(np.uint16))
    decoded = np.asarray(decode_image(encode(image, kind.split()[-1]), LIMIT))
    assert np.array_equal(decoded[..., 0], np.clip(np.round(values / 257), 0, 255))


def test_a_large_sixteen_bit_grey_does_not_fill_the_memory():
    data = encode(Image.new("I;16", (2000, 2000), 300))  # a few KB
    tracemalloc.start()  # which sees NumPy's memory, not Pillow's own
    decode_image(data, 4_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4_000_000


@pytest.mark.filterwarnings("ignore:Palette images:UserWarning")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_every_mode_becomes_rgb_and_alpha_is_dropped(mode):
    image = Image.new("RGBA", (4, 3), (200, 200, 200, 0)).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    decoded = decode_image(encode(image, kind), LIMIT)
    assert decoded.mode == "RGB" and decoded.size == (4, 3)
    if mode != "1":
        assert abs(np.asarray(decoded).astype(int) - 200).max() <= 3


def test_an_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(noise(40, 30), "JPEG", exif=exif), LIMIT).size == (40, 30)


# ---------------------------------------------------------------- geometry


def painted(seed: int, width: int = 0, height: int = 0) -> tuple[Image.Image, dict]:
    """Rectangles of one colour each, one per strip of the image; a label is the index of its colour."""
    rng = np.random.default_rng(seed)
    width, height = width or int(rng.integers(60, 140)), height or int(rng.integers(60, 140))
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    order = rng.permutation(len(COLOURS))[: rng.integers(0, len(COLOURS) + 1)]
    boxes = []
    for i, label in enumerate(order):
        left, right = width * i // len(COLOURS), width * (i + 1) // len(COLOURS)
        x1 = int(rng.integers(left, right - 3))
        x2 = int(rng.integers(x1 + 2, right))
        y1 = int(rng.integers(0, height - 3))
        y2 = int(rng.integers(y1 + 2, height + 1))
        pixels[y1:y2, x1:x2] = COLOURS[label]
        boxes.append([x1, y1, x2, y2])
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(order, dtype=torch.int64),
    }
    return Image.fromarray(pixels), target


BOTH = pytest.mark.parametrize("kind", [lambda image: image, to_uint8], ids=["PIL", "tensor"])


def pixels(image) -> np.ndarray:
    """uint8 [H, W, 3]"""
    return image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else np.asarray(image)


def seen(image, label: int, tolerance: int = 0) -> np.ndarray:
    """Where the label's colour stands, [N, 2] as y, x."""
    return np.argwhere((np.abs(pixels(image).astype(int) - COLOURS[label]) <= tolerance).all(-1))


def extent(points: np.ndarray) -> list[int]:
    (y1, x1), (y2, x2) = points.min(0), points.max(0) + 1
    return [x1, y1, x2, y2]


@BOTH
@pytest.mark.parametrize("flip", [hflip, vflip])
def test_a_flip_moves_boxes_with_their_objects_and_twice_is_the_identity(flip, kind):
    for seed in range(20):
        image, target = painted(seed)
        before = target["boxes"].clone()
        flipped, after = flip(kind(image), target)
        for box, label in zip(after["boxes"].tolist(), after["labels"].tolist(), strict=True):
            assert box == extent(seen(flipped, label))
        again, back = flip(flipped, after)
        assert np.array_equal(pixels(again), np.asarray(image))
        assert torch.equal(back["boxes"], before) and torch.equal(target["boxes"], before)


def augment(image, target, rng, scale, **flips):
    return random_zoom(*random_flips(image, target, rng, **{"horizontal": True, "vertical": True, **flips}), rng, scale)


@BOTH
def test_light_augmentation_keeps_boxes_on_their_objects_and_inside_the_image(kind):
    sizes, dropped, total = set(), 0, 0
    for seed in range(300):
        image, target = painted(seed)
        got, after = augment(kind(image), target, np.random.default_rng(seed), 0.6)
        width, height = size_of(got)
        boxes, labels = after["boxes"], after["labels"]
        assert len(boxes) == len(labels) and boxes.dtype == torch.float32 and labels.dtype == torch.int64
        assert (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            assert box == extent(seen(got, label))
            assert len(seen(got, label)) >= 0.4 * len(seen(image, label)), "a sliver was kept"
        for label in set(target["labels"].tolist()) - set(labels.tolist()):
            assert len(seen(got, label)) < 0.4 * len(seen(image, label)), "most of a dropped box is still to be seen"
            dropped += 1
        assert 0.39 * image.width <= width <= image.width and 0.39 * image.height <= height <= image.height
        sizes.add((width, height) == image.size)
        total += len(target["labels"])
    assert sizes == {True, False} and 0 < dropped < total / 2


def test_light_augmentation_follows_its_settings_and_its_generator():
    image, target = painted(3)
    off = {"horizontal": False, "vertical": False, "scale": 0.0}
    for seed in range(10):
        same, after = augment(image, target, np.random.default_rng(seed), **off)
        assert np.array_equal(np.asarray(same), np.asarray(image)) and torch.equal(after["boxes"], target["boxes"])
    on = {"horizontal": True, "vertical": False, "scale": 0.5}
    runs = [augment(image, target, np.random.default_rng(seed), **on)[0] for seed in (1, 1, 2)]
    assert np.array_equal(np.asarray(runs[0]), np.asarray(runs[1]))
    assert runs[0].size != runs[2].size or not np.array_equal(np.asarray(runs[0]), np.asarray(runs[2]))


def one_object(label: int, width: int, height: int, rng: np.random.Generator):
    """A black image with one rectangle of its label's colour."""
    w, h = (int(side * rng.uniform(0.2, 0.6)) for side in (width, height))
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y : y + h, x : x + w] = COLOURS[label]
    target = {"boxes": torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32), "labels": torch.tensor([label])}
    return Image.fromarray(pixels), target


def test_a_mosaic_shows_four_images_with_their_boxes_at_about_their_scale():
    config, gone, scales = ModelConfig(preset="tiny"), 0, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sizes = [(640, 480), (300, 500), (200, 100), (640, 480)]  # one wide enough only when it is enlarged
        parts = [one_object(label, *size, rng) for label, size in enumerate(sizes)]
        canvas, target = mosaic([(to_uint8(image), target) for image, target in parts], rng, config)
        assert size_of(canvas) == (256, 192) and len(target["boxes"]) == len(target["labels"])
        labels = target["labels"].tolist()
        for label, (image, before) in enumerate(parts):
            shown = np.argwhere(np.abs(pixels(canvas).astype(int) - COLOURS[label]).max(-1) < 110)
            area = float((before["boxes"][0, 2:] - before["boxes"][0, :2]).prod())
            if label not in labels:
                assert image.width < 640 or len(shown) < 0.4 * area * (1.5 * 0.4) ** 2, "it is still to be seen"
                gone += 1
                continue
            box = target["boxes"][labels.index(label)]
            assert np.abs(box.numpy() - extent(shown)).max() <= 1.5, "the box is not where its object is"
            scale = (box[2:] - box[:2]) / (before["boxes"][0, 2:] - before["boxes"][0, :2]) / 0.4
            if label == 0 and abs(scale[0] / scale[1] - 1) < 0.03:  # as good as whole
                scales.append(float(scale.mean()))
    assert 0 < gone < 400
    assert np.quantile(scales, 0.1) > 0.68 and max(scales) < 1.53 and np.ptp(scales) > 0.5


def test_colour_changes_pixels_within_its_amount():
    image, _ = painted(4)
    got, tensor = (jitter_colour(kind(image), np.random.default_rng(0), 0.4) for kind in (lambda x: x, to_uint8))
    assert got.size == image.size == size_of(tensor)
    assert not np.array_equal(np.asarray(got), np.asarray(image))
    assert np.abs(pixels(tensor).astype(int) - pixels(got)).max() <= 2  # rounded twice
    same = jitter_colour(image, np.random.default_rng(0), 0.0)
    assert np.abs(np.asarray(same).astype(int) - np.asarray(image)).max() <= 1


@BOTH
def test_the_published_recipe_keeps_boxes_on_their_objects_and_to_its_sizes(kind):
    shorter = set()
    for seed in range(25):
        image, target = painted(seed, 160, 120)
        got, after = augment_detr(kind(image), target, np.random.default_rng(seed), 1333)
        width, height = size_of(got)
        shorter.add(min(width, height))
        assert max(width, height) <= 1333 and after["size"].tolist() == [height, width]
        assert len(after["boxes"]) == len(after["labels"])
        pixel = 2 + 1.5 * width / 70  # one pixel of the source spans several, and edges are blurred
        for box, label in zip(after["boxes"].tolist(), after["labels"].tolist(), strict=True):
            points = seen(got, label, tolerance=60)
            if len(points):  # a sliver of an object may be blurred away
                assert np.abs(np.array(box) - extent(points)).max() <= pixel
    assert shorter <= set(TRAIN_SIZES) and len(shorter) > 5


@BOTH
def test_a_crop_drops_what_it_leaves_out_and_counts_the_rest_anew(kind):
    target = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 30], [5, 5, 30, 25]]),
        "labels": torch.tensor([1, 2, 3]),
        "area": torch.tensor([100.0, 200, 500]),
        "iscrowd": torch.tensor([0, 1, 0]),
    }
    image, after = crop(kind(noise()), target, (10, 15, 20, 15))  # x 15..30, y 10..30
    assert np.array_equal(pixels(image), np.asarray(noise())[10:30, 15:30])
    assert size_of(image) == (15, 20) and after["size"].tolist() == [20, 15]
    assert after["boxes"].tolist() == [[5, 10, 15, 20], [0, 0, 15, 15]]
    assert after["labels"].tolist() == [2, 3] and after["iscrowd"].tolist() == [1, 0]
    assert after["area"].tolist() == [100, 225]
    assert target["labels"].tolist() == [1, 2, 3]


def test_a_target_of_masks_alone_keeps_what_is_still_to_be_seen():
    masks = torch.zeros(3, 30, 40, dtype=torch.bool)
    masks[0, 2:6, 2:6] = masks[1, 10:20, 15:35] = masks[2, 29, 39] = True
    _, after = crop(noise(), {"masks": masks, "labels": torch.tensor([1, 2, 3])}, (10, 15, 20, 25))
    assert after["labels"].tolist() == [2, 3] and after["masks"].shape == (2, 20, 25)
    assert after["masks"][0, :10, :20].all() and after["masks"][1].sum() == 1


def test_sizes_and_places_of_random_crops_are_uniform_with_both_ends():
    wide, rng = Image.new("L", (700, 500)), np.random.default_rng(0)
    sizes = np.array([random_size_crop(wide, {}, rng, 384, 600)[0].size for _ in range(6000)])
    for side, values in zip(sizes.T, (range(384, 601), range(384, 501)), strict=True):
        assert set(side) == set(values)
        error = np.std(values) / len(side) ** 0.5
        assert abs(side.mean() - np.mean(values)) < 4 * error
        assert side.std() == pytest.approx(np.std(values), rel=0.03)
    assert abs(np.corrcoef(sizes.T)[0, 1]) < 0.06
    shown = np.arange(20, dtype=np.uint8).reshape(4, 5)
    corners = [np.asarray(random_crop(Image.fromarray(shown), {}, rng, (3, 3))[0])[0, 0] for _ in range(600)]
    assert set(corners) == {0, 1, 2, 5, 6, 7} and min(np.bincount(corners)[[0, 1, 2, 5, 6, 7]]) > 60


@BOTH
def test_padding_is_black_and_moves_no_box(kind):
    target = {"boxes": torch.tensor([[1.0, 2, 3, 4]]), "masks": torch.ones(1, 30, 40, dtype=torch.bool)}
    image, after = pad(kind(noise()), target, 3, 2)
    assert size_of(image) == (43, 32) and after["size"].tolist() == [32, 43]
    assert np.array_equal(pixels(image)[:30, :40], np.asarray(noise()))
    assert pixels(image)[30:].max() == pixels(image)[:, 40:].max() == 0
    assert torch.equal(after["boxes"], target["boxes"])
    assert after["masks"].sum() == 1200 and after["masks"].shape == (1, 32, 43)
    rng = np.random.default_rng(0)
    sizes = {random_pad(noise(), {}, rng, 2)[0].size for _ in range(200)}
    assert sizes == {(w, h) for w in (40, 41, 42) for h in (30, 31, 32)}


def test_the_middle_is_rounded_as_python_rounds():
    image = Image.fromarray(np.arange(49, dtype=np.uint8).reshape(7, 7))
    for size, first in (((4, 4), 16), ((2, 2), 16), ((7, 6), 0)):  # 1.5 and 2.5 both become 2, 0.5 becomes 0
        assert np.asarray(center_crop(image, {}, size)[0])[0, 0] == first


def test_the_published_recipe_draws_its_sizes_as_published(monkeypatch):
    calls, images, flips = [], 3000, 0

    def recorded(image, target, size, max_size=None):
        calls[-1].append((size, max_size))
        return Image.new("1", transforms.resized_size(*image.size, size, max_size)), target

    monkeypatch.setattr(transforms, "resize", recorded)
    monkeypatch.setattr(transforms, "hflip", lambda image, target: (image, {"flipped": True}))
    source, rng = Image.new("1", (640, 480)), np.random.default_rng(0)
    for _ in range(images):
        calls.append([])
        flips += augment_detr(source, {}, rng, 1333)[1].get("flipped", False)
    cropped = [c for c in calls if len(c) == 2]
    assert abs(flips / images - 0.5) < 0.04 and abs(len(cropped) / images - 0.5) < 0.04
    counts = np.unique([c[-1][0] for c in calls], return_counts=True)
    assert counts[0].tolist() == list(TRAIN_SIZES) and abs(counts[1] / images - 1 / 11).max() < 0.025
    first = np.unique([c[0][0] for c in cropped], return_counts=True)
    assert first[0].tolist() == [400, 500, 600] and abs(first[1] / len(cropped) - 1 / 3).max() < 0.05
    assert {c[-1][1] for c in calls} == {1333} and {c[0][1] for c in cropped} == {None}


def test_annotations_outside_the_image_are_cut_or_dropped():
    records = [
        {"bbox": [-5, -5, 20, 10], "category_id": 3, "area": 200},
        {"bbox": [35, 25, 20, 20], "category_id": 1, "area": 400, "iscrowd": 0},
        {"bbox": [50, 0, 5, 5], "category_id": 7, "area": 25},
        {"bbox": [0, 0, 40, 30], "category_id": 9, "area": 1200, "iscrowd": 1},
    ]
    target = annotations_to_target(records, 11, 40, 30)
    assert target["boxes"].tolist() == [[0, 0, 15, 5], [35, 25, 40, 30]]
    assert target["labels"].tolist() == [3, 1] and target["area"].tolist() == [200, 400]
    assert target["size"].tolist() == [30, 40] and target["image_id"].tolist() == [11]


def test_an_image_without_boxes_passes_through_everything():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        _, after = augment(noise(), empty, rng, 0.5)
        assert mosaic([(to_uint8(noise()), empty)] * 4, rng, ModelConfig(preset="tiny"))[1]["boxes"].shape == (0, 4)
        _, published = augment_detr(noise(), empty, rng, 1333)
        assert after["boxes"].shape == published["boxes"].shape == (0, 4)
        assert len(after["labels"]) == len(published["labels"]) == 0
    assert resize(noise(), empty, 20)[1]["boxes"].shape == (0, 4)
    assert boxes_to_targets(empty["boxes"], 40, 30).shape == (0, 4)


def test_input_size_enlarges_only_when_asked():
    tiny = ModelConfig(preset="tiny")  # 192, at most 256, no upscaling
    assert input_size(tiny, 100, 80) == (100, 80)
    assert input_size(tiny, 400, 400) == (192, 192)
    assert input_size(tiny, 1000, 500) == (256, 128)
    assert input_size(tiny, 1000, 100) == (260, 26)  # the official rule rounds the shorter side first
    published = ModelConfig()
    assert input_size(published, 100, 80) == (1000, 800)
    assert input_size(published, 2000, 500) == (1332, 333)
    assert input_size(tiny, 1, 600) == (1, 256) and input_size(published, 60000, 3) == (1333, 1)  # no side is nothing


# ---------------------------------------------------------------- batches


def test_padding_goes_right_and_below_up_to_the_multiple():
    images = [to_uint8(noise(40, 30)), to_uint8(noise(20, 33))]
    batch, sizes = pad_images(images, 32)
    assert batch.shape == (2, 3, 64, 64) and sizes.tolist() == [[30, 40], [33, 20]]
    for slot, image in zip(batch, images, strict=True):
        assert torch.equal(slot[:, : image.shape[1], : image.shape[2]], image)
        assert slot.sum() == image.sum()
    assert pad_images(images)[0].shape == (2, 3, 33, 40)


def test_boxes_become_shares_of_the_image():
    boxes = boxes_to_targets(torch.tensor([[10.0, 20, 30, 60], [0, 0, 200, 100]]), 200, 100)
    torch.testing.assert_close(boxes, torch.tensor([[0.1, 0.4, 0.1, 0.4], [0.5, 0.5, 1.0, 1.0]]))
