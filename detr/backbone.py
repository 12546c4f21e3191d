"""The convolutional feature extractor: a torchvision ResNet as published, or a small one for random weights."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d

from detr.config import ModelConfig
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


class ResNetBackbone(nn.Module):
    """A torchvision ResNet up to its last stage: stride 32, or 16 with dilation.

    With frozen norms (published) conv1 and layer1 do not train either.
    """

    def __init__(self, name: str, norm: str, dilation: bool):
        super().__init__()
        if name not in RESNETS:
            raise ValueError(
                f"backbone {name!r} is neither 'small' nor a torchvision ResNet; there are {', '.join(RESNETS)}"
            )
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
        self.fine_channels = self.num_channels // 2
        self.fine_stride, self.stride = 16, 16 if dilation else 32
        self.stage_channels = [self.num_channels // 2**i for i in (3, 2, 1, 0)]
        self.body = IntermediateLayerGetter(net, return_layers={"layer3": "fine", "layer4": "coarse"})

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] -> features at stride 16 [B, fine_channels, ...] and 32 [B, num_channels, ...]."""
        features = self.body(images)
        return features["fine"], features["coarse"]

    def stages(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> the features of layer1 to layer4 [B, stage_channels, ...], for a mask head."""
        features, x = [], images
        for name, layer in self.body.items():
            x = layer(x)
            if name.startswith("layer"):
                features.append(x)
        return features


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the first with stride 2, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class SmallBackbone(nn.Module):
    """A stem and three residual blocks to stride 16, 0.6 M parameters: trains from random weights on a laptop."""

    fine_channels = num_channels = 128
    fine_stride, stride = 8, 16
    stage_channels = (32, 64, 128, 128)

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(ResidualBlock(32, 64), ResidualBlock(64, 128))
        self.last = ResidualBlock(128, 128)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] -> features at stride 8 and at stride 16, both [B, 128, ...], sizes rounded up."""
        fine = self.blocks(self.stem(images))
        return fine, self.last(fine)

    def stages(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> features at strides 2, 4, 8 and 16 [B, stage_channels, ...]."""
        features = [self.stem(images)]
        for block in (*self.blocks, self.last):
            features.append(block(features[-1]))
        return features


def build_backbone(config: ModelConfig) -> nn.Sequential:
    """The extractor and the position encoding, under the official names backbone.0 and backbone.1."""
    if config.backbone == "small":
        body: nn.Module = SmallBackbone()
    else:
        body = ResNetBackbone(config.backbone, config.norm, config.dilation)
    encoding = PositionEmbeddingSine if config.position_embedding == "sine" else PositionEmbeddingLearned
    return nn.Sequential(body, encoding(config.hidden_dim // 2))
