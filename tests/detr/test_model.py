"""The model, matcher and loss as a training loop relies on them: what must not change, and what must be said."""
from __future__ import annotations

from itertools import repeat

import fill
import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from detr.attention import MultiheadAttention
from detr.backbone import PLAIN, RESNETS, PlainBackbone, ResNetBackbone
from detr.batch import normalise, pad_images
from detr.config import LossConfig, ModelConfig
from detr.criterion import SetCriterion
from detr.matcher import HungarianMatcher, NonFiniteOutputs
from detr.model import DETR, all_layers, count_parameters
from detr.position import PositionEmbeddingLearned, cell_centres, image_sizes, sine_of_boxes, sine_of_points
from detr.postprocess import PostProcess
from detr.queries import make_denoising_queries
from detr.transformer import Transformer

LEARNED = ModelConfig(
    backbone="small", norm="batch", hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=64,
    dropout=0.0, num_queries=7, num_classes=4,
)  # fmt: skip
ANCHORS = ModelConfig(preset="tiny", hidden_dim=32, dim_feedforward=64, num_queries=7, num_classes=4, nheads=4)
MODELS = {"learned": LEARNED, "anchors": ANCHORS}
LOSS = LossConfig()


def make_model(config: ModelConfig) -> DETR:
    """Random, and without the zeros of the first step, behind which mistakes hide."""
    torch.manual_seed(0)
    model = DETR(config)
    nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.3)
    if config.queries == "anchors":
        for layer in model.decoder.layers:
            nn.init.normal_(layer.cross_attn.places.weight, std=0.1)
            nn.init.normal_(layer.cross_attn.shares.weight, std=0.3)
    return model


