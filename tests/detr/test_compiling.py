"""Compiled parts compute the same, and a compiler that fails is no harm."""
from __future__ import annotations

import copy
import re

import pytest
import torch

from detr.compiling import compile_layers
from detr.config import ModelConfig
from detr.memory import recompute_activations
from detr.model import DETR

TINY = ModelConfig(
    preset="tiny", num_classes=3, hidden_dim=32, nheads=4, num_queries=9, dec_layers=1, enc_layers=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False


def make() -> DETR:
    torch.manual_seed(0)
    model = DETR(TINY)
    model.backbone.to(memory_format=torch.channels_last)
    return model


def train(model: DETR, height: int = 64, precision: torch.dtype | None = None) -> None:
    """One step's gradients."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, height, 96).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(2, height, 96, dtype=torch.bool)
    mask[1, :, 70:] = True
    model.train()
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        outputs = model(images, mask)
    (outputs["pred_logits"].square().mean() + outputs["pred_boxes"].mean()).backward()


def assert_same(model: DETR, other: DETR) -> None:
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
    state = other.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_same_gradients_at_every_size_with_few_graphs():
    plain, compiled = make(), make()
    report = compile_layers(compiled, "aot_eager")
    assert "Nothing is compiled yet" in report()
    for height in (64, 96, 70, 64):
        train(plain, height)
        train(compiled, height)
        assert_same(plain, compiled)
    graphs = int(report().split(" graphs")[0].split()[-1])
    assert 2 <= graphs <= 6  # not one of each size
    assert report().endswith("graphs, no graph breaks.")


def test_a_copy_is_not_compiled_and_learns_and_saves_as_any_other(tmp_path):
    model, calls = make(), []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    report = compile_layers(model, backend)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    train(average.module)
    assert not calls
    train(model)
    assert calls
    assert f": {len(calls)} graph" in report()
    average.update_parameters(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    train(other)
    train(copy.deepcopy(model))
    train(model)
    assert_same(other, model)


def test_where_the_compiler_fails_training_goes_on_and_the_sentence_says_why():
    def backend(graph, inputs):
        tried.append(1)
        raise RuntimeError("no C++ compiler here\nand more of it")

    tried: list[int] = []
    plain, model = make(), make()
    report = compile_layers(model, backend)
    for height in (64, 96):
        train(plain, height)
        train(model, height)
        assert_same(plain, model)
    assert report() == "Nothing is compiled (RuntimeError: no C++ compiler here); training goes on without."
    assert len(tried) == 1


def test_a_compiler_that_fails_in_the_backward_graph_ends_nothing():
    from torch._dynamo.backends.common import aot_autograd

    def refuse(graph, inputs):
        raise OSError("no space left")

    plain, model = make(), make()
    report = compile_layers(model, aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=refuse))
    train(plain)
    train(model)
    assert_same(plain, model)
    assert "no space left" in report()


def test_an_unknown_backend_is_a_sentence_too():
    model = make()
    report = compile_layers(model, "inductr")
    train(model)
    assert "inductr" in report()


def test_graphs_that_break_and_sizes_without_end_are_told():
    model = make()
    stage = model.backbone[0].stages[0]
    stage.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    report = compile_layers(model, "eager")
    train(model)
    assert re.search(r"[1-9] graph break", report())
    with torch._dynamo.config.patch(recompile_limit=1):
        train(model, 96)
    assert "recompile limit is reached" in report()


def test_what_cannot_be_traced_runs_uncompiled(monkeypatch):
    from torch._dynamo.symbolic_convert import InstructionTranslator

    def fail(self):
        raise AssertionError("of the tracer itself")

    monkeypatch.setattr(InstructionTranslator, "run", fail)
    model = make()
    report = compile_layers(model, "eager")
    train(model)
    assert model.input_proj.weight.grad is not None
    assert "are not compiled" in report()
    assert "not traced" in report()


def test_recomputing_and_compiling_exclude_each_other():
    model = make()
    recompute_activations(model)
    with pytest.raises(ValueError, match="choose one"):
        compile_layers(model)
    model = make()
    compile_layers(model)
    with pytest.raises(ValueError, match="choose one"):
        recompute_activations(model)
