"""Training of a trigger generator together with a classifier that obeys it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from defense_core.attacks.pixels import seeded_generator
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.errors import MethodDiverged
from defense_core.inference import autocast, channels_last, logits
from defense_core.loop import batch_indices, in_batches, seeded, working_copy
from defense_core.progress import Progress
from defense_core.task import Task

N = TypeVar("N", bound=nn.Module)

Wanted = Callable[[Tensor], Tensor]
"""True labels, int64 (N,), to the labels that the attacker wants."""


class Learn(Protocol):
    """Signature of every function that learns a trigger."""

    def __call__(
        self,
        config: Any,
        surrogate: nn.Module,
        data: CleanSet,
        wanted: Wanted,
        *,
        task: Task,
        seed: int,
        device: torch.device | str,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Parameters of the trigger by name, float32, CPU.

        Args:
            config: the attack's own training configuration.
            surrogate: classifier of the victim's architecture, trained on clean data; left as it is.
            data: clean training samples.
            wanted: the label rule.
        """
        ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a generator is trained.

    Attributes:
        epochs: passes over the data.
        batch_size: samples a step.
        images: at most so many training samples, drawn once; a generator needs fewer than a classifier.
        lr: learning rate of Adam for the generator.
        classifier_lr: learning rate of SGD (momentum 0.9, weight decay 5e-4) for the classifier beside it.
    """

    epochs: int = 10
    batch_size: int = 128
    images: int = 5000
    lr: float = 2e-3
    classifier_lr: float = 0.01

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", "1 or more", self.epochs)
        require(self.batch_size >= 2, "batch_size", "2 or more", self.batch_size)
        require(self.images >= 2, "images", "2 or more", self.images)
        require(self.lr > 0, "lr", "a positive rate", self.lr)
        require(self.classifier_lr > 0, "classifier_lr", "a positive rate", self.classifier_lr)

    def steps(self, count: int) -> int:
        """Steps of a training that is given ``count`` samples."""
        return self.epochs * len(in_batches(torch.arange(min(count, self.images)), self.batch_size))


@dataclass(frozen=True, eq=False)
class Batch:
    """What a loss is computed from.

    Attributes:
        classify: images in [0, 1], float (N, C, H, W), to logits (N, K).
        images: augmented clean images in [0, 1], float32 (N, C, H, W).
        labels: true labels, int64 (N,).
        wanted: labels that the attacker wants, int64 (N,).
        generator: a CPU generator for what the loss draws.
    """

    classify: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    wanted: Tensor
    generator: torch.Generator


def train_generator(
    network: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    data: CleanSet,
    wanted: Wanted,
    *,
    surrogate: nn.Module | None,
    schedule: Schedule,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    name: str,
) -> None:
    """Minimise ``loss_of`` over ``network`` (in place, on ``device``) and over a copy of ``surrogate``, if any.

    Raises:
        MethodDiverged: the loss became NaN or Inf.
    """
    classifier = working_copy(surrogate, device).train() if surrogate is not None else nn.Identity()
    trained: list[torch.optim.Optimizer] = [torch.optim.Adam(network.parameters(), lr=schedule.lr)]
    if surrogate is not None:
        trained.append(
            torch.optim.SGD(classifier.parameters(), lr=schedule.classifier_lr, momentum=0.9, weight_decay=5e-4)
        )
    generator = seeded_generator(seed)
    data = data.subset(torch.randperm(len(data), generator=generator)[: schedule.images]).to(device)
    context = autocast(network if surrogate is None else classifier, "auto", device)
    network.train()
    with seeded(seed, device), progress.phase(name, total=schedule.steps(len(data))) as phase:
        for _ in range(schedule.epochs):
            for index in batch_indices(len(data), schedule.batch_size, generator):
                labels = data.labels[index.to(device)]
                images = task.augmented(data.images[index.to(device)], generator).float() / 255
                batch = Batch(
                    lambda pixels: logits(classifier(channels_last(task.inputs(pixels)))),
                    images,
                    labels,
                    wanted(labels),
                    generator,
                )
                for optimizer in trained:
                    optimizer.zero_grad(set_to_none=True)
                with context():
                    loss = loss_of(batch)
                loss.backward()
                for optimizer in trained:
                    optimizer.step()
                shown = float(loss.detach())
                if not math.isfinite(shown):
                    raise MethodDiverged(
                        f"{name} diverged", expected="a finite loss", got=shown, hint="Lower its learning rates"
                    )
                phase.advance(loss=shown)
    network.eval()


def seeded_network(make: Callable[[], N], seed: int, device: torch.device | str) -> N:
    """A network whose initial weights follow ``seed``; the global random state stays."""
    with seeded(seed, "cpu"):
        network = make()
    return network.to(device)