def some_images(sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    return normalise(*pad_images(images))


def some_targets(counts: list[int], num_classes: int = 4, seed: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(num_classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.3 + torch.tensor([0.3, 0.3, 0.1, 0.1]),
        }
        for count in counts
    ]


def random_outputs(batch: int, queries: int = 7, classes: int = 5, layers: int = 2) -> dict:
    generator = torch.Generator().manual_seed(3)
    made = [
        {
            "pred_logits": torch.randn(batch, queries, classes, generator=generator),
            "pred_boxes": torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.2,
        }
        for _ in range(layers)
    ]
    return {**made[-1], "aux_outputs": made[:-1]}


@pytest.fixture(params=MODELS)
def config(request) -> ModelConfig:
    return MODELS[request.param]


# ---------------------------------------------------------------- model


def test_a_batch_equals_its_images_one_by_one_at_the_same_padded_size(config):
    model = make_model(config).eval()
    images, mask = some_images([(64, 96), (50, 70), (33, 96)])
    with torch.no_grad():
        logits, boxes = all_layers(model(images, mask))
        for i in range(3):
            one_logits, one_boxes = all_layers(model(images[i : i + 1], mask[i : i + 1]))
            torch.testing.assert_close(one_logits, logits[:, i : i + 1], rtol=0, atol=1e-5)
            torch.testing.assert_close(one_boxes, boxes[:, i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "settings", "near", "far"),
    # Receptive fields: 87 pixels of the small backbone, 435 of ResNet-18; half of it reaches into the padding.
    [
        ("learned", {}, (80, 80), (112, 144)),
        ("anchors", {}, (80, 80), (112, 144)),
        ("learned", {"backbone": "resnet18", "norm": "frozen"}, (256, 256), (288, 256)),
    ],
    ids=["learned", "anchors", "resnet18"],
)
def test_padding_further_changes_nothing(queries, settings, near, far):
    model = DETR(ModelConfig.model_validate({**MODELS[queries].model_dump(), **settings})).eval()
    # Its norms turn padding non-zero, and its queries see what changes.
    fill.fill_torch_module(model, "padding", lambda key: None if key.endswith("tracked") else key)
    image = some_images([(20, 30)])[0]

    def padded(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, mask = torch.zeros(1, 3, height, width), torch.ones(1, height, width, dtype=torch.bool)
        images[..., :20, :30], mask[..., :20, :30] = image, False
        with torch.no_grad():
            return all_layers(model(images, mask))

    for one, other in zip(padded(*near), padded(*far), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    # Nearer than that the published model itself changes: the images above do say something.
    assert (padded(32, 32)[0] - padded(*far)[0]).abs().max() > 1e-3


def test_outputs_hold_every_layer_the_last_one_last(config):
    images, mask = some_images([(64, 96), (50, 70)])
    model = make_model(config).eval()
    outputs = model(images, mask)
    logits, boxes = all_layers(outputs)
    classes = 5 if config.class_loss == "softmax" else 4
    assert logits.shape == (config.dec_layers, 2, 7, classes) and boxes.shape == (config.dec_layers, 2, 7, 4)
    assert torch.equal(logits[-1], outputs["pred_logits"])
    assert torch.equal(boxes[0], outputs["aux_outputs"][0]["pred_boxes"])
    assert boxes.min() >= 0 and boxes.max() <= 1
    without = make_model(config.model_copy(update={"aux_loss": False})).eval()(images, mask)
    assert set(without) - {"proposals"} == {"pred_logits", "pred_boxes"}
    assert torch.equal(without["pred_logits"], outputs["pred_logits"])


def test_centres_of_cells_are_where_the_boxes_count_from():
    """An image of 20 x 12 pixels at stride 8: the last column is half outside; padding further moves nothing."""
    for height, width in ((16, 24), (32, 40)):
        mask = torch.ones(1, height, width, dtype=torch.bool)
        mask[:, :12, :20] = False
        centres = cell_centres(image_sizes(mask), height // 8, width // 8, 8).view(height // 8, width // 8, 2)
        torch.testing.assert_close(centres[:2, :3, 0], torch.tensor([[4, 12, 20]] * 2) / 20)
        torch.testing.assert_close(centres[:2, :3, 1], torch.tensor([[4] * 3, [12] * 3]) / 12)
    same = sine_of_boxes(torch.cat([centres, torch.rand(*centres.shape)], -1), 8)[..., :16]
    torch.testing.assert_close(sine_of_points(centres, 8), same)


def test_padded_cells_of_the_memory_are_not_looked_at():
    """What stands in padding does not reach any query. (Anchor queries get it as zero; they are tested on images.)"""
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, :, 4:] = mask[:, 3:] = True
    memory = torch.randn(1, 32, 4, 6, generator=torch.Generator().manual_seed(0))
    model = make_model(LEARNED).eval()
    pos = model.backbone[1](mask).flatten(2).transpose(1, 2)

    def decode(x: torch.Tensor) -> torch.Tensor:
        allowed = ~mask.flatten(1)[:, None, None, :]
        return model.transformer(x.flatten(2).transpose(1, 2), pos, allowed, model.query_embed.weight)

    with torch.no_grad():
        want = decode(memory)
        torch.testing.assert_close(decode(torch.where(mask[:, None], memory + 10, memory)), want, rtol=0, atol=1e-5)
        assert (decode(torch.where(mask[:, None], memory, memory + 10)) - want).abs().max() > 1e-2


def test_attention_is_that_of_torch_with_the_same_weights():
    torch.manual_seed(0)
    own, theirs = MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(own.in_proj_bias)
    theirs.load_state_dict(own.state_dict())
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[1, 6:] = True
    want, want_weights = theirs(query, key, value, key_padding_mask=padded, average_attn_weights=False)
    allowed = ~padded[:, None, None, :]
    torch.testing.assert_close(own(query, key, value, allowed), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(own.explicit(query, key, value, allowed)[1], want_weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])
def test_encoder_and_decoder_are_those_of_the_paper(pre_norm):
    """Written out: where positions are added, where norms stand, and that pre-norm ends the encoder with one."""
    torch.manual_seed(0)
    own = Transformer(16, 4, 2, 2, 24, 0.0, pre_norm).eval()
    for parameter in own.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    assert (own.encoder.norm is not None) == pre_norm
    src, pos, query_pos = torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(5, 16)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[1, 6:] = True

    def attend(weights: MultiheadAttention, query, key, value, ignore=None):
        theirs = nn.MultiheadAttention(16, 4, batch_first=True)
        theirs.load_state_dict(weights.state_dict())
        return theirs(query, key, value, key_padding_mask=ignore, need_weights=False)[0]

    def residual(x, norm, function):
        return x + function(norm(x)) if pre_norm else norm(x + function(x))

    def feed_forward(layer):
        return lambda x: layer.linear2(layer.linear1(x).clamp(min=0))

    memory = src
    for layer in own.encoder.layers:
        memory = residual(memory, layer.norm1, lambda x, a=layer.self_attn: attend(a, x + pos, x + pos, x, padded))
        memory = residual(memory, layer.norm2, feed_forward(layer))
    memory = own.encoder.norm(memory) if pre_norm else memory
    x, want, q = torch.zeros(2, 5, 16), [], query_pos.expand(2, -1, -1)
    for layer in own.decoder.layers:
        x = residual(x, layer.norm1, lambda x, a=layer.self_attn: attend(a, x + q, x + q, x))
        x = residual(
            x, layer.norm2, lambda x, a=layer.multihead_attn: attend(a, x + q, memory + pos, memory, padded)
        )
        x = residual(x, layer.norm3, feed_forward(layer))
        want.append(own.decoder.norm(x))
    found = own(src, pos, ~padded[:, None, None, :], query_pos)
    torch.testing.assert_close(found, torch.stack(want), rtol=0, atol=1e-5)


def test_dropout_acts_in_training_only():
    images, mask = some_images([(64, 64)])
    model = make_model(LEARNED.model_copy(update={"dropout": 0.5})).eval()
    assert torch.equal(model(images, mask)["pred_logits"], model(images, mask)["pred_logits"])
    model.transformer.train()
    assert not torch.equal(model(images, mask)["pred_logits"], model(images, mask)["pred_logits"])


def test_learned_positions_end_at_fifty_cells():
    encoding = PositionEmbeddingLearned(8)
    assert encoding(torch.zeros(1, 50, 50, dtype=torch.bool)).shape == (1, 16, 50, 50)
    with pytest.raises(ValueError, match="this feature map has 3 x 51"):
        encoding(torch.zeros(1, 3, 51, dtype=torch.bool))


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 2.0), ("small", 6.3), ("base", 33.0)])
def test_presets_for_random_weights_are_as_large_as_they_say_and_train_everything(preset, millions):
    model = DETR(ModelConfig(preset=preset))
    parameters, trainable = count_parameters(model)
    assert round(parameters / 1e6, 1) == millions and trainable == parameters
    outputs = model(torch.rand(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    assert outputs["pred_boxes"].shape == (1, model.config.num_queries, 4)


def test_features_of_odd_sizes_round_up():
    for name, channels in (("small", 128), ("medium", 192)):
        body = PlainBackbone(*PLAIN[name]).eval()
        features = body(torch.zeros(1, 3, 65, 97))
        assert features[2].shape == (1, channels, 9, 13) and features[3].shape == (1, channels, 5, 7)
        assert tuple(x.shape[1] for x in features) == body.stage_channels and body.num_channels == channels


def test_frozen_norms_do_not_move_in_training_and_dilation_halves_the_stride():
    config = LEARNED.model_copy(update={"backbone": "resnet18", "norm": "frozen"})
    model = make_model(config).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    model(*some_images([(64, 64), (64, 64)]))
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    with torch.device("meta"):
        plain, dilated = (DETR(ModelConfig(dilation=dilation)).backbone[0] for dilation in (False, True))
        assert plain(torch.zeros(1, 3, 64, 96))[-1].shape == (1, 2048, 2, 3)
        assert dilated(torch.zeros(1, 3, 64, 96))[-1].shape == (1, 2048, 4, 6)


def test_dilated_features_are_those_of_torchvisions_dilated_network():
    torch.manual_seed(0)
    model = DETR(ModelConfig(preset="detr_resnet50_dc5", enc_layers=1, dec_layers=1)).eval()
    stride = [False, False, True]
    net = torchvision.models.resnet50(replace_stride_with_dilation=stride, norm_layer=FrozenBatchNorm2d).eval()
    net.load_state_dict({**net.state_dict(), **model.backbone[0].body.state_dict()})
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
        want = net.layer4(net.layer3(net.layer2(x)))
        found = model.backbone[0](images)[-1]
    assert found.shape == (1, 2048, 4, 6)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * want.max().item())  # the norms are folded


@pytest.mark.parametrize(("queries", "position"), [("learned", "sine"), ("learned", "learned"), ("anchors", "sine")])
def test_frozen_norms_go_with_either_kind_of_query(queries, position):
    settings = {"backbone": "resnet18", "norm": "frozen", "position_embedding": position}
    model = make_model(ModelConfig.model_validate({**MODELS[queries].model_dump(), **settings}))
    groups = model.train().parameter_groups(1e-4, 1e-5)
    trained = {id(p) for group in groups for p in group["params"]}
    frozen = [name for name, p in model.named_parameters() if id(p) not in trained]
    assert frozen and all(name.startswith(("backbone.0.body.conv1", "backbone.0.body.layer1")) for name in frozen)
    targets = some_targets([2, 1])
    criterion = SetCriterion(model.config, LOSS)
    criterion.total(criterion(model(*some_images([(64, 96), (48, 64)])), targets)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set(frozen)
    # Learned positions are no part of what a backbone without a learning rate freezes.
    groups = model.parameter_groups(1e-4, 0.0)
    assert not any(p.requires_grad for p in model.backbone[0].parameters())
    assert len(groups) == 1 + (position == "learned")


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet34", 512), ("resnext50_32x4d", 2048), ("wide_resnet50_2", 2048)]
)
def test_every_resnet_of_torchvision_is_a_backbone(name, channels):
    assert sorted(RESNETS) == torchvision.models.list_models(torchvision.models, include=["resn*t*", "wide_resnet*"])
    with torch.device("meta"):
        *_, fine, coarse = ResNetBackbone(name, "frozen", False)(torch.zeros(1, 3, 64, 96))
    assert fine.shape == (1, channels // 2, 4, 6) and coarse.shape == (1, channels, 2, 3)


def test_backbones_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="no backbone is named 'vgg16'; there are small, medium, resnet18, "):
        DETR(ModelConfig(backbone="vgg16"))
    for name in ("resnet18", "resnet34", "small"):
        with pytest.raises(ValueError, match=f"dilation needs a backbone of bottleneck blocks .*, not {name}"):
            ModelConfig(backbone=name, dilation=True)


# ---------------------------------------------------------------- matcher


def test_permuting_targets_permutes_only_the_assignment(config):
    targets = some_targets([5, 0, 3])
    order = [torch.tensor([3, 0, 4, 1, 2]), torch.arange(0), torch.tensor([2, 0, 1])]
    permuted = [{k: v[o] for k, v in t.items()} for t, o in zip(targets, order, strict=True)]
    classes = config.num_classes + (config.class_loss == "softmax")
    outputs = random_outputs(3, classes=classes)
    criterion = SetCriterion(config, LOSS)
    pairs, permuted_pairs = criterion.matcher(outputs, targets), criterion.matcher(outputs, permuted)
    for (q1, t1), (q2, t2), o in zip(pairs, permuted_pairs, order, strict=True):
        assert {(q, t) for q, t in zip(q1.tolist(), t1.tolist(), strict=True)} == {
            (q, int(o[t])) for q, t in zip(q2.tolist(), t2.tolist(), strict=True)
        }
    losses, permuted_losses = criterion(outputs, targets), criterion(outputs, permuted)
    for name, value in losses.items():
        torch.testing.assert_close(permuted_losses[name], value, rtol=1e-5, atol=1e-6)


def test_each_target_gets_the_query_that_predicts_it(config):
    targets = some_targets([4, 2])
    classes = config.num_classes + (config.class_loss == "softmax")
    outputs = {"pred_logits": torch.full((2, 7, classes), -4.0), "pred_boxes": torch.full((2, 7, 4), 0.9)}
    planned = [[6, 1, 3, 0], [2, 5]]
    for i, (queries, target) in enumerate(zip(planned, targets, strict=True)):
        outputs["pred_boxes"][i, queries] = target["boxes"]
        outputs["pred_logits"][i, queries, target["labels"]] = 8.0
    for (query, target), queries in zip(SetCriterion(config, LOSS).matcher(outputs, targets), planned, strict=True):
        assert [queries[t] for t in target] == query.tolist() and len(query) == len(queries)


def test_more_targets_than_queries_matches_every_query_once(config):
    classes = config.num_classes + (config.class_loss == "softmax")
    outputs, targets = random_outputs(2, queries=3, classes=classes), some_targets([8, 1])
    criterion = SetCriterion(config, LOSS)
    (query, target), (second, _) = criterion.matcher(outputs, targets)
    assert sorted(query.tolist()) == [0, 1, 2] and len(set(target.tolist())) == 3 and len(second) == 1
    assert all(torch.isfinite(v) for v in criterion(outputs, targets).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["pred_logits", "pred_boxes"])
@pytest.mark.parametrize("layer", ["last", "first"])
def test_outputs_that_are_not_finite_name_their_images(key, layer, value, config):
    """Image 1 has no target and must be found, too; its neighbours must not be blamed."""
    classes = config.num_classes + (config.class_loss == "softmax")
    outputs, targets = random_outputs(4, classes=classes), some_targets([2, 0, 6, 1])
    broken = outputs if layer == "last" else outputs["aux_outputs"][0]
    broken[key][1, 4, 0] = value
    broken[key][2, 6, 1] = value
    with pytest.raises(NonFiniteOutputs, match=r"\[1, 2\]") as caught:
        SetCriterion(config, LOSS)(outputs, targets)
    assert caught.value.images == [1, 2]


def test_outputs_that_are_not_finite_are_seen_without_any_target():
    outputs = random_outputs(2)
    outputs["pred_boxes"][1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteOutputs) as caught:
        SetCriterion(LEARNED, LOSS)(outputs, some_targets([0, 0]))
    assert caught.value.images == [1]


def test_a_matcher_without_any_cost_is_refused():
    with pytest.raises(ValueError, match="costs are zero"):
        HungarianMatcher(0, 0, 0)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("counts", [(3, 1), (0, 0)], ids=["some", "none"])
@pytest.mark.parametrize("kind", ["learned", "denoising"])
def test_one_copy_to_the_host_in_matching_losses_and_their_gradients(kind, counts, host_copies):
    config = MODELS.get(kind, ANCHORS)
    model, criterion = make_model(config).train(), SetCriterion(config, LOSS)
    images, mask = some_images([(64, 96), (48, 64)])
    targets = some_targets(list(counts))
    with host_copies() as copies:
        denoising = make_denoising_queries(targets, config.denoising, 4, repeat(torch.Generator().manual_seed(0)))
        losses = criterion(model(images, mask, denoising), targets, denoising)
        criterion.total(losses).backward()
    assert copies.seen == ["cpu"] * (1 + config.two_stage)  # that of the proposals is a matching of its own


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (9, 2)], ids=["all_empty", "one_empty", "more_than_queries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["learned", "anchors", "denoising"])
def test_every_trainable_weight_gets_a_finite_gradient(kind, counts, dtype):
    config = MODELS.get(kind, ANCHORS)
    model = make_model(config).to(dtype).train()
    images, mask = some_images([(64, 96), (48, 64)])
    targets = some_targets(list(counts))
    denoising = None
    if kind == "denoising":
        denoising = make_denoising_queries(targets, config.denoising, 4, repeat(torch.Generator().manual_seed(0)))
        assert (denoising is None) == (sum(counts) == 0)
    criterion = SetCriterion(config, LOSS)
    losses = criterion(model(images.to(dtype), mask, denoising), targets, denoising)
    criterion.total(losses).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert any(name.startswith("loss_ce_dn") for name in losses) == (denoising is not None)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), name
    if sum(counts) == 0:
        assert losses["loss_bbox"] == losses["loss_giou"] == 0 < losses["loss_ce"]


