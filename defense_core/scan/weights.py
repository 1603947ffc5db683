"""What the weights alone say: rows of the last layer that stand out, and channels of outlying Lipschitz bound.

A backdoor has to drive one logit whatever else is in the image, and often leaves that class's row of the last layer
with larger weights than the others' (Fields et al., *Trojan signatures in DNN weights*, 2021, arXiv 2109.02836); and
channels that react to a trigger have a large bound on their Lipschitz constant (CLP, Zheng et al., ECCV 2022,
arXiv 2208.03111, eq. 9). It costs next to nothing and proves nothing: training recipes move these numbers too, and
they outlive the backdoor. It is triage and evidence, never part of a verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.errors import NonFiniteOutputs
from defense_core.inference import channels_last
from defense_core.layers import classifier_head, is_finite, unit_layers
from defense_core.purify.clp import channel_bounds
from defense_core.purify.masks import following_norms
from defense_core.scan.base import Observation, Subject, outlying

INDICATORS = ("norm", "largest", "mean", "bias", "positive")
FLOOR = 1.0
"""Scores are robust deviations already, and one such deviation between two classes is nothing unusual."""


@dataclass(frozen=True)
class WeightsConfig:
    """Settings.

    Attributes:
        far: a channel counts as outlying from so many standard deviations above the mean of its layer.
        relative_floor: added to the robust deviation of an indicator, as a share of the root mean square of its values.
    """

    far: float = 3.0
    relative_floor: float = 0.05

    def __post_init__(self) -> None:
        require(self.far > 0, "far", "a positive number", self.far)
        require(self.relative_floor > 0, "relative_floor", "a positive share", self.relative_floor)


def weights(subject: Subject, config: WeightsConfig = WeightsConfig()) -> Observation:
    """Look at the weights; two random images find out which normalisation follows which layer.

    The score of a class is the largest of its robust deviations in the five indicators, upwards. Without a last layer
    of one row a class there are no scores, and the statistic is 0.

    Raises:
        NonFiniteOutputs: a weight or an output is NaN or Inf.
        OutOfTime: the scan's time is used up.
        Cancelled: a stop was requested.
    """
    if not is_finite(subject.model):
        raise NonFiniteOutputs("the model's weights are not finite", expected="finite weights", got="NaN or Inf")
    rows = head_rows(subject.model, subject.num_classes)
    deviations = {} if rows is None else row_deviations(*rows, relative_floor=config.relative_floor)
    scores = torch.stack(list(deviations.values())).amax(0).tolist() if deviations else []
    statistic, members = outlying(scores, floor=FLOOR) if scores else (0.0, ())
    facts = {
        "indicators": {name: [round(value, 3) for value in values.tolist()] for name, values in deviations.items()},
        "log_weight_norm": log_weight_norm(subject.model),
        **_channels(subject, config),
    }
    return Observation(
        detector="weights",
        statistic=statistic,
        why=_sentence(deviations, members),
        class_scores=tuple(scores),
        classes=tuple(range(len(scores))),
        targets=members,
        facts=MappingProxyType(facts),
    )


def head_rows(model: nn.Module, num_classes: int) -> tuple[Tensor, Tensor] | None:
    """Rows (K, features) and biases (K,) of the last layer, float64 on the CPU; ``None`` where it has not K rows."""
    head = classifier_head(model)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or len(weight) != num_classes:
        return None
    rows = weight.detach().flatten(1).double().cpu()
    bias = getattr(head, "bias", None)
    return rows, bias.detach().double().cpu() if isinstance(bias, Tensor) else torch.zeros(num_classes).double()


def row_deviations(rows: Tensor, bias: Tensor, *, relative_floor: float) -> dict[str, Tensor]:
    """For each indicator, the robust deviation of every class, ``(v - median) / (1.4826 MAD + floor)``, (K,).

    Args:
        rows: (K, features).
        bias: (K,).
        relative_floor: times the root mean square of an indicator's values, so that no unit matters.
    """
    values = (rows.norm(dim=1), rows.amax(1), rows.mean(1), bias, rows.clamp_min(0).sum(1))
    return {
        name: _robust(value, relative_floor * float(value.square().mean().sqrt()))
        for name, value in zip(INDICATORS, values, strict=True)
    }


def log_weight_norm(model: nn.Module) -> float:
    """Logarithm of the root mean square of all weights; biases and normalisations' scales are no weights."""
    matrices = [value.detach().double() for value in model.parameters() if value.dim() >= 2]
    squares = sum(float(value.square().sum()) for value in matrices)
    count = sum(value.numel() for value in matrices)
    return 0.5 * math.log(max(squares, 1e-300) / max(count, 1))


def _robust(values: Tensor, floor: float) -> Tensor:
    apart = values - values.median()
    deviation = 1.4826 * float(apart.abs().median()) + floor
    return apart / deviation if deviation > 0 else torch.zeros_like(apart)


def _channels(subject: Subject, config: WeightsConfig) -> dict[str, float]:
    """The most outlying channel bound, in standard deviations of its layer, and the share of outlying channels."""
    pixels = torch.rand(2, *subject.task.input_size, generator=subject.generator()).to(subject.device)
    with torch.no_grad():
        subject.logits(pixels)  # refuses outputs that are not finite
    layers = unit_layers(subject.model)
    norms = following_norms(subject.model, channels_last(subject.task.inputs(pixels)))
    apart: list[Tensor] = []
    with subject.progress.phase("weights", total=len(layers)) as phase:
        for layer in layers:
            norm = norms.get(layer.name)
            bounds = channel_bounds(layer, subject.model.get_submodule(norm) if norm else None).double().cpu()
            apart.append((bounds - bounds.mean()) / bounds.std(correction=0).clamp_min(1e-12))
            subject.deadline.check()
            phase.advance()
    if not apart:
        return {"channel_largest": 0.0, "channels_far": 0.0}
    every = torch.cat(apart)
    return {"channel_largest": float(every.max()), "channels_far": float((every > config.far).double().mean())}


def _sentence(deviations: dict[str, Tensor], members: tuple[int, ...]) -> str:
    if not members:
        return "The model has no last layer with one row a class, so its weights single out no class."
    first = members[0]
    name = max(deviations, key=lambda each: float(deviations[each][first]))
    words = {"norm": "length", "largest": "largest weight", "mean": "mean weight", "bias": "bias",
             "positive": "sum of positive weights"}  # fmt: skip
    return (
        f"In the last layer, the {words[name]} of class {first} lies {float(deviations[name][first]):.1f} robust "
        f"deviations above the usual class; clean models have such classes too."
    )
