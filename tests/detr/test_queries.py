"""Anchor and denoising queries: what they start as, and who may see whom."""
from __future__ import annotations

from dataclasses import replace
from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert

from detr.config import DenoisingConfig, LossConfig, ModelConfig
from detr.criterion import SetCriterion
from detr.matcher import HungarianMatcher
from detr.model import DETR, all_layers
from detr.queries import DeformableAttention, Proposals, Pyramid, denoising_mask, make_denoising_queries

CONFIG = ModelConfig(
    preset="tiny", hidden_dim=32, nheads=4, dim_feedforward=64, num_queries=10, num_classes=4, dec_layers=2,
    denoising={"groups": 3, "negatives": False},
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_targets(counts: list[int]) -> list[dict[str, torch.Tensor]]:
    g = generator(5)
    return [
        {
            "labels": torch.randint(4, (count,), generator=g),
            "boxes": torch.rand(count, 4, generator=g) * 0.3 + torch.tensor([0.3, 0.3, 0.1, 0.1]),
        }
        for count in counts
    ]


@pytest.fixture(scope="module")
def model() -> DETR:
    """In eval mode, with every weight random: those that start as zero hide leaks."""
    torch.manual_seed(0)
    model = DETR(CONFIG).eval()
    nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.3)
    nn.init.normal_(model.decoder.label_embed.weight)
    nn.init.normal_(model.decoder.content)
    nn.init.normal_(model.class_embed.bias)
    for layer in model.decoder.layers:
        nn.init.normal_(layer.cross_attn.places.weight, std=0.1)
        nn.init.normal_(layer.cross_attn.shares.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 48:] = True
    return torch.randn(2, 3, 64, 96, generator=generator(1)).masked_fill(mask[:, None], 0), mask


# ---------------------------------------------------------------- no leak


