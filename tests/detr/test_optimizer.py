"""Muon beside AdamW: every weight in one of them, convolutions moved in place, resumed as straight."""
import pytest
import torch
from torch import nn

from detr.config import ModelConfig
from detr.model import DETR
from detr.optimizer import build_optimizer

TINY = ModelConfig.model_validate({"preset": "tiny", "num_classes": 3, "num_queries": 9, "dec_layers": 1})
LR = 1e-2


def make(memory_format=torch.channels_last) -> DETR:
    torch.manual_seed(0)
    model = DETR(TINY)
    model.backbone.to(memory_format=memory_format)
    return model


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(drawn)  # in the weight's memory order, as autograd leaves it


def train(model: DETR, optimizer, seeds) -> dict[str, torch.Tensor]:
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_every_weight_moves_and_tables_heads_and_the_first_convolution_move_as_in_adamw():
    before = dict(make().named_parameters())
    muon, adamw = make(), make()
    after = train(muon, build_optimizer(muon, "muon", LR, LR, 0.0), [1])
    plain = train(adamw, build_optimizer(adamw, "adamw", LR, LR, 0.0), [1])
    assert all(not torch.equal(after[name], before[name]) for name in after)
    same = {name for name in after if torch.equal(after[name], plain[name])}
    assert {name for name in same if before[name].dim() > 1} == {
        "class_embed.weight", "decoder.content", "decoder.label_embed.weight", "decoder.proposals.class_embed.weight",
        "decoder.layers.0.cross_attn.places.weight", "decoder.layers.0.cross_attn.shares.weight",
        "backbone.0.stem.0.weight",
    }  # fmt: skip
    assert all(name in same for name in after if before[name].dim() == 1)


def test_a_step_is_the_orthogonal_factor_of_the_gradient_at_adamws_scale():
    model = make()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = train(model, build_optimizer(model, "muon", LR, LR, 0.0), [1])
    give_gradients(model, 1)
    for name in ("transformer.encoder.layers.0.linear1.weight", "backbone.0.stages.1.0.conv2.weight"):
        step = (before[name] - after[name]).flatten(1)
        left, _, right = torch.linalg.svd(dict(model.named_parameters())[name].grad.flatten(1), full_matrices=False)
        aim = 0.2 * LR * max(step.shape) ** 0.5 * left @ right
        # Five Newton-Schulz steps leave singular values between 0.7 and 1.2.
        assert torch.cosine_similarity(step.flatten(), aim.flatten(), 0) > 0.97
        assert step.norm() == pytest.approx(aim.norm().item(), rel=0.2)


def test_memory_order_changes_nothing():
    """As equal as Muon's bfloat16 lets them be."""
    one, other = make(), make(torch.contiguous_format)
    a = train(one, build_optimizer(one, "muon", LR, LR, 1e-4), [1, 2])
    b = train(other, build_optimizer(other, "muon", LR, LR, 1e-4), [1, 2])
    for name in a:
        assert (a[name] - b[name]).norm() < 2e-2 * (a[name] - dict(make().named_parameters())[name]).norm(), name


def test_interrupted_it_goes_on_as_if_it_had_not_been(tmp_path):
    straight = make()
    aim = train(straight, build_optimizer(straight, "muon", LR, LR, 1e-4), [1, 2, 3])
    first = make()
    optimizer = build_optimizer(first, "muon", LR, LR, 1e-4)
    train(first, optimizer, [1, 2])
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = make()
    second.load_state_dict(saved["model"])
    optimizer = build_optimizer(second, "muon", LR, LR, 1e-4)
    optimizer.load_state_dict(saved["optimizer"])
    for name, weight in train(second, optimizer, [3]).items():
        assert torch.equal(weight, aim[name]), name


def test_a_frozen_backbone_stays():
    model = make()
    before = {name: parameter.detach().clone() for name, parameter in model.backbone.named_parameters()}
    train(model, build_optimizer(model, "muon", LR, 0.0, 1e-4), [1])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.backbone.named_parameters())
    assert not torch.equal(model.input_proj.weight, make().input_proj.weight)
