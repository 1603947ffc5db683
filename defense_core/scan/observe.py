"""Run the detectors on one model: the same for a model under scan and for a reference of the pool."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from defense_core.data import CleanSet
from defense_core.inference import accuracy
from defense_core.loop import same_each_time
from defense_core.progress import Progress
from defense_core.scan.base import Deadline, Observation, OutOfTime, subject_of
from defense_core.scan.centring import centred, rounded_away
from defense_core.scan.detectors import DETECTORS, Regime, Settings, searched_and_held_out
from defense_core.task import ImageClassification

COVARIATES = {"weights": "log_weight_norm", "margin": "mean_log_margin"}
"""Facts of detectors by which a model of another kind is recognised."""

ROUNDED = "Its answers are not the same in bfloat16, in which this device computes: nothing found in them would count"


@dataclass(frozen=True, eq=False)
class Observed:
    """What the detectors saw.

    Attributes:
        observations: by detector, those that finished.
        covariates: see :func:`defense_core.scan.calibrate.uncovered`.
        unfinished: detectors that the time did not allow.
        searched: clean images that the detectors searched with.
        held_out: others, to confirm a suspicion on; ``None`` where too few are left.
        failure: why nothing could be observed at all; empty where something was.
    """

    observations: Mapping[str, Observation]
    covariates: Mapping[str, float]
    unfinished: tuple[str, ...]
    searched: CleanSet | None = None
    held_out: CleanSet | None = None
    failure: str = ""


def wanted(regimes: Sequence[Regime]) -> tuple[str, ...]:
    """The detectors that run in any of ``regimes``, in order."""
    return tuple(name for name, detector in DETECTORS.items() if set(detector.regimes) & set(regimes))


def observe(
    model: nn.Module,
    clean: CleanSet | None,
    regime: Regime,
    settings: Settings,
    *,
    task: ImageClassification,
    device: torch.device | str,
    progress: Progress,
    deadline: Deadline = Deadline(),
    seconds: dict[str, float] | None = None,
    only: Sequence[str] = (),
) -> Observed:
    """Run every detector of ``regime``, and those that need no image.

    Args:
        model: left as it is.
        clean: the user's clean set; as many images as the regime allows are searched with.
        seconds: where to put how long each detector took.
        only: names of detectors; empty: every one.

    Raises:
        NonFiniteOutputs: the model answers NaN or Inf.
        StateDictMismatch: its outputs are not one logit a class.
        Cancelled: a stop was requested.
    """
    images, held_out = searched_and_held_out(clean, regime)
    as_given = subject_of(model, images, task=task, device=device, progress=progress, deadline=deadline, centred=False)
    subject = replace(as_given, model=centred(as_given.model, task))
    if rounded_away(subject.model, task, subject.device):
        return Observed({}, {}, (), images, held_out, failure=ROUNDED)
    regimes: tuple[Regime, ...] = ("none",) if images is None else ("none", regime)
    names = tuple(name for name in wanted(regimes) if not only or name in only)
    observations: dict[str, Observation] = {}
    for name in names:
        started = time.monotonic()
        row = DETECTORS[name]
        try:
            with same_each_time(subject.device):
                observations[name] = row.function(as_given if row.as_given else subject, getattr(settings, name))
        except OutOfTime:
            break
        if seconds is not None:
            seconds[name] = time.monotonic() - started
    covariates = {
        fact: float(observations[name].facts[fact]) for name, fact in COVARIATES.items() if name in observations
    }
    if regime == "many" and images is not None:
        covariates["accuracy"] = accuracy(subject.model, images, task=task, device=device, precision="auto")
    unfinished = tuple(name for name in names if name not in observations)
    return Observed(observations, covariates, unfinished, images, held_out)
