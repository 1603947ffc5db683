"""FIP, Fisher-information-guided purification (Karim et al., arXiv 2409.00863).

Minimises ``D(theta) + eta_F Tr F(theta) + (eta_r / 2) sum_i Fbar_ii (theta_i - thetabar_i)^2`` over
every parameter. ``Tr F``, the mean squared norm of per-sample gradients, pulls the weights out of
the sharp minimum that a backdoor sits in; the last term keeps what the clean task relies on,
``thetabar`` and ``Fbar`` being the weights and the Fisher diagonal at the starting point, on the
clean set. By default that point is not the given model, and the data term ``D`` not the paper's cross-entropy: see
:class:`~defense_core.purify.fisher_guided.FisherGuidedConfig`.

The released code computes other quantities under these names; ``docs/methods-fip.md`` lists them.
Here the trace is the unbiased random-sign estimate and the diagonal is exact, per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.curvature import Kind, fisher_diagonal, random_sign_trace
from defense_core.data import CleanSet, Splits
from defense_core.errors import MethodDiverged
from defense_core.inference import channels_last
from defense_core.loop import finished
from defense_core.per_sample import samples_apart
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.fisher_guided import FisherGuidedConfig, Objective, measured_samples, minimise
from defense_core.purify.fisher_terms import TraceTerm
from defense_core.purify.zeroing import CLOSE_FACTORS
from defense_core.task import Task


@dataclass(frozen=True)
class FIPConfig(FisherGuidedConfig):
    """Settings of FIP. Symbols are the paper's.

    Attributes:
        fisher: whose labels the trace takes: the given ones (``empirical``), or labels drawn
            from the model's own prediction (``true``).
        trace_draws: random-sign estimates averaged each time.
        start, n_factors, taught_lr, eta_f, trace_share, eta_r, retain, trace_every, trace_batch, retain_images: see
            :class:`~defense_core.purify.fisher_guided.FisherGuidedConfig`.
        lr, lr_grid, max_drop, epochs, min_steps, batch_size, weight_decay: see there.
        max_trace_norm, precision: see there.
    """

    fisher: Kind = "empirical"
    trace_draws: int = 1
    n_factors: tuple[float, ...] = CLOSE_FACTORS
    max_drop: float = 0.045

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.fisher in ("empirical", "true"), "fisher", "empirical or true", self.fisher)
        require(self.trace_draws >= 1, "trace_draws", "1 or more", self.trace_draws)


def purify(
    model: nn.Module,
    clean: Splits,
    config: FIPConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Tune every parameter. The Fisher terms are taken with BatchNorm in eval mode.

    Returns:
        The purified model. ``facts`` holds ``lr``, ``n`` and the trials behind them, ``eta_f``, ``eta_r``, the accuracy
        on the *select* split before, the exact trace at the starting point (``trace_before``), and what was zeroed for
        it.

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        MethodNotApplicable: a BatchNorm layer keeps no running statistics.
        Cancelled: a stop was requested.
    """
    inputs, targets = measured_samples(clean.fit, config, task=task, seed=seed, device=device)

    def objective(start: nn.Module) -> Objective:
        with progress.phase("fisher") as phase:
            fisher = fisher_diagonal(start, inputs, targets, losses=task.losses, after_chunk=phase.advance)
        return Objective(
            start,
            fisher,
            term=lambda generator: trace_term(clean.fit, config, task=task, generator=generator, device=device),
            folded=lambda: (start, {}),
        )

    tuned, history, facts = minimise(
        model, clean, config, objective, task=task, seed=seed, device=device, progress=progress, name="fip"
    )
    return Purified(finished(tuned, "fip"), tuple(history), facts)


def trace_term(
    data: CleanSet, config: FIPConfig, *, task: Task, generator: torch.Generator, device: torch.device | str
) -> TraceTerm:
    """Differentiable estimate of Tr F on augmented samples of ``data``, drawn freshly from ``generator``.

    Of the true Fisher the value is unbiased, and the gradient is that at the labels drawn: how the labels' own
    distribution moves with the weights is left out.
    """
    data = data.to(device)

    def term(model: nn.Module) -> Tensor:
        drawn = torch.randint(len(data), (min(config.trace_batch, len(data)),), generator=generator).to(device)
        inputs = channels_last(task.inputs(task.augmented(data.images[drawn], generator)))
        with samples_apart(model):
            outputs = model(inputs)
            targets = data.labels[drawn]
            if config.fisher == "true":
                targets = sampled_labels(outputs, task, generator)
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return random_sign_trace(
                task.losses(outputs, targets), parameters, generator=generator, draws=config.trace_draws
            )

    return term


@torch.no_grad()
def sampled_labels(outputs: Tensor, task: Task, generator: torch.Generator) -> Tensor:
    """One label a sample from the model's prediction, ``p(k) = exp(-loss_k)``, int64 (N,).

    Raises:
        MethodDiverged: the outputs are not finite.
    """
    count = len(outputs)
    columns = [task.losses(outputs, torch.full((count,), k, device=outputs.device)) for k in range(task.num_classes)]
    probabilities = torch.exp(-torch.stack(columns, dim=1)).cpu()
    if not torch.isfinite(probabilities).all():
        raise MethodDiverged(
            "no label can be drawn", expected="finite outputs", got="NaN or Inf", hint="Lower the rate"
        )
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(outputs.device)


METHOD = Method(
    name="fip",
    config=FIPConfig,
    function=purify,
    summary="zero as TSBD does, learn the given model's answers back under a Fisher trace and anchor (FIP)",
    zero_steps={"epochs": 0},
)
