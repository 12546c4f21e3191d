"""AdamW as published, or Muon for the matrices inside the network and AdamW for the rest."""
from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from detr.model import DETR
from detr.segmentation import DETRsegm

# Two-dimensional, yet no matrix inside the network: tables of vectors, heads, and what sets a few scalars.
NO_MATRICES = (
    "class_embed", "query_embed", "row_embed", "col_embed", "label_embed", "content", "anchors", "places", "shares",
)  # fmt: skip


class MuonAdamW:
    """Muon (Jordan et al. 2024) for weight matrices and convolutions inside the network, AdamW for all else.

    Muon takes the orthogonal factor of the momentum as its step, scaled so that AdamW's learning rates hold (Liu
    et al. 2025, Muon is scalable for LLM training). A convolution counts as the matrix of its output channels by
    all else; the first convolution, tables and heads, biases and norms are left to AdamW.
    """

    def __init__(self, model: DETR | DETRsegm, lr: float, lr_backbone: float, weight_decay: float):
        groups = model.parameter_groups(lr, lr_backbone)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.flat: list[tuple[nn.Parameter, nn.Parameter]] = []  # convolutions and the same memory as matrices
        matrices, others = [], []
        for group in groups:
            inner = [p for p in group["params"] if _is_matrix(names[p], p)]
            taken = set(inner)
            others.append({**group, "params": [p for p in group["params"] if p not in taken]})
            matrices.append({**group, "params": [self._as_matrix(p) for p in inner]})
        self.adamw = torch.optim.AdamW(_filled(others), weight_decay=weight_decay, fused=True)
        self.muon = torch.optim.Muon(_filled(matrices), weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def _as_matrix(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dim() == 2:
            return parameter
        flat = nn.Parameter(_rows(parameter.detach()))
        if flat.data_ptr() != parameter.data_ptr():
            raise ValueError("a convolution's weight lies neither in rows nor in channels_last order")
        self.flat.append((parameter, flat))
        return flat

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.adamw.param_groups + self.muon.param_groups

    def step(self) -> None:
        for parameter, flat in self.flat:
            flat.grad = None if parameter.grad is None else _rows(parameter.grad, like=parameter)
        self.adamw.step()
        self.muon.step()

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.muon.load_state_dict(state["muon"])


def build_optimizer(
    model: DETR | DETRsegm, kind: Literal["adamw", "muon"], lr: float, lr_backbone: float, weight_decay: float
) -> torch.optim.AdamW | MuonAdamW:
    """The optimiser of a model that is on its device, in its memory format; lr_backbone 0 freezes the backbone.

    Where no matrix is left to train for Muon, it is AdamW.
    """
    groups = model.parameter_groups(lr, lr_backbone)  # freezes the backbone, where it does, before the next line
    trained = [_is_matrix(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if kind == "muon" and any(trained):
        return MuonAdamW(model, lr, lr_backbone, weight_decay)
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    if parameter.dim() == 4:
        return parameter.shape[1] > 3  # not the convolution that reads the image
    return parameter.dim() == 2 and not any(part in NO_MATRICES for part in name.split("."))


def _rows(weight: Tensor, like: Tensor | None = None) -> Tensor:
    """A convolution's weight [O, I, h, w] (or its gradient, as that of `like`) as [O, I * h * w], in memory's order."""
    if (weight if like is None else like).is_contiguous():
        return weight.flatten(1)
    return weight.permute(0, 2, 3, 1).flatten(1)


def _filled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]
