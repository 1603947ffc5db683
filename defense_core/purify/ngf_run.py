"""NGF's settings, and the passes that all of its parts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from defense_core.config import require
from defense_core.course import Course, Kept, random_state
from defense_core.data import CleanSet
from defense_core.errors import MethodDiverged
from defense_core.inference import Precision
from defense_core.loop import HistoryRow, epochs_for, in_batches, require_float32
from defense_core.progress import Progress
from defense_core.purify.choice import require_factors
from defense_core.purify.unlearning import require_closing
from defense_core.task import Task

NAME = "NGF"
Part = Literal["masked", "head", "fresh_head", "feature_mask", "block", "masked_block"]


@dataclass(frozen=True)
class NGFConfig:
    """Settings of NGF.

    Attributes:
        part: what is tuned. ``"masked_block"``: the last hidden layer and the classifier, started
            at random, after the hidden units that a short clean unlearning moves most were
            closed. ``"masked"``: the classifier alone after the same. ``"head"``: the classifier,
            the paper's choice. ``"fresh_head"``: the classifier, started at zero.
            ``"feature_mask"``: a mask in [0, 1] on the classifier's inputs. ``"block"``: the last
            hidden layers and the classifier, started at random. All but the blocks run on cached
            features.
        ratio: share of the hidden units that the masked parts close. ``None``: the largest of ``ratio_grid`` that
            keeps ``start_keep`` of the accuracy on the *select* split before anything is tuned, times the largest of
            ``factors`` after whose tuning the accuracy holds
            (:func:`~defense_core.purify.choice.expected_drop` on the *select* split, ``max_drop``).
        ratio_grid: candidates.
        start_keep: share of the accuracy that closing must leave, in (0, 1].
        factors: candidates, 1 or more.
        unlearn_lr: rate of the clean unlearning that ranks the units.
        unlearn_epochs: its passes over the fit split.
        layers: hidden layers of ``"block"``, or ``None`` to choose their number from
            ``layers_grid`` by the same bound.
        layers_grid: candidates.
        max_drop: permitted drop, in [0, 1].
        fisher: ``"empirical"``, or ``"true"``: the model's own labels, solved by conjugate
            gradients; for the classifier.
        eta: weight of the regulariser ``eta / 2 * sum Fbar_ii (w_i - wbar_i)^2``, with ``Fbar``
            the empirical Fisher's diagonal at the start; ``"masked"`` and ``"head"``.
        damping: lambda, relative to the mean nonzero eigenvalue of F.
        lr: length of a step; falls linearly to 0. 1 is Newton's.
        views: augmented views of the fit split whose features are cached.
        epochs: passes over the fit split.
        min_steps: at least so many steps: more passes on small sets. Nothing is trained where
            ``epochs`` is 0.
        batch_size: samples per step, and so the size of the solve.
        precision: of the unlearning and of the passes that cache features; see
            :class:`defense_core.loop.Tuning`. Natural steps on features are float64.
    """

    part: Part = "masked_block"
    ratio: float | None = None
    ratio_grid: tuple[float, ...] = (0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
    start_keep: float = 0.92
    factors: tuple[float, ...] = (1.0, 1.2, 1.4, 1.6, 1.8, 2.1, 2.5, 3.0, 3.6)
    unlearn_lr: float = 2e-3
    unlearn_epochs: int = 2
    layers: int | None = None
    layers_grid: tuple[int, ...] = (1, 2)
    max_drop: float = 0.045
    fisher: Literal["empirical", "true"] = "empirical"
    eta: float = 1.0
    damping: float = 0.1
    lr: float = 0.5
    views: int = 2
    epochs: int = 10
    min_steps: int = 60
    batch_size: int = 128
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require_closing(self)
        require_factors(self.factors, "factors")
        require(self.layers is None or self.layers >= 1, "layers", "1 or more, or null", self.layers)
        require(bool(self.layers_grid) and min(self.layers_grid) >= 1, "layers_grid", "counts", self.layers_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require(self.eta >= 0, "eta", "0 or more", self.eta)
        require(self.damping > 0, "damping", "a positive number", self.damping)
        require(self.lr > 0, "lr", "a positive rate", self.lr)
        require(self.views >= 1, "views", "1 or more", self.views)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.min_steps >= 0, "min_steps", "0 or more", self.min_steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)


@dataclass(frozen=True, eq=False)
class Run:
    """What every part needs."""

    data: CleanSet
    config: NGFConfig
    task: Task
    seed: int
    device: torch.device | str
    progress: Progress

    @property
    def epochs(self) -> int:
        """Passes over the fit split."""
        config = self.config
        return epochs_for(len(self.data), config.epochs, config.min_steps, config.batch_size)


def diverged(got: str) -> MethodDiverged:
    return MethodDiverged(f"{NAME} diverged", expected="finite losses", got=got, hint="Lower lr, raise damping")


def require_finite(losses: Tensor) -> None:
    if not bool(torch.isfinite(losses).all()):
        raise diverged("NaN or Inf")


def passes(run: Run, name: str, step: Callable[[Tensor, int, float], Tensor], *, kept: Kept) -> list[HistoryRow]:
    """Shuffled passes of ``step(batch, epoch, rate)``, the rate falling linearly to 0.

    Args:
        kept: everything that ``step`` changes, for checkpoints.

    Raises:
        MethodDiverged: a loss became NaN or Inf, or the rate is more than float32 holds.
        Cancelled: a stop was requested.
    """
    require_float32(run.config.lr, name)
    size, epochs = run.config.batch_size, run.epochs
    generator = torch.Generator().manual_seed(run.seed)
    order, total = torch.arange(len(run.data)), torch.zeros((), dtype=torch.float64)
    each = len(in_batches(order, size))

    def rate(done: int) -> float:
        return run.config.lr * (1 - done / (epochs * each))

    with run.progress.phase(name, total=epochs * each) as phase:
        changed: Kept = {"order": order, "total": total, "generator": generator, **random_state(run.device)}
        course = Course(run.progress.checkpoints.of_loop(name), name, {**changed, **kept})
        if course.done:
            phase.advance(course.done)
        if course.finished:
            return course.history
        for epoch in range(len(course.history), epochs):
            if course.done == epoch * each:  # a checkpoint may lie within the epoch, or at its end
                order.copy_(torch.randperm(len(run.data), generator=generator))
                total.zero_()
            for batch in in_batches(order, size)[course.done - epoch * each :]:
                try:
                    losses = step(batch.to(run.device), epoch, rate(course.done))
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                    raise diverged("gradients that are not finite, or too large to solve with") from error
                require_finite(losses)
                total.add_(float(losses.mean()))
                course.step()
                phase.advance(loss=float(total) / (course.done - epoch * each))
            row = {"phase": name, "step": epoch + 1, "loss": float(total) / each, "lr": rate(course.done - 1)}
            course.history.append(row)
        return course.finish()
