"""The attack lab: a backdoored model of the user's own architecture and data, to try scan and purification on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from components._runtime.evidence import Clock, compose, write_evidence
from components._runtime.loading import open_images, resolve_device
from components._runtime.plan import Loading
from components._runtime.trust import trusted_modules
from defense_core.attacks import MAX_UNTRIGGERED, without_trigger
from defense_core.attacks.catalogue import attack_from_spec
from defense_core.attacks.plant import TRIGGER_FILE, PlantedBackdoor, plant
from defense_core.attacks.victim import VictimTraining
from defense_core.bundle import Bundle, bundle_of, save_bundle, untrained_bundle
from defense_core.config import digest, from_mapping, require, to_mapping
from defense_core.data import require_apart
from defense_core.evaluate import evaluate
from defense_core.files import atomic_directory, write_atomic
from defense_core.progress import NullProgress, Progress
from defense_core.triggered import require_own_names
from defense_core.verdict import Finding, Verdict

BUNDLE, PROBE, RESULT = "bundle", "probe.yaml", "result.json"


def plant_backdoor(
    attack: Mapping[str, Any],
    train: Path,
    test: Path,
    out: Path,
    *,
    rate: float,
    spec: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    min_asr: float = 0.9,
    seed: int = 0,
    device: str = "auto",
    loading: Loading = Loading(),
    progress: Progress = NullProgress(),
) -> dict[str, Any]:
    """Train a backdoored model and measure it.

    Args:
        attack: specification, see :func:`defense_core.attacks.catalogue.attack_from_spec`.
        train, test: images; the first are poisoned in memory, the second, other ones, only measured.
        out: folder that gets ``bundle/``, ``probe.yaml``, ``result.json`` and, for a learned trigger, its file.
        rate: poisoning rate.
        spec: architecture, input size and normalisation; fields of ``ModelSpec``.
        training: fields of :class:`defense_core.attacks.victim.VictimTraining`.
        min_asr: attack success rate below which the verdict is FAIL: a backdoor that did not take says nothing
            about a defence. FAIL too where the model has learnt nothing, since one that gives everything the
            attacker's class has an attack success rate of 1: the lower end of ACC's interval is not above the
            share of the largest class in the test set, or the attacker's class is the answer to more than half of
            the untriggered test images of other classes.

    Returns:
        Evidence ``lab``; nothing is left in ``out`` after an error.

    Raises:
        ConfigError, ArtifactError, DataError, MethodDiverged, StorageError, Cancelled: of the kind that fits.
    """
    clock = Clock.start()
    require(0 <= min_asr <= 1, "min_asr", "in [0, 1]", min_asr)
    where = resolve_device(device)
    settings = from_mapping(VictimTraining, training or {}, where="training")
    untrained = untrained_bundle(spec, limits=loading.limits, trusted_modules=trusted_modules(loading.trusted_modules))
    parsed = attack_from_spec(attack, num_classes=untrained.spec.num_classes)
    parsed.poisoning(rate)
    require_own_names([parsed.name])
    seen, unseen = open_images(train, untrained), open_images(test, untrained, require_all_classes=False)
    require_apart(seen, unseen, fitted_name="training", quoted_name="test")
    task = untrained.spec.task_object()
    with atomic_directory(out) as folder:
        planted = plant(
            parsed,
            untrained.model,
            seen,
            rate=rate,
            training=settings,
            task=task,
            seed=seed,
            device=where,
            progress=progress,
            folder=folder,
        )
        probes = [planted.probe, without_trigger(planted.probe)]
        evaluation = evaluate(planted.model, unseen, task=task, probes=probes, device=where, progress=progress)
        measured = replace(evaluation, probes=evaluation.probes[:1]).to_results()
        measured["untriggered"] = evaluation.probes[1].asr.to_results()
        outcome = save_bundle(bundle_of(planted.model, untrained.spec), folder / BUNDLE)
        probe = _probe_spec(planted, folder)
        write_atomic(folder / PROBE, yaml.safe_dump(probe, sort_keys=False, allow_unicode=True).encode())
        finding = _finding(measured, min_asr)
        evidence = compose(
            "lab",
            clock,
            inputs={"train": seen.digest, "test": unseen.digest, "config": _configuration(attack, planted, untrained)},
            outputs={"model": outcome},
            results={"attack": dict(attack), "probe": probe, **planted.facts, **measured},
            verdict=finding.verdict,
            findings=[finding],
            device=where,
            seed=seed,
        )
        write_evidence(folder / RESULT, evidence)
    return evidence


def _probe_spec(planted: PlantedBackdoor, folder: Path) -> dict[str, Any]:
    """The probe as its file says it: a learned trigger's parameters lie beside it."""
    spec: dict[str, Any] = to_mapping(planted.probe.to_spec())
    named = Path(spec.get("path", ""))
    if named == folder / TRIGGER_FILE:
        spec["path"] = TRIGGER_FILE
    elif "path" in spec:
        write_atomic(folder / TRIGGER_FILE, named.read_bytes())
        spec["path"] = TRIGGER_FILE
    return spec


def _configuration(attack: Mapping[str, Any], planted: PlantedBackdoor, untrained: Bundle) -> str:
    return digest({"attack": dict(attack), "facts": planted.facts, "spec": untrained.spec})


def _finding(measured: Mapping[str, Any], min_asr: float) -> Finding:
    asr = measured["probes"][0]["asr"]["value"]

    def found(verdict: Verdict, why: str) -> Finding:
        return Finding("lab.planted", verdict, asr, f"ASR >= {min_asr:g}", why)

    if asr is None:
        return found(Verdict.UNKNOWN, "No test image is of another class than the attacker wants.")
    if nothing := _learnt_nothing(measured):
        return found(
            Verdict.FAIL,
            f"The model has learnt nothing that can be seen: {nothing}. Defences cannot be judged on it; train it "
            "longer or with another learning rate, or measure it on more images.",
        )
    if asr < min_asr:
        return found(
            Verdict.FAIL,
            "The backdoor did not take, so that defences cannot be judged on this model; raise the rate, the "
            "trigger's strength, or the epochs.",
        )
    return found(Verdict.PASS, "The backdoor works.")


def _learnt_nothing(measured: Mapping[str, Any]) -> str:
    """Why the model is no better than one constant answer; empty: it is better."""
    astray, acc = measured["untriggered"]["value"], measured["acc"]
    if astray > MAX_UNTRIGGERED:
        return (
            f"{astray:.0%} of the untriggered test images of other classes get the attacker's class too "
            f"(at most {MAX_UNTRIGGERED:.0%} may)"
        )
    share = max(each["trials"] for each in measured["classes"]) / acc["trials"]
    # On images of one class every constant answer is all right or all wrong: they say no more than the above.
    if share < 1 and acc["low"] <= share:
        return (
            f"its accuracy, {acc['value']:.3f} [{acc['low']:.3f}, {acc['high']:.3f}], is not clearly above "
            f"{share:.3f}, the share of the largest class in the test set"
        )
    return ""
