"""Where a trained DETR looks: attention, and each query's boxes over many images (paper, figures 3, 6 and 7)."""
from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from detr.batch import prepare_images
from detr.boxes import cxcywh_to_xyxy
from detr.model import DETR, Outputs
from detr.queries import Pyramid


@dataclass
class AttentionMaps:
    """The attention of the last layers, per head, with the outputs it led to.

    encoder [B, heads, h, w, h, w]: from each cell to all, or None where the model has no encoder layer.
    decoder [B, heads, Q, h, w]: from each query to the cells; with anchor queries over the finest of their maps, on
    which the places of the others are spread, without what lies outside the padded image.
    """

    outputs: Outputs
    encoder: Tensor | None
    decoder: Tensor


@torch.inference_mode()
def attention_maps(model: DETR, images: Tensor, mask: Tensor) -> AttentionMaps:
    """The model run with its last encoder and decoder layer on the explicit path: weights sum to 1, 0 in padding.

    images [B, 3, H, W] and mask [B, H, W] as in the model's forward. Raises ValueError in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    encoder, anchors = model.transformer.encoder, model.config.queries == "anchors"
    shapes: list[torch.Size] = []
    weights: dict[str, Tensor] = {}

    def see_shape(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        shapes.append(output.shape[-2:])

    def attend(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            output, maps = module.explicit(*args, **kwargs)
            weights[name] = maps.unflatten(-1, shapes[0])
            return output

        return hook

    def look(module: nn.Module, args: tuple, output: Tensor) -> None:
        weights["decoder"] = _on_the_finest(*module.look(*args[:2], args[2].sizes), args[2])

    with ExitStack() as hooks:
        hooks.enter_context(model.input_proj.register_forward_hook(see_shape))
        if encoder.layers:
            layer = encoder.layers[-1].self_attn
            hooks.enter_context(layer.register_forward_hook(attend("encoder"), with_kwargs=True))
        if anchors:
            hooks.enter_context(model.decoder.layers[-1].cross_attn.register_forward_hook(look))
        else:
            layer = model.transformer.decoder.layers[-1].multihead_attn
            hooks.enter_context(layer.register_forward_hook(attend("decoder"), with_kwargs=True))
        outputs = model(images, mask)
    own = weights["encoder"].unflatten(2, shapes[0]) if "encoder" in weights else None
    return AttentionMaps(outputs, own, weights["decoder"])


def _on_the_finest(places: Tensor, shares: Tensor, pyramid: Pyramid) -> Tensor:
    """What `DeformableAttention.look` gives, as one map of the finest size: [B, heads, Q, h, w].

    A place lies between four cells, which share its weight (bilinear); on a coarse map each passes it on to the
    finest cells that it covers.
    """
    total, size = 0, pyramid.maps[-1].shape[2:]
    around = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=places.device)
    for level, (stride, x) in enumerate(zip(pyramid.strides, pyramid.maps, strict=True)):
        height, width = x.shape[2:]
        at = (places[:, :, :, level] / stride - 0.5)[..., None, :]
        corners = at.floor() + around  # [B, Q, heads, points, 4, 2]
        inside = ((corners >= 0) & (corners < torch.tensor([width, height], device=at.device))).all(-1)
        weights = (1 - (at - corners).abs()).prod(-1) * inside * shares[:, :, :, level, :, None]
        cells = torch.where(inside, corners[..., 1] * width + corners[..., 0], 0).long()
        flat = weights.new_zeros(*weights.shape[:3], height * width)
        flat.scatter_add_(-1, cells.flatten(3), weights.flatten(3))
        coarse, factor = flat.transpose(1, 2).unflatten(-1, (height, width)), stride // pyramid.strides[-1]
        fine = coarse.repeat_interleave(factor, -2).repeat_interleave(factor, -1)[..., : size[0], : size[1]]
        whole, spread = coarse.sum((-2, -1), keepdim=True), fine.sum((-2, -1), keepdim=True)
        total = total + fine * (whole / spread.clamp(min=1e-9))
    return total


@dataclass
class Explanation:
    """What the queries found in one image, the surest first, and where the model looked for it.

    queries int64 [N], labels int64 [N], scores float32 [N], boxes float32 [N, 4] (xyxy, pixels, clipped).
    from_query [N, h, w] and from_cell [h, w, h, w] are the decoder's and the encoder's attention, the mean of the
    heads, over the padded input; from_cell is None where the model has no encoder layer.
    """

    queries: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    from_query: Tensor
    from_cell: Tensor | None
    mask: Tensor  # [H, W] of the padded input
    size: tuple[int, int]  # width and height of the image itself

    def decoder_attention(self, number: int | None = None) -> np.ndarray:
        """From the surest `number` of the queries, or all, over the image at the model's size of it: [N, H, W]."""
        return over_image(self.from_query[:number], self.mask).cpu().numpy()

    def encoder_attention(self, points: np.ndarray | list) -> np.ndarray:
        """From points [P, 2] (x, y in pixels of the image) over the image at the model's size of it: [P, H, W].

        Raises ValueError for a point outside the image, or a model without encoder layers.
        """
        if self.from_cell is None:
            raise ValueError("the model has no encoder layer")
        points = np.asarray(points, np.float64).reshape(-1, 2)
        if not ((points >= 0) & (points < self.size)).all():
            raise ValueError(f"a point lies outside the image of {self.size[0]}x{self.size[1]} pixels")
        rows, columns = self.from_cell.shape[:2]
        height, width = unpadded(self.mask)
        share = points / self.size * (width / self.mask.shape[1], height / self.mask.shape[0])
        x, y = torch.from_numpy((share * (columns, rows)).astype(np.int64)).unbind(1)
        return over_image(self.from_cell[y, x], self.mask).cpu().numpy()


