"""Activations computed again: the same training in less memory."""
from __future__ import annotations

import copy
from itertools import repeat

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detr.config import DenoisingConfig, ModelConfig
from detr.memory import recompute_activations
from detr.model import DETR
from detr.queries import make_denoising_queries
from detr.segmentation import DETRsegm

SMALL = {"num_classes": 4, "hidden_dim": 32, "nheads": 4, "dim_feedforward": 128, "dropout": 0.2, "num_queries": 7}
MODELS = {
    "learned, resnet with batch norms": ModelConfig(
        backbone="resnet18", norm="batch", enc_layers=3, dec_layers=3, **SMALL
    ),
    "learned, resnet with frozen norms": ModelConfig(
        backbone="resnet18", enc_layers=3, dec_layers=3, pre_norm=True, **SMALL
    ),
    "anchors, plain": ModelConfig(preset="tiny", **SMALL),
}  # fmt: skip


def make_pair(config: ModelConfig) -> tuple[DETR, DETR]:
    torch.manual_seed(0)
    plain = DETR(config)
    nn.init.normal_(plain.bbox_embed.layers[-1].weight, std=0.3)
    lean = copy.deepcopy(plain)
    recompute_activations(lean)
    return plain, lean


def steps(net: nn.Module, config: ModelConfig, number: int = 2, precision: torch.dtype | None = None) -> list[int]:
    """Train for some steps -> what each keeps for its backward pass, weights apart, in bytes."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    torch.manual_seed(1)
    kept = []
    for _ in range(number):
        images, mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
        mask[1, :, 100:] = True
        denoising = None
        if config.queries == "anchors":
            targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.full((2, 4), 0.4)}] * 2
            generator = torch.Generator().manual_seed(2)
            denoising = make_denoising_queries(targets, DenoisingConfig(groups=2), 4, repeat(generator))
        storages: dict[int, int] = {}

        def pack(x: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return x

        net.train()
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", precision, enabled=precision is not None),
        ):
            outputs = net(images, mask, denoising)
        layers = [outputs, *outputs["aux_outputs"], *([outputs["denoising"]] if denoising else [])]
        layers += [outputs["proposals"]] if "proposals" in outputs else []
        loss = sum(x["pred_logits"].sigmoid().mean() + x["pred_boxes"].sigmoid().mean() for x in layers)
        loss.backward()
        kept.append(sum(storages.values()))
    return kept


def assert_same_training(plain: nn.Module, lean: nn.Module) -> None:
    others = dict(lean.named_parameters())
    for name, weight in plain.named_parameters():
        other = others[name].grad
        assert (weight.grad is None) == (other is None), name
        assert weight.grad is None or torch.equal(weight.grad, other), name
    state = lean.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients_and_statistics_with_less_than_half_of_the_memory(name):
    plain, lean = make_pair(MODELS[name])
    much, little = steps(plain, plain.config), steps(lean, plain.config)
    assert max(little) < 0.5 * min(much)
    assert_same_training(plain, lean)
    counts = [b for key, b in lean.named_buffers() if key.endswith("num_batches_tracked")]
    assert all(count == 2 for count in counts)
    assert bool(counts) == (plain.config.norm == "batch")
    assert all(norm.momentum == 0.1 for norm in lean.modules() if isinstance(norm, nn.BatchNorm2d))


def test_in_bfloat16_too():
    plain, lean = make_pair(MODELS["anchors, plain"])
    steps(plain, plain.config, precision=torch.bfloat16)
    steps(lean, plain.config, precision=torch.bfloat16)
    assert_same_training(plain, lean)


@pytest.mark.parametrize("name", ["learned, resnet with batch norms", "anchors, plain"])
def test_under_distributed_data_parallel(name, tmp_path):
    plain, lean = make_pair(MODELS[name])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        steps(DistributedDataParallel(lean), plain.config)
    finally:
        torch.distributed.destroy_process_group()
    steps(plain, plain.config)
    for (name, weight), other in zip(plain.named_parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), lean.buffers(), strict=True))


def test_nothing_is_computed_twice_outside_training():
    model = make_pair(MODELS["anchors, plain"])[1]
    calls = []
    model.transformer.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    images, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    model.eval()
    model(images, mask)["pred_logits"].sum().backward()
    assert len(calls) == 1
    model.train()
    model(images, mask)["pred_logits"].sum().backward()
    assert len(calls) == 3


def test_a_copy_recomputes_with_its_own_weights_and_a_mask_head_may_be_on_top():
    model = make_pair(MODELS["anchors, plain"])[1]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.01)
    steps(other, other.config, number=1)
    assert all(weight.grad is None for weight in model.parameters())
    sizes = {"hidden_dim": 128, "nheads": 8, "class_loss": "softmax", "two_stage": False, "masks": True}
    segm = DETRsegm(DETR(ModelConfig(preset="tiny", **sizes)))
    recompute_activations(segm)
    assert segm.detr.backbone[0].recompute
    assert segm.detr.decoder.recompute
