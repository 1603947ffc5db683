"""A three-convolution network for very small images (8×8 digits up to 32×32)."""

from __future__ import annotations

from torch import Tensor, nn

from defense_core.config import require


class SmallCNN(nn.Module):
    """Three times conv → BN → ReLU (max pooling after the second), average pooling, linear."""

    def __init__(self, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=False)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.relu2 = nn.ReLU(inplace=False)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu3 = nn.ReLU(inplace=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits N×K for normalised images N×C×H×W (H, W ≥ 2)."""
        features = self.relu1(self.bn1(self.conv1(inputs)))
        features = self.pool(self.relu2(self.bn2(self.conv2(features))))
        features = self.relu3(self.bn3(self.conv3(features)))
        logits: Tensor = self.linear(self.flatten(self.avgpool(features)))
        return logits


def small_cnn(width: int = 16, in_channels: int = 1, num_classes: int = 10) -> nn.Module:
    """Three convolutions of ``width``, 2·``width`` and 4·``width`` channels."""
    require(1 <= width <= 1024, "width", "1 to 1024", width)
    return SmallCNN(width, num_classes, in_channels)
