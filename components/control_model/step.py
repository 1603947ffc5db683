"""Control: would the scan have found a backdoor in this very model, and would purification remove it?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components._runtime.calibration import pool_of_bundle
from components._runtime.control_store import ControlStore
from components._runtime.evidence import Clock, compose
from components._runtime.loading import open_model, open_splits, resolve_device, source_digest
from components._runtime.plan import REPORT_SHARE, Loading
from defense_core.config import digest, from_mapping
from defense_core.errors import DataError, MethodDiverged
from defense_core.positive_control import Control, ControlConfig, positive_control
from defense_core.progress import NullProgress, Progress
from defense_core.scan.judgement import ScanConfig
from defense_core.stored_checkpoints import work_key
from defense_core.verdict import Finding, Verdict

NAME = "control"


def control_model(
    model: Path,
    clean: Path,
    *,
    config: Mapping[str, Any] | None = None,
    scan: Mapping[str, Any] | None = None,
    pool: Path | None = None,
    report: float = REPORT_SHARE,
    spec: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    loading: Loading = Loading(),
    kept: ControlStore | None = None,
    progress: Progress = NullProgress(),
) -> dict[str, Any]:
    """Plant a patch into a copy of ``model``, scan and purify the copy.

    Args:
        model: a bundle folder, or a model file that ``spec`` describes; left as it is.
        clean: clean set; its *fit* part is planted with, its *select* part measured on.
        config: of :class:`defense_core.positive_control.ControlConfig`.
        scan: of :class:`defense_core.scan.judgement.ScanConfig`, the same as the model's own scan.
        pool: a calibration pool; otherwise the shipped one that covers the model.
        kept: where controls are kept; one of the same work is repeated and says so.

    Returns:
        Evidence ``control``; UNKNOWN where nothing could be planted or measured, no pool covers the model, or the
        time ran out on the scan before it found the patch; FAIL where the planted patch was missed.

    Raises:
        ConfigError, ArtifactError, DataError, Cancelled: of the kind that fits.
    """
    clock = Clock.start()
    parsed = from_mapping(ControlConfig, config or {}, where="control")
    scanning = from_mapping(ScanConfig, scan or {}, where="scan")
    where = resolve_device(device)
    bundle = open_model(model, spec, loading)
    splits = open_splits(clean, bundle, seed=seed, report=report)
    chosen = pool_of_bundle(bundle, pool, digest(scanning.settings))
    inputs = {
        "source": source_digest(bundle),
        "model": bundle.digest,
        "clean": splits.digest,
        "config": digest({"control": parsed, "scan": scanning}),
        "pool": None if chosen is None else chosen.digest,
    }
    work = {key: inputs[key] for key in ("config", "pool")}
    key = work_key(model=bundle.digest, clean=splits.digest, method=NAME, config=work, seed=seed, device=where)
    earlier = None if kept is None else kept.find(key)
    if earlier is not None and earlier["inputs"] == inputs:
        return _repeated(earlier, key)
    results: dict[str, Any] = {"detected": None}
    try:
        control = positive_control(
            bundle.model, splits, parsed, scanning, pool=chosen, task=bundle.spec.task_object(), seed=seed,
            device=where, progress=progress,
        )  # fmt: skip
        finding = _finding(control)
        detected = None if finding.verdict is Verdict.UNKNOWN else control.detected
        results = {**control.to_results(), "detected": detected, "repeats": None}
    except (DataError, MethodDiverged) as error:
        finding = Finding("control.detected", Verdict.UNKNOWN, None, "a planted patch", f"The control failed: {error}")
    evidence = compose(
        NAME,
        clock,
        inputs=inputs,
        results=results,
        verdict=finding.verdict,
        findings=[finding],
        device=where,
        seed=seed,
    )
    # What is unknown may be known another time.
    if kept is not None and finding.verdict is not Verdict.UNKNOWN:
        kept.keep(key, evidence)
    return evidence


def _repeated(earlier: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The evidence of ``earlier``, with its own time, and a word on where it comes from."""
    said = f"kept since {earlier['environment']['started']}: {key}"
    (finding,) = earlier["findings"]
    return {
        **earlier,
        "results": {**earlier["results"], "repeats": said},
        "findings": [{**finding, "why": f"{finding['why']} ({said})"}],
    }


def _finding(control: Control) -> Finding:
    verdict = Verdict.PASS if control.detected else Verdict.FAIL
    if not control.decided:
        verdict = Verdict.UNKNOWN
    return Finding("control.detected", verdict, control.scan.p_value, f"p <= {control.scan.fpr:g}", control.sentence())
