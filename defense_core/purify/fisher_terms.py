"""The two Fisher terms of FIP's objective, as the loop's gradient step takes them: the trace and the retainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from defense_core.errors import MethodDiverged
from defense_core.gradient_steps import LossOf, Step, plain_step
from defense_core.per_sample import without_tf32

TraceTerm = Callable[[nn.Module], Tensor]
Penalty = Callable[[nn.Module], None]


def finite_trace(diagonal: Mapping[str, Tensor]) -> float:
    """Sum of a Fisher diagonal.

    Raises:
        MethodDiverged: it is NaN or Inf.
    """
    trace = float(sum(value.sum(dtype=torch.float64) for value in diagonal.values()))
    if not math.isfinite(trace):
        raise MethodDiverged("the Fisher trace is not finite", expected="finite weights, inputs and losses", got=trace)
    return trace


def regularised_step(
    eta_f: float, term: TraceTerm, *, every: int, max_norm: float, retain: Penalty, taken: Tensor
) -> Step:
    """Gradient of the whole objective: the batch's data term as the loop runs it, the trace
    on its own samples every ``every`` steps, weighted by as many and clipped to ``max_norm``,
    and the retainer.

    The loss that is reported is the data term. ``taken``, an int64 scalar, counts the steps in place.
    """

    def step(model: nn.Module, loss_of: LossOf) -> Tensor:
        loss = plain_step(model, loss_of)
        if eta_f and int(taken) % every == 0:
            add_clipped(model, eta_f * every * term(model), max_norm=max_norm)
        taken.add_(1)
        retain(model)
        return loss

    return step


def add_clipped(model: nn.Module, term: Tensor, *, max_norm: float) -> None:
    """Add the gradient of ``term``, clipped to the global L2 norm ``max_norm``, to every gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with without_tf32():  # as the term itself was taken
        found = torch.autograd.grad(term, parameters, allow_unused=True)
    pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for _, gradient in pairs]))
    factor = (max_norm / norm.clamp_min(1e-12)).clamp(max=1.0)
    for parameter, gradient in pairs:
        scaled = gradient * factor
        parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)


def retainer(anchors: Mapping[str, Tensor], fisher: Mapping[str, Tensor], *, eta_r: float, lr: float) -> Penalty:
    """Adds ``eta_r Fbar_ii (theta_i - thetabar_i)`` to the gradient of every parameter in ``fisher``.

    The stiffness ``eta_r Fbar_ii`` is capped at ``1 / lr``: a stiffer spring cannot hold a weight
    closer at that rate, it makes gradient descent oscillate.
    """
    stiffness = {name: (eta_r * value).clamp(max=1 / lr) for name, value in fisher.items()}

    @torch.no_grad()
    def penalty(model: nn.Module) -> None:
        if eta_r == 0:
            return
        for name, parameter in model.named_parameters():
            if name not in stiffness:
                continue
            pull = stiffness[name] * (parameter - anchors[name])
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    return penalty
