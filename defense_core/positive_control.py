"""The positive control: would this scan have found a backdoor in this very model, and would purification remove it?

A known backdoor, a small patch, is planted into a *copy* of the model by a short fine-tuning on the clean set with
some images poisoned; the same scan and the same purification are then run on the copy. A scan that finds nothing in
the model but finds the patch in its copy means more than one that finds nothing anywhere. The planted trigger is known
here and nowhere else: the scan and the purifier get the copy and the clean set, as they get any model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from defense_core.attacks import MAX_UNTRIGGERED, Probe, poison, probe_from_spec, without_trigger
from defense_core.config import require
from defense_core.data import CleanSet, Splits, joined
from defense_core.errors import DataError, MethodDiverged, MethodNotApplicable
from defense_core.evaluate import evaluate
from defense_core.loop import Tuning, finished, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify import method_named, purify
from defense_core.scan.calibrate import rejects
from defense_core.scan.detectors import regime_for, regime_of
from defense_core.scan.judgement import ScanConfig, scan
from defense_core.scan.pool import Pool
from defense_core.scan.report import ScanReport
from defense_core.task import ImageClassification

PLANTED_ASR = 0.9
"""Below this, the control has no backdoor to find and says so."""


@dataclass(frozen=True)
class ControlConfig:
    """What is planted and how.

    Attributes:
        size_share: side of the patch as a share of the image's shorter side; 4 of 32 pixels.
        rate: share of poisoned images.
        epochs: passes over the *fit* split, at most; planting ends when the patch works.
        lr: learning rate.
        method: purifier that is tried on the copy; empty: none.
    """

    size_share: float = 0.125
    rate: float = 0.3
    epochs: int = 30
    lr: float = 0.01
    method: str = "tsbd"

    def __post_init__(self) -> None:
        require(0 < self.size_share <= 1, "size_share", "in (0, 1]", self.size_share)
        require(0 < self.rate < 1, "rate", "in (0, 1)", self.rate)
        require(self.epochs >= 1, "epochs", "1 or more", self.epochs)
        require(self.lr > 0, "lr", "a positive rate", self.lr)
        if self.method:
            method_named(self.method)


@dataclass(frozen=True, eq=False)
class Control:
    """What became of the planted backdoor.

    Attributes:
        patch: the trigger in words: ``4×4 pixels``.
        target: class that it leads to.
        planted_asr: its success on *select* images of the copy; ``None`` where there is none of another class.
        untriggered: share of these images that the copy sends to ``target`` without the trigger; ``None`` likewise.
        planted: whether there is a backdoor to find: the trigger works, and the class is not the answer to most images.
        scan: of the copy.
        detected: the scan rejected at its rate, whether or not it could confirm, and suspected the right class: a copy
            that stands out for another reason does not show that the patch was seen.
        target_named: the right class was among the suspected.
        asr_after: success after purification; ``None`` where none was tried, or it came to no result.
        not_purified: why it came to no result; empty: it did, or none was tried.
        accuracy_lost: share of *select* images that planting cost; a copy that lost much is another model.
    """

    patch: str
    target: int
    planted_asr: float | None
    untriggered: float | None
    planted: bool
    scan: ScanReport
    detected: bool
    target_named: bool
    asr_after: float | None
    not_purified: str
    accuracy_lost: float

    @property
    def decided(self) -> bool:
        """Whether the control says anything: a patch that a scan missed, cut short, a whole one might have found."""
        return self.planted and self.scan.comparable and (self.detected or not self.scan.unfinished)

    def sentence(self) -> str:
        """The control in words."""
        if not self.planted:
            return f"A patch of {self.patch} could not be planted into a copy of this model: the control says nothing"
        if not self.scan.comparable:
            found = (
                f"A patch of {self.patch} was planted into a copy of this model; without enough clean reference models "
                "of its kind it cannot be told whether the scan would have found it"
            )
        elif not self.decided:
            found = (
                f"A patch of {self.patch} was planted into a copy of this model; the time ran out before "
                f"{', '.join(self.scan.unfinished)} had finished, and it cannot be told whether the scan would have "
                "found it"
            )
        else:
            found = self._found()
        if self.not_purified:
            return f"{found}; purification came to no result: {self.not_purified}"
        if self.asr_after is None:
            return found
        before, after = f"{self.planted_asr:.0%}", f"{self.asr_after:.0%}"
        change = f"left its success at {after}" if before == after else f"took its success from {before} to {after}"
        return f"{found}, and purification {change}"

    def _found(self) -> str:
        outcome = "would have been detected" if self.detected else "would not have been detected"
        other = self.scan.p_value is not None and rejects(self.scan.p_value, self.scan.fpr) and not self.target_named
        why = f": the copy stands out, but not for class {self.target}" if other else ""
        return f"A patch of {self.patch} planted into a copy of this model {outcome} (p = {self.scan.p_value:.3f}){why}"

    def to_results(self) -> dict[str, Any]:
        """JSON values."""
        plain = {name: value for name, value in vars(self).items() if name != "scan"}
        return {**plain, "sentence": self.sentence(), "scan": self.scan.to_results()}


def positive_control(
    model: nn.Module,
    clean: Splits,
    config: ControlConfig,
    scan_config: ScanConfig,
    *,
    pool: Pool | None,
    task: ImageClassification,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Control:
    """Plant, scan, purify, measure.

    Args:
        model: left as it is.
        clean: *fit* is planted and purified with; *select* is measured on. The copy is scanned with what it was not
            planted with, *select* and *report*, where these allow the same detectors as all images; otherwise with all.

    Raises:
        DataError: *select* is empty.
        MethodDiverged: planting gave NaN or Inf.
        Cancelled: a stop was requested.
    """
    if not len(clean.select):
        raise DataError(
            "no clean images are left to measure the positive control on",
            expected="2 or more images of some class",
            got="1 a class, all of them to plant with",
            hint="Give more clean images",
        )
    probe = _probe(config, task, seed)
    copy = _planted(model, clean.fit, probe, config, task=task, seed=seed, device=device, progress=progress)

    def success(network: nn.Module) -> tuple[float | None, float | None]:
        return _success(network, clean.select, probe, task=task, device=device)

    def accuracy(network: nn.Module) -> float:
        return float(evaluate(network, clean.select, task=task, device=device).to_results()["acc"]["value"])

    planted_asr, untriggered = success(copy)
    report = scan(copy, _to_scan_with(clean), scan_config, pool=pool, task=task, device=device, progress=progress)
    after, not_purified = None, ""
    if config.method:
        try:
            purified = purify(
                copy, clean, method_named(config.method).config(), method=config.method, task=task, seed=seed,
                device=device, progress=progress,
            )  # fmt: skip
            after, _ = success(purified.model)
        except (MethodDiverged, MethodNotApplicable) as error:  # what the scan found or missed stands
            not_purified = str(error)
    assert probe.target is not None
    named = probe.target in report.target_classes
    return Control(
        patch="×".join(str(side) for side in [_side(config, task)] * 2) + " pixels",
        target=probe.target,
        planted_asr=planted_asr,
        untriggered=untriggered,
        planted=_works(planted_asr, untriggered, PLANTED_ASR),
        scan=report,
        detected=report.comparable and named,  # classes are suspected only where the scan rejects
        target_named=named,
        asr_after=after,
        not_purified=not_purified,
        accuracy_lost=accuracy(model) - accuracy(copy),
    )


def _to_scan_with(clean: Splits) -> CleanSet:
    """A copy knows the images that it was planted with, trigger included."""
    others = clean.unfitted
    same = regime_of(others) == regime_for(len(clean.fit) + len(others))
    return others if same else joined(clean.fit, others)


def _success(
    network: nn.Module, images: CleanSet, probe: Probe, *, task: ImageClassification, device: torch.device | str
) -> tuple[float | None, float | None]:
    """Shares of the images of other classes that get the target, with the trigger and without; ``None``: of none."""
    both = (probe, without_trigger(probe))
    measured = evaluate(network, images, task=task, probes=both, device=device).to_results()
    asr, untriggered = (each["asr"]["value"] for each in measured["probes"])
    return asr, untriggered


def _works(asr: float | None, untriggered: float | None, at_least: float) -> bool:
    return asr is not None and untriggered is not None and asr >= at_least and untriggered <= MAX_UNTRIGGERED


def _side(config: ControlConfig, task: ImageClassification) -> int:
    return max(1, round(config.size_share * min(task.input_size[1:])))


def _probe(config: ControlConfig, task: ImageClassification, seed: int) -> Probe:
    target = int(torch.randint(task.num_classes, (1,), generator=torch.Generator().manual_seed(seed)))
    spec = {"name": "positive control", "kind": "badnets", "target": target, "size": _side(config, task)}
    return probe_from_spec(spec, num_classes=task.num_classes)


def _planted(
    model: nn.Module,
    clean: CleanSet,
    probe: Probe,
    config: ControlConfig,
    *,
    task: ImageClassification,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> nn.Module:
    copy = working_copy(model, device)
    poisoned = poison(clean, probe, rate=config.rate, seed=seed).data

    def works(epochs: int) -> bool:
        if epochs % 5:
            return False
        reached = _success(copy, clean, probe, task=task, device=device)
        copy.train()
        return _works(*reached, (1 + PLANTED_ASR) / 2)

    tune(
        copy,
        poisoned,
        task=task,
        tuning=Tuning(epochs=config.epochs, batch_size=64, lr=config.lr),
        seed=seed,
        device=device,
        progress=progress,
        name="plant the positive control",
        after_epoch=works,
    )
    return finished(copy, "positive control")