@torch.inference_mode()
def explain(model: DETR, image: Image.Image, score_threshold: float | np.ndarray = 0.5) -> Explanation:
    """What the model finds in an RGB image from the threshold (or that of each label [K]) on, and where it looks.

    Each query counts once, with its best class. If none reaches the threshold, the surest one is given.
    """
    pixels, mask = prepare_images([image], model.config, model.class_embed.weight.device)
    maps = attention_maps(model, pixels, mask)
    logits, boxes = maps.outputs["pred_logits"][0], cxcywh_to_xyxy(maps.outputs["pred_boxes"][0])
    softmax = model.config.class_loss == "softmax"
    scores, labels = (logits.softmax(-1)[:, :-1] if softmax else logits.sigmoid()).max(-1)
    order = scores.argsort(descending=True, stable=True)
    least = torch.as_tensor(score_threshold, dtype=torch.float64, device=scores.device)
    kept = order[(scores >= (least[labels] if least.ndim else least))[order]]
    order = kept if len(kept) else order[:1]
    size = torch.tensor(image.size * 2, device=boxes.device)
    boxes = torch.minimum((boxes[order] * size).clamp(min=0), size)
    return Explanation(
        *(x.cpu().numpy() for x in (order, labels[order], scores[order].float(), boxes.float())),
        from_query=maps.decoder[0, :, order].mean(0),
        from_cell=None if maps.encoder is None else maps.encoder[0].mean(0),
        mask=mask[0],
        size=image.size,
    )


@torch.inference_mode()
def boxes_of_queries(model: DETR, images: Iterable[Image.Image], batch_size: int = 16) -> np.ndarray:
    """All boxes of every query over RGB images, whatever their scores: [I, Q, 4] as cxcywh in 0..1."""
    images, boxes = iter(images), [torch.zeros(0, model.config.num_queries, 4)]
    while batch := list(islice(images, batch_size)):
        outputs = model(*prepare_images(batch, model.config, model.class_embed.weight.device))
        boxes.append(outputs["pred_boxes"].float().cpu())
    return torch.cat(boxes).numpy()


def over_image(maps: Tensor, mask: Tensor) -> Tensor:
    """maps [N, h, w] of a padded input whose mask is [H, W] -> bilinear over its unpadded part [N, H', W']."""
    height, width = unpadded(mask)
    maps = F.interpolate(maps[:, None], size=mask.shape, mode="bilinear", align_corners=False)
    return maps[:, 0, :height, :width]


def unpadded(mask: Tensor) -> tuple[int, int]:
    """(height, width) of the part of a mask [H, W] that is not padding."""
    return int((~mask).any(1).sum()), int((~mask).any(0).sum())
