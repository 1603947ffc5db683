"""What a model is for: the loss, the prediction and the input transform of one task.

Purifiers and scanners talk to a :class:`Task` and never know which one it is. Image
classification is the first; another task implements the same protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from defense_core.config import require

Augment = Literal["none", "crop", "crop_flip"]


@dataclass(frozen=True, eq=False)
class Mixed:
    """A MixUp batch; the loss is ``weight * l(outputs, targets) + (1 - weight) * l(outputs, partners)``.

    Attributes:
        inputs: mixed inputs, float32, (N, ...).
        targets: labels of the first part, (N,).
        partners: labels of the second part, (N,).
        weight: share of the first part, in [0, 1], one for the batch.
    """

    inputs: Tensor
    targets: Tensor
    partners: Tensor
    weight: float


class Task(Protocol):
    """The face of a task that methods use. ``N`` is the batch size."""

    @property
    def num_classes(self) -> int:
        """Number of classes ``K``."""
        ...

    def inputs(self, images: Tensor) -> Tensor:
        """Stored samples as the model wants them (float32)."""
        ...

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stored samples after the task's label-preserving random transform."""
        ...

    def mixup(self, inputs: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> Mixed:
        """A batch mixed with a permutation of itself."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss per sample, shape (N,)."""
        ...

    def predict(self, outputs: Tensor) -> Tensor:
        """Predicted labels, int64, shape (N,)."""
        ...


@dataclass(frozen=True)
class ImageClassification:
    """Image classification with one label per image.

    Attributes:
        input_size: (C, H, W).
        num_classes: number of classes K, at least 2.
        mean: per-channel mean, in units of [0, 1] pixels, subtracted from the input.
        std: per-channel standard deviation that the input is divided by.
        class_names: K names, or empty.
        augment: label-preserving transform used while tuning. ``crop`` shifts by up to an
            eighth of the side; ``crop_flip`` also mirrors left-right, which is wrong for
            digits, text and traffic signs and is therefore not the default.
    """

    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    augment: Augment = "crop"

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        require(
            all(side > 0 for side in self.input_size), "input_size", "three positive numbers C,H,W", self.input_size
        )
        require(self.num_classes >= 2, "num_classes", "at least 2 classes", self.num_classes)
        require(len(self.mean) == channels, "mean", f"{channels} values, one a channel", self.mean)
        require(len(self.std) == channels, "std", f"{channels} values, one a channel", self.std)
        require(all(value > 0 for value in self.std), "std", "positive values", self.std)
        require(
            len(self.class_names) in (0, self.num_classes), "class_names", f"{self.num_classes} names", self.class_names
        )

    def inputs(self, images: Tensor) -> Tensor:
        """Normalise pixels.

        Args:
            images: (N, C, H, W), uint8 in 0..255, or floating point in [0, 1].

        Returns:
            float32 (N, C, H, W), ``(pixel - mean) / std``.
        """
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        mean = pixels.new_tensor(self.mean).view(1, -1, 1, 1)
        std = pixels.new_tensor(self.std).view(1, -1, 1, 1)
        return (pixels - mean) / std

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Random shift (zero padding) and mirror, drawn from ``generator`` (a CPU generator).

        Args:
            images: (N, C, H, W), any dtype and device.
        """
        if self.augment == "none":
            return images
        count, _, height, width = images.shape
        pad = max(1, min(height, width) // 8)
        rows = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
        columns = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
        rows = rows + torch.arange(height)
        columns = columns + torch.arange(width)
        if self.augment == "crop_flip":
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (pad, pad, pad, pad))
        flat = (rows.unsqueeze(2) * (width + 2 * pad) + columns.unsqueeze(1)).reshape(count, 1, -1).to(images.device)
        gathered = padded.flatten(2).gather(2, flat.expand(-1, images.shape[1], -1))
        return gathered.view_as(images)

    def mixup(self, inputs: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> Mixed:
        """MixUp (Zhang et al., ICLR 2018, eq. 1): one weight ~ Beta(alpha, alpha) and one permutation a batch.

        Args:
            inputs: normalised inputs, float, (N, ...).
            targets: labels, int64, (N,).
            alpha: parameter of the Beta distribution, positive.
            generator: a CPU generator; the same state gives the same mix.
        """
        draw = int(torch.randint(2**63 - 1, (), generator=generator))
        weight = float(numpy.random.default_rng(draw).beta(alpha, alpha))  # torch's own Beta takes no generator
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        return Mixed(inputs.mul(weight).add(inputs[order], alpha=1 - weight), targets, targets[order], weight)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy per sample, float32, shape (N,)."""
        return F.cross_entropy(outputs.float(), targets, reduction="none")

    def predict(self, outputs: Tensor) -> Tensor:
        """Class of the largest logit, int64, shape (N,)."""
        return outputs.argmax(dim=1)
