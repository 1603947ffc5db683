"""Pre-activation ResNet-18 for small images (He et al., "Identity Mappings in Deep Residual Networks", 2016).

Parameter names are those of the public CIFAR checkpoints of the backdoor literature:
``conv1``, ``layer1.0.bn1``, ``layer1.0.conv1``, ``layer2.0.shortcut.0``, ``linear``. As in those
checkpoints there is no BatchNorm after the last block.
"""

from __future__ import annotations

from torch import Tensor, nn

from defense_core.config import require


class PreActBlock(nn.Module):
    """BN → ReLU → conv → BN → ReLU → conv, plus the input (projected where the shape changes)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=False)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False))

    def forward(self, inputs: Tensor) -> Tensor:
        active = self.relu1(self.bn1(inputs))
        # The projection sees the activated input, the identity the raw one (as in the checkpoints).
        carried = inputs if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + carried


class PreActResNet(nn.Module):
    """Four stages of pre-activation blocks, global average pooling, one linear layer."""

    def __init__(self, blocks: tuple[int, int, int, int], width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        widths = (width, 2 * width, 4 * width, 8 * width)
        self.layer1 = _stage(width, widths[0], blocks[0], stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks[1], stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks[2], stride=2)
        self.layer4 = _stage(widths[2], widths[3], blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits N×K for normalised images N×C×H×W (H, W ≥ 8)."""
        features = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(inputs)))))
        logits: Tensor = self.linear(self.flatten(self.avgpool(features)))
        return logits


def _stage(in_channels: int, channels: int, count: int, stride: int) -> nn.Sequential:
    blocks = [PreActBlock(in_channels, channels, stride)]
    blocks += [PreActBlock(channels, channels, 1) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


def preact_resnet18(width: int = 64, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Pre-activation ResNet-18; ``width`` is the channel count of the first stage."""
    require(1 <= width <= 1024, "width", "1 to 1024", width)
    return PreActResNet((2, 2, 2, 2), width, num_classes, in_channels)
