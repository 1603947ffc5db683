"""A probe: a trigger, and the labels that the backdoor would answer with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from defense_core.attacks.adaptive_blend import AdaptiveBlend
from defense_core.attacks.badnets import BadNets
from defense_core.attacks.blended import Blended
from defense_core.attacks.bpp import Bpp
from defense_core.attacks.fba import ColourStyle
from defense_core.attacks.input_aware import InputAware
from defense_core.attacks.label_consistent import LabelConsistent
from defense_core.attacks.lf import LowFrequency
from defense_core.attacks.lira import Lira
from defense_core.attacks.sig import Sinusoid
from defense_core.attacks.ssba import Ssba
from defense_core.attacks.trojan import Trojan
from defense_core.attacks.wanet import WaNet
from defense_core.config import from_mapping
from defense_core.errors import ConfigError

MAX_UNTRIGGERED = 0.5
"""Images of other classes without the trigger that may be answered with the attacker's class: at most half of them. A
model that answers nearly every image so has no backdoor; it has learnt nothing."""


class Trigger(Protocol):
    """A pure, deterministic change of images."""

    def apply(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to uint8 of the same shape; the input is left alone."""
        ...


TRIGGERS: dict[str, type[Any]] = {
    "badnets": BadNets,
    "blended": Blended,
    "sig": Sinusoid,
    "wanet": WaNet,
    "bpp": Bpp,
    "adaptive_blend": AdaptiveBlend,
    "label_consistent": LabelConsistent,
    "low_frequency": LowFrequency,
    "trojan": Trojan,
    "input_aware": InputAware,
    "lira": Lira,
    "ssba": Ssba,
    "fba": ColourStyle,
}
"""Trigger kinds by the name that probe files use. Learned kinds name a file by ``path`` and ``sha256``."""


@dataclass(frozen=True)
class Probe:
    """A trigger with its label rule.

    Attributes:
        name: what reports call it.
        kind: key of :data:`TRIGGERS`.
        trigger: the change of the image.
        num_classes: number of classes K.
        target: the class that all triggered images are sent to (all-to-one), or ``None``
            for all-to-all: label ``y`` is sent to ``(y + 1) mod K``.
    """

    name: str
    kind: str
    trigger: Trigger
    num_classes: int
    target: int | None = 0

    def __post_init__(self) -> None:
        if self.target is not None and not 0 <= self.target < self.num_classes:
            raise ConfigError(
                f"probe {self.name}: target is no class", expected=f"0..{self.num_classes - 1}", got=self.target
            )

    def apply(self, images: Tensor) -> Tensor:
        """Triggered uint8 images."""
        return self.trigger.apply(images)

    def expected(self, labels: Tensor) -> Tensor:
        """Labels that the attacker wants, int64 (N,)."""
        if self.target is None:
            return (labels + 1) % self.num_classes
        return torch.full_like(labels, self.target)

    def eligible(self, labels: Tensor) -> Tensor:
        """Samples that count for ASR: those whose label is not what the attacker wants, bool (N,)."""
        return self.expected(labels) != labels

    def to_spec(self) -> dict[str, Any]:
        """The mapping that :func:`probe_from_spec` reads back."""
        parameters = dataclasses.asdict(self.trigger)  # type: ignore[call-overload]
        return {"name": self.name, "kind": self.kind, "target": self.target, **parameters}


@dataclass(frozen=True)
class _NoTrigger:
    def apply(self, images: Tensor) -> Tensor:
        return images


def without_trigger(probe: Probe) -> Probe:
    """``probe`` without its trigger: its success is the share of clean images of other classes that get the attacker's
    class anyway, see ``MAX_UNTRIGGERED``."""
    return dataclasses.replace(probe, name=f"{probe.name} left out", trigger=_NoTrigger())


def probe_from_spec(spec: Mapping[str, Any], *, num_classes: int) -> Probe:
    """Read a probe specification, e.g. ``{"kind": "badnets", "target": 0, "size": 3}``.

    Args:
        spec: ``kind`` is required; ``target`` defaults to 0, ``null`` means all-to-all;
            ``name`` defaults to the kind; the rest are the trigger's own fields.

    Raises:
        ConfigError: unknown kind, unknown key, or a value out of range.
    """
    if not isinstance(spec, Mapping) or "kind" not in spec:
        raise ConfigError(
            "probe specification is malformed", expected="a mapping with a key kind", got=type(spec).__name__
        )
    kind = spec["kind"]
    if not isinstance(kind, str) or kind not in TRIGGERS:
        raise ConfigError("probe kind is unknown", expected="one of " + ", ".join(sorted(TRIGGERS)), got=repr(kind))
    name = str(spec.get("name", kind))
    target = spec.get("target", 0)
    if target is not None and (isinstance(target, bool) or not isinstance(target, int)):
        raise ConfigError(f"probe {name}: target is malformed", expected="a class number or null", got=repr(target))
    parameters = {key: value for key, value in spec.items() if key not in ("name", "kind", "target")}
    trigger = from_mapping(TRIGGERS[kind], parameters, where=f"probe {name}")
    return Probe(name=name, kind=kind, trigger=trigger, num_classes=num_classes, target=target)
