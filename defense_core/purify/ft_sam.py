"""FT-SAM (Zhu et al., ICCV 2023, arXiv 2304.11823), a baseline: fine-tuning with adaptive SAM.

The perturbation of a weight is proportional to its square (the paper's eq. 4, after Kwon et al.
2021): ``eps = rho * w^2 * g / || |w| * g ||``, and the step takes the gradient at ``w + eps``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import Splits
from defense_core.gradient_steps import LossOf, Step, plain_step
from defense_core.layers import frozen_statistics
from defense_core.loop import finished
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.fine_tuning import FineTuningConfig, tune_within
from defense_core.task import Task


@dataclass(frozen=True)
class FTSAMConfig(FineTuningConfig):
    """Settings of FT-SAM.

    Attributes:
        rho: length of the perturbation in the adaptive norm.
        lr, lr_grid, max_drop, epochs, batch_size, weight_decay, schedule, precision: as plain
            fine-tuning's.
    """

    rho: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rho > 0, "rho", "a positive length", self.rho)


def adaptive_sam_step(rho: float) -> Step:
    """Gradient at ``w + rho * w^2 g / || |w| g ||``; BatchNorm statistics follow the first pass only."""

    def step(model: nn.Module, loss_of: LossOf) -> Tensor:
        loss = plain_step(model, loss_of)
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        first = [parameter.grad for parameter in parameters if parameter.grad is not None]
        before = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            scaled = [weight.abs() * gradient for weight, gradient in zip(before, first, strict=True)]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled))).clamp_min(1e-12)
            for parameter, weight, part in zip(parameters, before, scaled, strict=True):
                parameter.add_(weight.abs() * part * (rho / norm))
                parameter.grad = None
        with frozen_statistics(model):
            loss_of().backward()
        with torch.no_grad():
            for parameter, weight in zip(parameters, before, strict=True):
                parameter.copy_(weight)
        return loss

    return step


def purify(
    model: nn.Module,
    clean: Splits,
    config: FTSAMConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Fine-tune by adaptive SAM at the rate that the common rule takes."""
    tuned, rows, facts = tune_within(
        model,
        clean,
        config,
        task=task,
        seed=seed,
        device=device,
        progress=progress,
        name="ft-sam",
        step=adaptive_sam_step(config.rho),
    )
    return Purified(finished(tuned, "ft_sam"), tuple(rows), facts)


METHOD = Method(
    name="ft_sam",
    config=FTSAMConfig,
    function=purify,
    summary="fine-tuning with adaptive sharpness-aware minimisation (FT-SAM), a baseline",
    zero_steps={"epochs": 0},
    baseline=True,
)
