"""What official DETR computes, number by number; see tests/reference/README.md for the cases and tolerances."""
from __future__ import annotations

import hashlib

import fill
import numpy as np
import pytest
import torch
from PIL import Image

from detr.batch import normalise, pad_images
from detr.boxes import cxcywh_to_xyxy, generalized_iou
from detr.config import LossConfig, ModelConfig
from detr.criterion import SetCriterion
from detr.matcher import HungarianMatcher
from detr.model import DETR, count_parameters
from detr.position import PositionEmbeddingLearned, PositionEmbeddingSine
from detr.postprocess import PostProcess
from detr.transforms import (
    annotations_to_target,
    boxes_to_targets,
    center_crop,
    crop,
    hflip,
    pad,
    resize,
    resize_to,
    resized_size,
    to_uint8,
)

CASE = "det_base"
CONFIG = ModelConfig(
    backbone="resnet18", hidden_dim=64, nheads=4, enc_layers=2, dec_layers=3, dim_feedforward=128, dropout=0.0,
    num_queries=20, num_classes=7,
)  # fmt: skip


def tensors(arrays: dict) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def read_targets(arrays: dict, prefix: str, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    found, targets = fill.subtree(arrays, prefix), []
    while f"{len(targets)}/labels" in found:
        one = tensors({key: found[f"{len(targets)}/{key}"] for key in ("labels", "boxes")})
        targets.append({"labels": one["labels"], "boxes": one["boxes"].to(dtype)})
    return targets


def case_model(dtype: torch.dtype) -> DETR:
    model = fill.fill_torch_module(DETR(CONFIG), fill.load_json(CASE)["salt"])
    return model.to(dtype)


def detached(outputs):
    return {
        key: [detached(layer) for layer in value] if isinstance(value, list) else value.detach()
        for key, value in outputs.items()
    }


class Run:
    """The case forward and backward, once for each precision."""

    def __init__(self, dtype: torch.dtype):
        batch = fill.load_npz("batch_a")
        self.float64 = dtype == torch.float64
        self.model = case_model(dtype)
        criterion = SetCriterion(CONFIG, LossConfig())
        images = torch.from_numpy(batch["padded"]).to(dtype)
        mask = torch.from_numpy(batch["mask"])
        self.targets = read_targets(batch, "target", dtype)
        self.outputs = self.model(images, mask)
        losses = criterion(self.outputs, self.targets)
        total = criterion.total(losses)
        total.backward()
        self.losses, self.total = {name: value.detach() for name, value in losses.items()}, total.detach()
        self.outputs = detached(self.outputs)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def run(request) -> Run:
    return Run(request.param)


def test_weights_are_those_the_reference_was_made_with():
    check = fill.load_json("fill_check")
    for key, sample in check["samples"].items():
        array = fill.fill_array(check["salt"], key, sample["shape"])
        assert hashlib.sha256(array.tobytes()).hexdigest() == sample["sha256"], key


# ---------------------------------------------------------------- the whole model


def test_outputs_of_every_layer(run):
    assert fill.check_outputs(CASE, run.outputs, run.float64) == []


def test_losses_and_their_weighted_total(run):
    assert set(run.losses) == set(fill.load_json(CASE)["loss_dict"])
    assert fill.check_losses(CASE, run.losses, run.total, run.float64) == []


def test_assignments_of_every_layer(run):
    loss = LossConfig()
    matcher = HungarianMatcher(loss.cost_class, loss.cost_bbox, loss.cost_giou)
    layers = {"final": run.outputs, **{str(i): layer for i, layer in enumerate(run.outputs["aux_outputs"])}}
    for name, outputs in layers.items():
        assert fill.check_matching(CASE, name, matcher(outputs, run.targets)) == []


def test_gradients_and_which_weights_are_frozen(run):
    gradients = {name: p.grad for name, p in run.model.named_parameters()}
    assert fill.check_gradients(CASE, gradients, run.float64) == []


def test_detections_in_pixels(run):
    stored = fill.load_npz(CASE)
    found = PostProcess()(run.outputs, torch.from_numpy(stored["orig_sizes"]))
    for i, one in enumerate(found):
        want = fill.subtree(stored, f"post/{i}")
        assert fill.compare("labels", one["labels"], want["labels"]) is None
        assert fill.compare("scores", one["scores"], want["scores"], rtol=0, atol=1e-4) is None
        largest = float(stored["orig_sizes"][i].max())  # boxes are 2e-5 apart before they are scaled
        assert fill.compare("boxes", one["boxes"], want["boxes"], rtol=0, atol=2e-5 * largest) is None


def test_intermediate_features():
    stored, batch = tensors(fill.load_npz(CASE)), tensors(fill.load_npz("batch_a"))
    model = case_model(torch.float32)
    with torch.no_grad():
        *_, feature = model.backbone[0](batch["padded"])
        mask = stored["feature_mask"]
        pos = model.backbone[1](mask).flatten(2).transpose(1, 2)
        src = model.input_proj(feature).flatten(2).transpose(1, 2)
        key_mask = ~mask.flatten(1)[:, None, None, :]
        memory = model.transformer.encoder(src, pos, key_mask)
        hs = model.transformer(src, pos, key_mask, model.query_embed.weight)
    torch.testing.assert_close(feature, stored["feature"], rtol=0, atol=2e-4)
    torch.testing.assert_close(pos, stored["pos"].flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(memory, stored["memory"].flatten(2).transpose(1, 2), rtol=0, atol=2e-4)
    torch.testing.assert_close(hs, stored["hs"], rtol=0, atol=2e-4)


def test_six_steps_of_the_official_optimiser_loop():
    figures, args = fill.load_json(CASE), fill.load_json(CASE)["args"]
    batch = fill.load_npz("batch_a")
    model = case_model(torch.float64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    criterion = SetCriterion(CONFIG, LossConfig())
    images, mask = torch.from_numpy(batch["padded"]).double(), torch.from_numpy(batch["mask"])
    targets = read_targets(batch, "target", torch.float64)
    groups = model.parameter_groups(args["lr"], args["lr_backbone"])
    optimizer = torch.optim.AdamW(groups, lr=args["lr"], weight_decay=args["weight_decay"])
    for total, norm in figures["float64_train_trajectory"]:
        loss = criterion.total(criterion(model(images, mask), targets))
        optimizer.zero_grad()
        loss.backward()
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), args["clip_max_norm"])
        assert loss.item() == pytest.approx(total, rel=1e-6)
        assert found.item() == pytest.approx(norm, rel=1e-4)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in figures["float64_displacement"]:
            norm, projection = figures["float64_displacement"][name]
            moved = (parameter.detach() - start[name]).numpy()
            assert np.linalg.norm(moved) == pytest.approx(norm, rel=1e-3), name
            assert fill.projection(figures["salt"], name, moved) == pytest.approx(projection, abs=1e-3 * norm), name
        else:
            assert torch.equal(parameter, start[name]), f"{name} is frozen and has moved"


# ---------------------------------------------------------------- matcher and criterion on given outputs


@pytest.mark.parametrize("case", ["mixed", "coco_like", "all_empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_criterion_on_given_outputs(case, dtype):
    figures, stored = fill.load_json("criterion")[case], fill.load_npz("criterion")
    names = [*map(str, range(figures["aux"])), "final"]
    layers = [
        {
            key: torch.from_numpy(stored[f"{case}/out/{name}/{key}"]).to(dtype).requires_grad_()
            for key in ("pred_logits", "pred_boxes")
        }
        for name in names
    ]
    outputs = {**layers[-1], "aux_outputs": layers[:-1]}
    targets = read_targets(stored, f"{case}/target", dtype)
    criterion = SetCriterion(ModelConfig(num_classes=figures["num_classes"]), LossConfig())
    losses = criterion(outputs, targets)
    total = criterion.total(losses)
    total.backward()

    assert set(losses) == set(figures["loss_dict"])
    for name, want in figures["loss_dict"].items():
        assert losses[name].item() == pytest.approx(want, rel=1e-4, abs=1e-5), name
    assert total.item() == pytest.approx(figures["total"], rel=1e-4)
    for name, layer in zip(names, layers, strict=True):
        for i, (query, target) in enumerate(criterion.matcher(layer, targets)):
            assert query.tolist() == stored[f"{case}/match/{name}/{i}/query"].tolist()
            assert target.tolist() == stored[f"{case}/match/{name}/{i}/target"].tolist()
        for key, value in layer.items():
            want = torch.from_numpy(stored[f"{case}/grad/{name}/{key}"]).to(dtype)
            torch.testing.assert_close(value.grad, want, rtol=1e-3, atol=1e-5 * max(1.0, want.abs().max().item()))


# ---------------------------------------------------------------- units


def test_boxes_and_giou_of_all_pairs():
    unit = tensors(fill.load_npz("units"))
    corners = cxcywh_to_xyxy(unit["boxes/cxcywh"])
    torch.testing.assert_close(corners, unit["boxes/xyxy"], rtol=0, atol=1e-6)
    pairs = generalized_iou(unit["boxes/xyxy"][:, None], unit["boxes/other_xyxy"][None])
    torch.testing.assert_close(pairs, unit["boxes/giou"], rtol=1e-5, atol=1e-6, equal_nan=True)
    one_by_one = generalized_iou(unit["boxes/xyxy"], unit["boxes/other_xyxy"])
    torch.testing.assert_close(one_by_one, unit["boxes/giou"].diagonal(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_position_encodings():
    unit = tensors(fill.load_npz("units"))
    mask = unit["pos/mask"]
    torch.testing.assert_close(PositionEmbeddingSine(16)(mask), unit["pos/sine_normalized_16"], rtol=0, atol=1e-5)
    learned = fill.fill_torch_module(PositionEmbeddingLearned(16), "pos_learned")
    torch.testing.assert_close(learned(mask).detach(), unit["pos/learned_16"], rtol=0, atol=1e-6)


def test_postprocess_of_given_outputs():
    unit = tensors(fill.load_npz("units"))
    outputs = {"pred_logits": unit["post/pred_logits"], "pred_boxes": unit["post/pred_boxes"]}
    for i, found in enumerate(PostProcess()(outputs, unit["post/orig_sizes"])):
        assert torch.equal(found["labels"], unit[f"post/{i}/labels"])
        torch.testing.assert_close(found["scores"], unit[f"post/{i}/scores"], rtol=0, atol=1e-6)
        torch.testing.assert_close(found["boxes"], unit[f"post/{i}/boxes"], rtol=1e-6, atol=1e-4)


# ---------------------------------------------------------------- transforms

OPERATIONS = {op["name"]: op for op in fill.load_json("transforms")["ops"]}


def source(stored: dict, name: str) -> tuple[Image.Image, dict]:
    found = fill.subtree(stored, f"src/{name}")
    return Image.fromarray(found["image"]), tensors(fill.subtree(found, "target"))


@pytest.mark.parametrize("kind", [lambda image: image, to_uint8], ids=["PIL", "tensor"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_transform(name, kind):
    op, stored = OPERATIONS[name], fill.load_npz("transforms")
    image, target = source(stored, op["source"])
    image = kind(image)
    if op["op"] == "hflip":
        got, after = hflip(image, target)
    elif op["op"] == "resize" and isinstance(op["size"], list):
        got, after = resize_to(image, target, tuple(op["size"]))
    elif op["op"] == "resize":
        got, after = resize(image, target, op["size"], op["max_size"])
    elif op["op"] == "crop":
        got, after = crop(image, target, tuple(op["region_top_left_h_w"]))
    elif op["op"] == "pad":
        got, after = pad(image, target, *op["padding"])
    else:
        got, after = center_crop(image, target, tuple(op["size"]))

    want = fill.subtree(stored, f"op/{name}")
    got = got.permute(1, 2, 0).numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    difference = np.abs(got.astype(int) - want["image"].astype(int))
    assert difference.shape == want["image"].shape and difference.max() <= (op["op"] == "resize")
    wanted = tensors(fill.subtree(want, "target"))
    assert set(after) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(after[key], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", fill.load_json("convert")["cases"])
def test_annotations_become_the_official_target(name):
    figures = fill.load_json("convert")
    case, (width, height) = figures["cases"][name], figures["image_size_wh"]
    want = tensors(fill.subtree(fill.load_npz("convert"), name))
    masks = None
    if case["return_masks"]:
        masks = torch.zeros(len(case["annotations"]), height, width, dtype=torch.uint8)
        masks[: len(want["masks"])] = want["masks"]
    got = annotations_to_target(case["annotations"], 3, width, height, masks)
    assert set(got) == set(want)
    for key, value in want.items():
        assert str(got[key].dtype) == case["dtypes"][key], key
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-4, msg=key)


def test_rows_of_the_size_rule():
    for width, height, size, max_size, *want in fill.load_npz("transforms")["size_rule"].tolist():
        assert list(resized_size(width, height, size, max_size or None)) == want, (width, height, size, max_size)


def test_normalised_images_and_targets_of_a_batch():
    stored = fill.load_npz("transforms")
    sources = [source(stored, name) for name in "ab"]
    batch, sizes = pad_images([to_uint8(image) for image, _ in sources])
    images, mask = normalise(batch, sizes)
    for i, (name, (image, target)) in enumerate(zip("ab", sources, strict=True)):
        want = tensors(fill.subtree(stored, f"norm/{name}"))
        inside = images[i, :, : image.height, : image.width]
        torch.testing.assert_close(inside, want["image"], rtol=0, atol=1e-5)
        assert not mask[i, : image.height, : image.width].any()
        assert int((~mask[i]).sum()) == image.height * image.width
        assert float(images[i].masked_select(mask[i]).abs().sum()) == 0
        boxes = boxes_to_targets(target["boxes"], image.width, image.height)
        torch.testing.assert_close(boxes, want["target/boxes"], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- weights: names, numbers, initialisation


def skeleton(preset: str, **settings) -> DETR:
    """A model without memory behind its weights."""
    with torch.device("meta"):
        return DETR(ModelConfig(preset=preset, **settings))


@pytest.mark.parametrize("preset", ["detr_resnet50", "detr_resnet101"])
def test_names_order_shapes_and_types_of_the_weights(preset):
    own = [[k, list(v.shape), str(v.dtype).split(".")[1]] for k, v in skeleton(preset).state_dict().items()]
    assert own == fill.load_json("state_dict_keys")[preset]


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("detr_resnet50", {}),
        ("detr_resnet50_dc5", {"preset": "detr_resnet50_dc5"}),
        ("detr_resnet101", {"preset": "detr_resnet101"}),
        ("detr_resnet101_dc5", {"preset": "detr_resnet101_dc5"}),
        ("build:--backbone resnet18", {"backbone": "resnet18"}),
        ("build:--backbone resnet34", {"backbone": "resnet34"}),
        ("build:--pre_norm", {"pre_norm": True}),
        ("build:--position_embedding learned", {"position_embedding": "learned"}),
        ("build:--lr_backbone 0", {}),
    ],
)
def test_numbers_of_parameters_and_their_groups(variant, settings):
    want = fill.load_json("variants")[variant]
    model = skeleton(**{"preset": "detr_resnet50", **settings})
    groups = model.parameter_groups(1e-4, 0.0 if variant.endswith("lr_backbone 0") else 1e-5)
    assert count_parameters(model) == (want["parameters"], want["trainable"])
    assert len(model.state_dict()) == want["state_dict_entries"]
    rates = {1e-4: "other", 1e-5: "backbone"}
    tensors_of = {rates[group["lr"]]: len(group["params"]) for group in groups}
    assert {"backbone": 0, **tensors_of} == want["trainable_tensors"]
    elements = {rates[group["lr"]]: sum(p.numel() for p in group["params"]) for group in groups}
    assert {"backbone": 0, **elements} == want["trainable_elements"]
    lines = "\n".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in model.state_dict().items())
    assert hashlib.sha256(lines.encode()).hexdigest() == want["state_dict_sha256"]


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = DETR(ModelConfig(backbone="resnet18"))
    stats = fill.load_json("init_stats")
    names = [name for name, _ in model.named_parameters() if not name.startswith(("backbone", "input_proj"))]
    assert len(names) > 180
    for name in names:
        x, want = dict(model.named_parameters())[name].detach(), stats[f"detr.{name}"]
        if want["std"] == 0:
            assert x.min() == x.max() == want["mean"], name
            continue
        # Both sides are samples: allow each six standard errors; the ends of a uniform range are sharp.
        error = 6 * 2**0.5 * want["std"] / x.numel() ** 0.5
        assert abs(x.mean() - want["mean"]) < error, name
        assert abs(x.std() - want["std"]) < error, name
        if x.numel() > 10000 and "query_embed" not in name:
            assert x.abs().max() == pytest.approx(want["absmax"], rel=0.01), name


def test_defaults_are_those_of_the_official_script():
    official, model, loss = fill.load_json("default_args"), ModelConfig(), LossConfig()
    for name in (
        "backbone", "dilation", "position_embedding", "enc_layers", "dec_layers", "dim_feedforward", "hidden_dim",
        "dropout", "nheads", "num_queries", "pre_norm", "aux_loss",
    ):  # fmt: skip
        assert getattr(model, name) == official[name], name
    for name in ("class", "bbox", "giou"):
        assert getattr(loss, f"cost_{name}") == official[f"set_cost_{name}"]
    assert (loss.loss_bbox, loss.loss_giou) == (official["bbox_loss_coef"], official["giou_loss_coef"])
    assert loss.eos_coef == official["eos_coef"]
