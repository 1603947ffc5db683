"""The calibration pool: what the detectors read on clean reference models of one kind.

Only statistics are kept, no weights. A pool belongs to a stratum (architecture, classes, input size) and to one
configuration of the detectors; it covers no other model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defense_core import config
from defense_core.config import from_mapping, require
from defense_core.errors import ConfigError
from defense_core.files import write_atomic
from defense_core.scan.base import Observation

POOL_FORMAT = 1
SHIPPED = Path(__file__).parent / "pools"
MIN_REFERENCES = 59
"""References from which three channels under Holm can reach 0.05: 3 / (59 + 1) = 0.05."""
MAX_POOL_BYTES = 20_000_000
SUREST, LEAST_SURE = 0.98, 0.02
"""A stated probability is never further out: one confident mistake costs more than all the confidence gains."""


@dataclass(frozen=True)
class Stratum:
    """What a pool's models have in common.

    Attributes:
        architecture: name, without arguments; width and depth may differ inside a stratum.
        num_classes: K.
        input_size: (C, H, W).
        class_names: of the data that the references were trained on. A model with the same names is compared class by
            class; another with the same K, for which the user named the pool, only by how far its highest class stands
            out.
    """

    architecture: str
    num_classes: int
    input_size: tuple[int, int, int]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """One detector on one model: :class:`defense_core.scan.base.Observation` without its words and tensors."""

    statistic: float
    class_scores: tuple[float, ...] = ()
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reference:
    """One clean model of a pool.

    Attributes:
        name: unique in the pool.
        recipe: how it was trained, for the reader.
        covariates: numbers by which :mod:`defense_core.scan.calibrate` sees that a model is of another kind.
        readings: by regime (``none``, ``few``, ``many`` clean images) and detector.
    """

    name: str
    recipe: Mapping[str, Any]
    covariates: Mapping[str, float]
    readings: Mapping[str, Mapping[str, Reading]]


@dataclass(frozen=True)
class Probability:
    """P(backdoor) as ``1 / (1 + exp(-(intercept + slope * weight(score))))``, at equal prior odds.

    Attributes:
        intercept, slope: fitted on a zoo of clean and backdoored models.
        models: how many.
        kinds: attacks among them.
    """

    intercept: float
    slope: float
    models: int
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(math.isfinite(self.intercept) and math.isfinite(self.slope), "probability", "finite numbers", self)
        require(self.slope >= 0, "slope", "0 or more: a higher score is never less suspicious", self.slope)

    def of(self, score: float) -> float:
        """P(backdoor) of a model with this combined score, between ``LEAST_SURE`` and ``SUREST``."""
        odds = self.intercept + self.slope * score_weight(score)
        return min(SUREST, max(LEAST_SURE, 1 / (1 + math.exp(-max(-50.0, odds)))))


def score_weight(score: float) -> float:
    """``log(1 + score)``, 0 for scores below 0. Scores of strong backdoors run into the hundreds; on the scores
    themselves a logistic fit would put the even chance somewhere among those, far above every clean model."""
    return math.log1p(max(0.0, score))


@dataclass(frozen=True)
class Pool:
    """Statistics of clean reference models.

    Attributes:
        stratum: what they have in common.
        settings_digest: of the detectors' configuration.
        references: the models.
        probability: by regime, where a zoo with backdoored models was there to fit it.
    """

    stratum: Stratum
    settings_digest: str
    references: tuple[Reference, ...]
    probability: Mapping[str, Probability]
    format: int = POOL_FORMAT

    def __post_init__(self) -> None:
        require(self.format == POOL_FORMAT, "format of the pool", str(POOL_FORMAT), self.format)
        names = [reference.name for reference in self.references]
        require(len(set(names)) == len(names), "references", "distinct names", len(names) - len(set(names)))

    @property
    def digest(self) -> str:
        """Identifies the pool in evidence."""
        return config.digest(self)


def reading_of(observation: Observation) -> Reading:
    """What a pool keeps of an observation; seven digits, since more would only be noise in a file."""
    return Reading(_rounded(observation.statistic), tuple(map(_rounded, observation.class_scores)), observation.classes)


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def save_pool(pool: Pool, path: Path) -> None:
    """Write ``pool`` as JSON, one reference a line, atomically."""
    mapping = config.to_mapping(pool)
    references = ",\n  ".join(json.dumps(each, sort_keys=True) for each in mapping.pop("references"))
    head = json.dumps(mapping, sort_keys=True, indent=1)
    write_atomic(path, (head.removesuffix("\n}") + f',\n "references": [\n  {references}\n ]\n}}\n').encode())


def load_pool(path: Path) -> Pool:
    """Read a pool.

    Raises:
        ConfigError: the file is not there, too large, no JSON, or not a pool.
    """
    try:
        if path.stat().st_size > MAX_POOL_BYTES:
            raise ConfigError(
                f"{path} is too large for a pool", expected=f"at most {MAX_POOL_BYTES} bytes", got=path.stat().st_size
            )
        mapping = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no calibration pool", expected="the file that quarantine calibrate writes", got=str(error)
        ) from error
    return from_mapping(Pool, mapping, where="pool")


def shipped_pools() -> tuple[Path, ...]:
    """The pools that come along."""
    return tuple(sorted(SHIPPED.glob("*.json")))


def pool_for(stratum: Stratum, settings_digest: str) -> Pool | None:
    """The shipped pool that covers ``stratum`` under these settings; ``None``: there is none.

    The names of the classes must be the pool's: they are what tells a model of the same data from one of other images
    of the same size, about which the pool's p-values say nothing.
    """
    if not stratum.class_names:
        return None
    shipped = (load_pool(path) for path in shipped_pools())
    return next((pool for pool in shipped if pool.settings_digest == settings_digest and pool.stratum == stratum), None)