def test_perfect_predictions_cost_almost_nothing(config):
    """And the total is the weighted sum that the settings say."""
    targets = some_targets([3, 0])
    classes = config.num_classes + (config.class_loss == "softmax")
    logits = torch.full((2, 7, classes), -20.0)
    if config.class_loss == "softmax":
        logits[..., -1] = 20.0
    boxes = torch.full((2, 7, 4), 0.5)
    logits[0, :3] = -20.0
    logits[0, torch.arange(3), targets[0]["labels"]] = 20.0
    boxes[0, :3] = targets[0]["boxes"]
    criterion = SetCriterion(config, LOSS)
    losses = criterion({"pred_logits": logits, "pred_boxes": boxes}, targets)
    assert {"class_error", "cardinality_error", "loss_ce", "loss_bbox", "loss_giou"} == set(losses)
    assert all(abs(value) < 1e-5 for value in losses.values())

    losses = criterion({"pred_logits": logits, "pred_boxes": (boxes + 0.05).clamp(max=1)}, targets)
    assert losses["loss_bbox"] == pytest.approx(0.2, rel=1e-4)  # four numbers, each off by 0.05
    want = sum(getattr(LOSS, name) * losses[name] for name in ("loss_ce", "loss_bbox", "loss_giou"))
    torch.testing.assert_close(criterion.total(losses), want)


