"""Poisoning of a training set: which samples carry the trigger, which are cover, and what they are labelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from defense_core.attacks.probe import Probe
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.errors import ConfigError

Prepare = Callable[[Tensor, Tensor], Tensor]
"""What is done to (images, labels) of the poisoned samples before the trigger."""


@runtime_checkable
class Planted(Protocol):
    """A trigger that looks different in training than at test time."""

    def planted(self, images: Tensor, seed: int) -> Tensor:
        """Poisoned training images, uint8 (N, C, H, W)."""
        ...


@runtime_checkable
class Covered(Protocol):
    """A trigger that has cover samples: nearly triggered, rightly labelled."""

    def cover(self, images: Tensor, seed: int) -> Tensor:
        """Cover images, uint8 (N, C, H, W)."""
        ...


@dataclass(frozen=True)
class Poisoning:
    """How much of a training set is changed, and how it is labelled.

    Attributes:
        rate: poisoned samples as a share of the whole set, in (0, 1).
        cover_rate: cover samples as a share of the whole set; they are other samples than the poisoned ones.
        clean_label: draw the poisoned samples from the target class and leave their labels, instead of drawing
            from all classes and labelling them as the attacker wants (all-to-one or all-to-all, as the probe says).
    """

    rate: float = 0.1
    cover_rate: float = 0.0
    clean_label: bool = False

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "rate", "in (0, 1)", self.rate)
        require(
            0 <= self.cover_rate < 1 and self.rate + self.cover_rate <= 1,
            "cover_rate",
            "0 or more, at most 1 together with rate",
            self.cover_rate,
        )

    def label_mode(self, probe: Probe) -> str:
        """``clean_label``, ``all_to_all`` or ``all_to_one``."""
        if self.clean_label:
            return "clean_label"
        return "all_to_all" if probe.target is None else "all_to_one"


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A poisoned training set.

    Attributes:
        data: all samples, the poisoned ones among them.
        index: int64, which ones are poisoned.
        cover: int64, which ones are cover.
    """

    data: CleanSet
    index: Tensor
    cover: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def poison(data: CleanSet, probe: Probe, *, rate: float, seed: int) -> Poisoned:
    """Trigger and relabel ``round(rate * N)`` samples drawn from the whole set.

    Args:
        data: clean training samples; left alone.
        rate: poisoning rate, in (0, 1).
        seed: draws the samples.
    """
    return poison_by(data, probe, Poisoning(rate=rate), seed=seed)


def poison_by(
    data: CleanSet, probe: Probe, poisoning: Poisoning, *, seed: int, prepare: Prepare | None = None
) -> Poisoned:
    """Poison ``round(rate * N)`` samples and turn ``round(cover_rate * N)`` others into cover.

    Args:
        data: clean training samples; left alone.
        probe: trigger and label rule.
        seed: draws the samples, and whatever the trigger draws for each of them.
        prepare: change of the poisoned samples before the trigger (see ``label_consistent.adversarial``).

    Raises:
        ConfigError: no sample would be poisoned, the target class is too small for a clean-label attack, a
            clean-label attack has no target, or cover was asked of a trigger that has none.
    """
    require_possible(data, probe.target, poisoning, trigger=type(probe.trigger), kind=probe.kind)
    index, cover = _draw(data, probe, poisoning, seed)
    images, labels = data.images.clone(), data.labels.clone()
    chosen = data.images[index]
    if prepare is not None:
        chosen = prepare(chosen, data.labels[index])
    trigger = probe.trigger
    images[index] = trigger.planted(chosen, seed) if isinstance(trigger, Planted) else probe.apply(chosen)
    if not poisoning.clean_label:
        labels[index] = probe.expected(data.labels[index])
    if len(cover) and isinstance(trigger, Covered):
        images[cover] = trigger.cover(data.images[cover], seed + 1)
    return Poisoned(CleanSet(images, labels, data.num_classes), index, cover)


def require_possible(
    data: CleanSet, target: int | None, poisoning: Poisoning, *, trigger: type[object], kind: str
) -> None:
    """Refuse what could not be planted into ``data``, before anything is learnt or trained for it.

    Raises:
        ConfigError: as :func:`poison_by`.
    """
    count = round(poisoning.rate * len(data))
    if count < 1:
        raise ConfigError(
            "no sample would be poisoned",
            expected=f"a rate of {1 / max(len(data), 1):.2g} or more for {len(data)} samples",
            got=poisoning.rate,
        )
    if round(poisoning.cover_rate * len(data)) and not issubclass(trigger, Covered):
        raise ConfigError(f"attack {kind} has no cover samples", expected="cover_rate 0", got=poisoning.cover_rate)
    if not poisoning.clean_label:
        return
    if target is None:
        raise ConfigError("a clean-label attack needs a target class", expected="a class number", got="all-to-all")
    members = int((data.labels == target).sum())
    if members < count:
        raise ConfigError(
            "the target class is too small for this rate",
            expected=f"a rate of at most {members / len(data):.4f}: a clean-label attack changes images of "
            f"class {target} only",
            got=poisoning.rate,
        )


def _draw(data: CleanSet, probe: Probe, poisoning: Poisoning, seed: int) -> tuple[Tensor, Tensor]:
    count, covers = round(poisoning.rate * len(data)), round(poisoning.cover_rate * len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)
    drawn = order[data.labels[order] == probe.target] if poisoning.clean_label else order
    index = drawn[:count].sort().values
    free = torch.ones(len(data), dtype=torch.bool, device=order.device)
    free[index] = False
    return index, order[free[order]][:covers].sort().values
