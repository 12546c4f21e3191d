"""The mask head, its losses, and masks as instances and as one panoptic map."""
from __future__ import annotations

import io
import math

import fill
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as run_lengths
from torch import nn

from detr.batch import normalise, pad_images
from detr.checkpoint import CheckpointError, load_checkpoint, load_official, save_checkpoint
from detr.config import LossConfig, ModelConfig
from detr.criterion import SetCriterion
from detr.matcher import NonFiniteOutputs
from detr.model import DETR, count_parameters
from detr.postprocess import PostProcess
from detr.segmentation import (
    DETRsegm,
    MaskHead,
    MHAttentionMap,
    PostProcessPanoptic,
    PostProcessSegm,
    build_model,
    id_to_rgb,
)
from pipelines.coco import masks_of
from pipelines.detect import Detector

CONFIG = ModelConfig(
    backbone="resnet18", hidden_dim=128, nheads=8, enc_layers=1, dec_layers=2, dim_feedforward=64, dropout=0.0,
    num_queries=5, num_classes=4, masks=True, image_size=64,
)  # fmt: skip


def make_model(config: ModelConfig = CONFIG, freeze_detr: bool = False) -> DETRsegm:
    """Weights that keep queries and cells apart, so that mistakes show."""
    model = fill.fill_torch_module(DETRsegm(DETR(config), freeze_detr), "masks")
    with torch.no_grad():
        model.mask_head.lay1.weight[:, config.hidden_dim :] *= 100  # the maps add up to 1 over a whole image
    return model


def some_images(sizes: list[tuple[int, int]], multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    return normalise(*pad_images(images, multiple))


def some_targets() -> list[dict[str, torch.Tensor]]:
    """Two boxes with masks on 64 x 96, none on 64 x 64, each as large as its image."""
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.5]])
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[0, 10:40, 20:38] = True
    masks[1, 20:60, 50:85] = True
    none = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    return [
        {"labels": torch.tensor([1, 3]), "boxes": boxes, "masks": masks},
        {**none, "masks": torch.zeros(0, 64, 64, dtype=torch.bool)},
    ]


# ---------------------------------------------------------------- weights: names, numbers, initialisation


def skeleton(**settings) -> DETRsegm:
    with torch.device("meta"):
        return build_model(ModelConfig(preset="detr_resnet50_panoptic", **settings))


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_names_and_numbers_of_the_weights_and_their_groups(backbone):
    want, model = fill.load_json("variants")[f"detr_{backbone}_panoptic"], skeleton(backbone=backbone)
    if backbone == "resnet50":
        own = [[k, list(v.shape), str(v.dtype).split(".")[1]] for k, v in model.state_dict().items()]
        assert own == fill.load_json("state_dict_keys")["detr_resnet50_panoptic"]
    assert count_parameters(model) == (want["parameters"], want["trainable"])
    assert len(model.state_dict()) == want["state_dict_entries"]
    others, backbone = model.parameter_groups(1e-4, 1e-5)
    assert (others["lr"], backbone["lr"]) == (1e-4, 1e-5)
    assert {"backbone": len(backbone["params"]), "other": len(others["params"])} == want["trainable_tensors"]


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    modules = {"bbox_attention": MHAttentionMap(256, 8), "mask_head": MaskHead(256, 8, (1024, 512, 256))}
    stats = fill.load_json("init_stats")
    names = [f"{part}.{name}" for part, module in modules.items() for name, _ in module.named_parameters()]
    assert names == [name for name in stats if not name.startswith("detr.")]
    for name in names:
        part, rest = name.split(".", 1)
        x, want = modules[part].get_parameter(rest).detach(), stats[name]
        if want["std"] == 0:
            assert x.min() == x.max() == want["mean"], name
            continue
        error = 6 * 2**0.5 * want["std"] / x.numel() ** 0.5
        assert abs(x.mean() - want["mean"]) < error and abs(x.std() - want["std"]) < error, name
        assert x.abs().max() == pytest.approx(want["absmax"], rel=0.05), name


