"""Training on poisoned data, by an ordinary attacker or by one who knows which defence is coming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from defense_core.architectures import initialise
from defense_core.attacks.pixels import seeded_generator
from defense_core.calls import recorded
from defense_core.config import require
from defense_core.curvature import random_sign_trace
from defense_core.data import CleanSet
from defense_core.gradient_steps import LossOf, Step, gradient_norm_step, plain_step
from defense_core.inference import logits
from defense_core.loop import Schedule, Tuning, finished, tune, working_copy
from defense_core.per_sample import samples_apart
from defense_core.progress import Progress
from defense_core.task import ImageClassification

Adaptive = Literal["none", "sam", "fisher"]


@dataclass(frozen=True)
class VictimTraining:
    """How a network is trained from random weights.

    Attributes:
        epochs, batch_size, lr, momentum, weight_decay, schedule: as in :class:`defense_core.loop.Tuning`.
        adaptive: ``sam``: the attacker trains with sharpness-aware minimisation (Foret et al. 2021), ``fisher``: with
            the penalty ``fisher_weight * Tr F`` on the trace of the empirical Fisher matrix. Both hide the sharp
            minimum that defences by smoothing look for.
        radius: SAM's ascent step, the paper's rho.
        fisher_weight: weight of the trace; its gradient is cut to the length of that of the cross-entropy, without
            which training from random weights diverges.
        fisher_every: the trace is added every so many steps, times as much.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "onecycle"
    adaptive: Adaptive = "none"
    radius: float = 0.05
    fisher_weight: float = 0.01
    fisher_every: int = 5

    def __post_init__(self) -> None:
        self.tuning()
        require(self.epochs >= 1, "epochs", "1 or more", self.epochs)
        require(self.radius > 0, "radius", "a positive length", self.radius)
        require(self.fisher_weight > 0, "fisher_weight", "a positive weight", self.fisher_weight)
        require(self.fisher_every >= 1, "fisher_every", "1 or more", self.fisher_every)

    def tuning(self) -> Tuning:
        """Settings of the loop."""
        return Tuning(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
        )


def train_victim(
    network: nn.Module,
    data: CleanSet,
    *,
    training: VictimTraining,
    task: ImageClassification,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    name: str,
) -> nn.Module:
    """A copy of ``network``, its weights drawn anew, trained on ``data``: CPU, float32, eval mode.

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    model = initialise(working_copy(network, "cpu"), seed).to(device)
    recorder = _RecordingTask(**vars(task))
    steps: dict[Adaptive, Step] = {
        "none": plain_step,
        "sam": gradient_norm_step(radius=training.radius, alpha=1.0, normalisation="global"),
        "fisher": _fisher_step(recorder, training, seeded_generator(seed)),
    }
    tune(
        model,
        data,
        task=recorder,
        tuning=training.tuning(),
        seed=seed,
        device=device,
        progress=progress,
        name=name,
        step=steps[training.adaptive],
    )
    return finished(model, name)


@dataclass(frozen=True)
class _RecordingTask(ImageClassification):
    """The task, with the targets of the last batch, which the loop hands to nobody else."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        object.__setattr__(self, "last", targets)
        return super().losses(outputs, targets)


def _fisher_step(task: _RecordingTask, training: VictimTraining, generator: torch.Generator) -> Step:
    """Gradient of ``CE + w Tr F``: CE as usual, the trace on the same batch with samples kept apart (BatchNorm in eval
    mode, full precision) by the unbiased random-sign estimator."""
    done = 0

    def step(model: nn.Module, loss_of: LossOf) -> Tensor:
        nonlocal done
        done += 1
        if done % training.fisher_every:
            return plain_step(model, loss_of)
        with recorded({"model": model}) as seen:
            loss = plain_step(model, loss_of)
        inputs = seen.taken("model")
        with samples_apart(model):
            losses = task.losses(logits(model(inputs)), task.last)  # type: ignore[attr-defined]
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            trace = random_sign_trace(losses, parameters, generator=generator)
            gradients = torch.autograd.grad(trace, parameters, allow_unused=True)
        _add_bounded(parameters, gradients, weight=training.fisher_weight * training.fisher_every)
        return loss

    return step


def _add_bounded(parameters: list[nn.Parameter], extra: Sequence[Tensor | None], *, weight: float) -> None:
    """Add ``weight * extra`` to the gradients, shortened to their own global length where it is longer."""
    pairs = [(p.grad, g) for p, g in zip(parameters, extra, strict=True) if p.grad is not None and g is not None]
    present, added = (
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(side)))) for side in zip(*pairs, strict=True)
    )
    factor = torch.minimum(torch.full_like(added, weight), present / added.clamp_min(1e-12))
    for gradient, addition in pairs:
        gradient.add_(addition * factor)