def test_denoising_queries_do_not_reach_the_matched_ones(model, images):
    denoising = make_denoising_queries(some_targets([3, 1]), CONFIG.denoising, 4, repeat(generator()))
    with torch.no_grad():
        alone, together = model(*images), model(*images, denoising)
    assert "denoising" not in alone
    for one, other in zip(all_layers(alone), all_layers(together), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    assert together["denoising"]["pred_logits"].shape == (2, 2, 9, 4)
    assert together["denoising"]["pred_boxes"].shape == (2, 2, 9, 4)


def test_a_denoising_group_does_not_see_another(model, images):
    denoising = make_denoising_queries(some_targets([3, 1]), CONFIG.denoising, 4, repeat(generator()))
    labels, boxes = denoising.labels.clone(), denoising.boxes.clone()
    labels[:, 3:6] = (labels[:, 3:6] + 1) % 4  # the second of three groups
    boxes[:, 3:6] = boxes[:, 3:6] * 0.5 + 0.2
    with torch.no_grad():
        before = model(*images, denoising)["denoising"]
        after = model(*images, replace(denoising, labels=labels, boxes=boxes))["denoising"]
    for key in ("pred_logits", "pred_boxes"):
        changed = (before[key] - after[key]).abs().amax((0, 1, 3))
        assert changed[[0, 1, 2, 6, 7, 8]].max() < 1e-5
        assert changed[3:6].min() > 1e-3


def test_who_may_attend_to_whom():
    denoising = make_denoising_queries(some_targets([2, 1]), DenoisingConfig(groups=2), 4, repeat(generator()))
    full, padded = denoising_mask(2, denoising)[:, 0].int().tolist()
    assert full == [
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    assert padded == [[a, 0, b, 0, 1, 1] for a, _, b, *_ in full]


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_an_image_is_denoised_as_if_it_were_alone(model, images, class_loss):
    """Fuller images beside it add padding, which is neither seen nor judged."""
    softmax = CONFIG.model_copy(update={"class_loss": "softmax", "two_stage": False})
    config = CONFIG if class_loss == "focal" else softmax
    net = model if class_loss == "focal" else DETR(config).eval()
    criterion = SetCriterion(config, LossConfig(mal_gamma=1.5 if class_loss == "focal" else 0))
    few, many = some_targets([2, 5])
    pixels, mask = (x[:1].expand(2, *x.shape[1:]) for x in images)
    none = {"labels": few["labels"][:0], "boxes": few["boxes"][:0]}
    losses = []
    for targets in ([few, none], [few, many]):
        denoising = make_denoising_queries(targets, CONFIG.denoising, 4, repeat(generator()))
        first = denoising.image == 0
        with torch.no_grad():
            out = net(pixels, mask, denoising)
        out = {**out, "denoising": {k: v[:, :1] for k, v in out["denoising"].items()}}
        out |= {k: v[:1] for k, v in out.items() if k in ("pred_logits", "pred_boxes")}
        out |= {"aux_outputs": [{k: v[:1] for k, v in a.items()} for a in out["aux_outputs"]]}
        if "proposals" in out:
            out["proposals"] = {k: v[:1] for k, v in out["proposals"].items()}
        cut = {k: getattr(denoising, k)[first] for k in ("image", "query", "target")}
        cut |= {k: getattr(denoising, k)[:1] for k in ("labels", "boxes", "real")}
        losses.append(criterion(out, [few], replace(denoising, **cut)))
    assert any(name.endswith("_dn") for name in losses[0])
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, msg=name, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- making them


def test_queries_say_which_box_they_stand_for():
    targets = some_targets([3, 0, 1])
    config = DenoisingConfig(groups=4, label_noise=0.0, box_noise=0.0)
    made = make_denoising_queries(targets, config, 4, repeat(generator()))
    assert made.labels.shape == (3, 12) and made.boxes.shape == (3, 12, 4) and made.groups == 4
    labels, boxes = (torch.cat([t[key] for t in targets]) for key in ("labels", "boxes"))
    assert len(made.target) == 16 and torch.bincount(made.target).tolist() == [4, 4, 4, 4]
    assert torch.equal(made.labels[made.image, made.query], labels[made.target])
    torch.testing.assert_close(made.boxes[made.image, made.query], boxes[made.target], rtol=0, atol=1e-6)
    # Every box once in every group.
    group = made.query // 3
    assert len(set(zip(group.tolist(), made.target.tolist(), strict=True))) == 16
    assert set(made.image.tolist()) == {0, 2}


def test_negatives_are_further_off_than_positives_and_stand_for_nothing():
    config = DenoisingConfig(groups=2, label_noise=0, box_noise=0.3, negatives=True)
    targets = some_targets([40, 30])
    made = make_denoising_queries(targets, config, 4, repeat(generator()))
    assert made.groups == 2 and made.labels.shape == (2, 160) and made.real.sum() == 4 * 70
    assert len(made.target) == 140 and set((made.query % 80).tolist()) == set(range(40))
    truth = torch.cat([t["boxes"] for t in targets]).double()
    labels = torch.cat([t["labels"] for t in targets])
    twin = made.query + 40
    assert torch.equal(made.labels[made.image, twin], labels[made.target])
    for query, low, high in ((made.query, 0.0, 0.3), (twin, 0.3, 0.6)):
        found, true = (box_convert(x, "cxcywh", "xyxy") for x in (made.boxes[made.image, query], truth[made.target]))
        moved = (found - true).abs() / (truth[made.target, 2:].repeat(1, 2) / 2)
        assert low - 1e-3 <= moved.min() and moved.max() <= high + 1e-3 and moved.max() > high - 0.05
    allowed = denoising_mask(3, made)[0, 0]
    assert allowed[:80, :80].all() and not allowed[:80, 80:160].any()


def test_negatives_pull_scores_down_and_no_box(model, images):
    config = CONFIG.denoising.model_copy(update={"negatives": True})
    targets = some_targets([3, 2])
    denoising = make_denoising_queries(targets, config, 4, repeat(generator()))
    out = model(*images, denoising)
    criterion = SetCriterion(CONFIG, LossConfig())
    negative = denoising.real.clone()
    negative[denoising.image, denoising.query] = False
    assert negative.sum() == denoising.real.sum() / 2
    losses = criterion(out, targets, denoising)
    scores, boxes = (out["denoising"][key] for key in ("pred_logits", "pred_boxes"))
    (of_scores,) = torch.autograd.grad(losses["loss_ce_dn"], scores, retain_graph=True)
    assert (of_scores[-1][negative] > 0).all()
    (of_boxes,) = torch.autograd.grad(losses["loss_bbox_dn"], boxes)
    assert of_boxes[-1][negative].abs().max() == 0 and of_boxes[-1][denoising.image, denoising.query].abs().min() > 0


def test_crowded_images_get_fewer_groups():
    config = DenoisingConfig(groups=4)
    for most, groups in ((10, 4), (100, 4), (101, 3), (200, 2), (900, 1)):
        made = make_denoising_queries(some_targets([most, 2]), config, 4, repeat(generator()))
        assert made.groups == groups and made.labels.shape[1] == most * groups
        assert len(made.target) == (most + 2) * groups
    made = make_denoising_queries(some_targets([3, 2]), config, 4, repeat(generator()), most=200)
    assert made.groups == 2 and made.labels.shape[1] == 6  # as where another worker has the crowd


def test_an_image_has_the_same_noise_whatever_else_is_in_its_batch():
    targets = some_targets([3, 4])
    both = make_denoising_queries(targets, CONFIG.denoising, 4, (generator(s) for s in (5, 6)))
    alone = make_denoising_queries(targets[1:], CONFIG.denoising, 4, [generator(6)])
    assert torch.equal(both.boxes[1], alone.boxes[0]) and torch.equal(both.labels[1], alone.labels[0])


def test_noise_keeps_within_its_settings():
    targets = some_targets([200, 100])
    config = DenoisingConfig(groups=5, label_noise=0.4, box_noise=0.3)
    made = make_denoising_queries(targets, config, 50, repeat(generator()))
    labels, boxes = (torch.cat([t[key] for t in targets])[made.target] for key in ("labels", "boxes"))
    got = made.boxes[made.image, made.query]
    corner = torch.cat([got[:, :2] - got[:, 2:] / 2, got[:, :2] + got[:, 2:] / 2], 1)
    truth = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1).clamp(0, 1)
    moved = (corner - truth).abs() / (boxes[:, 2:].repeat(1, 2) / 2)
    assert moved.max() <= 0.3 + 1e-4 and moved.mean() == pytest.approx(0.15, abs=0.01)
    assert corner.min() >= -1e-6 and corner.max() <= 1 + 1e-6 and (got[:, 2:] > 0).all()
    flipped = (made.labels[made.image, made.query] != labels).float().mean()
    assert flipped == pytest.approx(0.4 * 49 / 50, abs=0.05)
    assert made.labels.min() >= 0 and made.labels.max() < 50


def test_the_generator_decides_the_noise():
    targets = some_targets([4, 2])
    made = (make_denoising_queries(targets, CONFIG.denoising, 4, repeat(generator(seed))) for seed in (1, 1, 2))
    first, again, other = made
    assert torch.equal(first.boxes, again.boxes) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.boxes, other.boxes)


