"""Frozen parts stay as they are, through optimiser, norms and moving average."""
from __future__ import annotations

import copy

import pytest
import torch

from detr.config import ModelConfig
from detr.model import DETR, count_parameters, freeze
from detr.optimizer import MuonAdamW, build_optimizer

TINY = ModelConfig(preset="tiny", num_classes=3, hidden_dim=32, nheads=4, num_queries=9, dec_layers=1)


def make() -> DETR:
    torch.manual_seed(0)
    return DETR(TINY)


def train(model: DETR, optimizer: torch.optim.AdamW | MuonAdamW, number: int = 2) -> None:
    for _ in range(number):
        model.train()
        outputs = model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
        model.zero_grad()
        (outputs["pred_logits"].square().mean() + outputs["pred_boxes"].mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("prefix", ["backbone", "transformer.encoder", "backbone.0.stages.1", "finer_norm.0.bias"])
def test_a_frozen_part_stays_and_all_else_trains(kind, prefix):
    model = make()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    frozen = freeze(model, [prefix])
    inside = [p for name, p in model.named_parameters() if name == prefix or name.startswith(f"{prefix}.")]
    assert frozen == sum(p.numel() for p in inside) > 0
    assert count_parameters(model) == (count_parameters(make())[0], count_parameters(make())[0] - frozen)
    optimizer = build_optimizer(model, kind, 1e-2, 1e-2, 1e-2)
    grouped = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    assert grouped.isdisjoint(p.data_ptr() for p in inside)

    before = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    average.update_parameters(model)
    after, averaged = model.state_dict(), average.module.state_dict()
    for name, value in before.items():
        at_rest = name == prefix or name.startswith(f"{prefix}.")
        unused = name.startswith(("decoder.label_embed", "decoder.proposals"))
        if at_rest:  # statistics of norms among it
            assert torch.equal(after[name], value) and torch.equal(averaged[name], value), name
        elif not unused:
            assert not torch.equal(after[name], value), name


def test_a_frozen_norm_uses_its_statistics_also_after_a_validation():
    model = make()
    freeze(model, ["backbone"])
    images = torch.randn(2, 3, 64, 64)
    aim = model.eval().backbone[0](images)[-1]
    model.train()
    assert torch.equal(model.backbone[0](images)[-1], aim)
    assert model.transformer.training


def test_a_learning_rate_of_zero_freezes_the_backbones_norms_too():
    model = make()
    before = copy.deepcopy(model.backbone.state_dict())
    train(model, build_optimizer(model, "muon", 1e-2, 0.0, 1e-2), 1)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_head_alone_can_train(kind):
    """No matrix is left for Muon."""
    model = make()
    parts = {name for name, _ in model.named_children()} - {"class_embed"}
    freeze(model, sorted(parts))
    optimizer = build_optimizer(model, kind, 1e-2, 1e-2, 1e-2)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"class_embed.weight", "class_embed.bias"}


def test_parts_count_once():
    model = make()
    both = freeze(model, ["backbone.0.stem", "backbone"])
    assert both == count_parameters(model.backbone)[0]
    assert freeze(model, ["backbone"]) == 0


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("backbon", "backbone"), ("encoder", "transformer.encoder"), ("bbox_embd.layers", "bbox_embed.layers"),
     ("stages.0", "backbone.0.stages.0"), ("backbone.body.stem", "backbone.0.stem")],
)  # fmt: skip
def test_an_unknown_part_is_an_error_that_names_the_nearest_and_freezes_nothing(given, nearest):
    model = make()
    with pytest.raises(ValueError, match=f"nearest is '{nearest}'$"):
        freeze(model, ["class_embed", given])
    assert all(p.requires_grad for p in model.parameters())


def test_something_must_be_left_to_train():
    model = make()
    with pytest.raises(ValueError, match="no weight would be left"):
        freeze(model, [name for name, _ in model.named_children()])
    assert all(p.requires_grad for p in model.parameters())
