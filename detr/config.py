"""The settings of the model, its matcher and its loss: frozen, typed, validated; presets by name.

This is the one place where their defaults are written. The defaults are those of DETR as published
(Carion et al. 2020, and the official training script); a preset overrides some of them.
"""
from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    # The text below a setting is its description, which `--print-settings` and docs/settings.md show.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class DenoisingConfig(Settings):
    """Denoising queries for training (Li et al. 2022, DN-DETR): noised truth that must find its way back."""

    groups: int = Field(0, ge=0)
    """Noised copies of every image's boxes in a step; where there are many boxes they are fewer. 0 switches denoising
    off; it is for model.queries: anchors."""

    label_noise: float = Field(0.2, ge=0, le=1)
    """Share of the copies' labels that are replaced by a random class."""

    box_noise: float = Field(0.4, ge=0, lt=1)
    """Corners move by up to this share of half the box's size."""

    negatives: bool = False
    """Whether every copy has a twin with more noise, up to twice as much, that is to find nothing (Zhang et al. 2022,
    DINO: contrastive denoising)."""


class LossConfig(Settings):
    """Weights of the matching costs and of the losses (Carion et al. 2020, section 3.1). They have no unit."""

    cost_class: float = Field(1.0, ge=0)
    """Matching: weight of the class score. 2 by default with model.class_loss: focal."""

    cost_bbox: float = Field(5.0, ge=0)
    """Matching: weight of the L1 distance between the boxes, in shares of the image."""

    cost_giou: float = Field(2.0, ge=0)
    """Matching: weight of the generalized IoU of the boxes."""

    loss_ce: float = Field(1.0, ge=0)
    """Loss: weight of the class loss."""

    loss_bbox: float = Field(5.0, ge=0)
    """Loss: weight of the L1 distance between matched boxes, in shares of the image."""

    loss_giou: float = Field(2.0, ge=0)
    """Loss: weight of 1 minus the generalized IoU of matched boxes."""

    loss_mask: float = Field(1.0, ge=0)
    """Loss: weight of the focal loss of the masks; only with masks, which a run does not train."""

    loss_dice: float = Field(1.0, ge=0)
    """Loss: weight of the dice loss of the masks; only with masks, which a run does not train."""

    eos_coef: float = Field(0.1, ge=0)
    """Weight of the no-object class in the class loss, beside 1 for every other; only with model.class_loss:
    softmax."""

    focal_alpha: float = Field(0.25, ge=0, le=1)
    """Balance of the focal loss between found and not found, and of its matching cost."""

    focal_gamma: float = Field(2.0, ge=0)
    """Exponent of the focal loss and of its matching cost: the higher, the less easy cases count."""

    mal_gamma: float = Field(0.0, ge=0)
    """Only with model.class_loss: focal, where it is 1.5 by default. A match is to score its IoU to this power,
    others weigh their score to this power (Huang et al. 2025, DEIM: MAL); 0: a match is to score 1 (sigmoid focal
    loss)."""

    class_norm: Literal["device", "window"] = "device"
    """What the class loss of softmax is divided by: this worker's own count (device, as published), or the count over
    all workers and micro-batches (window)."""