def test_nothing_to_denoise_without_boxes_or_groups():
    assert make_denoising_queries(some_targets([0, 0]), CONFIG.denoising, 4, repeat(generator())) is None
    assert make_denoising_queries(some_targets([2, 1]), DenoisingConfig(groups=0), 4, repeat(generator())) is None


# ---------------------------------------------------------------- anchors


def test_the_first_boxes_are_the_anchors_on_a_grid(images):
    torch.manual_seed(0)
    _, boxes = all_layers(DETR(CONFIG.model_copy(update={"two_stage": False})).eval()(*images))
    want = boxes[0, 0]
    torch.testing.assert_close(boxes, want.expand_as(boxes), rtol=0, atol=1e-5)  # of both layers and images
    assert len({tuple(centre) for centre in want[:, :2].mul(1e3).round().int().tolist()}) == 10
    torch.testing.assert_close(want[:, 2:], torch.full((10, 2), 0.25), rtol=0, atol=1e-4)
    assert want[:, :2].min() < 0.2 and want[:, :2].max() > 0.8


def test_a_layer_starts_from_the_boxes_of_the_one_before(model, images):
    """With a box head that adds a constant, boxes move by it once more in every layer."""
    moving = DETR(CONFIG).eval()
    moving.load_state_dict(model.state_dict())
    nn.init.zeros_(moving.bbox_embed.layers[-1].weight)
    with torch.no_grad():
        moving.bbox_embed.layers[-1].bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.4]))
        _, boxes = all_layers(moving(*images))
    step = torch.logit(boxes[1]) - torch.logit(boxes[0])
    torch.testing.assert_close(step, torch.tensor([0.3, -0.2, 0.1, 0.4]).expand_as(step), rtol=0, atol=1e-3)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_heads_start_apart_whatever_their_number(heads, images):
    torch.manual_seed(0)
    model = DETR(CONFIG.model_copy(update={"nheads": heads})).eval()
    places = model.decoder.layers[0].cross_attn.places.bias.view(heads, 3, 4, 2)  # of every head, level and point
    assert len({tuple(place) for place in places[:, 0, 0].tolist()}) == heads
    assert places.abs().max() <= 0.5  # in the box
    assert torch.isfinite(model(*images)["pred_logits"]).all()


