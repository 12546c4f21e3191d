"""The detector as all stages use it: what an image gets, whatever is beside it, in whichever precision."""
from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detr import compiling
from detr.batch import pad_images, prepare
from detr.config import ModelConfig
from detr.model import DETR
from detr.queries import make_denoising_queries
from pipelines.detect import Detector

SMALL = {"hidden_dim": 32, "nheads": 4, "dim_feedforward": 64, "num_queries": 12, "num_classes": 3, "dropout": 0.0}
SIZES = {"image_size": 96, "image_max_size": 128, "upscale": False}
MODELS = {
    "learned": ModelConfig(backbone="small", norm="batch", enc_layers=2, dec_layers=3, **SMALL, **SIZES),
    "anchors": ModelConfig(preset="tiny", two_stage=False, **SMALL, **SIZES),
    "two_stage": ModelConfig(preset="tiny", **SMALL, **SIZES),
    "resnet18": ModelConfig(backbone="resnet18", enc_layers=1, dec_layers=2, **SMALL, **SIZES),
}
CATEGORIES = [{"id": i, "name": f"class {i}"} for i in (3, 5, 8)]


def make_model(kind: str) -> DETR:
    """Random, but such that the queries of an image differ in what they find."""
    torch.manual_seed(0)
    model = DETR(MODELS[kind]).eval()
    for name, module in model.named_modules():
        if "decoder" in name and name.endswith(("self_attn", "multihead_attn")):
            nn.init.normal_(module.in_proj_bias, std=0.1)
            with torch.no_grad():
                module.in_proj_weight[: 2 * model.config.hidden_dim] *= 3
                module.out_proj.weight *= 3
    for owner in [model] + ([model.decoder.proposals] if kind == "two_stage" else []):
        nn.init.normal_(owner.bbox_embed.layers[-1].weight, std=0.5)
        nn.init.normal_(owner.class_embed.weight)
        nn.init.zeros_(owner.class_embed.bias)
    with torch.no_grad():  # what all queries have in common is taken away
        logits = model(torch.randn(1, 3, 96, 96), torch.zeros(1, 96, 96, dtype=torch.bool))["pred_logits"][0]
        model.class_embed.bias -= logits.mean(0)
    return model


