"""DETR: images and padding mask -> class logits and boxes of every query, of every decoder layer."""
from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.backbone import build_backbone
from detr.config import ModelConfig
from detr.position import cell_centres, image_sizes, sine_of_points
from detr.queries import MLP, AnchorDecoder, DenoisingQueries, Pyramid
from detr.transformer import Transformer

Outputs = dict[str, Tensor | list[dict[str, Tensor]]]


class Decoded(NamedTuple):
    """What a mask head builds on."""

    src: Tensor  # the projected features [B, D, h, w]
    mask: Tensor  # [B, h, w], true where padded
    memory: Tensor  # the encoder's output [B, h * w, D]
    queries: Tensor  # the last decoder layer's output [B, Q, D]


class DETR(nn.Module):
    """The detector (Carion et al. 2020); names of its weights are those of the official checkpoints.

    With `queries: anchors` the decoder refines anchor boxes instead of decoding learned vectors.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim, anchors = config.hidden_dim, config.queries == "anchors"
        self.transformer = Transformer(
            dim, config.nheads, config.enc_layers, 0 if anchors else config.dec_layers,
            config.dim_feedforward, config.dropout, config.pre_norm,
        )  # fmt: skip
        self.class_embed = nn.Linear(dim, config.num_classes + (config.class_loss == "softmax"))
        self.bbox_embed = MLP(dim, dim, 4, 3)
        if anchors:
            self.decoder = AnchorDecoder(config)
            nn.init.zeros_(self.bbox_embed.layers[-1].weight)  # the first boxes are the anchors themselves
            nn.init.zeros_(self.bbox_embed.layers[-1].bias)
        else:
            self.query_embed = nn.Embedding(config.num_queries, dim)
        if config.class_loss == "focal":
            nn.init.constant_(self.class_embed.bias, -math.log(99))  # every class starts at 1 %
        backbone = build_backbone(config)
        if anchors:
            finer = backbone[0].stage_channels[-2 : -config.levels - 1 : -1]
            self.finer_proj = nn.ModuleList(nn.Conv2d(channels, dim, 1) for channels in finer)
            self.finer_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in finer)
        self.input_proj = nn.Conv2d(backbone[0].num_channels, dim, 1)
        self.backbone = backbone

    def train(self, mode: bool = True) -> DETR:
        """Switch training on or off; batch norms with frozen weights keep, and use, their running statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def forward(self, images: Tensor, mask: Tensor, denoising: DenoisingQueries | None = None) -> Outputs:
        """images [B, 3, H, W] normalised, mask [B, H, W] bool, true where padded.

        Returns `pred_logits` [B, Q, num_classes (+ 1 with softmax)], `pred_boxes` [B, Q, 4] as cxcywh in
        0..1 of the unpadded image, `aux_outputs`: the same of each earlier layer (aux_loss; without it the heads
        compute the last layer alone, as far as no anchor needs the others), and with denoising queries
        `denoising`: the same of all layers for them, [L, B, P, ...]. With two_stage `proposals`: the same of every
        cell of a map, [B, N, ...].
        """
        return self.detect(self.backbone[0](images), mask, denoising)[0]

    def detect(
        self, features: list[Tensor], mask: Tensor, denoising: DenoisingQueries | None = None
    ) -> tuple[Outputs, Decoded]:
        """All that follows the backbone: its feature maps -> forward's outputs, and what led to them."""
        body, encoding = self.backbone
        anchors = self.config.queries == "anchors"
        coarse = features[-1]
        small, sizes = _shrink(mask, coarse), image_sizes(mask)
        src = self.input_proj(coarse)
        if anchors:
            centres = cell_centres(sizes, *coarse.shape[-2:], body.strides[-1])
            pos = sine_of_points(centres, src.shape[1] // 2).to(src.dtype)
        else:
            pos = encoding(small).to(src.dtype).flatten(2).transpose(1, 2)
        key_mask = ~small.flatten(1)[:, None, None, :]
        memory = self.transformer.encoder(src.flatten(2).transpose(1, 2), pos, key_mask)
        if anchors:
            pyramid = self._pyramid(memory.unflatten(1, coarse.shape[-2:]), features, mask, sizes)
            hs, boxes, proposed = self.decoder(pyramid, self.bbox_embed, denoising)
        else:
            hs = self.transformer.decode(memory, pos, key_mask, self.query_embed.weight)
        if not self.config.aux_loss and denoising is None:  # denoising queries learn in all layers
            hs = hs[-1:]
        if not anchors:
            boxes = self.bbox_embed(hs).sigmoid()
        logits = self.class_embed(hs)
        out: Outputs = {}
        if denoising is not None:
            split = denoising.labels.shape[1]
            out["denoising"] = {"pred_logits": logits[:, :, :split], "pred_boxes": boxes[:, :, :split]}
            logits, boxes = logits[:, :, split:], boxes[:, :, split:]
        if anchors and proposed is not None:
            out["proposals"] = dict(zip(("pred_logits", "pred_boxes"), proposed, strict=True))
        out["pred_logits"], out["pred_boxes"] = logits[-1], boxes[-1]
        if self.config.aux_loss:
            out["aux_outputs"] = [
                {"pred_logits": a, "pred_boxes": b} for a, b in zip(logits[:-1], boxes[:-1], strict=True)
            ]
        return out, Decoded(src, small, memory, hs[-1, :, -logits.shape[2] :])

    def _pyramid(self, memory: Tensor, features: list[Tensor], mask: Tensor, sizes: Tensor) -> Pyramid:
        """The encoder's memory [B, h, w, D] and finer maps, each the one before with what only its own grid shows.

        (Lin et al. 2017, FPN.)
        """
        strides = self.backbone[0].strides[: -self.config.levels - 1 : -1]
        maps = [memory.masked_fill(_shrink(mask, features[-1])[..., None], 0)]
        for i, (proj, norm) in enumerate(zip(self.finer_proj, self.finer_norm, strict=True)):
            fine, factor = features[-2 - i], strides[i] // strides[i + 1]
            coarse = maps[-1].permute(0, 3, 1, 2)
            up = F.interpolate(coarse, scale_factor=factor, mode="bilinear", align_corners=False)
            # The last coarse cell may lie half outside. (A slice would keep torch.export from leaving sizes open.)
            if torch.compiler.is_exporting() or up.shape[2:] != fine.shape[2:]:
                for axis in (2, 3):
                    up = up.index_select(axis, torch.arange(fine.shape[axis], device=up.device))
            fused = norm((proj(fine) + up).permute(0, 2, 3, 1))
            maps.append(fused.masked_fill(_shrink(mask, fine)[..., None], 0))
        return Pyramid(strides, [x.permute(0, 3, 1, 2).contiguous() for x in maps], sizes)

    def parameter_groups(self, lr: float, lr_backbone: float) -> list[dict]:
        """The two published optimiser groups: the backbone's trainable weights, and all others.

        lr_backbone 0 freezes the whole backbone.
        """
        if lr_backbone <= 0:
            self.backbone[0].requires_grad_(False)
        backbone, others = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (backbone if "backbone" in name else others).append(parameter)
        groups = [{"params": others, "lr": lr}, {"params": backbone, "lr": lr_backbone}]
        return [group for group in groups if group["params"]]


def _shrink(mask: Tensor, features: Tensor) -> Tensor:
    """The padding mask [B, H, W] at the size of a feature map."""
    return F.interpolate(mask[None].float(), size=features.shape[-2:])[0].bool()


def freeze(model: nn.Module, prefixes: Sequence[str]) -> int:
    """Keep parts of a DETR or DETRsegm as they are: weights whose name is a prefix, or below one, do not train.

    Prefixes end where a name has a dot or ends: "backbone", "transformer.encoder", "bbox_embed". Batch norms of such
    parts keep their running statistics, too, and compute with them (DETR.train sees to it at its next call); dropout
    stays on. Comes before the optimiser and DistributedDataParallel, which take the weights that train.
    Returns how many weights it froze, those that were not frozen before. Raises ValueError for a prefix that is no
    part of the model, with the nearest one that is, and where nothing would be left to train.
    """
    weights = dict(model.named_parameters())
    parts = {name.rsplit(".", cut)[0] for name in weights for cut in range(name.count(".") + 1)}
    for prefix in prefixes:
        if prefix not in parts:
            inner = sorted((part for part in parts if part.endswith(f".{prefix}")), key=len)  # its last names alone
            nearest = inner[0] if inner else difflib.get_close_matches(prefix, sorted(parts), 1, cutoff=0)[0]
            raise ValueError(f"no part of the model is named {prefix!r}; the nearest is {nearest!r}")
    training = {name: weight for name, weight in weights.items() if weight.requires_grad}
    heads = tuple(f"{prefix}." for prefix in prefixes)
    chosen = [weight for name, weight in training.items() if f"{name}.".startswith(heads)]
    if len(chosen) == len(training):
        raise ValueError(f"with {', '.join(prefixes)} frozen, no weight would be left to train")
    for weight in chosen:
        weight.requires_grad_(False)
    return sum(weight.numel() for weight in chosen)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def all_layers(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Outputs of the model -> logits [L, B, Q, C] and boxes [L, B, Q, 4], the last layer last."""
    layers = [*outputs.get("aux_outputs", []), outputs]
    return tuple(torch.stack([layer[key] for layer in layers]) for key in ("pred_logits", "pred_boxes"))
