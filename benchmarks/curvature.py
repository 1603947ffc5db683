"""Exact Fisher quantities against the loop over single samples: ``curvature.json``.

``python -m benchmarks.curvature``. Random images and random networks; one row per network and quantity, with the
seconds of the fast rule and of the loop on the same samples, the largest difference relative to the largest entry, and
their ratio. ``bound`` is the same ratio for one ordinary gradient of the summed loss in batches, which does not tell
samples apart and is the least that a rule for each has to do. All run with the threads that torch has been given.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import write_results
from defense_core.architectures import build
from defense_core.curvature import fisher_diagonal
from defense_core.per_sample import TRIED
from defense_core.purify.fast_fip import diagonal
from defense_core.singular import ShiftLayer, parametrise, ruled_layers, shift_layers
from defense_core.task import ImageClassification

TASK = ImageClassification((3, 32, 32), 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
Rule = Callable[[Tensor, Tensor], Tensor]
"""Inputs and targets to a flat result."""
BATCH, REPEATS = 64, 3
NETWORKS: tuple[tuple[str, Mapping[str, Any], tuple[int, int, int]], ...] = (
    ("preact_resnet18", {"width": 16, "num_classes": 10}, (3, 32, 32)),
    ("small_cnn", {"width": 16, "in_channels": 1, "num_classes": 10}, (1, 8, 8)),
)
"""The benchmarks' network on CIFAR-10, in which arithmetic is what takes the time, and a small one on digits."""


def looped(model: nn.Module, names: list[str], inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared gradient, one backward pass per sample, flat (P,)."""
    named = dict(model.named_parameters())
    parameters = [named[name] for name in names]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for sample, target in zip(inputs.split(1), targets.split(1), strict=True):
        gradients = torch.autograd.grad(TASK.losses(model(sample), target).sum(), parameters)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient.square())
    return torch.cat([total.flatten() for total in sums]) / len(inputs)


def summed(model: nn.Module, names: list[str], inputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the summed loss, in batches, flat (P,): no Fisher quantity, only its unavoidable part."""
    named = dict(model.named_parameters())
    total = torch.zeros(())
    for some, labels in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
        gradients = torch.autograd.grad(TASK.losses(model(some), labels).sum(), [named[name] for name in names])
        total = total + torch.cat([gradient.flatten() for gradient in gradients])
    return total


def by_layer(model: nn.Module, names: list[str], inputs: Tensor, targets: Tensor) -> Tensor:
    """The same by the layers' rules."""
    found = fisher_diagonal(model, inputs, targets, losses=TASK.losses, names=names)
    return torch.cat([found[name].flatten() for name in names])


def by_shift(model: nn.Module, layers: list[ShiftLayer], inputs: Tensor, targets: Tensor) -> Tensor:
    """The same for the shifts of singular values, by their rule."""
    ruled = ruled_layers(model, layers, inputs[:TRIED], targets[:TRIED], losses=TASK.losses)
    names = [layer.shift_name for layer in layers]
    found = diagonal(model, ruled, names, inputs, targets, task=TASK)
    return torch.cat([found[name] for name in names])


def quantities(architecture: str, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Rule, Rule, Rule]]:
    """(name, rule, loop, ordinary gradient) of each quantity, on random weights."""
    plain, shifted = (build(architecture, arguments).eval() for _ in range(2))
    names = [name for name, _ in plain.named_parameters()]
    yield (
        "empirical Fisher diagonal, all weights",
        partial(by_layer, plain, names),
        partial(looped, plain, names),
        partial(summed, plain, names),
    )
    layers = shift_layers(shifted)
    parametrise(shifted, layers)
    shifts = [layer.shift_name for layer in layers]
    yield (
        "empirical Fisher diagonal, singular-value shifts",
        partial(by_shift, shifted, layers),
        partial(looped, shifted, shifts),
        partial(summed, shifted, shifts),
    )


def seconds_of(rule: Rule, inputs: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Wall seconds, the least of ``REPEATS``, and the result, once the rule has been called on a few samples."""
    rule(inputs[:BATCH], targets[:BATCH])
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = rule(inputs, targets)
        taken.append(time.perf_counter() - started)
    return min(taken), result


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = datetime.now(UTC)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 10, (options.samples,), generator=generator)
    rows = []
    for architecture, arguments, size in NETWORKS:
        inputs = torch.randn(options.samples, *size, generator=generator)
        for quantity, rule, loop, ordinary in quantities(architecture, arguments):
            loop_seconds, want = seconds_of(loop, inputs, targets)
            seconds, got = seconds_of(rule, inputs, targets)
            least, _ = seconds_of(ordinary, inputs, targets)
            rows.append(
                {
                    "quantity": quantity,
                    "architecture": f"{architecture}(width={arguments['width']})",
                    "samples": options.samples,
                    "parameters": len(want),
                    "threads": torch.get_num_threads(),
                    "seconds": round(seconds, 3),
                    "loop_seconds": round(loop_seconds, 3),
                    "ratio": round(loop_seconds / seconds, 2),
                    "bound": round(loop_seconds / least, 2),
                    "max_rel_error": float((got - want).abs().max() / want.max()),
                }
            )
            logging.info("%s", rows[-1])
    write_results("curvature", rows, command="python -m benchmarks.curvature", started=started)


if __name__ == "__main__":
    main()
