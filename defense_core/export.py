"""ONNX export: one plain file that takes pixels and gives logits, checked against the network.

The graph normalises by itself, so that whoever serves it cannot forget to: input ``image`` is
float32 (N, C, H, W) in [0, 1], output ``logits`` is float32 (N, K), N is free. Standard operators
only, weights inside the file, and none of the exporter's notes (source paths, code lines): the
same network gives the same bytes on every machine with the same versions.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from defense_core.config import require, to_mapping
from defense_core.data import CleanSet
from defense_core.errors import DataError, ExportError, NonFiniteWeights
from defense_core.files import sha256_bytes, write_atomic
from defense_core.layers import is_finite
from defense_core.parity import Parity, ParityBounds, check_parity, first_line, parity_steps
from defense_core.plain_onnx import checked_bytes, cleaned, nodes
from defense_core.progress import NullProgress, Progress
from defense_core.task import ImageClassification
from defense_core.triggered import NamedTrigger
from defense_core.verdict import Finding, Verdict, combine

OPSET = 18
"""The opset that PyTorch's exporter is written for; read by onnxruntime from 1.14 (2023) on."""

OPSETS = (18, 23)
"""Smallest and largest opset that can be asked for."""

MAX_BYTES = 2**31 - 2**20
"""A protobuf message ends at 2 GiB; the rest is left for the graph itself."""

logger = logging.getLogger("quarantine")


@dataclass(frozen=True)
class Exported:
    """The file, described; whether or not it answers like the network.

    Attributes:
        path: where it is.
        sha256: digest of its bytes.
        bytes: its size.
        opset: version of the standard operators.
        operators: kinds of operators in it, sorted.
        dynamic_batch: whether every batch size ran.
        parity: one row for the clean images and one a probe.
        findings: one a rule; a file that fails one is not to be promoted.
    """

    path: Path
    sha256: str
    bytes: int
    opset: int
    operators: tuple[str, ...]
    dynamic_batch: bool
    parity: tuple[Parity, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """PASS only if every finding passes."""
        return combine(finding.verdict for finding in self.findings)

    def to_results(self) -> dict[str, Any]:
        """The ``results`` of an export evidence file (JSON types only)."""
        return {
            "opset": self.opset,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "operators": list(self.operators),
            "dynamic_batch": self.dynamic_batch,
            "parity": to_mapping(self.parity),
        }


def export_onnx(
    model: nn.Module,
    path: Path | str,
    *,
    task: ImageClassification,
    input_size: tuple[int, int, int],
    clean: CleanSet,
    probes: Sequence[NamedTrigger] = (),
    bounds: ParityBounds = ParityBounds(),
    opset: int = OPSET,
    bundle_digest: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write ``model`` as ONNX and compare the file with it.

    A file that answers differently stays where it is, described by failed findings, so that
    one can look at it; it is the caller's part not to promote it.

    Args:
        model: takes normalised float32 (N, C, H, W) and answers logits (N, K); left as it is.
        path: the file to write.
        task: its normalisation goes into the graph, its class names into the file's metadata.
        input_size: (C, H, W).
        clean: images to compare on.
        probes: known triggers; the comparison is made on triggered images too.
        bounds: what counts as the same answer.
        opset: version of the standard operators.
        bundle_digest: recorded in the file's metadata.
        progress: shown to the operator; also where a stop request takes effect.

    Raises:
        NonFiniteWeights: weights hold NaN or Inf.
        NonFiniteOutputs: the network answers NaN or Inf on the images.
        ExportError: the network is too large for one file, or cannot be expressed in plain ONNX.
        DataError: the images do not have the network's size.
        StorageError: the file cannot be written; none is left.
    """
    require(OPSETS[0] <= opset <= OPSETS[1], "opset", f"{OPSETS[0]} to {OPSETS[1]}", opset)
    _check_inputs(model, input_size, clean)
    bounds = bounds.fitting(clean.images)
    with (progress or NullProgress()).phase("export", total=2 + parity_steps(len(clean), len(probes), bounds)) as phase:
        network = copy.deepcopy(model).cpu().float().eval()
        proto = _converted(network, task, input_size, opset)
        phase.advance()
        proto = cleaned(proto)
        proto.metadata_props.extend(_metadata(task, input_size, bundle_digest))
        data = checked_bytes(proto)
        phase.advance()
        check = check_parity(data, network, task=task, clean=clean, probes=probes, bounds=bounds, phase=phase)
    write_atomic(Path(path), data)
    return Exported(
        path=Path(path),
        sha256=sha256_bytes(data),
        bytes=len(data),
        opset=opset,
        operators=tuple(sorted({node.op_type for node in nodes(proto.graph)})),
        dynamic_batch=check.dynamic_batch,
        parity=check.rows,
        findings=check.findings,
    )


class _FromPixels(nn.Module):
    """The network behind its normalisation."""

    def __init__(self, network: nn.Module, task: ImageClassification) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(task.mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(task.std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.network((image - self.mean) / self.std)  # type: ignore[operator,no-any-return]


def _converted(
    network: nn.Module, task: ImageClassification, input_size: tuple[int, int, int], opset: int
) -> onnx.ModelProto:
    chatter = io.StringIO()
    # A batch of two: one would be taken for a constant.
    example = torch.zeros(2, *input_size)
    try:
        with contextlib.redirect_stdout(chatter), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                _FromPixels(network, task).eval(),
                (example,),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
            proto: onnx.ModelProto = program.model_proto
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise ExportError(
            "the network cannot be exported to ONNX",
            expected="a forward pass without data-dependent branches, of operators that ONNX has",
            got=first_line(cause),
            hint="Rewrite that part of the network; the bundle itself is not affected",
        ) from error
    finally:
        if chatter.getvalue():
            logger.debug("exporter: %s", chatter.getvalue().strip())
    return proto


def _metadata(
    task: ImageClassification, input_size: tuple[int, int, int], bundle_digest: str | None
) -> Iterable[onnx.StringStringEntryProto]:
    values: dict[str, Any] = {
        "quarantine.format": 1,
        "quarantine.input": {
            "name": "image",
            "dtype": "float32",
            "shape": ["N", *input_size],
            "range": [0, 1],
            "normalised": False,
        },
        "quarantine.output": {"name": "logits", "dtype": "float32", "shape": ["N", task.num_classes]},
        "quarantine.class_names": list(task.class_names),
    }
    if bundle_digest is not None:
        values["quarantine.bundle"] = bundle_digest
    for key in sorted(values):
        value = values[key]
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        yield onnx.StringStringEntryProto(key=key, value=text)


def _check_inputs(model: nn.Module, input_size: tuple[int, int, int], clean: CleanSet) -> None:
    size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    if size > MAX_BYTES:
        raise ExportError(
            "the network is too large for one ONNX file",
            expected=f"at most {MAX_BYTES} bytes of float32 weights",
            got=f"{size} bytes",
            hint="Promote the bundle without ONNX; weights in a second file are not supported",
        )
    if not is_finite(model):
        raise NonFiniteWeights(
            "the network's weights hold NaN or Inf", expected="finite weights", hint="Nothing was exported"
        )
    if tuple(clean.images.shape[1:]) != tuple(input_size):
        raise DataError("images do not fit the network", expected=tuple(input_size), got=tuple(clean.images.shape[1:]))
