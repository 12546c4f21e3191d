"""The convolutional feature extractor: a torchvision ResNet as published, or a plain one for random weights."""
from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

from detr.config import ModelConfig
from detr.memory import run
from detr.position import PositionEmbeddingLearned, PositionEmbeddingSine

# torchvision's ResNets by what their weights show: blocks of each stage, and of the first block the size of the
# first convolution's kernel and the input channels of each group of the second.
RESNETS = {
    "resnet18": ((2, 2, 2, 2), 3, 64),
    "resnet34": ((3, 4, 6, 3), 3, 64),
    "resnet50": ((3, 4, 6, 3), 1, 64),
    "resnet101": ((3, 4, 23, 3), 1, 64),
    "resnet152": ((3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": ((3, 4, 6, 3), 1, 4),
    "resnext101_32x8d": ((3, 4, 23, 3), 1, 8),
    "resnext101_64x4d": ((3, 4, 23, 3), 1, 4),
    "wide_resnet50_2": ((3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": ((3, 4, 23, 3), 1, 128),
}

PLAIN = {"small": (32, 1), "medium": (48, 2)}  # width of the stem, blocks in a stage: 0.6 and 2.9 M parameters


class ResNetBackbone(nn.Module):
    """A torchvision ResNet up to its last stage: stride 32, or 16 with dilation.

    With frozen norms (published) conv1 and layer1 do not train either, and each convolution is computed with
    its norm's scale and bias in it: the same numbers but for rounding, without the norm's two passes.
    """

    recompute = False  # see detr.memory

    def __init__(self, name: str, norm: str, dilation: bool):
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"no backbone is named {name!r}; there are {', '.join([*PLAIN, *RESNETS])}")
        net = get_model(
            name,
            weights=None,
            replace_stride_with_dilation=[False, False, dilation],
            norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d,
        )
        self.num_channels = net.fc.in_features
        if norm == "frozen":
            for key, parameter in net.named_parameters():
                if not key.startswith(("layer2", "layer3", "layer4")):
                    parameter.requires_grad_(False)
        self.strides = (4, 8, 16, 16 if dilation else 32)
        self.stage_channels = [self.num_channels // 2**i for i in (3, 2, 1, 0)]
        self.body = IntermediateLayerGetter(net, return_layers={"layer3": "fine", "layer4": "coarse"})

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> the features of layer1 to layer4 [B, stage_channels, ...] at `strides`."""
        x = run(self, self._stem, images)
        features = []
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = run(self, _stage, self.body[name], x)
            features.append(x)
        return features

    def _stem(self, images: Tensor) -> Tensor:
        body = self.body
        return body["maxpool"](_convolve(body["conv1"], body["bn1"], images).relu_())


def _stage(blocks: nn.Sequential, x: Tensor) -> Tensor:
    for block in blocks:
        x = _residual(block, x)
    return x


def _residual(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    """A block of torchvision's ResNet, as its own forward but for the norms."""
    shortcut = x if block.downsample is None else _convolve(*block.downsample, x)
    y = _convolve(block.conv2, block.bn2, _convolve(block.conv1, block.bn1, x).relu_())
    if isinstance(block, Bottleneck):
        y = _convolve(block.conv3, block.bn3, y.relu_())
    return y.add_(shortcut).relu_()


def _convolve(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(convolution(x)); a frozen norm is folded into the convolution, through which gradients flow on."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(convolution(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = convolution.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
    c = convolution
    return F.conv2d(x, weight, bias, c.stride, c.padding, c.dilation, c.groups)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(channels_in, channels_out, 1, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class PlainBackbone(nn.Module):
    """A stem and three stages of residual blocks to stride 16, with batch norms: trains from random weights."""

    strides = (2, 4, 8, 16)
    recompute = False  # see detr.memory

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.stage_channels = (width, 2 * width, 4 * width, 4 * width)
        self.num_channels = self.stage_channels[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(a, b, 2), *(ResidualBlock(b, b, 1) for _ in range(depth - 1)))
            for a, b in pairwise(self.stage_channels)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> features at `strides` [B, stage_channels, ...], sizes rounded up."""
        features = [run(self, self.stem, images)]
        for stage in self.stages:
            features.append(run(self, stage, features[-1]))
        return features


def build_backbone(config: ModelConfig) -> nn.Sequential:
    """The extractor and the position encoding, under the official names backbone.0 and backbone.1."""
    if config.backbone in PLAIN:
        body: nn.Module = PlainBackbone(*PLAIN[config.backbone])
    else:
        body = ResNetBackbone(config.backbone, config.norm, config.dilation)
    encoding = PositionEmbeddingSine if config.position_embedding == "sine" else PositionEmbeddingLearned
    return nn.Sequential(body, encoding(config.hidden_dim // 2))


Model = TypeVar("Model", bound=nn.Module)


def fold_norms(model: Model) -> Model:
    """A copy of a model for inference, in evaluation mode, its frozen and batch norms folded into the convolutions.

    It computes the same but for rounding, faster; its state dict has other keys, and it does not train.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for (_, convolution), (name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
                convolution.weight, convolution.bias = fuse_conv_bn_weights(
                    convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps,
                    norm.weight, norm.bias,
                )  # fmt: skip
                setattr(module, name, nn.Identity())
    return model.requires_grad_(False)
