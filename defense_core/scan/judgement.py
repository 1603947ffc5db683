"""From observations to a verdict of three states: p-values by the pool, Holm, confirmation on held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.errors import MethodDiverged
from defense_core.loop import same_each_time
from defense_core.progress import Progress
from defense_core.scan.base import Deadline, Observation, OutOfTime, subject_of
from defense_core.scan.calibrate import (
    CHANNELS,
    LEAST_REFERENCES,
    Standing,
    holm,
    readers,
    rejects,
    standing,
    uncovered,
)
from defense_core.scan.confirm import Confirmation, confirm
from defense_core.scan.detectors import DETECTORS, EVIDENCE_ONLY, Regime, Settings, regime_of
from defense_core.scan.observe import Observed, observe, wanted
from defense_core.scan.pool import Pool, Reading, reading_of
from defense_core.scan.report import ChannelEntry, DetectorEntry, ScanReport
from defense_core.scan.wording import coverage, incomparable, narrowed, sentence, undecided
from defense_core.task import ImageClassification
from defense_core.verdict import Verdict

__all__ = ["DETECTORS", "Pool", "ScanConfig", "ScanReport", "Settings", "judge", "scan"]

MAX_SUSPECTS = 3


@dataclass(frozen=True)
class ScanConfig:
    """Settings of a scan.

    Attributes:
        fpr: nominal false positive rate of the whole scan.
        budget_s: seconds after which no further detector is begun or continued, and as many again for the confirmation
            of a suspicion; 0: no limit.
        settings: of the detectors; a calibration pool is valid for exactly one.
    """

    fpr: float = 0.05
    budget_s: float = 0.0
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        require(0 < self.fpr < 1, "fpr", "in (0, 1)", self.fpr)
        require(self.budget_s >= 0, "budget_s", "0 (no limit) or more seconds", self.budget_s)


def scan(
    model: nn.Module,
    clean: CleanSet | None,
    config: ScanConfig,
    *,
    pool: Pool | None,
    task: ImageClassification,
    device: torch.device | str,
    progress: Progress,
) -> ScanReport:
    """Scan ``model``: :func:`observe`, then :func:`judge`.

    Args:
        model: left as it is.
        clean: clean images, or ``None``: then only what needs none is run. Exact copies are left out: no image may
            confirm what its copy was searched with.
        pool: statistics of clean reference models of this kind; without, the verdict is UNKNOWN. Where the task's
            class names are the pool's, the model is compared class by class.

    Raises:
        StateDictMismatch: the model's outputs are not one logit a class.
        Cancelled: a stop was requested.
    """
    clean = clean if clean is None else clean.without_copies()
    try:
        observed = observe(
            model, clean, regime_of(clean), config.settings, task=task, device=device, progress=progress,
            deadline=Deadline.after(config.budget_s),
        )  # fmt: skip
    except MethodDiverged as error:
        observed = Observed({}, {}, (), failure=str(error))
    return judge(model, clean, observed, config, pool=pool, task=task, device=device, progress=progress)


def judge(
    model: nn.Module,
    clean: CleanSet | None,
    observed: Observed,
    config: ScanConfig,
    *,
    pool: Pool | None,
    task: ImageClassification,
    device: torch.device | str,
    progress: Progress,
) -> ScanReport:
    """From what the detectors saw to a verdict: p-values by the pool, and the confirmation of a suspicion."""
    regime = regime_of(clean)
    standings = {} if pool is None else _channel_standings(pool, observed, regime, task.class_names)
    singly = {} if pool is None else _detector_standings(pool, observed, regime, task.class_names)
    planned = _planned(regime)
    adjusted = holm({name: standings[name].p_value if name in standings else 1.0 for name in planned})
    targets = _targets(
        standings, [name for name in planned if name in standings and rejects(adjusted[name], config.fpr)]
    )
    confirmations: tuple[Confirmation, ...] = ()
    unanswered = ""
    if targets and observed.held_out is not None:
        subject = subject_of(
            model, observed.searched, task=task, device=device, progress=progress,
            deadline=Deadline.after(config.budget_s),
        )  # fmt: skip
        try:
            with same_each_time(device):
                for each in confirm(subject, observed.held_out, tuple(observed.observations.values()), targets):
                    confirmations += (each,)
        except OutOfTime:
            unanswered = f"the {config.budget_s:g} seconds that it was given for this ran out"
        except MethodDiverged as error:  # on an image that no detector has seen
            unanswered = str(error).rstrip(".")
    channels = tuple(
        ChannelEntry(name, place.p_value, adjusted[name], place.score, place.targets)
        for name, place in standings.items()
        if name in planned
    )
    p_value = min((each.adjusted for each in channels), default=None)
    score = max((each.score for each in channels), default=None)
    confirmed = tuple(each.target for each in confirmations if each.confirmed)
    fewest = min((standings[name].references for name in planned if name in standings), default=_references(pool))
    other_kind = () if pool is None else uncovered(pool, observed.covariates, _regimes(regime), _readings(observed))
    because = incomparable(config.fpr, pool, observed, other_kind, channels=len(planned), references=fewest)
    comparable = p_value is not None and not because
    reasons = because + undecided(
        config.fpr, observed, confirmations, p_value=p_value, targets=targets, comparable=comparable,
        unanswered=unanswered,
    )  # fmt: skip
    pairs = observed.observations.get("pairs")
    without_pairs = pairs is not None and not pairs.measured
    expected = [name for name in planned if name != "pairs" or not without_pairs]
    unread = [name for name in expected if name not in standings and not set(CHANNELS[name]) & set(observed.unfinished)]
    if pool is not None and observed.observations and unread:
        reasons += (f"The pool holds no readings of {', '.join(unread)} with so few clean images: give 100 or more",)
    blind = [] if pool is None else _blind(pool, observed, regime)
    if blind:
        reasons += (f"What {', '.join(blind)} would have found is not known: they saw the references, not this model",)
    unfinished = tuple(name for name in observed.unfinished if name not in EVIDENCE_ONLY)
    if comparable and confirmed:  # classes are suspected, and confirmed, only where the p-value rejects
        verdict = Verdict.FAIL
    elif reasons or not comparable:
        verdict = Verdict.UNKNOWN
    else:
        verdict = Verdict.PASS
    return ScanReport(
        verdict=verdict,
        sentence=sentence(config.fpr, verdict, confirmations, p_value, reasons, references=_references(pool)),
        p_value=p_value,
        comparable=comparable,
        probability=_probability(pool, regime, score) if comparable and not unfinished and not blind else None,
        score=score,
        fpr=config.fpr,
        target_classes=confirmed + tuple(target for target in targets if target not in confirmed),
        channels=channels,
        detectors=tuple(_entry(each, singly) for each in observed.observations.values()),
        confirmations=confirmations,
        reasons=reasons if verdict is Verdict.UNKNOWN else (),
        unfinished=unfinished,
        coverage=coverage(
            regime,
            pool,
            without_pairs=without_pairs,
            class_names=task.class_names,
            failed=bool(observed.failure),
            missing=(*unfinished, *blind),
            without_images=_without_images(observed, task.num_classes),
            narrowed=narrowed(observed, task.num_classes),
        ),
        regime=regime,
        images=0 if clean is None else len(clean),
        pool="" if pool is None else pool.digest,
        references=_references(pool),
        covariates=observed.covariates,
        observations=observed.observations,
    )


def combined_score(observed: Observed, regime: Regime, pool: Pool, class_names: tuple[str, ...]) -> float:
    """The largest channel score: what models are ranked by."""
    standings = _channel_standings(pool, observed, regime, class_names)
    return max(standings[name].score for name in _planned(regime) if name in standings)


def _planned(regime: Regime) -> tuple[str, ...]:
    """Channels that a scan with so many images is to run; Holm counts them all, finished or not."""
    names = wanted(("none", regime))
    return tuple(channel for channel, members in CHANNELS.items() if set(members) & set(names))


def _blind(pool: Pool, observed: Observed, regime: Regime) -> list[str]:
    """Detectors of the verdict that looked at the references and could not look at this model."""
    unmeasured = {name for name, each in observed.observations.items() if not each.measured}
    members = [name for channel in _planned(regime) for name in CHANNELS[channel] if name in unmeasured]
    return [name for name in members if readers(pool, _regimes(regime), name) >= LEAST_REFERENCES]


def _without_images(observed: Observed, classes: int) -> int:
    """Classes that ``subspace``, which keeps a class's own images out, had no image of."""
    seen = observed.observations.get("subspace")
    if seen is None or not seen.measured or observed.searched is None:
        return 0
    return classes - len(observed.searched.labels.unique())


