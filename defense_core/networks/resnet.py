"""Residual networks for small images (He et al., "Deep Residual Learning for Image Recognition", 2016).

``resnet18``: the four-stage network with a 3×3 first convolution and projection shortcuts
(``shortcut.0`` convolution, ``shortcut.1`` BatchNorm). ``resnet20``: the paper's three-stage CIFAR
network (section 4.2) with parameter-free shortcuts (option A). Parameter names are those of the
public CIFAR checkpoints: ``conv1``, ``bn1``, ``layer1.0.conv1``, ``linear``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

from defense_core.config import require


class SubsampleAndPad(nn.Module):
    """Option A of the paper: every second pixel, new channels filled with zeros on both sides."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        missing = channels - in_channels
        self.before = missing // 2
        self.after = missing - self.before

    def forward(self, inputs: Tensor) -> Tensor:
        return pad(inputs[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """conv → BN → ReLU → conv → BN, plus the shortcut, then ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=False)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = (
                nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))
                if project
                else SubsampleAndPad(in_channels, channels)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(inputs)))))
        active: Tensor = self.relu2(out + self.shortcut(inputs))
        return active


class ResNet(nn.Module):
    """3×3 stem, ``len(blocks)`` stages that double the width and halve the size, pooling, linear."""

    def __init__(
        self, blocks: tuple[int, ...], width: int, num_classes: int, in_channels: int, *, project: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=False)
        self.stages = len(blocks)
        before = width
        for number, count in enumerate(blocks, start=1):
            channels = width * 2 ** (number - 1)
            stage = [BasicBlock(before, channels, 1 if number == 1 else 2, project)]
            stage += [BasicBlock(channels, channels, 1, project) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            before = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(before, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits N×K for normalised images N×C×H×W (H, W ≥ 8)."""
        features = self.relu1(self.bn1(self.conv1(inputs)))
        for number in range(1, self.stages + 1):
            features = self.get_submodule(f"layer{number}")(features)
        logits: Tensor = self.linear(self.flatten(self.avgpool(features)))
        return logits


def resnet18(width: int = 64, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-18 with a 3×3 first convolution and no first pooling."""
    require(1 <= width <= 1024, "width", "1 to 1024", width)
    return ResNet((2, 2, 2, 2), width, num_classes, in_channels, project=True)


def resnet20(width: int = 16, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The 20-layer CIFAR network of the paper: three stages of three blocks, option A shortcuts."""
    require(1 <= width <= 1024, "width", "1 to 1024", width)
    return ResNet((3, 3, 3), width, num_classes, in_channels, project=False)
