"""The detectors by name, and how many clean images each is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from defense_core.data import CleanSet
from defense_core.scan.additive import AdditiveConfig, additive
from defense_core.scan.base import Observation, Subject
from defense_core.scan.features import ActivenessConfig, CurvatureConfig, activeness, curvature
from defense_core.scan.generator import GeneratorConfig, generator
from defense_core.scan.margin import MarginConfig, margin
from defense_core.scan.pairs import PairsConfig, pairs
from defense_core.scan.patch import PatchConfig, patch
from defense_core.scan.sampling import spread_over_classes
from defense_core.scan.subspace import SubspaceConfig, subspace
from defense_core.scan.token import TokenConfig, token
from defense_core.scan.weights import WeightsConfig, weights

Regime = Literal["none", "few", "many"]

FEW, MANY = 10, 100
"""Clean images from which the regime is ``few`` and ``many``."""
SEARCHED: Mapping[str, int] = {"few": 10, "many": 64}
"""Images that detectors search with; the others are kept to confirm a suspicion on. Always so many, because a
statistic on more images is another statistic, and the pool holds these two."""


@dataclass(frozen=True)
class Detector:
    """One detector.

    Attributes:
        config: its frozen configuration class.
        function: ``function(subject, config) -> Observation``.
        regimes: in which it is run; ``none``: it looks at the model alone.
        as_given: it looks at the weights and not at answers, and gets them as they are.
    """

    config: type[Any]
    function: Callable[[Subject, Any], Observation]
    regimes: tuple[Regime, ...]
    as_given: bool = False


DETECTORS: Mapping[str, Detector] = {
    "weights": Detector(WeightsConfig, weights, ("none",), as_given=True),
    "margin": Detector(MarginConfig, margin, ("none",)),
    "subspace": Detector(SubspaceConfig, subspace, ("many",)),
    "token": Detector(TokenConfig, token, ("few", "many")),
    "additive": Detector(AdditiveConfig, additive, ("few", "many")),
    "patch": Detector(PatchConfig, patch, ("few", "many")),
    "generator": Detector(GeneratorConfig, generator, ("many",)),
    "pairs": Detector(PairsConfig, pairs, ("many",)),
    "activeness": Detector(ActivenessConfig, activeness, ("many",)),
    "curvature": Detector(CurvatureConfig, curvature, ("many",)),
}
"""In the order in which they are run: the cheapest and those that say most come first, in case the time runs out."""

EVIDENCE_ONLY = ("weights", "activeness", "curvature")
"""Never part of the verdict: weights-only evidence outlives the backdoor, the others follow the training recipe."""


@dataclass(frozen=True)
class Settings:
    """Configuration of all detectors; a pool is valid for exactly one."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    margin: MarginConfig = field(default_factory=MarginConfig)
    subspace: SubspaceConfig = field(default_factory=SubspaceConfig)
    token: TokenConfig = field(default_factory=TokenConfig)
    additive: AdditiveConfig = field(default_factory=AdditiveConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    activeness: ActivenessConfig = field(default_factory=ActivenessConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)


def regime_for(count: int) -> Regime:
    """What ``count`` clean images allow."""
    return "many" if count >= MANY else "few" if count >= FEW else "none"


def regime_of(clean: CleanSet | None) -> Regime:
    """What the user's clean images allow."""
    return regime_for(0 if clean is None else len(clean))


def searched_and_held_out(clean: CleanSet | None, regime: Regime) -> tuple[CleanSet | None, CleanSet | None]:
    """The images that detectors search with, spread evenly over the classes, and all the others; ``None`` where fewer
    than ``FEW`` are left over: a suspicion is never confirmed on images that it was found with."""
    if clean is None or regime == "none":
        return None, None
    spread = spread_over_classes(clean)
    count = SEARCHED[regime]
    searched, rest = clean.subset(spread[:count].sort().values), spread[count:].sort().values
    return searched, clean.subset(rest) if len(rest) >= FEW else None
