"""The one fine-tuning loop. Methods differ in the gradient step and in what follows it."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.course import Course, Kept, model_state, random_state
from defense_core.data import CleanSet
from defense_core.distillation import Teacher, distillation
from defense_core.errors import MethodDiverged
from defense_core.gradient_steps import Step, plain_step
from defense_core.inference import Precision, autocast, channels_last, is_convolutional, logits
from defense_core.layers import is_finite
from defense_core.progress import Progress
from defense_core.task import Mixed, Task

HistoryRow = dict[str, Any]
Schedule = Literal["constant", "cosine", "onecycle"]


@dataclass(frozen=True)
class Tuning:
    """Settings of the loop.

    Attributes:
        epochs: passes over the fit split.
        batch_size: samples per step.
        lr: peak learning rate of SGD.
        momentum: SGD momentum.
        weight_decay: L2 penalty of SGD.
        schedule: ``constant``; ``cosine`` to zero; ``onecycle``: linear to the peak over the
            first third, then linear to zero.
        precision: ``fp32``; ``bf16`` autocast; ``auto``: bf16 where the device multiplies
            bfloat16 natively (CUDA, CPUs with AMX or AVX-512 BF16) and the network is convolutional, or a transformer
            or another network with large matrices.
        max_grad_norm: clip the gradient's global L2 norm to this; 0 leaves it.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    precision: Precision = "auto"
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.lr > 0, "lr", "a positive rate", self.lr)
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        require(self.max_grad_norm >= 0, "max_grad_norm", "0 or more", self.max_grad_norm)


def working_copy(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A trainable deep copy on ``device``; the original is never touched again.

    Convolutional weights are laid out channels-last, which is what the bfloat16 kernels of
    CPUs and GPUs want.
    """
    duplicate = copy.deepcopy(model).to(device)
    for parameter in duplicate.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    if is_convolutional(duplicate):
        duplicate = duplicate.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return duplicate


def finished(model: nn.Module, method: str) -> nn.Module:
    """The purified model as it is handed over: CPU, float32, contiguous, eval mode.

    Raises:
        MethodDiverged: a weight or statistic is NaN or Inf.
    """
    if not is_finite(model):
        raise MethodDiverged(
            f"{method} diverged", expected="finite weights", got="NaN or Inf", hint="Lower its learning rate"
        )
    model = model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return model.eval()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Random numbers that a network draws by itself (dropout, drop path) follow ``seed`` inside.

    Outside, the process's random state is what it was. On a GPU, convolutions are the same each time inside.
    """
    place = torch.device(device)
    cuda = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), same_each_time(place):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def same_each_time(device: torch.device | str) -> Iterator[None]:
    """cuDNN takes no convolution inside whose sums depend on the order in which threads end; on a CPU nothing changes.
    Outside, its settings are what they were."""
    if torch.device(device).type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def tune(
    model: nn.Module,
    data: CleanSet,
    *,
    task: Task,
    tuning: Tuning,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    name: str,
    step: Step = plain_step,
    sign: float = 1.0,
    mixup: float = 0.0,
    teacher: Teacher | None = None,
    fixed_statistics: bool = False,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[int], bool] | None = None,
    kept: Kept | None = None,
) -> list[HistoryRow]:
    """Train ``model`` in place on ``data``; from a checkpoint on where ``progress`` brings one.

    Args:
        model: in any mode; left in training mode, with ``fixed_statistics`` in eval mode. Parameters that require no
            gradient stay.
        data: samples, moved to ``device`` once.
        step: fills ``parameter.grad`` and returns the loss.
        sign: -1 for gradient ascent.
        mixup: parameter of the Beta distribution of MixUp; 0 mixes nothing.
        teacher: whose answers to the same (mixed) inputs are learnt in place of the labels.
        fixed_statistics: BatchNorm normalises by its running statistics, which stay as they are; other layers
            that behave differently in training do as in eval mode.
        after_step: called after each optimiser step (clamp, project, mask).
        after_epoch: called with the number of finished epochs; true ends the loop early.
        kept: what ``step``, ``after_step`` and ``after_epoch`` change besides the model, for checkpoints.

    Returns:
        One row per epoch: ``{"phase", "step", "loss", "lr"}``.

    Raises:
        MethodDiverged: the loss became NaN or Inf, or the rate is more than float32 holds.
        Cancelled: a stop was requested; checked after each step.
    """
    data = data.to(device)
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=tuning.lr, momentum=tuning.momentum, weight_decay=tuning.weight_decay, foreach=True
    )
    order, total = torch.arange(len(data)), torch.zeros((), device=device)
    steps_per_epoch = len(in_batches(order, tuning.batch_size))
    rates = _finite_rates(tuning, steps_per_epoch, name)
    context = autocast(model, tuning.precision, device)
    model.train(not fixed_statistics)
    with seeded(seed, device), progress.phase(name, total=tuning.epochs * steps_per_epoch) as phase:
        changed: Kept = {"order": order, "total": total, "generator": generator, **random_state(device)}
        changed = {**changed, **model_state(model), **{f"step.{key}": part for key, part in (kept or {}).items()}}
        course = Course(progress.checkpoints.of_loop(name), name, changed, optimizer=optimizer)
        if course.done:
            phase.advance(course.done)
        if course.finished:
            return course.history
        shown = math.nan  # the loss of the last whole epoch
        for epoch in range(len(course.history), tuning.epochs):
            if course.done == epoch * steps_per_epoch:  # a checkpoint may lie within the epoch, or at its end
                order.copy_(torch.randperm(len(data), generator=generator))
                total.zero_()
            for batch in in_batches(order, tuning.batch_size)[course.done - epoch * steps_per_epoch :]:
                index = batch.to(device)
                images = task.augmented(data.images[index], generator)
                inputs = channels_last(task.inputs(images))
                targets = data.labels[index]
                mixed = task.mixup(inputs, targets, mixup, generator) if mixup else None
                taught = (
                    teacher.answers(course.done, inputs if mixed is None else mixed.inputs, context)
                    if teacher is not None
                    else None
                )

                def loss_of(
                    inputs: Tensor = inputs,
                    targets: Tensor = targets,
                    mixed: Mixed | None = mixed,
                    taught: Tensor | None = taught,
                ) -> Tensor:
                    with context():
                        outputs = logits(model(inputs if mixed is None else mixed.inputs))
                    if taught is not None:
                        return sign * distillation(outputs, taught)
                    loss = task.losses(outputs, targets).mean()
                    if mixed is not None:
                        loss = mixed.weight * loss + (1 - mixed.weight) * task.losses(outputs, mixed.partners).mean()
                    return sign * loss

                for group in optimizer.param_groups:
                    group["lr"] = rates[course.done]
                optimizer.zero_grad(set_to_none=True)
                total += step(model, loss_of)
                if tuning.max_grad_norm:
                    nn.utils.clip_grad_norm_(trained, tuning.max_grad_norm)
                optimizer.step()
                if after_step is not None:
                    after_step()
                course.step()
                phase.advance(loss=shown)
            shown = sign * float(total) / steps_per_epoch
            if not math.isfinite(shown):
                raise MethodDiverged(
                    f"{name} diverged in epoch {epoch + 1}",
                    expected="a finite loss",
                    got=shown,
                    hint="Lower its learning rate",
                )
            course.history.append({"phase": name, "step": epoch + 1, "loss": shown, "lr": rates[course.done - 1]})
            if after_epoch is not None and after_epoch(epoch + 1):
                break
        return course.finish()


