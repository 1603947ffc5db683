"""How a purifier chooses its own strength: what it may look at, what accuracy a change costs, and the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.errors import MethodDiverged
from defense_core.inference import Precision, autocast, channels_last, images_at_once, logits_of, outputs_of
from defense_core.layers import evaluating
from defense_core.progress import Progress
from defense_core.selection import permitted_drop
from defense_core.task import Task

T = TypeVar("T")
Trials = list[dict[str, float | None]]
"""One row a trial: ``strength``, and ``accuracy``, which is ``None`` where it diverged."""
TEMPERATURES = tuple(0.5 * 1.1**step for step in range(25))
"""Candidates between 0.5 and 5."""
LEAST_SEEN = 30
"""Images that are chosen on count as so many, at least: of ten one may be lost and not three, of three none."""
VIEWS = 6
"""Of each image, by which a drop of accuracy is estimated: itself and augmented ones."""


def require_factors(factors: tuple[float, ...], name: str) -> None:
    """Refuse candidates by which a strength is multiplied that are none, or below 1. Raises ConfigError."""
    require(bool(factors) and min(factors) >= 1, name, "numbers of 1 or more", factors)


def chooser(clean: Splits) -> CleanSet:
    """The split on which hyper-parameters are chosen: *select*, or *fit* where every class
    has one image only and nothing could be set aside."""
    return clean.select if len(clean.select) else clean.fit


def choosers(clean: Splits) -> int:
    """How many images :func:`strongest_within` is told that it chooses on."""
    return max(len(clean.select) or len(clean.fit), LEAST_SEEN)


def cautious_accuracy(before: Tensor, after: Tensor) -> float:
    """Accuracy after a change, less one standard error of the paired difference.

    On a select split of 200 images that error is about two points, and a search that goes up as long
    as the plain accuracy holds would follow the luck of the split.

    Args:
        before: which images the unpurified model labels as stated, bool (N,).
        after: the same for the candidate.

    Returns:
        ``mean(after) - sqrt(b + c) / N``, where ``b`` and ``c`` count the images that changed sides.
    """
    changed = int((before != after).sum())
    return float(after.float().mean()) - math.sqrt(changed) / len(after)


@torch.no_grad()
def expected_drop(
    given: nn.Module,
    candidate: nn.Module,
    data: CleanSet,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    views: int = VIEWS,
    temperature: float = 1.0,
    precision: Precision = "auto",
) -> float:
    """How much accuracy ``candidate`` is expected to lose against ``given``, by the given model's own probabilities.

    Counting which of 200 images changed sides has a standard error of two points. The mean of ``p(a) - p(b)``, where
    ``p`` are the given model's probabilities and ``a`` and ``b`` the classes that it and the candidate choose, has a
    fraction of it and needs no label, so augmented views count too. Where the given model is calibrated it is the
    expected drop; where it is too sure of itself, an upper bound. The answers of a network that ends in a softmax are
    probabilities as they are.

    Args:
        given, candidate: compared in eval mode, as they are.
        data: images that the candidate was not trained on.
        views: the images themselves and so many less one augmented views of each.
        temperature: by which the given model's logits are divided.
        precision: see :class:`defense_core.loop.Tuning`.

    Returns:
        A difference of accuracies in [0, 1].
    """
    images, generator = data.images.to(device), torch.Generator().manual_seed(seed)
    context = autocast(given, precision, device)
    total = 0.0
    with evaluating(given), evaluating(candidate), progress.phase("expected drop", total=views) as phase:
        for view in range(views):
            for part in images.split(images_at_once(images)):
                inputs = channels_last(task.inputs(part if view == 0 else task.augmented(part, generator)))
                with context():
                    outputs, answers = given(inputs), candidate(inputs)
                known = (logits_of(outputs) / temperature).softmax(-1)
                lost = known.amax(-1) - known.gather(-1, answers.argmax(-1, keepdim=True)).squeeze(-1)
                total += float(lost.sum())
            phase.advance()
    return total / (views * len(images))


@torch.no_grad()
def calibrating_temperature(model: nn.Module, data: CleanSet, *, task: Task, device: torch.device | str) -> float:
    """The temperature at which ``model``'s probabilities fit the labels of ``data`` best (Guo et al., ICML 2017).

    Args:
        data: images that the model was not trained on.

    Returns:
        Of ``TEMPERATURES``, the one of smallest cross-entropy.

    Raises:
        MethodDiverged: the model returned NaN or Inf.
    """
    batches = outputs_of(model, data, task=task, device=device, precision="auto")
    logits, labels = logits_of(torch.cat([outputs.float().cpu() for outputs in batches])), data.labels.cpu()
    losses = [float(nn.functional.cross_entropy(logits / each, labels)) for each in TEMPERATURES]
    return TEMPERATURES[losses.index(min(losses))]


def strongest_within(
    strengths: tuple[float, ...],
    attempt: Callable[[float], tuple[float, T]],
    *,
    reference: float,
    max_drop: float,
    images: int,
) -> tuple[float, T, Trials]:
    """The declared rule for every hyper-parameter that trades accuracy for removal.

    Strengths are tried in ascending order while the accuracy on the *select* split stays
    within ``max_drop`` of the unpurified model's; the last one that did is taken, or the
    weakest where even that did not. Going up rather than down spends trials only while they
    buy something. On a small split the bound is never tighter than three images. A candidate
    that diverges is too strong, like one that costs too much; the weakest may not diverge.

    Args:
        strengths: candidates, at least one.
        attempt: accuracy on the select split at a strength, in [0, 1], and what was made.
        reference: accuracy of the unpurified model on the same images.
        max_drop: permitted drop, in [0, 1].
        images: size of the select split.

    Returns:
        The strength, what was made at it, and one row per trial; ``accuracy`` is ``None``
        where the trial diverged.

    Raises:
        MethodDiverged: even the weakest candidate diverged.
    """
    allowed = permitted_drop(max_drop, images)
    first, *others = sorted(strengths)
    chosen = first
    reached, made = attempt(first)
    trials: Trials = [{"strength": first, "accuracy": reached}]
    for strength in others:
        if reference - reached > allowed:
            break
        try:
            reached, candidate = attempt(strength)
        except MethodDiverged:
            trials.append({"strength": strength, "accuracy": None})
            break
        trials.append({"strength": strength, "accuracy": reached})
        if reference - reached <= allowed:
            chosen, made = strength, candidate
    return chosen, made, trials


def strongest_training(
    strengths: tuple[float, ...],
    attempt: Callable[[float], tuple[float, T]],
    *,
    clean: Splits,
    reference: float,
    max_drop: float,
    views: int = 1,
) -> tuple[float, T, Trials]:
    """:func:`strongest_within` for what decides a training on the *fit* split: the weakest alone is tried where no
    *select* split was set aside, because images that the training has seen would permit anything.

    Args:
        strengths, attempt, reference, max_drop: see there.
        views: of each image, where the accuracy is an estimate from several.
    """
    return strongest_within(
        _candidates(strengths, clean),
        attempt,
        reference=reference,
        max_drop=max_drop,
        images=views * choosers(clean),
    )


def strongest_expected(
    strengths: tuple[float, ...], attempt: Callable[[float], tuple[float, T]], *, clean: Splits, max_drop: float
) -> tuple[float, T, Trials]:
    """:func:`strongest_training` where ``attempt`` gives the change of accuracy that :func:`expected_drop` estimates
    from its ``VIEWS`` of every image: 0 for the given model, negative for a loss."""
    return strongest_training(strengths, attempt, clean=clean, reference=0.0, max_drop=max_drop, views=VIEWS)


def strongest_by_halving(
    strengths: tuple[float, ...], attempt: Callable[[float], tuple[float, T]], *, clean: Splits, max_drop: float
) -> tuple[float, T, Trials]:
    """:func:`strongest_expected` for many strengths that lie close together, in fewer trials.

    Of the strengths that are still possible the middle one is tried; where it holds the bound the weaker ones are out,
    where it does not, or diverges, it and the stronger ones are. Where more strength costs more this takes the strength
    that the ascent takes; elsewhere it may be another one, which holds the bound too. Of ten candidates three or four
    are tried. The weakest is tried, and taken, where no other holds the bound.

    Args, returns, raises: as :func:`strongest_expected`.
    """
    allowed = permitted_drop(max_drop, VIEWS * choosers(clean))
    ordered = sorted(_candidates(strengths, clean))
    held, too_strong = 0, len(ordered)
    best: T | None = None
    trials: Trials = []
    while too_strong - held > 1:
        middle = (held + too_strong) // 2
        try:
            reached, candidate = attempt(ordered[middle])
        except MethodDiverged:
            trials.append({"strength": ordered[middle], "accuracy": None})
            too_strong = middle
            continue
        trials.append({"strength": ordered[middle], "accuracy": reached})
        if -reached <= allowed:
            held, best = middle, candidate
        else:
            too_strong = middle
    if best is None:
        reached, best = attempt(ordered[0])
        trials.append({"strength": ordered[0], "accuracy": reached})
    return ordered[held], best, trials


def _candidates(strengths: tuple[float, ...], clean: Splits) -> tuple[float, ...]:
    """Those of ``strengths`` that are tried of a training on the *fit* split."""
    return strengths if len(clean.select) else (min(strengths),)
