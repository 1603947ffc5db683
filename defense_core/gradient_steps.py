"""Gradient steps that the loop runs: plain, and with a penalty on the gradient's norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from defense_core.layers import frozen_statistics

LossOf = Callable[[], Tensor]
Step = Callable[[nn.Module, LossOf], Tensor]


def plain_step(model: nn.Module, loss_of: LossOf) -> Tensor:
    """Gradient of the loss."""
    loss = loss_of()
    loss.backward()
    return loss.detach()


def gradient_norm_step(*, radius: float, alpha: float, normalisation: Literal["global", "per_tensor"]) -> Step:
    """Gradient of ``CE + lambda * ||grad CE||`` by finite difference (TSBD, stage 2).

    ``G = (1 - alpha) * g1 + alpha * g2`` with ``g1 = grad CE(theta)``,
    ``g2 = grad CE(theta + radius * g1 / ||g1||)`` and ``alpha = lambda / radius``: alpha 0
    is plain fine-tuning, alpha 1 is SAM (Foret et al. 2021, eq. 2-3). BatchNorm running
    statistics follow the unperturbed pass only.

    Args:
        radius: length of the ascent step in weight space.
        alpha: weight of the perturbed gradient, in [0, 1].
        normalisation: divide ``g1`` by its global L2 norm (the equation), or each tensor by
            its own (a step about ``sqrt(number of tensors)`` times as long).
    """

    def step(model: nn.Module, loss_of: LossOf) -> Tensor:
        loss = plain_step(model, loss_of)
        if alpha == 0:
            return loss
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        first = [parameter.grad.clone() for parameter in parameters]  # type: ignore[union-attr]
        norms = torch._foreach_norm(first)
        if normalisation == "global":
            norms = (torch.linalg.vector_norm(torch.stack(norms)),) * len(first)
        before = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, gradient, norm in zip(parameters, first, norms, strict=True):
                # A layer whose gradient vanishes (fully zeroed, dead) stays where it is.
                parameter.add_(gradient * (radius / norm.clamp_min(1e-12)))
                parameter.grad = None
        with frozen_statistics(model):
            loss_of().backward()
        with torch.no_grad():
            for parameter, old, gradient in zip(parameters, before, first, strict=True):
                parameter.copy_(old)
                second = parameter.grad if parameter.grad is not None else torch.zeros_like(gradient)
                parameter.grad = gradient.mul_(1 - alpha).add_(second, alpha=alpha)
        return loss

    return step