def batch_indices(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """A shuffled pass over ``count`` samples as :func:`in_batches`."""
    return in_batches(torch.randperm(count, generator=generator), size)


def in_batches(order: Tensor, size: int) -> list[Tensor]:
    """``order`` in batches. A last batch of one joins its neighbour, since batch
    normalisation cannot train on one sample; a set of one sample is a batch of it twice."""
    if len(order) == 1:
        return [order.repeat(2)]
    batches = list(order.split(max(size, 2)))
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] = torch.cat([batches[-1], last])
    return batches


def epochs_for(images: int, epochs: int, min_steps: int, batch_size: int) -> int:
    """``epochs``, or as many more as ``min_steps`` optimiser steps take; 0 stays 0."""
    if epochs == 0:
        return 0
    return max(epochs, math.ceil(min_steps / len(in_batches(torch.arange(images), batch_size))))


def _finite_rates(tuning: Tuning, steps_per_epoch: int, name: str) -> list[float]:
    rates = list(learning_rates(tuning, steps_per_epoch))
    require_float32(max(rates, default=0.0), name)
    return rates


def require_float32(rate: float, name: str) -> None:
    """Raise :class:`MethodDiverged` for a learning rate that weights cannot be multiplied with."""
    if rate > torch.finfo(torch.float32).max:
        raise MethodDiverged(
            f"{name} cannot begin", expected="a learning rate that float32 holds", got=rate, hint="Lower it"
        )


def learning_rates(tuning: Tuning, steps_per_epoch: int) -> Iterator[float]:
    """The rate of each step, in order."""
    total = max(1, tuning.epochs * steps_per_epoch)
    for done in range(total):
        if tuning.schedule == "cosine":
            yield tuning.lr * 0.5 * (1 + math.cos(math.pi * done / total))
        elif tuning.schedule == "onecycle":
            rise = total / 3
            yield tuning.lr * min((done + 1) / rise, (total - done) / (total - rise), 1.0)
        else:
            yield tuning.lr
