"""Masks on top of DETR (paper, section 4.4): the mask head, and its outputs as instance and panoptic masks."""
from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from detr.attention import split_heads
from detr.config import ModelConfig
from detr.model import DETR, Outputs
from detr.queries import DenoisingQueries


class MHAttentionMap(nn.Module):
    """Where each query looks: attention weights over the encoder's memory, without values."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.k_linear = nn.Linear(dim, dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """queries [B, Q, D], memory [B, h * w, D], mask [B, h, w] true where padded -> [B, Q, heads, h, w].

        As published, one softmax runs over all heads and cells of a query together.
        """
        q = split_heads(self.q_linear(queries), self.heads)
        k = split_heads(self.k_linear(memory), self.heads)
        score = torch.einsum("bhqd,bhnd->bqhn", q * q.shape[-1] ** -0.5, k)
        score = score.masked_fill(mask.flatten(1)[:, None, None], float("-inf"))
        return score.flatten(2).softmax(-1).reshape(*score.shape[:3], *mask.shape[1:])


class MaskHead(nn.Module):
    """A small convolutional network in the manner of an FPN, run for every query; from stride 32 to stride 4."""

    def __init__(self, dim: int, heads: int, channels: Sequence[int]):
        """channels: those of the backbone's features that are added on the way, coarse to fine."""
        super().__init__()
        width = [dim + heads, dim // 2, dim // 4, dim // 8, dim // 16]
        self.lay1, self.gn1 = nn.Conv2d(width[0], width[0], 3, padding=1), nn.GroupNorm(8, width[0])
        self.lay2, self.gn2 = nn.Conv2d(width[0], width[1], 3, padding=1), nn.GroupNorm(8, width[1])
        self.lay3, self.gn3 = nn.Conv2d(width[1], width[2], 3, padding=1), nn.GroupNorm(8, width[2])
        self.lay4, self.gn4 = nn.Conv2d(width[2], width[3], 3, padding=1), nn.GroupNorm(8, width[3])
        self.lay5, self.gn5 = nn.Conv2d(width[3], width[4], 3, padding=1), nn.GroupNorm(8, width[4])
        self.out_lay = nn.Conv2d(width[4], 1, 3, padding=1)
        self.adapter1 = nn.Conv2d(channels[0], width[1], 1)
        self.adapter2 = nn.Conv2d(channels[1], width[2], 1)
        self.adapter3 = nn.Conv2d(channels[2], width[3], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, src: Tensor, maps: Tensor, features: Sequence[Tensor]) -> Tensor:
        """src [B, D, h, w], maps [B, Q, heads, h, w], features coarse to fine -> mask logits [B, Q, H, W].

        H and W are those of the finest features.
        """
        # lay1 reads src beside the maps. Being linear, it reads src once for all queries.
        of_src, of_maps = self.lay1.weight.split([src.shape[1], maps.shape[2]], 1)
        x = F.conv2d(maps.flatten(0, 1), of_maps, padding=1)
        x = _add_to_queries(x, F.conv2d(src, of_src, self.lay1.bias, padding=1))
        x = self.gn1(x).relu()
        x = self.gn2(self.lay2(x)).relu()
        steps = ((self.adapter1, self.lay3, self.gn3), (self.adapter2, self.lay4, self.gn4),
                 (self.adapter3, self.lay5, self.gn5))  # fmt: skip
        for feature, (adapter, convolution, norm) in zip(features, steps, strict=True):
            x = F.interpolate(x, size=feature.shape[-2:], mode="nearest")
            x = norm(convolution(_add_to_queries(x, adapter(feature)))).relu()
        return self.out_lay(x).reshape(*maps.shape[:2], *x.shape[-2:])


def _add_to_queries(x: Tensor, image: Tensor) -> Tensor:
    """x [B * Q, C, H, W] plus what is the same for all queries of an image [B, C, H, W]."""
    return (x.unflatten(0, (image.shape[0], -1)) + image[:, None]).flatten(0, 1)


class DETRsegm(nn.Module):
    """DETR with a mask head; names of its weights are those of the official panoptic checkpoints.

    With freeze_detr the mask head alone trains (as published: 25 epochs on a trained detector).
    """

    def __init__(self, detr: DETR, freeze_detr: bool = False):
        super().__init__()
        self.detr = detr
        self.freeze_detr = freeze_detr
        if freeze_detr:
            detr.requires_grad_(False)
        config = detr.config
        self.bbox_attention = MHAttentionMap(config.hidden_dim, config.nheads)
        self.mask_head = MaskHead(config.hidden_dim, config.nheads, detr.backbone[0].stage_channels[-2::-1])

    @property
    def config(self) -> ModelConfig:
        return self.detr.config

    @property
    def backbone(self) -> nn.Sequential:
        return self.detr.backbone

    parameter_groups = DETR.parameter_groups

    def train(self, mode: bool = True) -> DETRsegm:
        """Switch training on or off; statistics of a frozen detector's norms stay as they are."""
        super().train(mode)
        if self.freeze_detr:
            self.detr.backbone.eval()
        return self

    def forward(self, images: Tensor, mask: Tensor, denoising: DenoisingQueries | None = None) -> Outputs:
        """The outputs of DETR and `pred_masks`, the mask logits of every query [B, Q, H / 4, W / 4].

        images [B, 3, H, W], mask [B, H, W] true where padded. Group norms read the padded part, too: masks
        depend on the padded size, as in the published model.
        """
        features = self.backbone[0](images)
        out, decoded = self.detr.detect(features, mask, denoising)
        maps = self.bbox_attention(decoded.queries, decoded.memory, decoded.mask)
        out["pred_masks"] = self.mask_head(decoded.src, maps, features[-2::-1])
        return out


def build_model(config: ModelConfig) -> DETR | DETRsegm:
    """The model of this configuration, with random weights."""
    model = DETR(config)
    return DETRsegm(model) if config.masks else model


class PostProcessSegm(nn.Module):
    """Adds each query's mask to the results of PostProcess."""

    def __init__(self, threshold: float = 0.5):
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self, results: list[dict[str, Tensor]], outputs: Outputs, orig_target_sizes: Tensor,
        max_target_sizes: Tensor, padded_size: tuple[int, int] | None = None,
    ) -> list[dict[str, Tensor]]:  # fmt: skip
        """results of B images -> the same with `masks` uint8 [Q, 1, height, width] of the original size.

        orig_target_sizes and max_target_sizes [B, 2] as (height, width): before resizing, and as the model saw
        them without padding. padded_size: the batch's (height, width), by default the largest of them.
        """
        batch_size = padded_size or max_target_sizes.amax(0).tolist()
        found = []
        for result, logits, (height, width), original in zip(
            results, outputs["pred_masks"], max_target_sizes.tolist(), orig_target_sizes.tolist(), strict=True
        ):
            masks = _enlarge(logits, batch_size).sigmoid() > self.threshold
            masks = masks[:, None, :height, :width].to(torch.uint8)
            found.append({**result, "masks": F.interpolate(masks, size=original, mode="nearest")})
        return found


