"""Wide residual network for small images (Zagoruyko and Komodakis, "Wide Residual Networks", 2016).

Parameter names are those of the public PyTorch checkpoints: ``conv1``, ``block1.layer.0.bn1``,
``block2.layer.0.convShortcut``, ``bn1``, ``fc``.
"""

from __future__ import annotations

from torch import Tensor, nn

from defense_core.config import require


class WideBlock(nn.Module):
    """BN → ReLU → conv → BN → ReLU → conv, plus the input (projected where the shape changes)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=False)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        active = self.relu1(self.bn1(inputs))
        carried = inputs if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + carried


class WideStage(nn.Module):
    """``count`` blocks of equal width; the first one changes width and size."""

    def __init__(self, in_channels: int, channels: int, count: int, stride: int) -> None:
        super().__init__()
        blocks = [WideBlock(in_channels, channels, stride)]
        blocks += [WideBlock(channels, channels, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layer(inputs)
        return out


class WideResNet(nn.Module):
    """WRN-d-k: 16 channels in the stem, then 16k, 32k and 64k."""

    def __init__(self, depth: int, widen_factor: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        count = (depth - 4) // 6
        widths = tuple(base * widen_factor for base in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, widths[0], count, stride=1)
        self.block2 = WideStage(widths[0], widths[1], count, stride=2)
        self.block3 = WideStage(widths[1], widths[2], count, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU(inplace=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[2], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits N×K for normalised images N×C×H×W (H, W ≥ 4)."""
        features = self.block3(self.block2(self.block1(self.conv1(inputs))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(self.relu(self.bn1(features)))))
        return logits


def wrn16_1(widen_factor: int = 1, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """WRN-16-1; ``widen_factor`` multiplies the channels of every stage."""
    require(1 <= widen_factor <= 64, "widen_factor", "1 to 64", widen_factor)
    return WideResNet(16, widen_factor, num_classes, in_channels)
