"""Exact Fisher quantities against the loop over single samples: ``curvature.json``.

``python -m benchmarks.curvature``. Random images and a random ``preact_resnet18(width=16)``; one
row per quantity, with the seconds of the fast rule and of the loop on the same samples, the
largest difference relative to the largest entry, and their ratio. Both run with the threads that
torch has been given.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import write_results
from defense_core.architectures import build
from defense_core.curvature import fisher_diagonal
from defense_core.singular import parametrise, ruled_layers, shift_gradients, shift_layers
from defense_core.task import ImageClassification

TASK = ImageClassification((3, 32, 32), 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CHUNK = 16


def looped(model: nn.Module, inputs: Tensor, targets: Tensor, names: list[str]) -> Tensor:
    """Mean squared gradient, one backward pass per sample, flat (P,)."""
    named = dict(model.named_parameters())
    parameters = [named[name] for name in names]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for sample, target in zip(inputs.split(1), targets.split(1), strict=True):
        gradients = torch.autograd.grad(TASK.losses(model(sample), target).sum(), parameters)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient.square())
    return torch.cat([total.flatten() for total in sums]) / len(inputs)


def by_layer(model: nn.Module, inputs: Tensor, targets: Tensor, names: list[str]) -> Tensor:
    """The same by the layers' rules."""
    found = fisher_diagonal(model, inputs, targets, losses=TASK.losses, names=names, chunk_size=CHUNK)
    return torch.cat([found[name].flatten() for name in names])


def by_shift(model: nn.Module, inputs: Tensor, targets: Tensor, names: list[str]) -> Tensor:
    """The same for the shifts of singular values, by their rule."""
    layers = ruled_layers(model, shift_layers_of(names), inputs[:8], targets[:8], losses=TASK.losses)
    sums: dict[str, Tensor] = {}
    for some, labels in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
        for name, rows in shift_gradients(model, layers, some, labels, losses=TASK.losses).items():
            squares = rows.square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
    return torch.cat([sums[name] for name in names]) / len(inputs)


def shift_layers_of(names: list[str]) -> list[Any]:
    """The layers whose shifts are called ``names``."""
    return [layer for layer in shift_layers(network()) if layer.shift_name in names]


def network() -> nn.Module:
    """The network of the figures, random weights, eval mode."""
    return build("preact_resnet18", {"width": 16, "num_classes": 10})


def seconds_of(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Wall seconds and the result."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = datetime.now(UTC)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(options.samples, 3, 32, 32, generator=generator)
    targets = torch.randint(0, 10, (options.samples,), generator=generator)
    plain, shifted = network(), network()
    layers = shift_layers(shifted)
    parametrise(shifted, layers)
    rows = []
    for quantity, model, names, fast in (
        ("empirical Fisher diagonal, all weights", plain, [name for name, _ in plain.named_parameters()], by_layer),
        ("empirical Fisher diagonal, singular-value shifts", shifted, [layer.shift_name for layer in layers], by_shift),
    ):
        fast(model, inputs[:CHUNK], targets[:CHUNK], names)
        looped(model, inputs[:CHUNK], targets[:CHUNK], names)
        loop_seconds, want = seconds_of(lambda m=model, n=names: looped(m, inputs, targets, n))  # type: ignore[misc]
        seconds, got = seconds_of(lambda m=model, n=names, f=fast: f(m, inputs, targets, n))  # type: ignore[misc]
        rows.append(
            {
                "quantity": quantity,
                "samples": options.samples,
                "parameters": len(want),
                "threads": torch.get_num_threads(),
                "seconds": round(seconds, 3),
                "loop_seconds": round(loop_seconds, 3),
                "ratio": round(loop_seconds / seconds, 2),
                "max_rel_error": float((got - want).abs().max() / want.max()),
            }
        )
        logging.info("%s", rows[-1])
    write_results("curvature", rows, command="python -m benchmarks.curvature", started=started)


if __name__ == "__main__":
    main()
