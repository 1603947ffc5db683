"""Evaluate: what a model does on clean and on triggered images, beside the model it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components._runtime.evidence import Clock, compose, is_absent, read_evidence, source_of, why_of
from components._runtime.loading import (
    open_model,
    quoted_images,
    require_same_interface,
    resolve_device,
    source_digest,
)
from components._runtime.plan import REPORT_SHARE, Loading
from defense_core.attacks import probe_from_spec
from defense_core.config import digest
from defense_core.evaluate import Evaluation, evaluate
from defense_core.evidence import require_part
from defense_core.progress import NullProgress, Progress
from defense_core.verdict import Finding, Verdict

RESULT = "result.json"


def evaluate_model(
    model: Path,
    *,
    name: str,
    clean: Path | None = None,
    test: Path | None = None,
    reference: Path | None = None,
    probes: Sequence[Mapping[str, Any]] = (),
    spec: Mapping[str, Any] | None = None,
    seed: int = 0,
    report: float = REPORT_SHARE,
    device: str = "auto",
    loading: Loading = Loading(),
    progress: Progress = NullProgress(),
) -> dict[str, Any]:
    """Measure ACC, and per probe ASR, RA and DER.

    Args:
        model: a bundle folder, or a model file that ``spec`` describes.
        name: ``before`` or the method's name; the evidence is called ``evaluate.<name>``.
        clean, test: figures are quoted on ``test``, or on the *report* split of ``clean``.
        seed, report: of the cut of ``clean``; beside a purification's ``result.json`` the ones that it was given.
        reference: the unpurified model; enables drops, DER and "before" figures.
        probes: trigger specifications.

    Returns:
        Evidence ``evaluate.<name>``; its verdict says whether everything could be measured, and
        judges nothing: bounds are the policy's part. UNKNOWN too where ``reference`` does not surely answer more of the
        images as labelled than by guessing.

    Raises:
        ConfigError: neither ``clean`` nor ``test``; a malformed name or probe; a reference that is given other numbers
            for an image; another cut of ``clean`` than the purification's, which may have trained on what is quoted.
        ArtifactError, DataError, NonFiniteOutputs, Cancelled: of the kind that fits.
    """
    clock = Clock.start()
    require_part(name)
    where = resolve_device(device)
    bundle = open_model(model, spec, loading)
    before = open_model(reference, spec, loading) if reference is not None else None
    if before is not None:
        require_same_interface(bundle, before)
    beside = Path(model) / RESULT
    images = quoted_images(bundle, clean=clean, test=test, seed=seed, report=report, purification=beside)
    parsed = [probe_from_spec(each, num_classes=bundle.spec.num_classes) for each in probes]
    evaluation = evaluate(
        bundle.model,
        images,
        task=bundle.spec.task_object(),
        probes=parsed,
        reference=before.model if before is not None else None,
        device=where,
        progress=progress,
    )
    inputs = {
        "source": source_digest(bundle),
        "model": bundle.digest,
        "clean": images.digest,
        "config": digest([probe.to_spec() for probe in parsed]),
    }
    if before is not None:
        inputs["reference"] = before.digest
    results = evaluation.to_results()
    open_figures = [f"asr of {row['name']}" for row in results["probes"] if row["asr"]["value"] is None]
    findings = [
        Finding("evaluate.measured", Verdict.UNKNOWN, None, "a figure", f"There is no image to measure {figure} on.")
        for figure in open_figures
    ]
    findings += _says_nothing(evaluation, bundle.spec.num_classes)
    return compose(
        f"evaluate.{name}",
        clock,
        inputs=inputs,
        results={"split": "test" if test is not None else "report", **results},
        verdict=Verdict.UNKNOWN if findings else Verdict.PASS,
        findings=findings,
        device=where,
        seed=seed,
    )


def _says_nothing(evaluation: Evaluation, classes: int) -> list[Finding]:
    """Where the model before purification answers these images no better than by guessing, a drop of its accuracy
    measures nothing: the labels are in another order, or the images are of something else."""
    if evaluation.paired is None or evaluation.paired.before.above_guessing(classes):
        return []
    before = evaluation.paired.before
    why = (
        f"The model before purification answers {before.successes} of {before.trials} images as labelled, which may be "
        f"guessing among {classes} classes: do images and labels belong to this model?"
    )
    return [Finding("evaluate.measured", Verdict.UNKNOWN, before.value, f"surely above {1 / classes:.4g}", why)]


def evaluate_candidate(model: Path, *, name: str, **options: Any) -> dict[str, Any] | None:
    """:func:`evaluate_model` for what purification left, which may be no model at all; ``None`` where nothing was
    asked for, and an empty file stands in the evidence's place."""
    result = Path(model) / RESULT
    if is_absent(result):
        return None
    if result.is_file():
        purification = read_evidence(result)
        if purification["verdict"] != Verdict.PASS.value:
            return _nothing_to_measure(name, purification)
    return evaluate_model(model, name=name, **options)


def _nothing_to_measure(name: str, purification: Mapping[str, Any]) -> dict[str, Any]:
    return compose(
        f"evaluate.{name}",
        Clock.start(),
        inputs={"source": source_of(purification), "model": None},
        results={},
        verdict=Verdict.UNKNOWN,
        findings=[
            Finding(
                "evaluate.measured", Verdict.UNKNOWN, None, "a model", f"{name} gave no model: {why_of(purification)}"
            )
        ],
    )