def test_focal_loss_of_known_values():
    """One query at logit 0 for 4 classes: -alpha (1 - p)^2 log p for the target's class, likewise for the others."""
    outputs = {"pred_logits": torch.zeros(1, 1, 4), "pred_boxes": torch.full((1, 1, 4), 0.5)}
    targets = [{"labels": torch.tensor([2]), "boxes": torch.full((1, 4), 0.5)}]
    losses = SetCriterion(ANCHORS, LOSS)(outputs, targets)
    want = (0.25 + 3 * 0.75) * 0.25 * torch.tensor(2.0).log()
    torch.testing.assert_close(losses["loss_ce"], want)
    twice = SetCriterion(ANCHORS, LOSS)(
        {k: v.repeat(2, 1, 1) for k, v in outputs.items()}, [targets[0], targets[0]]
    )
    torch.testing.assert_close(twice["loss_ce"], want)  # divided by the number of boxes


def test_quality_loss_of_known_values():
    """A match aims at its IoU to the power gamma, all else at 0 with the weight score ** gamma."""
    loss = LossConfig(mal_gamma=1.5)
    truth = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]], requires_grad=True)  # half of it
    logits = torch.tensor([[[1.0, -2.0, 0.0, 0.0]]], requires_grad=True)
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    losses = SetCriterion(ANCHORS, loss)(outputs, [{"labels": torch.tensor([0]), "boxes": truth}])

    def log(p: float) -> torch.Tensor:
        return torch.tensor(p).log()

    def score(x: float) -> float:
        return torch.tensor(x).sigmoid().item()

    aim = 0.5**1.5
    want = -aim * log(score(1.0)) - (1 - aim) * log(1 - score(1.0))
    want = want - sum(score(x) ** 1.5 * log(1 - score(x)) for x in (-2.0, 0.0, 0.0))
    torch.testing.assert_close(losses["loss_ce"], want)
    assert torch.autograd.grad(losses["loss_ce"], boxes, allow_unused=True) == (None,)
    plain = SetCriterion(ANCHORS, LOSS)(outputs, [{"labels": torch.tensor([0]), "boxes": truth}])
    assert plain["loss_ce"] != losses["loss_ce"]


