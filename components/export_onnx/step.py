"""Export: a bundle becomes one ONNX file that answers like it, or is said not to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components._runtime.evidence import Clock, compose, write_evidence
from components._runtime.loading import open_model, quoted_images, source_digest
from components._runtime.plan import Loading
from components._runtime.release import ONNX_NAME
from defense_core import export
from defense_core.attacks import probe_from_spec
from defense_core.files import atomic_directory
from defense_core.parity import ParityBounds
from defense_core.progress import NullProgress, Progress

RESULT = "result.json"


def export_onnx(
    model: Path,
    out: Path,
    *,
    clean: Path | None = None,
    test: Path | None = None,
    probes: Sequence[Mapping[str, Any]] = (),
    spec: Mapping[str, Any] | None = None,
    bounds: ParityBounds = ParityBounds(),
    opset: int = export.OPSET,
    seed: int = 0,
    loading: Loading = Loading(),
    progress: Progress = NullProgress(),
) -> dict[str, Any]:
    """Export ``model`` and compare the file with it on clean and on triggered images.

    Args:
        model: a bundle folder, or a model file that ``spec`` describes.
        out: folder that gets ``model.onnx`` and ``result.json`` (the evidence).
        clean, test: images to compare on: ``test``, or the *report* split of ``clean``.
        probes: trigger specifications.

    Returns:
        Evidence ``export``; FAIL where the file answers differently, which is then kept to be
        looked at and never promoted.

    Raises:
        ExportError: the network cannot be expressed as one plain ONNX file; nothing is left.
        ArtifactError, DataError, ConfigError, NonFiniteOutputs, StorageError: nothing is left.
    """
    clock = Clock.start()
    with atomic_directory(out) as folder:
        bundle = open_model(model, spec, loading)
        images = quoted_images(bundle, clean=clean, test=test, seed=seed)
        exported = export.export_onnx(
            bundle.model,
            folder / ONNX_NAME,
            task=bundle.spec.task_object(),
            input_size=bundle.spec.input_size,
            clean=images,
            probes=[probe_from_spec(each, num_classes=bundle.spec.num_classes) for each in probes],
            bounds=bounds,
            opset=opset,
            bundle_digest=bundle.digest,
            progress=progress,
        )
        evidence = compose(
            "export",
            clock,
            inputs={"source": source_digest(bundle), "model": bundle.digest, "clean": images.digest},
            outputs={"onnx": exported.sha256},
            results=exported.to_results(),
            verdict=exported.verdict,
            findings=exported.findings,
            seed=seed,
        )
        write_evidence(folder / RESULT, evidence)
    return evidence
