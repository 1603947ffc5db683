"""The masks of NFT: settings, depth schedule, training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.distillation import Teacher
from defense_core.gradient_steps import LossOf
from defense_core.inference import Precision
from defense_core.layers import running_statistics
from defense_core.loop import HistoryRow, Tuning, epochs_for, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify.choice import require_factors
from defense_core.purify.masks import Granularity, MaskSite, Reach, Sites, attach_masks, fold_masks
from defense_core.purify.statistics import renew_statistics
from defense_core.purify.unlearning import require_closing
from defense_core.task import Task

PAPER_DEPTH = 19
"""Masked layers of the paper's ResNet-18, on which its alpha and beta were set."""


@dataclass(frozen=True)
class NFTConfig:
    """Settings of NFT. Symbols are the paper's.

    Attributes:
        sites: where masks stand; see :func:`defense_core.purify.masks.mask_sites`. ``"norm"``
            is the paper's choice.
        granularity: of the masks on hidden layers; see there.
        taught_lr: learning rate of a first training of the masks, on the given model's answers to mixed clean images,
            under the BatchNorm statistics as they are; 0: there is none, as in the paper.
        factors: candidates by which the ``ratio`` that closing permits is multiplied for it, 1 or more: the strongest
            by :func:`~defense_core.purify.choice.strongest_by_halving` on the
            :func:`~defense_core.purify.choice.expected_drop`.
        sparsity: weight of the pull of every mask towards 0, or ``None`` to choose it from
            ``sparsity_grid`` by :func:`~defense_core.purify.choice.strongest_within` for the training by labels, which
            is left out where the first one leaves room for none.
        sparsity_grid: candidates; the first training takes the smallest.
        max_drop: permitted drop of accuracy, estimated on the *select* split, in [0, 1].
        ratio: share of the hidden units whose most-moved kernels start at the lower clamp, or
            ``None`` to choose the largest of ``ratio_grid`` that keeps ``start_keep`` of the
            accuracy on the *select* split before the masks are tuned. 0 starts all at 1.
        ratio_grid: candidates.
        start_keep: share of the accuracy that closing must leave, in (0, 1].
        unlearn_lr: rate of the clean unlearning that ranks the kernels.
        unlearn_epochs: its passes over the fit split.
        eta: weight of the pull towards 1 at one sample a class; ``eta / N_c`` with ``N_c``
            samples a class.
        alpha: the lower clamp's scale, in [0, 1].
        beta: its decay with depth.
        ceiling: the upper clamp; 1 is the paper's, more lets open masks make up for closed ones.
        depth: ``l`` runs evenly from 1 at the first masked layer to this at the last, so that
            the schedule means the same in shallow and deep networks.
        mixup: parameter of MixUp's Beta distribution; 0 mixes nothing.
        statistics: BatchNorm while tuning by labels: leave the ``running`` statistics and normalise by
            them, or normalise by the ``batch`` and measure them afresh at the end.
        lr: learning rate of the masks in the training by labels; 0: there is none.
        momentum: of SGD.
        epochs: passes over the fit split.
        min_steps: at least so many steps by labels, and half as many before: more passes on small sets. Nothing is
            trained where ``epochs`` is 0.
        batch_size: samples per step.
        precision: see :class:`defense_core.loop.Tuning`.
    """

    sites: Sites = "all"
    granularity: Granularity = "kernel"
    taught_lr: float = 0.2
    factors: tuple[float, ...] = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0)
    sparsity: float | None = None
    sparsity_grid: tuple[float, ...] = (5e-4, 3e-3)
    max_drop: float = 0.04
    ratio: float | None = None
    ratio_grid: tuple[float, ...] = (0.02, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
    start_keep: float = 0.92
    unlearn_lr: float = 2e-3
    unlearn_epochs: int = 2
    eta: float = 1e-3
    alpha: float = 0.8
    beta: float = 0.5
    ceiling: float = 1.0
    depth: float = PAPER_DEPTH
    mixup: float = 1.0
    statistics: Literal["running", "batch"] = "batch"
    lr: float = 0.5
    momentum: float = 0.9
    epochs: int = 10
    min_steps: int = 150
    batch_size: int = 128
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require(self.taught_lr >= 0, "taught_lr", "0 or more", self.taught_lr)
        require(bool(self.taught_lr or self.lr), "lr", "positive where taught_lr is 0", self.lr)
        require_factors(self.factors, "factors")
        require(self.sparsity is None or self.sparsity >= 0, "sparsity", "0 or more, or null", self.sparsity)
        grid_fits = bool(self.sparsity_grid) and min(self.sparsity_grid) > 0
        require(grid_fits, "sparsity_grid", "positive weights; 0 by itself is sparsity=0", self.sparsity_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require_closing(self)
        require(self.eta >= 0, "eta", "0 or more", self.eta)
        require(0 <= self.alpha <= 1, "alpha", "in [0, 1]", self.alpha)
        require(self.beta >= 0, "beta", "0 or more", self.beta)
        require(self.ceiling >= 1, "ceiling", "1 or more", self.ceiling)
        require(self.depth >= 1, "depth", "1 or more", self.depth)
        require(self.mixup >= 0, "mixup", "0 or more", self.mixup)
        require(self.lr >= 0, "lr", "0 or more", self.lr)
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.min_steps >= 0, "min_steps", "0 or more", self.min_steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)


@dataclass(frozen=True, eq=False)
class Outcome:
    """One trained set of masks, folded."""

    model: nn.Module
    history: list[HistoryRow]
    values: list[Tensor]


def depth_schedule(count: int, *, alpha: float, beta: float, depth: float = PAPER_DEPTH) -> list[float]:
    """``mu(l) = alpha * exp(-beta * l)`` at ``count`` layers, ``l`` evenly from 1 to ``depth``."""
    step = (depth - 1) / max(count - 1, 1)
    return [alpha * math.exp(-beta * (1 + index * step)) for index in range(count)]


def train_masks(
    original: nn.Module,
    data: CleanSet,
    config: NFTConfig,
    sites: list[MaskSite],
    floors: list[float],
    *,
    starts: list[Tensor],
    sparsity: float,
    openness: float,
    teacher: Teacher | None,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Outcome:
    """Masks trained on a copy of ``original`` with ``loss + sparsity ||m||_1 + openness ||1 - m||_1``, folded into
    another.

    On [0, 1] the two pulls are one: there ``||1 - m||_1`` is a constant minus ``||m||_1``.

    Args:
        teacher: whose answers are learnt; ``None``: the labels are.
    """
    taught = teacher is not None
    pull = sparsity - openness
    follow = config.statistics == "batch" and not taught
    masked = working_copy(original, device)
    masks = attach_masks(masked, sites, starts)
    reach = Reach([mask.values for mask in masks], device)

    def step(network: nn.Module, loss_of: LossOf) -> Tensor:
        with running_statistics(network, frozen=not follow):
            loss = loss_of()
            penalty = pull * torch.stack([mask.values.sum() for mask in masks]).sum()
            if config.ceiling > 1:
                beyond = [(mask.values - 1).relu().sum() for mask in masks]
                penalty = penalty + 2 * openness * torch.stack(beyond).sum()
            (loss + penalty).backward()
        return loss.detach()

    @torch.no_grad()
    def clamp() -> None:
        reach.note()
        for mask, floor in zip(masks, floors, strict=True):
            mask.values.clamp_(floor, config.ceiling)

    min_steps = config.min_steps // 2 if taught else config.min_steps
    epochs = epochs_for(len(data), config.epochs, min_steps, config.batch_size)
    history = tune(
        masked,
        data,
        task=task,
        tuning=Tuning(
            epochs,
            config.batch_size,
            config.taught_lr if taught else config.lr,
            momentum=config.momentum,
            schedule="cosine",
            precision=config.precision,
        ),
        seed=seed,
        device=device,
        progress=progress,
        name="taught masks" if taught else "masks",
        step=step,
        mixup=config.mixup,
        teacher=teacher,
        fixed_statistics=taught,
        after_step=clamp,
        kept={"farthest": reach.farthest},
    )
    reach.require_trained("NFT")
    values = [mask.values.detach() for mask in masks]
    folded = working_copy(original, device)
    fold_masks(folded, sites, values)
    if follow and epochs:
        renew_statistics(
            folded, data, task=task, batch_size=config.batch_size, seed=seed, device=device, progress=progress
        )
    return Outcome(folded, history, values)