def test_denoising_losses_compare_each_query_with_the_box_it_was_made_from():
    targets = some_targets([3, 1])
    exact = ANCHORS.denoising.model_copy(update={"label_noise": 0.0, "box_noise": 0.0})
    denoising = make_denoising_queries(targets, exact, 4, repeat(torch.Generator().manual_seed(0)))
    logits = torch.full((2, *denoising.labels.shape, 4), -20.0)
    logits.scatter_(-1, denoising.labels[None, ..., None].expand(2, -1, -1, 1), 20.0)
    # Padded slots stand for nothing and must predict nothing.
    used = torch.zeros_like(denoising.labels, dtype=torch.bool)
    used[denoising.image, denoising.query] = True
    logits = torch.where(used[None, ..., None], logits, -20.0)
    outputs = random_outputs(2, classes=4)
    outputs["denoising"] = {"pred_logits": logits, "pred_boxes": denoising.boxes.repeat(2, 1, 1, 1)}
    criterion = SetCriterion(ANCHORS, LOSS)
    losses = criterion(outputs, targets, denoising)
    names = [name for name in losses if "_dn" in name]
    assert len(names) == 6 and all(losses[name] < 1e-5 for name in names)
    outputs["denoising"]["pred_boxes"] = outputs["denoising"]["pred_boxes"] + torch.tensor([0.05, 0, 0, 0])
    moved = criterion(outputs, targets, denoising)
    assert moved["loss_bbox_dn"] == pytest.approx(0.05, rel=1e-4)  # a mean over boxes and groups
    assert moved["loss_bbox"] == losses["loss_bbox"]