def _regimes(regime: Regime) -> tuple[Regime, ...]:
    """Whose readings a scan is compared with."""
    return ("none",) if regime == "none" else ("none", regime)


def _channel_standings(
    pool: Pool, observed: Observed, regime: Regime, class_names: tuple[str, ...]
) -> dict[str, Standing]:
    """Standing in every channel of the verdict; half a channel has another null distribution, and none."""
    whole = {name: each for name, each in CHANNELS.items() if not set(each) & set(observed.unfinished)}
    return _standings(pool, observed, regime, class_names, whole)


def _readings(observed: Observed) -> dict[str, Reading]:
    """What was read of the model, without the detectors that could not look at it."""
    return {name: reading_of(each) for name, each in observed.observations.items() if each.measured}


def _detector_standings(
    pool: Pool, observed: Observed, regime: Regime, class_names: tuple[str, ...]
) -> dict[str, Standing]:
    """Standing by every single detector."""
    return _standings(pool, observed, regime, class_names, {name: (name,) for name in DETECTORS})


def _standings(
    pool: Pool,
    observed: Observed,
    regime: Regime,
    class_names: tuple[str, ...],
    groups: Mapping[str, tuple[str, ...]],
) -> dict[str, Standing]:
    """Standing by the detectors of each of ``groups``, where one of them was run."""
    readings = _readings(observed)
    by_class = bool(class_names) and class_names == pool.stratum.class_names
    regimes = _regimes(regime)
    found: dict[str, Standing] = {}
    for name, members in groups.items():
        place = standing(pool, regimes, readings, members, by_class=by_class)
        if place is not None:
            found[name] = place if place.targets else replace(place, targets=_named(observed, members))
    return found


