"""The attacks by name: trigger, how it is learned, and how the training set is poisoned by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from defense_core.attacks.fba import ColourStyleTraining, learn_colour_style
from defense_core.attacks.input_aware import InputAwareTraining, learn_input_aware
from defense_core.attacks.joint import Learn
from defense_core.attacks.lf import LowFrequencyTraining, learn_low_frequency
from defense_core.attacks.lira import LiraTraining, learn_lira
from defense_core.attacks.poison import Poisoning
from defense_core.attacks.probe import TRIGGERS, Probe, Trigger
from defense_core.attacks.ssba import SsbaTraining, learn_ssba
from defense_core.attacks.trojan import TrojanTraining, learn_trojan
from defense_core.config import from_mapping, to_mapping
from defense_core.errors import ConfigError


@dataclass(frozen=True)
class AttackKind:
    """A row of the catalogue.

    Attributes:
        summary: one line.
        clean_label: labels stay true, by default.
        cover_share: cover samples as a multiple of the poisoned ones, by default.
        training: configuration of learning the trigger; ``None`` where there is nothing to learn.
        learn: the function that learns it.
        surrogate: whether a clean model of the same architecture is trained first.
        fixed_target: whether the trigger can serve one target class only.
    """

    summary: str
    clean_label: bool = False
    cover_share: float = 0.0
    training: type[Any] | None = None
    learn: Learn | None = None
    surrogate: bool = False
    fixed_target: bool = False

    @property
    def label_modes(self) -> tuple[str, ...]:
        """The label modes that a specification may ask for, the default first."""
        if self.clean_label:
            return ("clean_label", "all_to_one")
        return ("all_to_one", "clean_label") if self.fixed_target else ("all_to_one", "all_to_all", "clean_label")


ATTACKS: dict[str, AttackKind] = {
    "badnets": AttackKind("a patch at a fixed place"),
    "blended": AttackKind("a picture mixed faintly into the whole image"),
    "sig": AttackKind("a sinusoid over the image, labels true", clean_label=True, fixed_target=True),
    "wanet": AttackKind("a small smooth warp, with noise-mode cover", cover_share=2.0),
    "bpp": AttackKind("fewer grey levels with dithering, with negative samples as cover", cover_share=1.0),
    "adaptive_blend": AttackKind("half of a faint picture in training, all of it at test time", cover_share=1.0),
    "label_consistent": AttackKind(
        "marked corners on adversarial images of the target class, labels true",
        clean_label=True,
        surrogate=True,
        fixed_target=True,
    ),
    "low_frequency": AttackKind(
        "one smooth perturbation computed against a clean model",
        training=LowFrequencyTraining,
        learn=learn_low_frequency,
        surrogate=True,
        fixed_target=True,
    ),
    "trojan": AttackKind(
        "a patch that excites chosen units of a clean model",
        training=TrojanTraining,
        learn=learn_trojan,
        surrogate=True,
    ),
    "input_aware": AttackKind(
        "a trigger of its own for every image, with cross-trigger cover",
        cover_share=1.0,
        training=InputAwareTraining,
        learn=learn_input_aware,
        surrogate=True,
    ),
    "lira": AttackKind(
        "a faint perturbation learned with a classifier", training=LiraTraining, learn=learn_lira, surrogate=True
    ),
    "ssba": AttackKind("a message hidden by a learned encoder", training=SsbaTraining, learn=learn_ssba),
    "fba": AttackKind(
        "a learned change of colours", training=ColourStyleTraining, learn=learn_colour_style, surrogate=True
    ),
}
"""Every attack of the lab; the names are those of :data:`defense_core.attacks.probe.TRIGGERS`."""


@dataclass(frozen=True)
class Attack:
    """An attack that is ready to be planted.

    Attributes:
        name: what reports call it.
        kind: key of :data:`ATTACKS`.
        num_classes: number of classes K.
        target: target class, or ``None`` for all-to-all.
        settings: the trigger, or the configuration of learning it.
        clean_label: whether labels stay true.
        cover_rate: cover samples as a share of the training set; ``None``: the kind's share of the poisoning rate.
    """

    name: str
    kind: str
    num_classes: int
    target: int | None
    settings: Any
    clean_label: bool
    cover_rate: float | None = None

    @property
    def row(self) -> AttackKind:
        """Its row in the catalogue."""
        return ATTACKS[self.kind]

    @property
    def trigger(self) -> Trigger | None:
        """The trigger, ``None`` where it has yet to be learned."""
        return self.settings if isinstance(self.settings, TRIGGERS[self.kind]) else None

    def probe(self, trigger: Trigger) -> Probe:
        """The trigger with this attack's name and label rule. Raises ConfigError for a target that is no class."""
        return Probe(self.name, self.kind, trigger, self.num_classes, self.target)

    def poisoning(self, rate: float) -> Poisoning:
        """How the training set is poisoned at ``rate``. Raises ConfigError for rates out of range."""
        cover = self.row.cover_share * rate if self.cover_rate is None else self.cover_rate
        return Poisoning(rate=rate, cover_rate=cover, clean_label=self.clean_label)


@dataclass(frozen=True)
class _Common:
    """The keys of a specification that every kind has."""

    kind: str
    name: str = ""
    target: int | None = 0
    clean_label: bool | None = None
    cover_rate: float | None = None


def attack_from_spec(spec: Mapping[str, Any], *, num_classes: int) -> Attack:
    """Read an attack specification, e.g. ``{"kind": "wanet", "target": 0, "strength": 0.5, "cover_rate": 0.2}``.

    Args:
        spec: ``kind`` is required; ``target`` defaults to 0, ``null`` means all-to-all; ``name`` defaults to the
            kind; ``clean_label`` and ``cover_rate`` to the kind's own; the rest are the fields of the trigger or, for
            a learned kind without ``path``, of the configuration that it is learned with.

    Raises:
        ConfigError: unknown kind, unknown key, a value out of range, or a label rule that the kind does not have.
    """
    kind = spec.get("kind") if isinstance(spec, Mapping) else type(spec).__name__
    if not isinstance(kind, str) or kind not in ATTACKS:
        raise ConfigError("attack kind is unknown", expected="one of " + ", ".join(sorted(ATTACKS)), got=repr(kind))
    shared = {field.name for field in dataclasses.fields(_Common)}
    common = from_mapping(_Common, {key: value for key, value in spec.items() if key in shared}, where="attack")
    row, name = ATTACKS[common.kind], common.name or common.kind
    learned = row.training is not None and "path" not in spec
    settings = from_mapping(
        row.training if learned and row.training is not None else TRIGGERS[common.kind],
        {key: value for key, value in spec.items() if key not in shared},
        where=f"attack {name}",
    )
    clean_label = row.clean_label if common.clean_label is None else common.clean_label
    if common.target is None and (clean_label or row.fixed_target):
        raise ConfigError(f"attack {name} needs a target class", expected="a class number", got="null (all-to-all)")
    if common.target is not None and not 0 <= common.target < num_classes:
        raise ConfigError(f"attack {name}: target is no class", expected=f"0..{num_classes - 1}", got=common.target)
    return Attack(name, common.kind, num_classes, common.target, settings, clean_label, common.cover_rate)


def default_settings(kind: str) -> dict[str, Any]:
    """What a specification of ``kind`` may set, with its defaults, JSON types."""
    settings: dict[str, Any] = to_mapping((ATTACKS[kind].training or TRIGGERS[kind])())
    return settings
