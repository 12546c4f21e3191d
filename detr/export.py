"""A detector as one file that runs without this code: torch.export (`.pt2`) and ONNX (`.onnx`).

Both take (images [B, 3, H, W] float32 normalised, mask [B, H, W] bool, true where padded) and give
(pred_logits [B, Q, C], pred_boxes [B, Q, 4]) of the last layer. B, H and W are free: H and W need be no multiple
of the stride, only within `side_limits`.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from detr.model import DETR
from detr.position import PositionEmbeddingLearned

INPUTS, OUTPUTS = ("images", "mask"), ("pred_logits", "pred_boxes")
TOLERANCES = {"pred_logits": 2e-4, "pred_boxes": 2e-5}  # float32, absolute
CHECKED = [(batch, *size) for batch in (1, 3) for size in ((192, 256), (135, 203))]

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _LastLayer(nn.Module):
    def __init__(self, model: DETR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(images, mask)
        return out["pred_logits"], out["pred_boxes"]


def side_limits(model: DETR) -> tuple[int, int | None]:
    """The least and the greatest H and W of an exported model, in pixels.

    torch.export tells a feature map of one row or column apart from all others, so there must be two; learned
    positions end after 50.
    """
    body, position = model.backbone
    if not isinstance(position, PositionEmbeddingLearned):
        return body.strides[-1] + 1, None
    return body.strides[-1] + 1, body.strides[-1] * position.row_embed.num_embeddings


@torch.no_grad()
def export(model: DETR) -> ExportedProgram:
    """The traced model. Raises ValueError in training mode, whose norms and dropout would be traced, too."""
    if model.training:
        raise ValueError("a model is exported in evaluation mode; call model.eval() first")
    low, high = side_limits(model)
    batch = Dim("batch", min=1)
    height, width = Dim("height", min=low, max=high), Dim("width", min=low, max=high)
    example = torch.zeros(2, 3, 75, 101), torch.zeros(2, 75, 101, dtype=torch.bool)
    shapes = {"images": {0: batch, 2: height, 3: width}, "mask": {0: batch, 1: height, 2: width}}
    # Deferred: that a pooling window starts inside the image is always so, but sympy cannot prove it.
    program = torch.export.export(
        _LastLayer(model), example, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )
    program.graph_module.graph.eliminate_dead_code()  # the outputs of earlier layers
    program.graph_module.recompile()
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def save(program: ExportedProgram, path: Path | str) -> None:
    """Write `path` as torch.export (.pt2) or ONNX (.onnx), weights inside."""
    if Path(path).suffix == ".onnx":
        names = {"images": {0: "batch", 2: "height", 3: "width"}, "mask": {}}  # the mask's are the same
        torch.onnx.export(
            program, f=path, dynamo=True, verbose=False, external_data=False,
            input_names=INPUTS, output_names=OUTPUTS, dynamic_shapes=names,
        )  # fmt: skip
    else:
        torch.export.save(program, path)


def load(path: Path | str) -> Run:
    """A file written by `save` as a function of (images, mask), on the CPU."""
    if Path(path).suffix != ".onnx":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found = session.run(list(OUTPUTS), {"images": images.numpy(), "mask": mask.numpy()})
        return tuple(torch.from_numpy(value) for value in found)

    return run


@torch.no_grad()
def differences(model: DETR, run: Run) -> dict[str, float]:
    """Greatest absolute difference of each output between the model and its exported form.

    Over noise of the shapes CHECKED, partly padded.
    """
    generator = torch.Generator().manual_seed(0)
    worst = dict.fromkeys(OUTPUTS, 0.0)
    for number, (batch, height, width) in enumerate(CHECKED):
        images = torch.randn(batch, 3, height, width, generator=generator)
        mask = torch.zeros(batch, height, width, dtype=torch.bool)
        for i in range(batch):
            mask[i, height - height // 5 * ((i + number) % 3) :] = True
            mask[i, :, width - width // 7 * ((i + 2 * number) % 3) :] = True
        images = images.masked_fill(mask[:, None], 0.0)
        want = model(images, mask)
        for key, value in zip(OUTPUTS, run(images, mask), strict=True):
            worst[key] = torch.tensor([worst[key], (value - want[key]).abs().max()]).max().item()  # NaN stays
    return worst