# ---------------------------------------------------------------- proposals


def test_the_best_proposals_are_the_first_boxes(images):
    """The surest first; padding has no score."""
    torch.manual_seed(0)
    proposals = Proposals(CONFIG)
    nn.init.normal_(proposals.class_embed.weight)
    x, sizes = torch.randn(2, 32, 8, 12, generator=generator(4)), torch.tensor([[96, 64], [96, 48]])
    logits, boxes, anchors = proposals(8, x, sizes)
    assert logits.shape == (2, 96, 4) and boxes.shape == (2, 96, 4) and anchors.shape == (2, 10, 4)
    for image in range(2):
        order = sorted(range(96), key=lambda i: -logits[image, i].max())[:10]
        torch.testing.assert_close(anchors[image], boxes[image, order])
    # Boxes start at their cell's centre; the second image ends after six rows of cells.
    torch.testing.assert_close(boxes[0, 13], torch.tensor([12 / 96, 12 / 64, 32 / 96, 32 / 64]))
    assert (logits[1, 72:] == -20).all() and not (logits[1, :72] == -20).any() and not anchors.requires_grad


def test_an_image_of_fewer_cells_than_queries_has_all_its_queries():
    model = DETR(CONFIG).eval()
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 17, 17), torch.zeros(1, 17, 17, dtype=torch.bool))
    assert out["pred_boxes"].shape == (1, 10, 4) and torch.isfinite(out["pred_logits"]).all()


def test_no_target_is_matched_to_padding():
    """Neither to cells of padding nor to what fills up the anchors, cheap as a guess at the middle may be."""
    torch.manual_seed(0)
    proposals, targets = Proposals(CONFIG), [{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}]
    logits, boxes, anchors = proposals(8, torch.randn(1, 32, 8, 12), torch.tensor([[40, 24]]))
    assert (boxes[0].amax(-1) <= 1).sum() == 15 and anchors.max() <= 1
    for cost_class in (0.0, 1.0, 2.0):
        found = HungarianMatcher(cost_class, 5, 2, "focal").match(logits[None], boxes[None], targets)
        assert found.query[0] // 12 < 3 and found.query[0] % 12 < 5