class PostProcessPanoptic(nn.Module):
    """Merges the masks into one map of segments (paper, section 4.4), written as in the COCO panoptic format.

    Every pixel goes to the query with the highest mask; queries of one stuff class become one segment, and
    segments of at most 4 pixels are dropped until none is left. As published, dropping decides every pixel
    anew among the queries that remain, those merged into another one not being among them.
    """

    def __init__(self, is_thing_map: Mapping[int, bool], threshold: float = 0.85):
        """is_thing_map: for every label, whether it is a thing (counted) or stuff (not)."""
        super().__init__()
        self.is_thing_map = is_thing_map
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self, outputs: Outputs, processed_sizes: Tensor | Sequence, target_sizes: Tensor | Sequence | None = None,
        padded_size: tuple[int, int] | None = None,
    ) -> list[dict]:  # fmt: skip
        """Per image `png_string`, a PNG whose colours are ids (see id_to_rgb), and `segments_info`: of every id
        `id`, `isthing`, `category_id` (the label) and `area` in pixels.

        processed_sizes: B times (height, width) as the model saw the images, without padding; target_sizes:
        those of the result, by default the same. As published the mask is taken for the unpadded image's, which
        holds for images without padding; with the batch's padded_size (height, width) the padding is cut off.
        """
        sizes = [tuple(map(int, size)) for size in processed_sizes]
        targets = sizes if target_sizes is None else [tuple(map(int, size)) for size in target_sizes]
        return [
            self._merge(logits, masks, size, target, padded_size or size)
            for logits, masks, size, target in zip(
                outputs["pred_logits"], outputs["pred_masks"], sizes, targets, strict=True
            )
        ]

    def _merge(
        self, logits: Tensor, masks: Tensor, size: tuple[int, int], target: tuple[int, int], padded: tuple[int, int]
    ) -> dict:
        """logits [Q, C + 1] and masks [Q, h, w] of one image."""
        scores, labels = logits.softmax(-1).max(-1)
        keep = (labels != logits.shape[-1] - 1) & (scores > self.threshold)
        masks = _enlarge(masks[keep], padded)[:, : size[0], : size[1]]
        labels = labels[keep].cpu().numpy()
        found = labels.tolist()
        owner = [i if self.is_thing_map[label] else found.index(label) for i, label in enumerate(found)]
        ids, area = _segments(masks, owner, target)
        while (large := area > 4).sum() < len(area):
            masks, labels = masks[torch.from_numpy(large).to(masks.device)], labels[large]
            ids, area = _segments(masks, range(len(labels)), target)
        png = io.BytesIO()
        Image.fromarray(id_to_rgb(ids)).save(png, format="PNG")
        segments = [
            {"id": i, "isthing": self.is_thing_map[label], "category_id": label, "area": pixels}
            for i, (label, pixels) in enumerate(zip(labels.tolist(), area.tolist(), strict=True))
        ]
        return {"png_string": png.getvalue(), "segments_info": segments}


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Segment ids [H, W] -> colours uint8 [H, W, 3], id = r + 256 g + 256² b, as in COCO's panoptic PNGs."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)


def _segments(masks: Tensor, owner: Sequence[int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """masks [N, h, w], whose pixels count for `owner` [N] -> (ids int32 of the given size, areas [N])."""
    number, height, width = masks.shape
    ids = torch.zeros(height, width, dtype=torch.int32)
    if number:
        # The softmax decides ties: logits that differ by less than its rounding go to the first query.
        best = masks.flatten(1).T.softmax(-1).argmax(-1).cpu()
        ids = torch.tensor(owner, dtype=torch.int32)[best].view(height, width)
    resized = Image.fromarray(ids.numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    ids = np.asarray(resized)
    return ids, np.bincount(ids.ravel(), minlength=number)[:number]


def _enlarge(masks: Tensor, size: Sequence[int]) -> Tensor:
    """[Q, h, w] -> [Q, *size]."""
    return F.interpolate(masks[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