# ---------------------------------------------------------------- postprocess


def test_detections_of_the_focal_loss_are_the_best_pairs_of_query_and_class():
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, 0] = torch.tensor([2.0, -1.0, 1.0])
    logits[0, 1, 1] = 3.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    (found,) = PostProcess("focal")({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    assert len(found["scores"]) == 6  # two queries of three classes: fewer than 100
    assert found["labels"][:4].tolist() == [1, 0, 2, 1]
    torch.testing.assert_close(found["scores"][:4], torch.tensor([3.0, 2.0, 1.0, -1.0]).sigmoid())
    wide, small = [0.0, 0.0, 100.0, 100.0], [80.0, 30.0, 120.0, 70.0]
    torch.testing.assert_close(found["boxes"][:4], torch.tensor([wide, small, small, small]))


@pytest.mark.parametrize(("queries", "number"), [(60, 100), (150, 150)])
def test_number_of_detections_of_the_focal_loss(queries, number):
    outputs = random_outputs(2, queries=queries, classes=80)
    found = PostProcess("focal")(outputs, torch.tensor([[10, 20], [30, 40]]))
    assert all(len(one["scores"]) == number for one in found)
    assert all((one["scores"].diff() <= 0).all() for one in found)


def test_the_no_object_class_is_never_a_detection():
    logits = torch.zeros(1, 1, 4)
    logits[..., -1] = 50.0
    logits[..., 1] = 1.0
    outputs = {"pred_logits": logits, "pred_boxes": torch.full((1, 1, 4), 0.5)}
    (found,) = PostProcess()(outputs, torch.tensor([[10, 10]]))
    assert found["labels"].tolist() == [1] and found["scores"] < 1e-6
