"""Convolutions with their norm's scale and bias in them compute what torchvision's own forward computes."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from detr.backbone import PlainBackbone, ResNetBackbone, fold_norms


def randomised(body: nn.Module) -> nn.Module:
    """Norms that do something; small, so that a deep stack stays in range."""
    torch.manual_seed(0)
    for module in body.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.3, 0.8)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return body.double()


@pytest.mark.parametrize(
    ("name", "norm", "dilation"),
    [("resnet18", "frozen", False), ("resnet50", "frozen", True), ("resnet18", "batch", False)],
)
def test_features_and_gradients_are_those_of_torchvision(name, norm, dilation):
    backbone = randomised(ResNetBackbone(name, norm, dilation)).eval()
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    found = {}
    for way in ("folded", "torchvision"):
        backbone.zero_grad()
        fine, coarse = backbone(images)[-2:] if way == "folded" else backbone.body(images).values()
        (fine.square().mean() + coarse.square().mean()).backward()
        found[way] = [fine, coarse, *(p.grad for p in backbone.parameters() if p.grad is not None)]
    trained = sum(p.requires_grad for p in backbone.parameters())
    assert len(found["folded"]) == len(found["torchvision"]) == 2 + trained
    for own, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    if norm == "frozen":
        assert not backbone.body["layer1"][0].conv1.weight.requires_grad


@pytest.mark.parametrize("make", [lambda: ResNetBackbone("resnet18", "frozen", False), lambda: PlainBackbone(8, 2)])
def test_a_model_folded_for_inference_is_a_copy_without_norms(make):
    backbone = randomised(make())
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    folded = fold_norms(backbone)
    assert not any(isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d) for m in folded.modules())
    assert backbone.training and not folded.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    for own, theirs in zip(folded(images), backbone.eval()(images), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    with torch.no_grad():  # nothing of the copy is shared
        next(p for p in backbone.parameters() if p.requires_grad).fill_(1)
    again = fold_norms(backbone)(images)[1]
    assert not torch.equal(again, folded(images)[1])