def make_images(sizes: list[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """(width, height) -> images with some structure."""
    random = np.random.default_rng(seed)
    images = []
    for width, height in sizes:
        coarse = Image.fromarray(random.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        images.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return images


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one["labels"].tolist() == other["labels"].tolist()
    np.testing.assert_allclose(one["scores"], other["scores"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(one["boxes"], other["boxes"], rtol=0, atol=1e-2)  # 1e-4 of a hundred pixels


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_found_on_an_image_does_not_depend_on_the_images_beside_it(kind):
    detector = Detector(make_model(kind), CATEGORIES, batch_size=4)
    images = make_images([(60, 90), (128, 40), (90, 60), (64, 96), (300, 200), (61, 94), (96, 64), (63, 95), (20, 20)])
    together = detector.detect(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = detector.detect([image])
        assert_close(found, alone)
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= [image.width, image.height] * 2).all()
        assert (np.diff(found["scores"]) <= 0).all() and len(found["scores"]) >= 12
    assert all(np.ptp(together[4][key], axis=0).max() > least for key, least in (("scores", 0.05), ("boxes", 1)))
    # To the last bit in a batch of as many: the same image with others beside it.
    first, second = (detector.detect([images[3], *make_images([(60, 90)] * 3, seed)]) for seed in (1, 2))
    assert all(np.array_equal(first[0][key], second[0][key]) for key in first[0])
    assert not np.array_equal(first[1]["boxes"], second[1]["boxes"])
    assert detector.detect([]) == []


class Fixed(nn.Module):
    """A model that always finds the same."""

    def __init__(self, config: ModelConfig, logits: list, boxes: list):
        super().__init__()
        self.config, self.logits, self.boxes = config, torch.tensor(logits), torch.tensor(boxes)

    def forward(self, images, mask):
        return {"pred_logits": self.logits[: len(images)], "pred_boxes": self.boxes[: len(images)]}


def test_boxes_are_in_pixels_of_the_image_and_clipped_to_it_best_first():
    detector = Detector(make_model("learned"), CATEGORIES)
    high, low, no = 4.0, 1.0, -9.0
    logits = [[[no, low, no, 0.0], [no, no, high, 0.0], [low, no, no, 0.0]], [[high, no, no, 0.0]] * 3]
    boxes = [[[0.5, 0.5, 0.2, 0.4], [0.9, 0.5, 0.4, 0.5], [0.5, 0.1, 0.5, 0.4]], [[0.5, 0.5, 0.25, 0.5]] * 3]
    detector.model = Fixed(MODELS["learned"], logits, boxes)
    batch, sizes = torch.zeros(2, 3, 64, 96, dtype=torch.uint8), torch.tensor([[60, 90], [64, 96]])
    wide, tall = detector.detect_batch(batch, sizes, torch.tensor([[200, 300], [640, 480]]))
    np.testing.assert_allclose(wide["boxes"], [[210, 50, 300, 150], [120, 60, 180, 140], [75, 0, 225, 60]], rtol=1e-6)
    assert wide["labels"].tolist() == [2, 1, 0]  # of equal scores the first query's first
    top, next_ = np.exp(high) / (np.exp(high) + 1 + 2 * np.exp(no)), np.exp(low) / (np.exp(low) + 1 + 2 * np.exp(no))
    np.testing.assert_allclose(wide["scores"], [top, next_, next_], rtol=1e-6)
    np.testing.assert_allclose(tall["boxes"], [[180, 160, 300, 480]] * 3, rtol=1e-6)
    assert [wide[key].dtype for key in ("boxes", "scores", "labels")] == [np.float32, np.float32, np.int64]
    least = np.array([0.0, 1.0, 0.9])
    wide, tall = detector.detect_batch(batch, sizes, torch.tensor([[200, 300], [640, 480]]), least)
    assert wide["labels"].tolist() == [2, 0] and tall["labels"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["learned", "two_stage"])
def test_a_threshold_on_the_device_keeps_what_one_afterwards_would(kind):
    detector = Detector(make_model(kind), CATEGORIES, batch_size=3)
    images = make_images([(60, 90), (90, 60), (64, 96), (300, 200), (61, 94)])
    everything = detector.detect(images)
    scores, labels = (np.concatenate([found[key] for found in everything]) for key in ("scores", "labels"))
    # Scores themselves, which are high enough.
    exactly = np.array([np.sort(scores[labels == k])[(labels == k).sum() // 2] for k in range(3)], np.float64)
    for least in (exactly, np.nextafter(exactly, 1), np.zeros(3), np.ones(3), np.array([0.0, 1.0, 1.0])):
        for found, thresholded in zip(everything, detector.detect(images, least), strict=True):
            kept = found["scores"] >= least[found["labels"]]
            for key in found:
                assert np.array_equal(thresholded[key], found[key][kept]) and thresholded[key].dtype == found[key].dtype
    counts = [sum(len(found["scores"]) for found in detector.detect(images, least))
              for least in (np.zeros(3), exactly, np.nextafter(exactly, 1), np.ones(3))]  # fmt: skip
    assert counts[0] == len(scores) > counts[1] > counts[2] > counts[3] == 0


@pytest.mark.parametrize("kind", ["learned", "two_stage"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_one_copy_to_the_host_a_batch_and_the_number_of_what_is_left(kind, batch_size, host_copies):
    detector = Detector(make_model(kind), CATEGORIES)
    batch = torch.randint(0, 255, (batch_size, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[60, 90]] * batch_size)
    with host_copies() as copies:
        detector.detect_batch(batch, sizes, 2 * sizes)
    assert copies.seen == ["cpu"]
    with host_copies() as copies:
        detector.detect_batch(batch, sizes, 2 * sizes, np.full(3, 0.4))
    assert copies.seen == ["index", "cpu"]


@pytest.mark.parametrize("kind", MODELS)
def test_the_heads_compute_the_last_layer_alone(kind):
    model = make_model(kind)
    detector = Detector(model, CATEGORIES)
    seen = []
    for owner in (model, detector.model):
        owner.class_embed.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        if kind != "anchors" and kind != "two_stage":
            owner.bbox_embed.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 50:] = True
    images = images.masked_fill(mask[:, None], 0)
    with torch.no_grad():
        full, last = model(images, mask), detector.model(images, mask)
    layers = MODELS[kind].dec_layers
    assert seen == ([layers, 1] if kind in ("anchors", "two_stage") else [layers] * 2 + [1] * 2)
    assert "aux_outputs" in full and "aux_outputs" not in last and model.config.aux_loss
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(last[key], full[key], rtol=0, atol=1e-4)


def test_denoising_queries_keep_all_layers_without_auxiliary_losses():
    config = MODELS["two_stage"].model_copy(update={"aux_loss": False})
    model = DETR(config)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    queries = make_denoising_queries(targets, config.denoising, 3, [torch.Generator().manual_seed(0)])
    outputs = model(torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool), queries)
    assert [len(outputs["denoising"][key]) for key in ("pred_logits", "pred_boxes")] == [config.dec_layers] * 2
    assert outputs["pred_boxes"].shape == (1, 12, 4) and "aux_outputs" not in outputs


def rounded(values: np.ndarray) -> float:
    """The share of values that bfloat16 would hold exactly."""
    values = torch.from_numpy(values[(values > 0) & (values < 90)])
    return float((values == values.bfloat16().float()).float().mean())


@pytest.mark.parametrize("kind", MODELS)
def test_in_bfloat16_boxes_and_scores_are_near_and_not_rounded(kind):
    model = make_model(kind)
    exact, fast = Detector(model, CATEGORIES), Detector(model, CATEGORIES, precision="bfloat16")
    images = make_images([(128, 96)] * 6)
    apart = []
    for one, other in zip(exact.detect(images), fast.detect(images), strict=True):
        pixels = np.abs(one["boxes"][:, None] - other["boxes"]).max(-1)
        pixels[one["labels"][:, None] != other["labels"]] = np.inf
        apart += pixels.min(1).tolist()
        assert rounded(other["boxes"]) < 0.1 and rounded(other["scores"]) < 0.1
    if kind != "two_stage":  # whose random proposals are so alike that rounding chooses other ones
        assert np.percentile(apart, 90) < 0.5
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_bfloat16_takes_half_the_memory_for_all_but_heads_and_norms():
    model = Detector(make_model("two_stage"), CATEGORIES, precision="bfloat16").model
    kinds = {name: weight.dtype for name, weight in model.named_parameters()}
    full = [name for name, kind in kinds.items() if kind == torch.float32]
    heads = [name for name in kinds if "class_embed" in name or "bbox_embed" in name]
    assert len(heads) == 16 and set(heads) <= set(full)
    assert all("norm" in name or name in heads or name.split(".")[-1] in ("content", "weight") for name in full)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    assert sum(sizes[name] for name in full) < 0.1 * sum(sizes.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_detector_finds_the_same(precision, monkeypatch):
    monkeypatch.setattr(compiling, "compile_layers", functools.partial(compiling.compile_layers, backend="eager"))
    images = make_images([(60, 90), (90, 60), (64, 96)])
    try:
        plain = Detector(make_model("learned"), CATEGORIES, precision=precision)
        compiled = Detector(make_model("learned"), CATEGORIES, precision=precision, compile=True)
        for one, other in zip(plain.detect(images), compiled.detect(images), strict=True):
            assert_close(one, other)
        assert plain.compiled is None and compiled.compiled().startswith("The backbone and the encoder are compiled")
    finally:
        torch._dynamo.reset()
        torch._dynamo.config.suppress_errors = False


def test_images_prepared_elsewhere_give_what_detect_gives():
    detector = Detector(make_model("two_stage"), CATEGORIES)
    images = make_images([(300, 210), (280, 200)])  # of one padded shape
    batch, sizes = pad_images([prepare(image, MODELS["two_stage"]) for image in images], 16)
    originals = torch.tensor([[image.height, image.width] for image in images])
    for one, other in zip(detector.detect(images), detector.detect_batch(batch, sizes, originals), strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)
