"""torch.compile for the parts of a DETR whose work is alike from batch to batch, and in a sentence what came of it.

(Ansel et al. 2024, PyTorch 2.)
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Callable[[], str]:
    """Have torch.compile make the backbone and the encoder's layers of a DETR or DETRsegm, in place.

    The decoder stays as it is: its sizes follow the number of denoising queries, and would be compiled for ever anew.
    Compiled are calls, when they come (the first batch, and once more when sizes change), not weights: the state dict
    is as before, and a copy of the model (the moving average) is not compiled. Figures are those of before but for
    rounding; dropout may draw others.

    backend: a name torch.compile knows, or a function of its kind. Where it fails, at whatever batch, that and all
    later graphs run uncompiled. Sets torch._dynamo.config.suppress_errors, so that tracing that fails does so, too.

    Returns a function that says, in one sentence, what has been compiled so far, or why nothing. Raises ValueError
    where the model recomputes its activations: the two passes could meet differently compiled graphs.
    """
    if any(getattr(module, "recompute", False) for module in model.modules()):
        raise ValueError("a model that recomputes its activations is not compiled; choose one of both")
    detr = getattr(model, "detr", model)
    compiled, problems, before = [], [], _trouble()

    def compile_or_keep(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        if not problems:
            try:
                # The backward graph at once, not in the backward pass, where no one could catch what goes wrong.
                with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                    made = lookup_backend(backend)(graph, inputs)
                compiled.append(made)
                return made
            except Exception as error:  # noqa: BLE001 - compilers raise what they like
                problems.append(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])
        return graph.forward

    torch._dynamo.config.suppress_errors = True
    for part in (detr.backbone[0], *detr.transformer.encoder.layers):
        part.compile(backend=compile_or_keep)
    return lambda: _sentence(len(compiled), problems, _trouble() - before)


def _trouble() -> Counter[str]:
    """What has kept torch.compile from its work in this process so far, and how often."""
    frames = counters["frames"]
    limit = sum(count for why, count in counters["unimplemented"].items() if "recompile limit" in why)
    return Counter(
        breaks=sum(counters["graph_break"].values()), limit=limit, untraced=frames["total"] - frames["ok"] - limit
    )


def _sentence(graphs: int, problems: list[str], trouble: Counter[str]) -> str:
    if problems:
        done = f"Only {_count(graphs, 'graph')} compiled" if graphs else "Nothing is compiled"
        return f"{done} ({problems[0]}); training goes on without."
    if not graphs and not trouble["untraced"]:
        return "Nothing is compiled yet: no batch has come."
    notes = [_count(graphs, "graph"), _count(trouble["breaks"], "graph break")]
    if trouble["untraced"]:
        notes.append(f"{_count(trouble['untraced'], 'function')} not traced")
    if trouble["limit"]:
        notes.append("the recompile limit is reached, other sizes run uncompiled")
    return f"The backbone and the encoder are {'' if graphs else 'not '}compiled: {', '.join(notes)}."


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
