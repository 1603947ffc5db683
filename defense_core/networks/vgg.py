"""VGG-19 with BatchNorm for small images (Simonyan and Zisserman, 2015, configuration E).

As in the public CIFAR checkpoints the three large fully connected layers are replaced by one:
``features.N`` and ``classifier``. The ImageNet-sized network is ``torchvision:vgg19_bn``.
"""

from __future__ import annotations

from torch import Tensor, nn

from defense_core.config import require

_STAGES = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))  # (multiple of the width, convolutions)


class SmallVGG(nn.Module):
    """Five stages of 3×3 convolutions with BatchNorm and ReLU, each followed by 2×2 max pooling."""

    def __init__(self, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for multiple, count in _STAGES:
            channels = width * multiple
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=False)]
                before = channels
            # Rounding up changes nothing at 32×32 and lets 28×28 and 8×8 through five poolings.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits N×K for normalised images N×C×H×W."""
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(inputs))))
        return logits


def vgg19_bn(width: int = 64, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """VGG-19-BN with one linear layer; ``width`` is the channel count of the first stage."""
    require(1 <= width <= 512, "width", "1 to 512", width)
    return SmallVGG(width, num_classes, in_channels)
