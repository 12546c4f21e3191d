"""Which images share a batch in inference, and how they come into it."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from detr.batch import pad_images, padded_shape, prepare, prepare_images, same_shape_batches
from detr.config import ModelConfig
from detr.transforms import input_size


@pytest.mark.parametrize(
    ("model", "width", "height", "shape"),
    [
        ({}, 640, 480, (800, 1088)),  # 1066 x 800
        ({}, 480, 640, (1088, 800)),
        ({}, 2000, 100, (96, 1344)),  # 1333 x 67
        ({"image_size": 480}, 640, 480, (480, 640)),
        ({"image_size": 480}, 641, 480, (480, 656)),  # steps of 16 below 512 pixels
        ({"image_size": 600, "upscale": False}, 33, 31, (32, 64)),
        ({"image_size": 192, "image_max_size": 256, "upscale": False}, 1, 1, (16, 16)),
    ],
)
def test_the_padded_shape_follows_from_the_size_of_the_image(model, width, height, shape):
    config = ModelConfig.model_validate({"preset": "detr_resnet50", **model})
    assert padded_shape(config, width, height) == shape
    image = Image.new("RGB", (width, height))
    assert tuple(prepare(image, config).shape) == (3, *input_size(config, width, height)[::-1])
    assert tuple(prepare_images([image], config)[0].shape[2:]) == shape


def test_only_equal_shapes_share_a_batch_in_a_fixed_order():
    shapes = [(32, 48), (16, 64), (32, 48), (32, 48), (16, 64), (32, 32)]
    assert same_shape_batches(shapes, 2) == [[1, 4], [5], [0, 2], [3]]
    assert same_shape_batches(shapes, 16) == [[1, 4], [5], [0, 2, 3]]
    assert same_shape_batches([], 4) == []
    random = np.random.default_rng(0)
    shapes = [tuple(shape) for shape in random.integers(1, 4, (50, 2)).tolist()]
    batches = same_shape_batches(shapes, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(len({shapes[i] for i in batch}) == 1 and 1 <= len(batch) <= 3 for batch in batches)
    assert sum(len(batch) < 3 for batch in batches) <= len(set(shapes))  # one of each shape is not full


def test_a_prepared_image_lies_unchanged_in_the_corner_of_its_batch():
    config = ModelConfig(preset="tiny", image_size=64, image_max_size=96)
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    image = prepare(Image.fromarray(pixels), config)  # no larger than the model sees it
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
    batch, sizes = pad_images([image, image], 16)
    assert batch.shape == (2, 3, 64, 64) and sizes.tolist() == [[50, 60]] * 2
    assert torch.equal(batch[1, :, :50, :60], image) and not batch[:, :, 50:].any() and not batch[..., 60:].any()
