"""Purify: a bundle becomes another bundle, with its history and the signals that a choice may rest on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components._runtime.bundle_files import copy_bundle
from components._runtime.evidence import Clock, compose, write_evidence
from components._runtime.loading import open_model, open_splits, resolve_device, source_digest
from components._runtime.plan import REPORT_SHARE, UNTOUCHED, Loading
from components.purify_model.members import NOT_APPLICABLE, RESULT, is_asked_for, mix_members
from defense_core.bundle import Bundle, bundle_of, save_bundle
from defense_core.checkpoints import NO_CHECKPOINTS, Checkpoints
from defense_core.config import digest, from_mapping, to_mapping
from defense_core.errors import MethodDiverged, MethodNotApplicable
from defense_core.files import atomic_directory
from defense_core.progress import NullProgress, Progress
from defense_core.purify import Purified, method_named, purify
from defense_core.purify.base import Method
from defense_core.stored_checkpoints import work_key
from defense_core.universal import select_signals
from defense_core.verdict import Finding, Verdict


def purify_model(
    model: Path,
    clean: Path,
    out: Path,
    *,
    method: str,
    config: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    report: float = REPORT_SHARE,
    loading: Loading = Loading(),
    progress: Progress = NullProgress(),
    checkpoints: Callable[[str], Checkpoints] = lambda key: NO_CHECKPOINTS,
    made: Sequence[Path] = (),
) -> dict[str, Any]:
    """Purify ``model`` with ``method`` on the *fit* split of ``clean``.

    Args:
        model: a bundle folder, or a model file that ``spec`` describes.
        out: folder that becomes the purified bundle, with ``result.json`` (the evidence, which
            holds the history, one row an epoch) beside it.
        config: the method's configuration; missing keys have their defaults.
        report: share of the clean set to leave for quoting; 0 where there is a test set.
        checkpoints: from the work's key, which names all that its bytes depend on, to where its loops save how far
            they have come.
        made: what other purifiers of the same run left; a soup averages its members among them and runs none again.

    Returns:
        Evidence ``purify.<method>``.

    Raises:
        ConfigError: unknown method, unknown key, value out of range, or other settings for a member than it ran with.
        EvidenceMismatch: a member was made of something else.
        MethodNotApplicable: the method has nothing to work on in this network; nothing is left.
        MethodDiverged: a loss or weight became NaN or Inf; nothing is left.
        ArtifactError, DataError, Cancelled, StorageError: nothing is left.
    """
    clock = Clock.start()
    row = method_named(method)
    parsed = from_mapping(row.config, config or {}, where=method)
    where = resolve_device(device)
    with atomic_directory(out) as folder:
        bundle = open_model(model, spec, loading)
        splits = open_splits(clean, bundle, seed=seed, report=report)
        task = bundle.spec.task_object()
        shared: dict[str, Any] = {"task": task, "seed": seed, "device": where, "progress": progress}
        mixture = mix_members(parsed, made, bundle, splits, loading=loading, **shared)
        if mixture is not None:
            parsed, purified = mixture.config, mixture.purified
        else:
            work = {"model": bundle.digest, "clean": splits.digest, "method": method, "config": parsed, "seed": seed}
            kept = checkpoints(work_key(**work, device=where))
            purified = purify(bundle.model, splits, parsed, method=method, checkpoints=kept, **shared)
        outcome = save_bundle(bundle_of(purified.model, bundle.spec, bundle.origin), folder)
        results = {
            **_described(row, parsed),
            "facts": purified.facts,
            "history": _finite_rows(purified),
            "select": select_signals(
                bundle.model, purified.model, splits, task=task, device=where, progress=progress
            ).to_mapping(),
            "images": {"fit": len(splits.fit), "select": len(splits.select)},
            "parts": {"seed": seed, "report": report},
        }
        evidence = compose(
            f"purify.{method}",
            clock,
            inputs={
                **_inputs(bundle, splits.digest, parsed),
                **({"members": mixture.digests} if mixture is not None else {}),
            },
            outputs={"model": outcome},
            results=results,
            device=where,
            seed=seed,
        )
        write_evidence(folder / RESULT, evidence)
    return evidence


def purify_candidate(
    model: Path,
    clean: Path,
    out: Path,
    *,
    method: str,
    made: Sequence[Path] = (),
    methods: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any] | None:
    """:func:`purify_model` for one of several methods: that one gives no model is an outcome, not an end.

    ``untouched`` in place of a method leaves the model as it is: the scan found no evidence.
    A method that diverges, or has nothing to work on in this network, leaves a folder with ``result.json`` only, whose
    verdict is UNKNOWN; it is never selected, and the other methods go on. Every other error is raised.

    Args:
        made: what the methods before this one left; empty for one that stands beside the others.
        methods: with ``made``: those that were asked for.

    Returns:
        ``None`` where others ran and ``method`` is not to come after them; the ``result.json`` is empty then.
    """
    clock = Clock.start()
    if made and not is_asked_for(method, methods, made):
        with atomic_directory(out) as folder:
            (folder / RESULT).touch()
        return None
    if method == UNTOUCHED:
        return _untouched(model, clean, out, clock, **options)
    try:
        return purify_model(model, clean, out, method=method, made=made, **options)
    except MethodDiverged as error:
        finding = Finding("purify.diverged", Verdict.UNKNOWN, error.got, "finite losses and weights", str(error))
    except MethodNotApplicable as error:
        finding = Finding(NOT_APPLICABLE, Verdict.UNKNOWN, error.got, error.expected or "", str(error))
    bundle = open_model(model, options.get("spec"), options.get("loading", Loading()))
    seed = options.get("seed", 0)
    row = method_named(method)
    parsed = from_mapping(row.config, options.get("config") or {}, where=method)
    splits = open_splits(clean, bundle, seed=seed, report=options.get("report", REPORT_SHARE))
    evidence = compose(
        f"purify.{method}",
        clock,
        inputs=_inputs(bundle, splits.digest, parsed),
        results={**_described(row, parsed), "facts": {}, "history": [], "select": None},
        verdict=Verdict.UNKNOWN,
        findings=[finding],
        device=resolve_device(options.get("device", "auto")),
        seed=seed,
    )
    with atomic_directory(out) as folder:
        write_evidence(folder / RESULT, evidence)
    return evidence


def digest_of(evidence: Mapping[str, Any] | None) -> str:
    """The digest of the model that a candidate's evidence names, or ``None`` as text."""
    return str(None if evidence is None else evidence["outputs"].get("model"))