def _named(observed: Observed, members: tuple[str, ...]) -> tuple[int, ...]:
    """The classes that detectors name by themselves: pairs have no score for each class."""
    return tuple(
        target for each in members if each in observed.observations for target in observed.observations[each].targets
    )


def _targets(standings: Mapping[str, Standing], suspected: list[str]) -> tuple[int, ...]:
    """The classes that the rejecting channels name, those of the channel that stands out most first."""
    ordered = sorted(suspected, key=lambda name: -standings[name].score)
    return tuple(dict.fromkeys(target for name in ordered for target in standings[name].targets))[:MAX_SUSPECTS]


def _references(pool: Pool | None) -> int:
    return 0 if pool is None else len(pool.references)


def _probability(pool: Pool | None, regime: Regime, score: float | None) -> float | None:
    if pool is None or score is None or regime not in pool.probability:
        return None
    return pool.probability[regime].of(score)


def _entry(observation: Observation, standings: Mapping[str, Standing]) -> DetectorEntry:
    channel = next((name for name, members in CHANNELS.items() if observation.detector in members), "")
    place = standings.get(observation.detector)
    return DetectorEntry(
        observation.detector,
        channel,
        observation.statistic,
        None if place is None else place.score,
        None if place is None else place.p_value,
        observation.targets if place is None else place.targets,
        observation.why,
        observation.facts,
    )
