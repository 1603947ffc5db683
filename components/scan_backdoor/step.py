"""Scan: a verdict of three states on a model, from the model and clean images alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components._runtime.calibration import pool_of_bundle
from components._runtime.evidence import Clock, compose, read_evidence, write_evidence
from components._runtime.inputs import requirements
from components._runtime.loading import (
    open_images,
    open_model,
    open_splits,
    require_same_interface,
    resolve_device,
    source_digest,
)
from components._runtime.plan import REPORT_SHARE, UNTOUCHED, Loading
from components.scan_backdoor.repeat import RESULT, Outcome, repeated
from defense_core.bundle import Bundle
from defense_core.config import digest, from_mapping, to_mapping
from defense_core.data import CleanSet
from defense_core.files import atomic_directory, write_atomic
from defense_core.progress import NullProgress, Progress
from defense_core.purify.soup import side_by_side
from defense_core.scan.base import Deadline, InvertedTrigger, subject_of
from defense_core.scan.calibrate import rejects
from defense_core.scan.judgement import ScanConfig, scan
from defense_core.scan.pictures import Picture, class_pictures, trigger_picture
from defense_core.scan.pool import Pool
from defense_core.scan.report import ScanReport
from defense_core.scan.residual import Residual, residuals
from defense_core.scan.stored_triggers import kept_triggers, load_triggers, save_triggers
from defense_core.verdict import Finding, Verdict

PICTURES = "pictures"
PICTURED_TRIGGERS = 4
MAX_EVIDENCE_PICTURES = 8


def scan_model(
    model: Path,
    out: Path,
    *,
    name: str = "scan",
    clean: Path | None = None,
    report: float = REPORT_SHARE,
    spec: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    pool: Path | None = None,
    earlier: Path | None = None,
    reference: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    loading: Loading = Loading(),
    progress: Progress = NullProgress(),
) -> dict[str, Any]:
    """Scan ``model``; where ``earlier`` is a scan of the same bytes with the same settings, repeat what it says.

    Args:
        model: a bundle folder, or a model file that ``spec`` describes.
        out: folder for ``scan.json`` (the evidence), the inverted triggers and the pictures.
        name: ``scan``, or ``rescan`` after purification.
        clean: clean set. A model that was purified is scanned with what its purifier was not fitted to: the *select*
            and *report* parts; references have not seen the images that they were read on either. Any other model is
            scanned with all of it.
        report: share of the clean set that is left for quoting figures.
        config: of :class:`defense_core.scan.judgement.ScanConfig`.
        pool: a calibration pool; otherwise the shipped one that covers the model.
        earlier: folder of the scan of the model before purification, whose triggers are tried again.
        reference: the model before purification; needed with ``earlier``.
        seed: of the splits of the clean set.

    Returns:
        Evidence ``scan`` or ``rescan``.

    Raises:
        ConfigError: a bad setting, a pool of another kind of model, or a reference of another interface.
        ArtifactError, DataError, Cancelled: of the kind that fits; no folder is left.
    """
    clock = Clock.start()
    parsed = from_mapping(ScanConfig, config or {}, where="scan")
    where = resolve_device(device)
    with atomic_directory(out) as folder:
        bundle = open_model(model, spec, loading)
        before = None if reference is None else open_model(reference, spec, loading)
        if before is not None:
            require_same_interface(bundle, before)
        purified = before is not None and before.digest != bundle.digest
        images = _images(bundle, clean, purified=purified, seed=seed, report=report)
        chosen = pool_of_bundle(bundle, pool, digest(parsed.settings))
        inputs = {
            "source": source_digest(bundle),
            "model": bundle.digest,
            "clean": None if images is None else images.digest,
            "config": digest(parsed),
            "pool": None if chosen is None else chosen.digest,
        }
        used: dict[str, Any] = {"task": bundle.spec.task_object(), "device": where, "progress": progress}
        outcome = None
        if earlier is not None:
            environment = clock.environment(device=where, seed=seed)
            outcome = repeated(earlier, folder, name, inputs=inputs, environment=environment)
        if outcome is None:
            outcome = _searched(bundle, images, parsed, chosen, folder, name, **used)
        left: tuple[Residual, ...] = ()
        suspected: tuple[int, ...] = ()
        if earlier is not None and before is not None and images is not None:
            timed = {**used, "deadline": Deadline.after(parsed.budget_s)}
            given, after = (subject_of(each.model, None, **timed) for each in (before, bundle))
            suspected = _suspected(earlier)
            left = residuals(given, after if purified else None, images, load_triggers(earlier), suspects=suspected)
        evidence = compose(
            name,
            clock,
            inputs={**inputs, "scan": outcome.scan} if outcome.scan else inputs,
            results={**outcome.results, **_residual_results(left, suspected)},
            verdict=outcome.verdict,
            findings=outcome.findings,
            device=where,
            seed=seed,
        )
        write_evidence(folder / RESULT, evidence)
    return evidence


def methods_after(evidence: Mapping[str, Any], methods: Sequence[str], policy: str) -> list[str]:
    """What is to be purified with side by side: ``methods``, but for the soup, which is mixed of what they leave; or
    nothing after a PASS where the policy lets an unsuspicious model go on as it is.

    Raises:
        ConfigError, PolicyError: ``policy`` is malformed.
    """
    forced = requirements(policy).purification
    if evidence["verdict"] == Verdict.PASS.value and not forced:
        return [UNTOUCHED]
    return side_by_side(methods)


def _images(bundle: Bundle, clean: Path | None, *, purified: bool, seed: int, report: float) -> CleanSet | None:
    if clean is None:
        return None
    if purified:
        left = open_splits(clean, bundle, seed=seed, report=report).unfitted
        return left if len(left) else None
    return open_images(clean, bundle, require_all_classes=False)


def _searched(  # noqa: PLR0917
    bundle: Bundle, images: CleanSet | None, config: ScanConfig, pool: Pool | None, folder: Path, name: str, **used: Any
) -> Outcome:
    """Scan, and put the inverted triggers and the pictures into ``folder``."""
    found = scan(bundle.model, images, config, pool=pool, **used)
    triggers = kept_triggers(tuple(found.observations.values()), found.target_classes)
    save_triggers(folder, triggers)
    pictures = _pictures(found, triggers, images, bundle.spec.class_names)
    (folder / PICTURES).mkdir()
    for picture in pictures:
        write_atomic(folder / PICTURES / f"{picture.name}.png", picture.png)
    return Outcome(found.verdict, _results(found, pictures), tuple(_findings(name, found)))


def _pictures(
    found: ScanReport,
    triggers: Sequence[tuple[str, InvertedTrigger]],
    images: CleanSet | None,
    names: tuple[str, ...],
) -> list[Picture]:
    pictures = class_pictures(found.observations, found.target_classes, names)
    if images is None:
        return pictures
    notes = {
        (each.detector, each.target): f"Works on {each.success:.0%} of {each.images} held-out images"
        for each in found.confirmations
    }
    suspected = [each for each in triggers if each[1].target in found.target_classes] or list(triggers)

    def said(detector: str, trigger: InvertedTrigger) -> str:
        """What the detector says of the class that it finds most suspicious, which may be another one."""
        seen = found.observations[detector]
        return seen.why if trigger.target in seen.targets[:1] else f"What {detector} found for this class"

    return pictures + [
        trigger_picture(
            detector, trigger, images, notes.get((detector, trigger.target), said(detector, trigger)), names
        )
        for detector, trigger in suspected[:PICTURED_TRIGGERS]
    ]


def _suspected(earlier: Path) -> tuple[int, ...]:
    """The classes that the earlier scan suspected."""
    return tuple(int(label) for label in read_evidence(earlier / RESULT)["results"]["target_classes"])


def _results(found: ScanReport, pictures: Sequence[Picture]) -> dict[str, Any]:
    shown = sorted(pictures, key=lambda each: not each.name.startswith("trigger"))[:MAX_EVIDENCE_PICTURES]
    return {
        **found.to_results(),
        "verdict": found.verdict.value,
        "suspects": list(found.target_classes),
        "repeats": None,
        "pictures": [
            {
                "title": each.title,
                "note": each.note,
                "alt": each.alt,
                "png": base64.b64encode(each.png).decode(),
            }
            for each in shown
        ],
    }


def _residual_results(left: tuple[Residual, ...], suspected: tuple[int, ...]) -> dict[str, Any]:
    # A trigger of a class that nobody suspects is the easiest change there is; clean models have one for each class.
    of_suspects = [each for each in left if each.target in suspected]
    known = [each.after for each in of_suspects if each.after is not None]
    return {
        "residuals": to_mapping(left),
        "suspected_residuals": to_mapping(of_suspects),
        "residual_max": max(known) if known and len(known) == len(of_suspects) else None,
    }


def _findings(name: str, found: ScanReport) -> list[Finding]:
    """The verdict in a sentence, then a line a channel."""
    lines = [Finding(f"{name}.verdict", found.verdict, found.p_value, f"p > {found.fpr:g}", found.sentence)]
    for channel in found.channels:
        members = [each for each in found.detectors if each.channel == channel.name]
        why = "; ".join(f"{each.name}: {each.why}" for each in members)
        # Among references that say nothing about the model, or with a detector that could not look, no rank is a PASS.
        looked = found.comparable and all(found.observations[each.name].measured for each in members)
        verdict = Verdict.PASS if looked and not rejects(channel.adjusted, found.fpr) else found.verdict
        lines.append(Finding(f"{name}.{channel.name}", verdict, round(channel.adjusted, 4), f"p > {found.fpr:g}", why))
    return lines
