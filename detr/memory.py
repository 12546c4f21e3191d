"""Activations computed again in the backward pass instead of kept: less memory for about a third more time.

After Chen et al. 2016 (Training deep nets with sublinear memory cost).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(model: nn.Module) -> None:
    """Let a DETR or DETRsegm keep, in training, the inputs of each backbone stage and layer instead of all within.

    Gradients, running statistics and the state dict stay the same. A copy of the model recomputes, too. Raises
    ValueError for a compiled model (see detr.compiling).
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("a compiled model does not recompute its activations; choose one of both")
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = True


def run(owner: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), a part of owner's forward; what it keeps for the backward pass is its inputs alone where
    owner.recompute says so and owner trains.
    """
    if not (owner.recompute and owner.training and torch.is_grad_enabled()):
        return function(*inputs)
    return checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=True,
        context_fn=lambda: (nullcontext(), _statistics_at_rest(owner)),
    )  # fmt: skip


@contextmanager
def _statistics_at_rest(owner: nn.Module) -> Iterator[None]:
    """Batch norms compute as before, but their running statistics stay: the first pass has moved them.

    Momentum 0 adds nothing to them, and keeps the norm's kernel, and what it saves, that of the first pass.
    """
    norms = [module for module in owner.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