def test_loss_weights_are_those_of_the_official_script():
    official, loss = fill.load_json("default_args"), LossConfig()
    assert (loss.loss_mask, loss.loss_dice) == (official["mask_loss_coef"], official["dice_loss_coef"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_dim": 64}, "multiple of 128"),
        ({"nheads": 4}, "nheads of 8"),
        ({"class_loss": "focal"}, "class_loss: softmax"),
    ],
)
def test_settings_without_a_mask_head_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**{**CONFIG.model_dump(), **settings})


# ---------------------------------------------------------------- the forward pass


def test_attention_maps_are_one_softmax_over_heads_and_cells():
    maps = MHAttentionMap(4, 2).double()
    with torch.no_grad():
        maps.q_linear.weight.copy_(torch.eye(4))
        maps.k_linear.weight.copy_(2 * torch.eye(4))
        maps.k_linear.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
        query = torch.tensor([[[1.0, 2.0, 3.0, -1.0]]]).double()
        memory = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0]]]).double()
        found = maps(query, memory, torch.tensor([[[False, False, True]]]))
    # Head 0 sees channels 0 and 1, head 1 channels 2 and 3; keys are twice the memory, plus 1 in channel 2.
    logits = [[2.0, 2.0], [3.0, 3.0 * 3 - 1 * 2]]
    exponents = [[math.exp(x / math.sqrt(2)) for x in head] for head in logits]
    total = sum(map(sum, exponents))
    want = torch.tensor([[x / total for x in head] + [0.0] for head in exponents], dtype=torch.float64)
    torch.testing.assert_close(found[0, 0, :, 0], want, rtol=1e-12, atol=0)


def test_the_mask_head_reads_every_querys_maps_beside_the_features():
    """The first convolution is done in two parts: here it is done as it is written in the paper."""
    torch.manual_seed(0)
    head = MaskHead(128, 8, (20, 12, 6)).double()
    for norm in (head.gn1, head.gn2, head.gn3, head.gn4, head.gn5):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    for name in ("lay1", "lay3", "adapter2", "out_lay"):
        nn.init.normal_(head.get_submodule(name).bias)
    src, maps = torch.randn(2, 128, 3, 4).double(), torch.rand(2, 3, 8, 3, 4).double()
    features = [torch.randn(2, *shape).double() for shape in ((20, 5, 7), (12, 10, 14), (6, 19, 28))]
    found = head(src, maps, features)
    assert found.shape == (2, 3, 19, 28)
    for image in range(2):
        for query in range(3):
            x = torch.cat([src[image], maps[image, query]])[None]
            x = F.relu(head.gn1(head.lay1(x)))
            x = F.relu(head.gn2(head.lay2(x)))
            for i, feature in enumerate(features):
                fine = head.get_submodule(f"adapter{i + 1}")(feature[image : image + 1])
                x = fine + F.interpolate(x, size=fine.shape[-2:], mode="nearest")
                x = F.relu(head.get_submodule(f"gn{i + 3}")(head.get_submodule(f"lay{i + 3}")(x)))
            torch.testing.assert_close(found[image, query], head.out_lay(x)[0, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (17, 25)),
        ({"backbone": "resnet50", "dilation": True, "pre_norm": True}, (17, 25)),
        ({"backbone": "small", "norm": "batch", "queries": "anchors"}, (33, 49)),
    ],
)
def test_masks_stand_beside_the_plain_detectors_outputs(settings, size):
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate({**CONFIG.model_dump(), **settings})).eval()
    images, mask = some_images([(65, 97), (60, 70)])
    with torch.no_grad():
        found, plain = model(images, mask), model.detr(images, mask)
    assert found.keys() - plain.keys() == {"pred_masks"}
    assert found["pred_masks"].shape == (2, 5, *size)
    for key in ("pred_logits", "pred_boxes"):
        assert torch.equal(found[key], plain[key])
        assert all(torch.equal(a[key], b[key]) for a, b in zip(found["aux_outputs"], plain["aux_outputs"], strict=True))


