"""What a scan says: a verdict of three, why, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from defense_core import config
from defense_core.scan.base import Observation
from defense_core.scan.confirm import Confirmation
from defense_core.verdict import Verdict


@dataclass(frozen=True)
class DetectorEntry:
    """One detector's or channel's line.

    Attributes:
        name: of the detector.
        channel: whose part it is; empty where it is evidence only.
        statistic: its own; larger is more suspicious.
        score: for ranking; ``None`` where no pool covers the model.
        p_value: by the pool; ``None`` where no pool covers the model.
        targets: classes that it suspects.
        why: one plain sentence.
        facts: further values.
    """

    name: str
    channel: str
    statistic: float
    score: float | None
    p_value: float | None
    targets: tuple[int, ...]
    why: str
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class ChannelEntry:
    """One channel of the verdict.

    Attributes:
        name: of the channel.
        p_value: conformal.
        adjusted: Holm's, over all channels that the scan was to run.
        score: for ranking, see :class:`defense_core.scan.calibrate.Standing`.
        targets: classes that it suspects.
    """

    name: str
    p_value: float
    adjusted: float
    score: float
    targets: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ScanReport:
    """The result of a scan.

    Attributes:
        verdict: PASS: no evidence found at ``fpr``, which is not a proof of absence; FAIL: a backdoor, confirmed on
            held-out clean images; UNKNOWN: everything else.
        sentence: the verdict in words for somebody who is no researcher.
        p_value: the least of the channels' Holm-adjusted p-values; ``None`` where no pool covers the model.
        comparable: clean reference models cover the model, and are enough for ``fpr``; otherwise the p-value says
            nothing, and the verdict is UNKNOWN whatever was found.
        probability: calibrated P(backdoor) at equal prior odds; ``None`` where no pool that has one covers the model.
        score: largest channel score, for ranking models; ``None`` without a pool.
        fpr: nominal false positive rate.
        target_classes: suspected, the most suspicious first; empty unless the p-value is at most ``fpr``.
        reasons: why UNKNOWN.
        unfinished: detectors of the verdict that the time did not allow.
        coverage: what a PASS would mean, and what it says nothing about.
        regime: how many clean images the detectors searched with: none, few or many.
        images: clean images that were there, to search with and to confirm on, without exact copies.
        pool: digest of the calibration pool, and its number of references; empty and 0 without.
    """

    verdict: Verdict
    sentence: str
    p_value: float | None
    comparable: bool
    probability: float | None
    score: float | None
    fpr: float
    target_classes: tuple[int, ...]
    channels: tuple[ChannelEntry, ...]
    detectors: tuple[DetectorEntry, ...]
    confirmations: tuple[Confirmation, ...]
    reasons: tuple[str, ...]
    unfinished: tuple[str, ...]
    coverage: tuple[str, ...]
    regime: str
    images: int
    pool: str
    references: int
    covariates: Mapping[str, float]
    observations: Mapping[str, Observation]

    def to_results(self) -> dict[str, Any]:
        """The report as JSON values, without tensors."""
        return {name: config.to_mapping(value) for name, value in vars(self).items() if name != "observations"}