def _untouched(model: Path, clean: Path, out: Path, clock: Clock, **options: Any) -> dict[str, Any]:
    """The fetched bundle, byte for byte, where a candidate is expected."""
    loading, seed = options.get("loading", Loading()), options.get("seed", 0)
    bundle = open_model(model, options.get("spec"), loading)
    report = options.get("report", REPORT_SHARE)
    splits = open_splits(clean, bundle, seed=seed, report=report)
    with atomic_directory(out) as folder:
        copy_bundle(model, folder)
        evidence = compose(
            f"purify.{UNTOUCHED}",
            clock,
            inputs=_inputs(bundle, splits.digest, {}),
            outputs={"model": bundle.digest},
            results={
                "method": UNTOUCHED,
                "control": False,
                "summary": "Nothing was purified: the scan found no evidence of a backdoor",
                "config": {},
                "facts": {},
                "history": [],
                "select": None,
                "images": {"fit": len(splits.fit), "select": len(splits.select)},
                "parts": {"seed": seed, "report": report},
            },
            device="cpu",
            seed=seed,
        )
        write_evidence(folder / RESULT, evidence)
    return evidence


def _inputs(bundle: Bundle, splits_digest: str, config: Any) -> dict[str, str]:
    return {
        "source": source_digest(bundle),
        "model": bundle.digest,
        "clean": splits_digest,
        "config": digest(config),
    }


def _described(row: Method, config: Any) -> dict[str, Any]:
    return {"method": row.name, "control": row.control, "summary": row.summary, "config": to_mapping(config)}


def _finite_rows(purified: Purified) -> list[dict[str, Any]]:
    """History rows as JSON: numbers that JSON cannot hold are left out, which a chart shows as a gap."""
    return [
        {key: value for key, value in row.items() if not (isinstance(value, float) and not abs(value) < float("inf"))}
        for row in purified.history
    ]