def test_a_backbone_says_what_channels_and_strides_its_stages_have():
    for config in (CONFIG, CONFIG.model_copy(update={"backbone": "small"})):
        backbone = DETR(config).eval().backbone[0]
        images, _ = some_images([(64, 96)])
        stages = backbone(images)
        assert [x.shape[1] for x in stages] == list(backbone.stage_channels)
        assert [tuple(x.shape[2:]) for x in stages] == [(64 // stride, 96 // stride) for stride in backbone.strides]


def test_a_batch_equals_its_images_one_by_one_at_the_same_padded_size():
    model = make_model().double().eval()
    images, mask = some_images([(64, 96), (50, 70)])
    with torch.no_grad():
        together = model(images.double(), mask)["pred_masks"]
        alone = [model(images[i : i + 1].double(), mask[i : i + 1])["pred_masks"][0] for i in range(2)]
    assert together.std() > 0.01 and (together[:, 0] - together[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-9)


def test_attention_maps_do_not_move_with_further_padding():
    """Masks do: the published head's group norms average over the padding."""
    torch.manual_seed(0)
    maps = MHAttentionMap(32, 8)
    queries, memory = torch.randn(1, 3, 32), torch.randn(1, 4, 5, 32)
    padding = torch.zeros(1, 4, 5, dtype=torch.bool)
    padding[:, :, 4:] = True
    wider, wider_padding = F.pad(memory, (0, 0, 0, 3, 0, 2), value=7.0), F.pad(padding, (0, 3, 0, 2), value=True)
    with torch.no_grad():
        first = maps(queries, memory.flatten(1, 2), padding)
        second = maps(queries, wider.flatten(1, 2), wider_padding)
    assert first.flatten(2).sum(2) == pytest.approx(1.0)
    torch.testing.assert_close(second[..., :4, :5], first)
    assert second[..., 4:, :].abs().sum() == 0 and second[..., 4:].abs().sum() == 0


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("freeze_detr", [True, False])
def test_which_weights_train(freeze_detr):
    model = make_model(freeze_detr=freeze_detr).train()
    criterion = SetCriterion(CONFIG, LossConfig())
    losses = criterion(model(*some_images([(64, 96), (64, 64)])), some_targets())
    criterion.total(losses).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    published = {n for n, p in DETR(CONFIG).named_parameters() if p.requires_grad}
    head = {n for n, _ in model.named_parameters() if not n.startswith("detr.")}
    # A bias that shifts all logits of a softmax alike has no gradient of its own but rounding.
    silent = {"bbox_attention.k_linear.bias"}
    want = head if freeze_detr else head | {f"detr.{name}" for name in published}
    assert moved - silent >= {n for n in want if "self_attn.in_proj_bias" not in n} - silent
    assert moved <= want
    groups = model.parameter_groups(1e-4, 1e-5)
    assert len(groups) == (1 if freeze_detr else 2)
    assert sum(len(g["params"]) for g in groups) == len(want)


def test_the_mask_losses_alone_reach_the_detector():
    model = make_model().train()
    losses = SetCriterion(CONFIG, LossConfig())(model(*some_images([(64, 96), (64, 64)])), some_targets())
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    for name in ("backbone.0.body.layer2.0.conv1.weight", "transformer.encoder.layers.0.linear1.weight",
                 "transformer.decoder.layers.1.linear1.weight", "query_embed.weight", "input_proj.weight"):  # fmt: skip
        assert model.detr.get_parameter(name).grad.abs().sum() > 0, name
    assert model.detr.class_embed.weight.grad is None


def test_a_frozen_detector_does_not_move_while_training():
    config = CONFIG.model_copy(update={"backbone": "small", "norm": "batch"})
    torch.manual_seed(0)
    model = DETRsegm(DETR(config), freeze_detr=True).train()
    before = {name: value.clone() for name, value in model.detr.state_dict().items()}
    criterion = SetCriterion(config, LossConfig())
    groups = model.parameter_groups(1e-3, 1e-3)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    losses = []
    for _ in range(3):
        losses.append(criterion.total(criterion(model(*some_images([(64, 96), (64, 64)])), some_targets())))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.detr.state_dict().items())


def mask_outputs(masks: torch.Tensor, *, layers: int = 1) -> dict:
    """Outputs in which query i of the only image sits exactly on target i."""
    queries = masks.shape[1]
    boxes = torch.tensor([[0.2 + 0.2 * i, 0.5, 0.1, 0.1] for i in range(queries)])[None]
    layer = {"pred_logits": torch.zeros(1, queries, 3), "pred_boxes": boxes}
    return {**layer, "pred_masks": masks, "aux_outputs": [layer] * (layers - 1)}


def mask_targets(outputs: dict, masks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    count = len(masks)
    return [{"labels": torch.zeros(count, dtype=torch.long), "boxes": outputs["pred_boxes"][0, :count], "masks": masks}]


TWO_CLASSES = ModelConfig(num_classes=2)


def test_focal_and_dice_loss_by_hand():
    outputs = mask_outputs(torch.tensor([[[[2.0, -1.0]], [[0.0, 3.0]], [[9.0, 9.0]]]]).requires_grad_())
    targets = mask_targets(outputs, torch.tensor([[[True, False]], [[True, True]]]))
    losses = SetCriterion(TWO_CLASSES, LossConfig())(outputs, targets)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    focal, dice = 0.0, 0.0
    for logits, truth in (((2.0, -1.0), (1, 0)), ((0.0, 3.0), (1, 1))):
        p = [sigmoid(x) for x in logits]
        right = [q if t else 1 - q for q, t in zip(p, truth, strict=True)]
        alpha = [0.25 if t else 0.75 for t in truth]
        focal += sum(-a * (1 - r) ** 2 * math.log(r) for a, r in zip(alpha, right, strict=True)) / 2
        dice += 1 - (2 * sum(q * t for q, t in zip(p, truth, strict=True)) + 1) / (sum(p) + sum(truth) + 1)
    assert losses["loss_mask"].item() == pytest.approx(focal / 2, rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(dice / 2, rel=1e-5)
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert outputs["pred_masks"].grad[0, 2].abs().sum() == 0 and outputs["pred_masks"].grad[0, :2].abs().min() > 0


def test_mask_losses_are_of_the_last_layer_and_weighted():
    outputs = mask_outputs(torch.zeros(1, 2, 1, 2), layers=3)
    criterion = SetCriterion(TWO_CLASSES, LossConfig(loss_mask=3, loss_dice=7))
    losses = criterion(outputs, mask_targets(outputs, torch.tensor([[[True, False]]])))
    assert {name for name in losses if "mask" in name or "dice" in name} == {"loss_mask", "loss_dice"}
    without = criterion.total({k: v for k, v in losses.items() if k not in ("loss_mask", "loss_dice")})
    want = without + 3 * losses["loss_mask"] + 7 * losses["loss_dice"]
    assert criterion.total(losses).item() == pytest.approx(want.item())


def test_masks_are_compared_at_the_targets_size_padded_to_the_batchs_largest():
    model = make_model().eval()
    targets = some_targets()
    targets[1] = {**targets[0], "labels": targets[0]["labels"][:1], "boxes": targets[0]["boxes"][:1],
                  "masks": targets[0]["masks"][:1, :60, :64]}  # fmt: skip
    with torch.no_grad():
        outputs = model(*some_images([(64, 96), (60, 64)]))
        criterion = SetCriterion(CONFIG, LossConfig())
        found = criterion(outputs, targets)
        padded = [targets[0], {**targets[1], "masks": F.pad(targets[1]["masks"], (0, 32, 0, 4)).to(torch.uint8)}]
        again = criterion(outputs, padded)
        large = F.interpolate(outputs["pred_masks"], size=(64, 96), mode="bilinear", align_corners=False)
        once_more = criterion({**outputs, "pred_masks": large}, padded)
    for name in ("loss_mask", "loss_dice"):
        assert found[name].item() == again[name].item() == pytest.approx(once_more[name].item(), rel=1e-6)


def test_without_any_target_the_mask_losses_are_zero_and_have_a_gradient():
    outputs = mask_outputs(torch.randn(1, 2, 3, 4).requires_grad_())
    losses = SetCriterion(TWO_CLASSES, LossConfig())(outputs, mask_targets(outputs, torch.zeros(0, 6, 8).bool()))
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert outputs["pred_masks"].grad.abs().sum() == 0


def test_masks_that_are_not_finite_stop_training_and_name_the_image():
    outputs = make_model()(*some_images([(64, 96), (64, 64)]))
    outputs["pred_masks"].data[1, 2, 0, 0] = float("nan")
    with pytest.raises(NonFiniteOutputs) as caught:
        SetCriterion(CONFIG, LossConfig())(outputs, some_targets())
    assert caught.value.images == [1]


# ---------------------------------------------------------------- targets


def test_masks_of_annotations():
    case = fill.load_json("convert")["cases"]["plain+masks"]
    want = fill.load_npz("convert")["plain+masks/masks"]
    assert np.array_equal(masks_of(case["annotations"], *want.shape[1:]), want.astype(bool))
    crowd = fill.load_json("convert")["cases"]["crowd_dropped"]["annotations"][1]
    runs = np.zeros(40 * 60, bool)
    runs[100:600] = True
    packed = run_lengths.encode(np.asfortranarray(runs.reshape(60, 40).T.astype(np.uint8)))
    parts = {"segmentation": [[5, 6, 25, 6, 25, 16, 5, 16], [40, 0, 50, 0, 50, 40, 40, 40]]}
    found = masks_of([crowd, {"segmentation": packed}, parts, {"segmentation": []}], 40, 60)
    assert np.array_equal(found[0], runs.reshape(60, 40).T) and np.array_equal(found[1], found[0])
    assert found[2, 10, 10] and found[2, 20, 45] and found[2].sum() == want[0].sum() + 400
    assert not found[3].any()
    assert masks_of([], 4, 6).shape == (0, 4, 6)
    with pytest.raises(ValueError, match="shape"):
        masks_of([crowd], 30, 60)


# ---------------------------------------------------------------- checkpoints


def test_a_model_with_masks_comes_back_as_it_was_saved(tmp_path):
    model = make_model().eval()
    save_checkpoint(tmp_path, model, [{"id": 1, "name": "a"}])
    loaded, _ = load_checkpoint(tmp_path)
    assert isinstance(loaded, DETRsegm) and loaded.config == CONFIG and not loaded.training
    batch = some_images([(64, 64)])
    with torch.no_grad():
        assert torch.equal(loaded(*batch)["pred_masks"], model(*batch)["pred_masks"])
    photo = [Image.new("RGB", (40, 30), "red")]
    found, plain = Detector.load(tmp_path).detect(photo)[0], Detector(model.detr, []).detect(photo)[0]
    assert np.array_equal(found["boxes"], plain["boxes"]) and len(found["boxes"]) == 5


def test_an_official_panoptic_file_is_loaded(tmp_path):
    keys = fill.load_json("state_dict_keys")["detr_resnet50_panoptic"]
    state = {key: torch.full(shape, 0.01) for key, shape, _ in keys}
    state["mask_head.adapter2.weight"] += 1
    torch.save({"model": state}, tmp_path / "panoptic.pth")
    model = load_official(tmp_path / "panoptic.pth")
    assert isinstance(model, DETRsegm) and model.config == ModelConfig(preset="detr_resnet50_panoptic")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    del state["bbox_attention.k_linear.bias"]
    torch.save({"model": state}, tmp_path / "panoptic.pth")
    with pytest.raises(CheckpointError, match=r"missing bbox_attention\.k_linear\.bias"):
        load_official(tmp_path / "panoptic.pth")


# ---------------------------------------------------------------- masks of the instances


def test_masks_are_enlarged_cut_and_resized_to_the_original():
    # One query; the batch is 4 x 8, the image 4 x 6 of it, and was 2 x 3 before resizing.
    logits = torch.tensor([[-3.0, 4.0, 4.0, -3.0]]).repeat(2, 1)[None, None]
    results = [{"scores": torch.tensor([0.5])}]
    found = PostProcessSegm()(
        results, {"pred_masks": logits}, torch.tensor([[2, 3]]), torch.tensor([[4, 6]]), padded_size=(4, 8)
    )
    # Bilinear, twice as wide: -3 -1.25 2.25 4 4 2.25 -1.25 -3; cut at 6, every second column.
    assert found[0]["masks"].tolist() == [[[[0, 1, 1], [0, 1, 1]]]]
    assert found[0]["masks"].dtype == torch.uint8 and torch.equal(found[0]["scores"], torch.tensor([0.5]))
    alone = PostProcessSegm()(results, {"pred_masks": logits}, torch.tensor([[4, 6]]), torch.tensor([[4, 6]]))
    # Taken for all of 4 x 6: -3 0.5 4 4 0.5 -3.
    assert alone[0]["masks"][0, 0, 0].tolist() == [0, 1, 1, 1, 1, 0]


def test_a_mask_at_the_threshold_is_outside():
    outputs = {"pred_masks": torch.tensor([[[[0.0]], [[1e-3]]]])}
    size = torch.tensor([[1, 1]])
    assert PostProcessSegm()([{}], outputs, size, size)[0]["masks"].flatten().tolist() == [0, 1]
    assert PostProcessSegm(0.6)([{}], outputs, size, size)[0]["masks"].flatten().tolist() == [0, 0]


def test_images_of_a_batch_are_cut_at_their_own_size():
    model = make_model().eval()
    sizes, originals = torch.tensor([[64, 96], [50, 70]]), torch.tensor([[100, 150], [50, 70]])
    with torch.no_grad():
        outputs = model(*some_images([(64, 96), (50, 70)]))
    results = PostProcess()(outputs, originals)
    found = PostProcessSegm()(results, outputs, originals, sizes)
    assert [tuple(one["masks"].shape) for one in found] == [(5, 1, 100, 150), (5, 1, 50, 70)]
    large = F.interpolate(outputs["pred_masks"], size=(64, 96), mode="bilinear", align_corners=False)
    assert torch.equal(found[1]["masks"][:, 0].bool(), large[1, :, :50, :70].sigmoid() > 0.5)
    assert 0 < found[1]["masks"].float().mean() < 1 and found[1]["boxes"].shape == (5, 4)


# ---------------------------------------------------------------- panoptic

THINGS = {0: True, 1: True, 2: False, 3: False}


def read_png(data: bytes) -> np.ndarray:
    red, green, blue = np.asarray(Image.open(io.BytesIO(data)), np.int64).transpose(2, 0, 1)
    return red + 256 * green + 256**2 * blue


def panoptic(labels: list[int | None], masks: list[list[list[float]]], target=None, size=None, **settings) -> tuple:
    """Sure queries of these labels (None: no object) with masks -> (ids, segments_info)."""
    logits = torch.full((1, len(labels), len(THINGS) + 1), -10.0)
    for i, label in enumerate(labels):
        logits[0, i, len(THINGS) if label is None else label] = 10.0
    masks = torch.tensor(masks)[None]
    size = size or masks.shape[-2:]
    outputs = {"pred_logits": logits, "pred_masks": masks, "pred_boxes": torch.rand(1, len(labels), 4)}
    (found,) = PostProcessPanoptic(THINGS)(outputs, [size], None if target is None else [target], **settings)
    return read_png(found["png_string"]), found["segments_info"]


def left(columns: int, value: float = 5.0, rows: int = 3, width: int = 8) -> list[list[float]]:
    return [[value] * columns + [-value] * (width - columns)] * rows


def test_every_pixel_goes_to_the_highest_mask():
    ids, segments = panoptic([1, 3], [left(5), left(8, 1.0)])
    assert ids.tolist() == [[0] * 5 + [1] * 3] * 3
    assert segments == [
        {"id": 0, "isthing": True, "category_id": 1, "area": 15},
        {"id": 1, "isthing": False, "category_id": 3, "area": 9},
    ]


def test_of_equal_masks_the_first_query_wins():
    ids, segments = panoptic([1, 0], [left(8), left(8)])
    assert (ids == 0).all() and segments == [{"id": 0, "isthing": True, "category_id": 1, "area": 24}]


def test_stuff_of_one_class_is_one_segment_and_things_stay_apart():
    right = [row[::-1] for row in left(4)]
    ids, segments = panoptic([2, 2], [left(4), right])
    assert (ids == 0).all() and [s["area"] for s in segments] == [24]
    ids, segments = panoptic([1, 1], [left(4), right])
    assert ids.tolist() == [[0] * 4 + [1] * 4] * 3 and [s["area"] for s in segments] == [12, 12]


def test_after_merging_pixels_are_decided_anew_among_those_that_remain():
    """As published: a stuff query merged into another is dropped with its mask, and a thing may take its pixels."""
    stuff = [[[3.0, -3.0] * 2 + [-9.0] * 4] * 3, [[-3.0, 3.0] * 2 + [-9.0] * 4] * 3]
    first = [[-9.0, 1.0] * 2 + [9.0, 9.0, -9.0, -9.0]] * 3  # over the first stuff query where the second stood
    second = [[-9.0] * 6 + [9.0, 9.0]] * 3
    ids, segments = panoptic([2, 2, 1, 0], [*stuff, first, second])
    assert ids.tolist() == [[0, 1, 0, 1, 1, 1, 2, 2]] * 3
    assert [(s["category_id"], s["area"]) for s in segments] == [(2, 6), (1, 12), (0, 6)]


def test_segments_of_at_most_four_pixels_are_dropped_until_none_is_left():
    four = [[9.0] * 4 + [-9.0] * 4, [-9.0] * 8, [-9.0] * 8]
    five = [[9.0] * 5 + [-9.0] * 3, [-9.0] * 8, [-9.0] * 8]
    ids, segments = panoptic([0, 3], [four, left(8, 1.0)])
    assert (ids == 0).all() and segments == [{"id": 0, "isthing": False, "category_id": 3, "area": 24}]
    ids, segments = panoptic([0, 3], [five, left(8, 1.0)])
    assert [s["area"] for s in segments] == [5, 19]
    # All three have 4 pixels or fewer: all go at once.
    ids, segments = panoptic([0, 1, 3], [[[9.0, 0.0, 0.0]], [[0.0, 9.0, 0.0]], [[0.0, 0.0, 9.0]]])
    assert segments == [] and (ids == 0).all()


def test_nothing_found_is_an_empty_map_of_the_right_size():
    ids, segments = panoptic([None, None], [left(4), left(4)], target=(7, 5))
    assert ids.shape == (7, 5) and (ids == 0).all() and segments == []


def test_unsure_queries_are_dropped():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [1.7, 0.0, -9.0], [1.9, 0.0, -9.0]]])  # 0.787, 0.8455, 0.8699
    outputs = {"pred_logits": logits, "pred_masks": torch.tensor([[left(8, 9.0), left(3), left(8, 1.0)]])}
    for threshold, areas in ((0.85, [24]), (0.84, [9, 15]), (0.9, [])):
        (found,) = PostProcessPanoptic({0: True, 1: True}, threshold)(outputs, torch.tensor([[3, 8]]))
        assert [s["area"] for s in found["segments_info"]] == areas
    assert PostProcessPanoptic({}).threshold == 0.85


def test_areas_are_counted_at_the_size_asked_for():
    ids, segments = panoptic([1, 3], [left(5), left(8, 1.0)], target=(6, 4))
    # Nearest from the middle of every pixel: columns 1, 3, 5, 7 of 8.
    assert ids.tolist() == [[0, 0, 1, 1]] * 6 and [s["area"] for s in segments] == [12, 12]
    assert all(type(s["area"]) is int and type(s["category_id"]) is int for s in segments)


def test_padding_is_cut_off_when_its_size_is_told():
    _, segments = panoptic([1, 3], [left(4), left(8, 1.0)], size=(3, 6), padded_size=(3, 8))
    assert [s["area"] for s in segments] == [12, 6]
    _, segments = panoptic([1, 3], [left(4), left(8, 1.0)], size=(3, 6))  # as published: taken for the image's own
    assert [s["area"] for s in segments] == [9, 9]


def test_colours_hold_ids_beyond_a_byte():
    ids = np.array([[0, 255, 256, 65535, 65536, 256**3 - 1]])
    assert id_to_rgb(ids).tolist()[0] == [
        [0, 0, 0], [255, 0, 0], [0, 1, 0], [255, 255, 0], [0, 0, 1], [255, 255, 255],
    ]  # fmt: skip
    # 300 things of 8 pixels each.
    masks = torch.full((300, 300, 8), -5.0)
    masks[torch.arange(300), torch.arange(300)] = 5.0
    found, segments = panoptic([1] * 300, masks.tolist())
    assert (found == np.arange(300)[:, None]).all() and len(segments) == 300
