"""The explicit attention path, and what is read off it: maps that lie where the image's pixels lie."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detr.attention import MultiheadAttention
from detr.batch import prepare_images
from detr.config import ModelConfig
from detr.explain import Explanation, attention_maps, boxes_of_queries, explain, over_image
from detr.model import DETR
from detr.postprocess import PostProcess
from detr.queries import DeformableAttention

SMALL = {
    "hidden_dim": 32, "nheads": 4, "dim_feedforward": 64, "num_queries": 10, "num_classes": 4, "enc_layers": 2,
    "dec_layers": 2,
}  # fmt: skip
LEARNED = {**SMALL, "backbone": "small", "norm": "batch", "image_size": 96, "image_max_size": 128, "upscale": False}
CONFIGS = {
    "anchors": ModelConfig(preset="tiny", **SMALL),
    "learned": ModelConfig(**LEARNED),
    "pre-norm": ModelConfig(**LEARNED, pre_norm=True),
    "two grids": ModelConfig(preset="tiny", **{**SMALL, "backbone": "resnet18", "norm": "frozen"}),
}


def make_model(name: str) -> DETR:
    """In eval mode and far from uniform attention."""
    torch.manual_seed(0)
    model = DETR(CONFIGS[name]).eval()
    nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.3)
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=0.3)
            nn.init.normal_(module.in_proj_bias, std=0.3)
        if isinstance(module, DeformableAttention):
            nn.init.normal_(module.places.weight, std=0.03)
            nn.init.normal_(module.shares.weight, std=0.3)
    return model


def padded_images() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(2, 80, 112, dtype=torch.bool)
    mask[1, 50:] = mask[1, :, 90:] = True
    images = torch.randn(2, 3, 80, 112, generator=torch.Generator().manual_seed(1))
    return images.masked_fill(mask[:, None], 0), mask


def photo(width: int = 100, height: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8))


# ---------------------------------------------------------------- the explicit path


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_explicit_path_gives_the_same_outputs(name, dtype, tolerance):
    model, (images, mask) = make_model(name).to(dtype), padded_images()
    with torch.no_grad():
        want = model(images.to(dtype), mask)
    got = attention_maps(model, images.to(dtype), mask).outputs
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_sum_to_one_over_what_is_not_padding(name):
    model, (images, mask) = make_model(name), padded_images()
    maps = attention_maps(model, images, mask)
    anchors = name in ("anchors", "two grids")
    stride = 32 if name == "two grids" else 16
    h, w = -(-80 // stride), -(-112 // stride)
    fine = 4 if anchors else 1
    assert maps.encoder.shape == (2, 4, h, w, h, w)
    assert maps.decoder.shape == (2, 4, 10, -(-80 * fine // stride), -(-112 * fine // stride))
    for each in (maps.encoder, maps.decoder):
        assert each.dtype == torch.float32 and each.min() >= 0
        if anchors and each is maps.decoder:  # what lies outside the image's map is missing; padding is read as zero
            assert each.sum((-2, -1)).max() < 1 + 1e-5 and each.sum((-2, -1)).median() > 0.5
            continue
        torch.testing.assert_close(each.sum((-2, -1)), torch.ones(each.shape[:-2]))
        cell = 80 / each.shape[-2]
        rows, columns = np.ceil(50 / cell).astype(int), np.ceil(90 / cell).astype(int)
        assert each[1, ..., rows:, :].sum() == each[1, ..., columns:].sum() == 0
        assert (each[1].flatten(0, -3).sum(0)[:rows, :columns] > 0).all()  # somebody looks at every cell


def test_reduced_precision_attends_as_full_precision_does():
    model, (images, mask) = make_model("anchors"), padded_images()
    want = attention_maps(model, images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_maps(model, images, mask)
    assert got.decoder.dtype == got.encoder.dtype == torch.float32
    torch.testing.assert_close(got.encoder.sum((-2, -1)), torch.ones(want.encoder.shape[:-2]))
    assert (got.encoder - want.encoder).abs().max() < 0.1


def test_the_model_is_left_as_it_was():
    model, (images, mask) = make_model("anchors"), padded_images()
    attention_maps(model, images, mask)
    with pytest.raises(RuntimeError):
        attention_maps(model, images[:, :2], mask)  # two channels
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="eval"):
        attention_maps(model.train(), images, mask)


# ---------------------------------------------------------------- in the image's coordinates


@pytest.mark.parametrize("size", [(100, 70), (70, 100), (300, 90)])
def test_a_query_that_looks_at_its_box_is_bright_there(size):
    """With all places at the centre, each query's brightest spot is its own box's centre."""
    model = DETR(CONFIGS["anchors"].model_copy(update={"two_stage": False})).eval()
    nn.init.zeros_(model.decoder.layers[-1].cross_attn.places.bias)
    found = explain(model, photo(*size), 0.0)
    assert sorted(found.queries) == list(range(10))
    maps = found.decoder_attention()
    height, width = maps.shape[1:]
    assert abs(width / height - size[0] / size[1]) < 0.1
    cell = 8 / np.array([width, height])
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2 / size
    for weights, centre in zip(maps, centres, strict=True):
        y, x = np.unravel_index(weights.argmax(), weights.shape)
        assert (np.abs((np.array([x, y]) + 0.5) / [width, height] - centre) <= cell).all()


def test_attention_from_a_point_starts_in_the_point_s_own_cell():
    mask = torch.ones(64, 96, dtype=torch.bool)
    mask[:50, :90] = False
    from_cell = torch.eye(24).reshape(4, 6, 4, 6)  # every cell attends to itself
    none = np.zeros(0)
    found = Explanation(none, none, none, none, torch.zeros(0, 4, 6), from_cell, mask, (180, 100))
    points = np.array([[0, 0], [179.9, 99.9], [100, 20], [40, 62]])
    maps = found.encoder_attention(points)
    assert maps.shape == (4, 50, 90)
    for weights, (x, y) in zip(maps, points / 2, strict=True):
        cell = np.array([[x // 16 * 16, x // 16 * 16 + 16], [y // 16 * 16, y // 16 * 16 + 16]])
        rows, columns = np.nonzero(weights == weights.max())
        assert cell[0, 0] <= columns.mean() <= cell[0, 1] and cell[1, 0] <= rows.mean() <= cell[1, 1]
    for outside in ([180, 5], [5, 100], [-1, 5], [float("nan"), 1]):
        with pytest.raises(ValueError, match="180x100"):
            found.encoder_attention([outside])


def test_a_map_is_stretched_over_the_padded_input_and_cut_to_the_image():
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, 6:] = True
    ramp = torch.arange(8.0).expand(1, 4, 8)
    assert torch.equal(over_image(ramp, mask), ramp[..., :6])
    assert over_image(torch.full((3, 2, 2), 0.5), mask).eq(0.5).all()


# ---------------------------------------------------------------- what was found


@pytest.mark.parametrize("name", ["anchors", "learned"])
def test_what_is_explained_is_what_is_detected(name):
    model, image = make_model(name), photo()
    with torch.no_grad():
        outputs = model(*prepare_images([image], model.config))
        want = PostProcess(model.config.class_loss)(outputs, torch.tensor([[70, 100]]))[0]
    best = want["scores"].max().item()
    found = explain(model, image, 0.0)
    assert len(found.queries) == 10 and (np.diff(found.scores) <= 0).all()
    assert found.scores[0] == pytest.approx(best)
    at = want["scores"].argmax()
    assert found.labels[0] == want["labels"][at]
    limit = torch.tensor([100.0, 70, 100, 70])
    np.testing.assert_allclose(found.boxes[0], want["boxes"][at].clamp(min=0).minimum(limit), atol=1e-3)
    middle = float(found.scores[3:5].mean())
    assert len(explain(model, image, middle).queries) == 4
    alone = explain(model, image, 1.0)
    assert list(alone.queries) == list(found.queries[:1])  # the surest, where none is sure enough
    np.testing.assert_allclose(alone.decoder_attention(), found.decoder_attention(1))


def test_a_model_without_encoder_layers_has_no_encoder_attention():
    model = DETR(ModelConfig(preset="tiny", **{**SMALL, "enc_layers": 0})).eval()
    found = explain(model, photo())
    assert found.from_cell is None and found.decoder_attention().shape[0] == 1
    with pytest.raises(ValueError, match="encoder"):
        found.encoder_attention([[1, 1]])


def test_boxes_of_every_query_in_every_image_in_order():
    model = make_model("learned")
    images = [photo(), photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT), photo().rotate(180)]
    boxes = boxes_of_queries(model, iter(images), batch_size=2)
    assert boxes.shape == (3, 10, 4)
    for image, own in zip(images, boxes, strict=True):
        np.testing.assert_allclose(boxes_of_queries(model, [image])[0], own, atol=1e-5)
    assert boxes_of_queries(model, []).shape == (0, 10, 4)
