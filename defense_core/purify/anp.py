"""ANP, Adversarial Neuron Pruning (Wu and Wang, NeurIPS 2021, arXiv 2110.14430), a baseline.

Masks on the scales of normalisations are trained to keep accuracy while scales and shifts are
perturbed against it (eq. 3): ``min_m alpha * CE(m) + (1 - alpha) * max_{|d|,|e| <= eps} CE((m + d) w, (1 + e) b)``,
the inner problem by one sign step from a random start. Units whose mask ends at or below a
threshold are cut. The reference benchmark reads the threshold off the test ASR; here accuracy on
the *select* split sets it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from defense_core.calls import few_inputs
from defense_core.config import require
from defense_core.data import Splits
from defense_core.gradient_steps import LossOf
from defense_core.inference import Precision, accuracy
from defense_core.layers import frozen_statistics
from defense_core.loop import Tuning, finished, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import chooser, choosers, strongest_within
from defense_core.purify.masks import MaskSite, Reach, fold_masks, mask_sites
from defense_core.task import Task


@dataclass(frozen=True)
class ANPConfig:
    """Settings of ANP. Symbols are the paper's.

    Attributes:
        eps: largest relative perturbation.
        alpha: weight of the loss without perturbation, in [0, 1].
        lr: rate of the masks.
        epochs: passes over the fit split.
        batch_size: samples per step.
        threshold: units whose mask is at or below it are cut, or ``None`` to choose it from
            ``threshold_grid`` by :func:`~defense_core.purify.choice.strongest_within`.
        threshold_grid: candidates.
        max_drop: permitted drop of accuracy on the *select* split, in [0, 1].
        precision: see :class:`defense_core.loop.Tuning`.
    """

    eps: float = 0.4
    alpha: float = 0.2
    lr: float = 0.2
    epochs: int = 20
    batch_size: int = 128
    threshold: float | None = None
    threshold_grid: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    max_drop: float = 0.02
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require(self.eps > 0, "eps", "a positive number", self.eps)
        require(0 <= self.alpha <= 1, "alpha", "in [0, 1]", self.alpha)
        require(self.lr > 0, "lr", "a positive rate", self.lr)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        in_range = self.threshold is None or 0 <= self.threshold < 1
        require(in_range, "threshold", "in [0, 1), or null", self.threshold)
        listed = bool(self.threshold_grid) and all(0 <= value < 1 for value in self.threshold_grid)
        require(listed, "threshold_grid", "thresholds in [0, 1)", self.threshold_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)


class Perturbed(nn.Module):
    """The parametrisation ``w -> (m + noise) * w``, row by row.

    Attributes:
        values: m, (units,), all ones at first.
        noise: (units,), zero unless a step perturbs; a plain tensor, never trained.
    """

    def __init__(self, units: int, *, trained: bool, device: torch.device) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(units, device=device), requires_grad=trained)
        self.noise = torch.zeros(units, device=device)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.values + self.noise).view(-1, *[1] * (weight.dim() - 1))


def attach_perturbations(model: nn.Module, sites: list[MaskSite]) -> tuple[list[Perturbed], list[Perturbed]]:
    """Masks on the scales at ``sites`` and perturbations on these and on the shifts, in place.

    Returns:
        The masked parametrisations, one a site, and all parametrisations.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    masks, everything = [], []
    for site in sites:
        owner, _, name = site.name.rpartition(".")
        module = model.get_submodule(owner)
        for part in (name, name.replace("weight", "bias")):
            tensor = getattr(module, part, None)
            if tensor is None:
                continue
            perturbed = Perturbed(site.shape[0], trained=part == name, device=tensor.device)
            parametrize.register_parametrization(module, part, perturbed)
            everything.append(perturbed)
            if part == name:
                masks.append(perturbed)
    return masks, everything


def adversarial_noise(loss_of: LossOf, perturbed: list[Perturbed], *, eps: float) -> None:
    """Set each noise to one sign step of ``eps`` up the loss from a uniform start, kept within ``eps``."""
    for part in perturbed:
        part.noise = torch.empty_like(part.noise).uniform_(-eps, eps).requires_grad_()
    # An auxiliary head of the network has no part in the loss.
    gradients = torch.autograd.grad(loss_of(), [part.noise for part in perturbed], allow_unused=True)
    for part, gradient in zip(perturbed, gradients, strict=True):
        up = torch.zeros_like(part.noise) if gradient is None else gradient.sign()
        part.noise = (part.noise.detach() + eps * up).clamp(-eps, eps)


def purify(
    model: nn.Module,
    clean: Splits,
    config: ANPConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Train masks, cut at the threshold that the common rule takes.

    Networks without normalisations are masked on their hidden units.

    Raises:
        MethodDiverged: a loss or mask became NaN or Inf.
        MethodNotApplicable: there is nothing to mask.
        Cancelled: a stop was requested.
    """

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=task, device=device, precision=config.precision)

    original = working_copy(model, device)
    reference = select_accuracy(original)
    sample = few_inputs(clean.fit, task=task, device=device)
    scales = [site for site in mask_sites(original, sample) if site.kind == "norm"]
    sites = scales or mask_sites(original, sample)
    masked = working_copy(original, device)
    masks, perturbed = attach_perturbations(masked, sites)
    reach = Reach([mask.values for mask in masks], device)

    def step(network: nn.Module, loss_of: LossOf) -> Tensor:
        with frozen_statistics(network):
            adversarial_noise(loss_of, perturbed, eps=config.eps)
            ((1 - config.alpha) * loss_of()).backward()
            for part in perturbed:
                part.noise = torch.zeros_like(part.noise)
            loss = loss_of()
            (config.alpha * loss).backward()
        return loss.detach()

    @torch.no_grad()
    def clamp() -> None:
        reach.note()
        for mask in masks:
            mask.values.clamp_(0.0, 1.0)

    history = tune(
        masked,
        clean.fit,
        task=task,
        tuning=Tuning(config.epochs, config.batch_size, config.lr, precision=config.precision),
        seed=seed,
        device=device,
        progress=progress,
        name="masks",
        step=step,
        after_step=clamp,
        kept={"farthest": reach.farthest},
    )
    reach.require_trained("ANP")
    thresholds = config.threshold_grid if config.threshold is None else (config.threshold,)
    with progress.phase("choose threshold", total=len(thresholds)) as choosing:

        def attempt(threshold: float) -> tuple[float, nn.Module]:
            pruned = working_copy(original, device)
            fold_masks(pruned, sites, [(mask.values.detach() > threshold).float() for mask in masks])
            reached = select_accuracy(pruned)
            choosing.advance()
            return reached, pruned

        threshold, pruned, trials = strongest_within(
            thresholds, attempt, reference=reference, max_drop=config.max_drop, images=choosers(clean)
        )
    cut = {s.name: int((m.values <= threshold).sum()) for s, m in zip(sites, masks, strict=True)}
    facts = {"threshold": threshold, "trials": trials, "pruned": cut}
    return Purified(finished(pruned, "anp"), tuple(history), facts)


METHOD = Method(
    name="anp",
    config=ANPConfig,
    function=purify,
    summary="cut units whose scales do not survive adversarial perturbation (ANP), a baseline",
    zero_steps={"epochs": 0},
    baseline=True,
)
