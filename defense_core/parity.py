"""Does an ONNX file answer like the network that it was made from?

The file is run in onnxruntime on the CPU and compared with the network in float32, on clean
and on triggered images, at batch sizes 1, 2 and a larger one.

Where the bound comes from. Both sides compute in float32 (machine epsilon 1.2e-7), but not in
the same order: exporters fold BatchNorm into convolutions, and kernels sum in other orders. The
difference of a logit therefore grows with the *size* of the logits, not with their spread; a
fixed bound would be blind for small logits and spurious for large ones. As fractions of the
largest logit, sound exports of twelve architectures (4 to 121 layers) measured 1.1e-7 to 1.4e-6;
weights rounded to half precision 2e-4 to 5e-4, pixels divided by 255.5 instead of 255 1e-3, a
mean off by 0.01 1e-2. ``relative = 2e-5`` is a factor of ten or more from either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, evenly_spaced
from defense_core.errors import DataError, ExportError, NonFiniteOutputs
from defense_core.inference import NETWORK_ERRORS, images_at_once
from defense_core.layers import evaluating
from defense_core.progress import Phase
from defense_core.task import Task
from defense_core.triggered import CLEAN, NamedTrigger, require_own_names, triggered
from defense_core.verdict import Finding, Verdict


@dataclass(frozen=True)
class ParityBounds:
    """What counts as the same answer.

    Attributes:
        relative: largest difference of a logit, as a fraction of the largest absolute logit.
        floor: the difference that is always permitted, in logits; for networks whose logits are all near zero.
        agreement: smallest fraction of images with the same predicted class.
        batch_sizes: images a run; the first two show that the batch is dynamic, the last carries the set.
        max_images: at most so many images a set, evenly spaced.
    """

    relative: float = 2e-5
    floor: float = 1e-5
    agreement: float = 0.999
    batch_sizes: tuple[int, ...] = (1, 2, 64)
    max_images: int = 1024

    def __post_init__(self) -> None:
        require(0 < self.relative < 1, "relative", "in (0, 1)", self.relative)
        require(self.floor >= 0, "floor", "0 or more", self.floor)
        require(0 < self.agreement <= 1, "agreement", "in (0, 1]", self.agreement)
        require(len(set(self.batch_sizes)) >= 2, "batch_sizes", "at least two different sizes", self.batch_sizes)
        require(min(self.batch_sizes) >= 1, "batch_sizes", "1 or more images", self.batch_sizes)
        require(self.max_images >= 1, "max_images", "1 or more images", self.max_images)

    def fitting(self, images: Tensor) -> ParityBounds:
        """The same, with fewer images in the batches that carry the set where images are as large as ``images``."""
        *first, last = self.batch_sizes
        return replace(self, batch_sizes=(*first, max(*first, images_at_once(images, last))))


@dataclass(frozen=True)
class Parity:
    """One set of images, answered by both.

    Attributes:
        name: ``clean`` or the probe's name.
        max_abs_diff: largest difference of a logit; ``None`` where the file answers NaN or Inf.
        argmax_agreement: fraction of images with the same predicted class.
        images: how many.
        logit_scale: largest absolute logit of the network on this set.
        bound_abs: permitted ``max_abs_diff``.
        bound_agreement: demanded ``argmax_agreement``.
    """

    name: str
    max_abs_diff: float | None
    argmax_agreement: float
    images: int
    logit_scale: float
    bound_abs: float
    bound_agreement: float

    def findings(self) -> Iterator[Finding]:
        """One for the difference, one for the agreement."""
        diff = self.max_abs_diff
        near = diff is not None and diff <= self.bound_abs
        why = "it answers NaN or Inf" if diff is None else f"logits differ by up to {diff:.2g} on {self.name} images"
        yield Finding(
            f"parity.{self.name}.max_abs_diff",
            _verdict(near),
            diff,
            f"<= {self.bound_abs:.3g}",
            f"The ONNX file was compared: {why}.",
        )
        share = self.argmax_agreement
        yield Finding(
            f"parity.{self.name}.argmax_agreement",
            _verdict(share >= self.bound_agreement),
            share,
            f">= {self.bound_agreement:g}",
            f"The ONNX file gives the same class on {share:.2%} of {self.images} {self.name} images.",
        )


@dataclass(frozen=True)
class ParityCheck:
    """All sets, and whether every batch size ran.

    Attributes:
        rows: one a set; empty where the file cannot be run at all.
        dynamic_batch: whether the file answered every batch size with one row an image.
        findings: one a rule.
    """

    rows: tuple[Parity, ...]
    dynamic_batch: bool
    findings: tuple[Finding, ...]


def check_parity(
    data: bytes,
    model: nn.Module,
    *,
    task: Task,
    clean: CleanSet,
    probes: Sequence[NamedTrigger],
    bounds: ParityBounds,
    phase: Phase,
) -> ParityCheck:
    """Compare the ONNX file ``data`` with ``model``.

    Args:
        data: the bytes of the file; input ``image`` (N, C, H, W) float32 in [0, 1], output ``logits``.
        model: float32 on the CPU; its modes are restored.
        task: normalises for ``model``; the file is expected to normalise by itself.

    Raises:
        DataError: there are no images, a probe's name repeats or is ``clean``, or a probe returns something
            else than images.
        NonFiniteOutputs: the network itself answers NaN or Inf.
        ExportError: the network itself does not take one of the batch sizes.
    """
    images = clean.images.cpu()[_spread(len(clean), bounds.max_images)]
    require_own_names([probe.name for probe in probes])
    sets = chain([(CLEAN, images)], ((probe.name, triggered(probe, images)) for probe in probes))  # one at a time
    try:
        run = _Session(data)
        with evaluating(model):
            rows = tuple(
                _compare(run, model, name, pixels, task=task, bounds=bounds, phase=phase) for name, pixels in sets
            )
    except _RunFailed as error:
        why = f"The ONNX file does not run: {error}."
        sizes = "batch sizes " + ", ".join(map(str, bounds.batch_sizes))
        return ParityCheck((), False, (Finding("parity.runs", Verdict.FAIL, str(error), sizes, why),))
    sizes = ", ".join(map(str, bounds.batch_sizes))
    ran = Finding("parity.runs", Verdict.PASS, sizes, f"batch sizes {sizes}", "The ONNX file runs at every batch size.")
    return ParityCheck(rows, True, (ran, *(finding for row in rows for finding in row.findings())))


def parity_steps(images: int, probes: int, bounds: ParityBounds) -> int:
    """Runs that :func:`check_parity` advances its phase by."""
    count = min(images, bounds.max_images)
    return (1 + probes) * (len(bounds.batch_sizes) - 1 + -(-count // bounds.batch_sizes[-1]))


def _compare(
    run: _Session, model: nn.Module, name: str, images: Tensor, *, task: Task, bounds: ParityBounds, phase: Phase
) -> Parity:
    differences: list[float] = []
    scale, same = 0.0, 0
    for batch, counted in _batches(images, bounds.batch_sizes):
        wanted = _logits(model, task, batch)
        got = run(batch.float().div(255).numpy(), wanted.shape)
        scale = max(scale, float(numpy.abs(wanted).max()))
        differences.append(float(numpy.abs(wanted - got).max()))
        same += int((wanted.argmax(1) == got.argmax(1))[:counted].sum())
        phase.advance()
    finite = bool(numpy.isfinite(differences).all())
    return Parity(
        name=name,
        max_abs_diff=max(differences) if finite else None,
        argmax_agreement=same / len(images),
        images=len(images),
        logit_scale=scale,
        bound_abs=max(bounds.floor, bounds.relative * scale),
        bound_agreement=bounds.agreement,
    )


def _batches(images: Tensor, sizes: tuple[int, ...]) -> Iterator[tuple[Tensor, int]]:
    """One batch of each size but the last, then all images once in batches of the last; and how many of each count.

    Images are repeated where there are fewer than a size, and count once.
    """
    for size in sizes[:-1]:
        yield images[torch.arange(size) % len(images)], 0
    if len(images) < sizes[-1]:
        yield images[torch.arange(sizes[-1]) % len(images)], len(images)
        return
    for start in range(0, len(images), sizes[-1]):
        batch = images[start : start + sizes[-1]]
        yield batch, len(batch)


def _logits(model: nn.Module, task: Task, images: Tensor) -> numpy.ndarray:
    wanted = (len(images), task.num_classes)
    try:
        with torch.inference_mode():
            outputs = model(task.inputs(images))
    except NETWORK_ERRORS as error:
        raise ExportError(
            f"the network does not take a batch of {len(images)}",
            expected="any batch size",
            got=first_line(error),
        ) from error
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != wanted:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ExportError("the network's answer is not one logit a class", expected=f"logits {wanted}", got=got)
    if not torch.isfinite(outputs).all():
        raise NonFiniteOutputs(
            "the network answers NaN or Inf",
            expected="finite logits",
            got=f"{int((~torch.isfinite(outputs)).any(dim=1).sum())} of {len(images)} images without them",
            hint="Check the weights and the normalisation; nothing was exported",
        )
    return outputs.float().numpy()


class _RunFailed(Exception):
    """The file cannot be loaded or run; says why."""


class _Session:
    """The file in onnxruntime, on the CPU, quiet."""

    def __init__(self, data: bytes) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
        self._errors: tuple[type[Exception], ...] = (
            ValueError,
            *(getattr(state, name) for name in names),
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session: Any = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise _RunFailed(first_line(error)) from error

    def __call__(self, images: numpy.ndarray, shape: tuple[int, ...]) -> numpy.ndarray:
        try:
            answer: numpy.ndarray = self._session.run(["logits"], {"image": images})[0]
        except self._errors as error:
            raise _RunFailed(f"batch of {len(images)}: {first_line(error)}") from error
        if answer.shape != shape:
            raise _RunFailed(f"batch of {len(images)}: logits are {answer.shape}, not {tuple(shape)}")
        return answer


def _spread(count: int, limit: int) -> Tensor:
    """Indices of the images that are compared."""
    if not count:
        raise DataError("there is nothing to compare on", expected="at least one image", got="none")
    return evenly_spaced(count, limit)


def first_line(error: BaseException) -> str:
    """The first line of its message, or its name: a bare ``raise ValueError`` says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _verdict(passed: bool) -> Verdict:
    return Verdict.PASS if passed else Verdict.FAIL
