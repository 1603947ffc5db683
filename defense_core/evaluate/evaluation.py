"""Judge a model on held-out clean samples and on triggered ones, beside the model that it was made from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.errors import DataError, NonFiniteOutputs, StateDictMismatch
from defense_core.evaluate.metrics import PairedCounts, Proportion, der, der_interval
from defense_core.evaluate.records import ClassAccuracy, Evaluation, ProbeResult
from defense_core.inference import images_at_once
from defense_core.progress import NullProgress, Phase, Progress
from defense_core.task import Task
from defense_core.triggered import NamedTrigger, require_own_names, triggered


class Probe(NamedTrigger, Protocol):
    """A known trigger with the labels that its backdoor answers with."""

    @property
    def kind(self) -> str:
        """The kind of trigger, e.g. ``badnets``."""
        ...

    @property
    def target(self) -> int | None:
        """The one target class, or ``None`` where every class has its own (all-to-all)."""
        ...

    def expected(self, labels: Tensor) -> Tensor:
        """Labels that the attacker wants, int64 (N,)."""
        ...

    def eligible(self, labels: Tensor) -> Tensor:
        """Samples that count, bool (N,): those whose label is not already what the attacker wants."""
        ...


def evaluate(
    model: nn.Module,
    clean: CleanSet,
    *,
    task: Task,
    probes: Sequence[Probe] = (),
    reference: nn.Module | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure ACC, and per probe ASR, RA and DER, all on ``clean``.

    Works on a copy of the model in evaluation mode: modes, hooks, buffers, gradients and
    device of the one that was passed in stay as they are, also after an exception.

    Args:
        model: answers float32 (N, C, H, W) inputs with logits (N, K).
        clean: held-out samples that neither a method nor a choice has seen.
        task: transforms inputs and reads predictions.
        probes: known triggers; none in production.
        reference: the model before purification; enables drops, DER and "before" figures,
            paired image by image.
        device: where the copies run.
        batch_size: images a forward pass, at most: fewer where they are large.
        progress: shown to the operator; also where a stop request takes effect.

    Raises:
        DataError: there are no samples, probe names repeat, one is ``clean``, or a probe returns other than uint8
            images of the same shape.
        StateDictMismatch: the logits are not (N, K).
        NonFiniteOutputs: a model answers NaN or Inf.
        Cancelled: the operator asked to stop.
    """
    require(batch_size >= 1, "batch_size", "1 or more images", batch_size)
    _check(clean, probes, task)
    batch_size = images_at_once(clean.images, batch_size)
    models = [_copy(each, device) for each in (model, reference) if each is not None]
    steps = len(models) * _batches(len(clean), batch_size)
    steps += len(models) * sum(_batches(int(probe.eligible(clean.labels).sum()), batch_size) for probe in probes)
    with (progress or NullProgress()).phase("evaluate", total=steps) as phase:
        runner = _Runner(task, torch.device(device), batch_size, phase)
        answers = [runner.predict(each, clean.images) for each in models]
        hits = [answer == clean.labels.cpu() for answer in answers]
        paired = _paired(hits, slice(None))
        results = tuple(_judge_probe(probe, clean, models, runner, paired) for probe in probes)
    return Evaluation(_proportion(hits[0]), paired, _per_class(clean, hits), results)


def _per_class(clean: CleanSet, hits: list[Tensor]) -> tuple[ClassAccuracy, ...]:
    labels = clean.labels.cpu()
    rows = []
    for label in range(clean.num_classes):
        members = labels == label
        rows.append(ClassAccuracy(label, _proportion(hits[0][members]), _paired(hits, members)))
    return tuple(rows)


def _judge_probe(
    probe: Probe, clean: CleanSet, models: list[nn.Module], runner: _Runner, acc: PairedCounts | None
) -> ProbeResult:
    counted = clean.subset(probe.eligible(clean.labels).nonzero().flatten())
    labels, wanted = counted.labels.cpu(), probe.expected(counted.labels).cpu()
    answers = [runner.predict(each, counted.images, lambda images: triggered(probe, images)) for each in models]
    obeyed = [answer == wanted for answer in answers]
    resisted = [answer == labels for answer in answers]
    asr_paired = _paired(obeyed, slice(None))
    return ProbeResult(
        name=probe.name,
        kind=probe.kind,
        target=probe.target,
        asr=_proportion(obeyed[0]),
        ra=_proportion(resisted[0]),
        asr_paired=asr_paired,
        ra_paired=_paired(resisted, slice(None)),
        der=der(acc.drop, asr_paired.drop) if acc is not None and asr_paired is not None else None,
        der_interval=der_interval(acc, asr_paired) if acc is not None and asr_paired is not None else None,
    )


@dataclass(frozen=True)
class _Runner:
    task: Task
    device: torch.device
    batch_size: int
    phase: Phase

    def predict(self, model: nn.Module, images: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Predicted labels on the CPU, int64 (N,)."""
        answers = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                batch = images[start : start + self.batch_size].to(self.device)
                outputs = model(self.task.inputs(batch if change is None else change(batch)))
                answers.append(self.task.predict(self._checked(outputs, len(batch))).cpu())
                self.phase.advance()
        return torch.cat(answers) if answers else torch.empty(0, dtype=torch.int64)

    def _checked(self, outputs: Tensor, count: int) -> Tensor:
        wanted = (count, self.task.num_classes)
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != wanted:
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise StateDictMismatch(
                "the model's answer is not one logit a class",
                expected=f"logits of shape {wanted}",
                got=got,
                hint="Check num_classes against the model's last layer",
            )
        if not torch.isfinite(outputs).all():
            raise NonFiniteOutputs(
                "the model answers NaN or Inf",
                expected="finite logits",
                got=f"{int((~torch.isfinite(outputs)).any(dim=1).sum())} of {count} images in a batch without them",
                hint="Check the weights and the normalisation; no figure was derived",
            )
        return outputs


def _check(clean: CleanSet, probes: Sequence[Probe], task: Task) -> None:
    if not len(clean):
        raise DataError("there is nothing to evaluate on", expected="at least one labelled image", got="none")
    if clean.num_classes != task.num_classes:
        raise DataError(
            "the samples are not of this task",
            expected=f"{task.num_classes} classes",
            got=f"{clean.num_classes} classes",
        )
    require_own_names([probe.name for probe in probes])


def _copy(model: nn.Module, device: torch.device | str) -> nn.Module:
    return copy.deepcopy(model).to(device).eval()


def _batches(count: int, size: int) -> int:
    return -(-count // size)


def _proportion(outcomes: Tensor) -> Proportion:
    return Proportion(int(outcomes.sum()), outcomes.numel())


def _paired(outcomes: list[Tensor], index: slice | Tensor) -> PairedCounts | None:
    """Counts of (reference, model) where both were run; the model comes first in the list."""
    if len(outcomes) < 2:
        return None
    return PairedCounts.of(outcomes[1][index].tolist(), outcomes[0][index].tolist())