@pytest.mark.parametrize("mal_gamma", [0.0, 1.5])
@pytest.mark.parametrize("counts", [[3, 1], [0, 0]], ids=["some", "none"])
def test_a_step_in_bfloat16_with_proposals_has_finite_gradients(images, mal_gamma, counts):
    torch.manual_seed(0)
    model, targets = DETR(CONFIG).train(), some_targets(counts)
    denoising = make_denoising_queries(targets, CONFIG.denoising, 4, repeat(generator()))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(*images, denoising)
    criterion = SetCriterion(CONFIG, LossConfig(mal_gamma=mal_gamma))
    criterion.total(criterion(outputs, targets, denoising)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_proposals_learn_from_the_same_targets(images):
    """A loss of their own, which reaches the backbone; the decoder's does not come back through its first boxes."""
    torch.manual_seed(0)
    model = DETR(CONFIG).train()
    losses = SetCriterion(CONFIG, LossConfig())(model(*images), some_targets([3, 1]))
    enc = losses["loss_ce_enc"] + losses["loss_bbox_enc"] + losses["loss_giou_enc"]
    assert enc.isfinite() and enc > 0
    weights = (model.decoder.proposals.class_embed.weight, model.backbone[0].stem[0].weight)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(enc, weights, retain_graph=True))
    rest = sum(v for k, v in losses.items() if k.startswith("loss") and not k.endswith("_enc"))
    assert torch.autograd.grad(rest, weights, allow_unused=True)[0] is None


# ---------------------------------------------------------------- attention to places


def test_places_are_read_as_grid_sample_reads_them():
    """Against F.grid_sample of every head's channels, whose corners are those of the padded map."""
    torch.manual_seed(0)
    attention = DeformableAttention(16, 4, 2, 3).double()
    nn.init.normal_(attention.places.weight, std=0.5)
    nn.init.normal_(attention.shares.weight)
    query, boxes = torch.randn(2, 5, 16).double(), (torch.rand(2, 5, 4) * 0.8 + 0.1).double()
    maps = [torch.randn(2, 16, 4, 6).double(), torch.randn(2, 16, 8, 12).double()]
    sizes = torch.tensor([[96, 64], [80, 50]])
    found = attention(query, boxes, Pyramid((16, 8), maps, sizes))
    places = attention.places(query).view(2, 5, 4, 2, 3, 2)
    shares = attention.shares(query).view(2, 5, 4, 6).softmax(-1).view(2, 5, 4, 2, 3)
    at = boxes[:, :, None, None, None, :2] + places * boxes[:, :, None, None, None, 2:]
    want = torch.zeros(2, 5, 4, 4).double()
    for level, x in enumerate(maps):
        grid = at[:, :, :, level] * sizes[:, None, None, None] / torch.tensor([96, 64]) * 2 - 1
        for head in range(4):
            channels = x[:, head * 4 : head * 4 + 4]
            read = F.grid_sample(channels, grid[:, :, head], align_corners=False)  # [B, 4, Q, points]
            want[:, :, head] += (read * shares[:, None, :, head, level]).sum(-1).transpose(1, 2)
    torch.testing.assert_close(found, attention.out_proj(want.flatten(2)))


def test_gradients_of_places_and_maps_are_true():
    torch.manual_seed(0)
    attention = DeformableAttention(4, 2, 2, 2).double()
    nn.init.normal_(attention.places.weight, std=0.3)
    nn.init.normal_(attention.shares.weight)
    query, boxes = torch.randn(1, 2, 4).double(), (torch.rand(1, 2, 4) * 0.5 + 0.2).double()
    maps = [torch.randn(1, 4, 3, 3).double(), torch.randn(1, 4, 6, 6).double()]

    def run(query, boxes, *maps):
        return attention(query, boxes, Pyramid((16, 8), list(maps), torch.tensor([[48, 48]])))

    torch.autograd.gradcheck(run, [x.requires_grad_() for x in (query, boxes, *maps)])
