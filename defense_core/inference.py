"""What a network answers: batch by batch in eval mode, in the precision that suits the network and the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defense_core.data import CleanSet
from defense_core.errors import MethodDiverged
from defense_core.layers import CONVOLUTIONS, evaluating
from defense_core.task import Task

Precision = Literal["auto", "fp32", "bf16"]
NATIVE_BFLOAT16 = ("amx_bf16", "avx512_bf16")
"""CPUs that multiply bfloat16: up to ten times faster than float32 with the first, 1.2 to 2 times with the second."""
NETWORK_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
"""What a stranger's network raises that does not take what it is given."""
LARGE_NETWORK = 1_000_000
"""Parameters from which a network without convolutions gains from bfloat16 (a ViT of 5 million: six times)."""
PIXELS_AT_ONCE = 512 * 32 * 32
"""Pixels of a forward pass, all its images together: what bounds the memory."""


def items_at_once(images: Tensor, batch_size: int) -> int:
    """How many targets (or pairs) of ``batch_size`` images like ``images``, (N, C, H, W), fit into one forward pass."""
    return max(1, PIXELS_AT_ONCE // (batch_size * images.shape[-1] * images.shape[-2]))


def images_at_once(images: Tensor, most: int = 512) -> int:
    """How many of ``images``, (N, C, H, W), go through a network at once: at most ``most``."""
    return min(most, items_at_once(images, 1))


def are_probabilities(outputs: Tensor) -> bool:
    """Whether outputs (N, K) look like those of a softmax: none negative, and a sum of 1 in every row."""
    return outputs.dim() == 2 and bool((outputs >= 0).all()) and bool((outputs.sum(1) - 1).abs().max() < 1e-2)


def logarithms(probabilities: Tensor) -> Tensor:
    """Logits whose softmax these are, float32; 0 counts as 1e-30."""
    return probabilities.float().clamp_min(1e-30).log()


def logits_of(outputs: Tensor) -> Tensor:
    """Outputs (N, K) as logits, float32: the :func:`logarithms` of what a softmax gave, anything else as it is."""
    return logarithms(outputs) if are_probabilities(outputs) else outputs.float()


@torch.no_grad()
def outputs_of(
    model: nn.Module,
    data: CleanSet,
    *,
    task: Task,
    device: torch.device | str,
    batch_size: int = 512,
    precision: Precision = "fp32",
) -> Iterator[Tensor]:
    """The outputs in eval mode, batch by batch, on the device; the model's modes are restored.

    Args:
        batch_size: images at once, at most: fewer where they are large.

    Raises:
        MethodDiverged: the model returned NaN or Inf.
    """
    context = autocast(model, precision, device)
    with evaluating(model):
        for images, _ in data.batches(images_at_once(data.images, batch_size)):
            with context():
                outputs = model(channels_last(task.inputs(images.to(device))))
            if not torch.isfinite(outputs).all():
                raise MethodDiverged("the model's outputs are not finite", expected="finite logits", got="NaN or Inf")
            yield outputs


@torch.no_grad()
def predictions(
    model: nn.Module,
    data: CleanSet,
    *,
    task: Task,
    device: torch.device | str,
    batch_size: int = 512,
    precision: Precision = "fp32",
) -> Tensor:
    """Predicted labels in eval mode, int64 (N,), on the CPU; the model's modes are restored.

    Raises:
        MethodDiverged: the model returned NaN or Inf.
    """
    batches = outputs_of(model, data, task=task, device=device, batch_size=batch_size, precision=precision)
    return torch.cat([task.predict(outputs).cpu() for outputs in batches])


def correct(
    model: nn.Module, data: CleanSet, *, task: Task, device: torch.device | str, precision: Precision = "fp32"
) -> Tensor:
    """Which images of ``data`` the model labels as stated, bool (N,), on the CPU.

    Raises:
        MethodDiverged: the model returned NaN or Inf.
    """
    return predictions(model, data, task=task, device=device, precision=precision) == data.labels.cpu()


def accuracy(
    model: nn.Module, data: CleanSet, *, task: Task, device: torch.device | str, precision: Precision = "fp32"
) -> float:
    """Share of ``data`` that the model labels as stated, in [0, 1].

    Raises:
        MethodDiverged: the model returned NaN or Inf.
    """
    return float(correct(model, data, task=task, device=device, precision=precision).float().mean())


def autocast(
    model: nn.Module, precision: Precision, device: torch.device | str
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Context that runs a forward pass in the precision asked for."""
    kind = torch.device(device).type
    heavy = is_convolutional(model) or sum(parameter.numel() for parameter in model.parameters()) >= LARGE_NETWORK
    wanted = precision == "bf16" or (precision == "auto" and heavy and multiplies_bfloat16(kind))
    if not wanted:
        return contextlib.nullcontext
    return lambda: torch.autocast(kind, dtype=torch.bfloat16)


def logits(answer: Any) -> Tensor:
    """A network's answer without the auxiliary heads that Inception networks add to it in training mode."""
    found: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return found


def channels_last(inputs: Tensor) -> Tensor:
    """4-dimensional inputs in channels-last layout, others as they are."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


def is_convolutional(model: nn.Module) -> bool:
    """Whether more of the layers are convolutions than linear maps."""
    convolutions = sum(isinstance(module, CONVOLUTIONS) for module in model.modules())
    return convolutions > sum(isinstance(module, nn.Linear) for module in model.modules())


def multiplies_bfloat16(kind: str) -> bool:
    """Whether devices of this kind do so here: ``cpu`` or ``cuda``."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not there before torch 2.12
    return kind == "cpu" and any(capabilities.get(name, False) for name in NATIVE_BFLOAT16)