class ModelConfig(Settings):
    """Architecture of the detector, and how an image is prepared for it."""

    backbone: str = "resnet50"
    """Network that reads the image: a ResNet of torchvision (resnet18 to resnet152, and more), or a plain one for
    random weights: small, medium."""

    norm: Literal["frozen", "batch"] = "frozen"
    """Normalisation of a ResNet: frozen as published, for trained weights, or batch norms that learn. The plain
    backbones have batch norms in any case."""

    dilation: bool = False
    """DC5: dilate the ResNet's last stage instead of striding, for a map twice as wide and high."""

    hidden_dim: int = Field(256, gt=0)
    """Width of the transformer, in numbers for each place and query: a multiple of nheads and of 4."""

    nheads: int = Field(8, gt=0)
    """Heads of each attention layer."""

    enc_layers: int = Field(6, ge=0)
    """Layers of the encoder."""

    dec_layers: int = Field(6, gt=0)
    """Layers of the decoder."""

    dim_feedforward: int = Field(2048, gt=0)
    """Width of the hidden layer in each transformer layer's feed-forward part."""

    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the transformer's numbers that are set to 0 at random in training."""

    pre_norm: bool = False
    """Whether the transformer normalises before each part of a layer instead of after it; only with queries:
    learned."""

    position_embedding: Literal["sine", "learned"] = "sine"
    """How the encoder is told where a place is: sines, or vectors that are learned; queries: anchors takes sine
    alone."""

    num_queries: int = Field(100, gt=0)
    """Queries, and so most objects that are found in an image; it must exceed those that are in one. With
    fit.num_queries the data set it."""

    queries: Literal["learned", "anchors"] = "learned"
    """What the decoder starts from: learned vectors (as published), or anchor boxes that are refined layer by layer."""

    two_stage: bool = False
    """Whether anchors are the best of one proposal per cell, not learned boxes; for queries: anchors with class_loss:
    focal."""

    levels: int = Field(3, ge=1, le=4)
    """Maps that anchor queries look at: the encoder's, and finer ones."""

    points: int = Field(4, ge=1)
    """Places on each map that a head of an anchor query looks at."""

    class_loss: Literal["softmax", "focal"] = "softmax"
    """How classes are scored: against each other and a no-object class (softmax, as published), or each by itself with
    a sigmoid (focal)."""

    aux_loss: bool = True
    """Whether every layer of the decoder is trained to find the objects, and not the last alone."""

    masks: bool = False
    """Adds the mask head of DETR for segmentation, for use from Python (detr.segmentation); a run refuses it."""

    denoising: DenoisingConfig = DenoisingConfig()

    num_classes: int = Field(91, gt=0)
    """Classes the model tells apart. The data decide it: whatever stands here, a training takes the number of their
    categories, and who detects that of the trained model. It counts only where Python builds a model without data;
    COCO's official weights have 91."""

    image_size: int = Field(800, gt=0)
    """Pixels that an image's shorter side is resized to. One of both sizes alone changes the other in proportion; with
    fit.image_size the data set both."""

    image_max_size: int = Field(1333, gt=0)
    """Pixels that an image's longer side has at most."""

    upscale: bool = True
    """Whether images smaller than image_size are enlarged to it."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if isinstance(value, dict) and "preset" in value:
            value = dict(value)
            name = value.pop("preset")
            if name not in PRESETS:
                raise ValueError(f"no model preset is named {name!r}; there are {', '.join(PRESETS)}")
            preset = PRESETS[name]
            for one, other in (("image_size", "image_max_size"), ("image_max_size", "image_size")):
                if isinstance(value.get(one), int) and other not in value:  # in the preset's proportion
                    was = {key: preset.get(key, cls.model_fields[key].default) for key in (one, other)}
                    value[other] = round(value[one] * was[other] / was[one])
            for key in preset.keys() & value.keys():
                if isinstance(preset[key], dict) and isinstance(value[key], dict):
                    value[key] = {**preset[key], **value[key]}
            value = {**preset, **value}
        return value

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_dim % self.nheads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of nheads {self.nheads}")
        if self.hidden_dim % 4:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of 4")
        if self.denoising.groups and self.queries != "anchors":
            raise ValueError("denoising needs queries: anchors")
        if self.dilation and self.backbone in ("small", "medium", "resnet18", "resnet34"):
            raise ValueError(f"dilation needs a backbone of bottleneck blocks such as resnet50, not {self.backbone}")
        if self.two_stage and (self.queries != "anchors" or self.class_loss != "focal"):
            raise ValueError("two_stage needs queries: anchors and class_loss: focal; else set two_stage: false")
        if self.queries == "anchors" and self.pre_norm:
            raise ValueError("pre_norm is for queries: learned")
        if self.queries == "anchors" and self.position_embedding != "sine":
            raise ValueError("position_embedding: learned is for queries: learned")
        if self.masks and (self.hidden_dim % 128 or self.nheads % 8):
            raise ValueError("masks need a hidden_dim that is a multiple of 128, and nheads of 8")
        if self.masks and self.class_loss != "softmax":
            raise ValueError("masks need class_loss: softmax")
        return self


# What models with sigmoid scores are trained with: the focal loss' matching cost (Zhu et al. 2021, Deformable DETR) and
# the class loss of Huang et al. 2025 (DEIM).
FOCAL_WEIGHTS = {"cost_class": 2.0, "loss_ce": 1.0, "mal_gamma": 1.5}

FROM_SCRATCH: dict[str, Any] = {
    "norm": "batch",
    "dropout": 0.0,
    "queries": "anchors",
    "two_stage": True,
    "class_loss": "focal",
    "denoising": {"groups": 2, "negatives": True},
    "upscale": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "detr_resnet50": {},
    "detr_resnet50_dc5": {"dilation": True},
    "detr_resnet101": {"backbone": "resnet101"},
    "detr_resnet101_dc5": {"backbone": "resnet101", "dilation": True},
    "detr_resnet50_panoptic": {"num_classes": 250, "masks": True},
    # These learn from few images and random weights. A laptop's: 2.0 M parameters.
    "tiny": {
        **FROM_SCRATCH,
        "backbone": "small",
        "hidden_dim": 128,
        "enc_layers": 2,
        "dec_layers": 3,
        "dim_feedforward": 512,
        "num_queries": 60,
        "image_size": 192,
        "image_max_size": 256,
    },
    # A workstation's with many cores, or a small GPU's: 6.3 M parameters.
    "small": {
        **FROM_SCRATCH,
        "backbone": "medium",
        "hidden_dim": 192,
        "enc_layers": 2,
        "dec_layers": 4,
        "dim_feedforward": 768,
        "num_queries": 100,
        "image_size": 288,
        "image_max_size": 384,
    },
    # A GPU's, best with ImageNet weights (train.backbone_weights): 33 M parameters.
    "base": {
        **FROM_SCRATCH,
        "backbone": "resnet50",
        "hidden_dim": 256,
        "enc_layers": 3,
        "dec_layers": 6,
        "dim_feedforward": 1024,
        "num_queries": 300,
        "image_size": 480,
        "image_max_size": 640,
    },
}
