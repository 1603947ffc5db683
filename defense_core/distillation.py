"""Learning another network's answers in place of labels (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TEMPERATURE = 2.0
"""At which the student compares itself with the teacher."""


MAX_KEPT_BYTES = 64_000_000
"""Of answers that a teacher keeps; it gives all further ones anew."""


class Teacher:
    """A network in eval mode whose answers are learnt, by one student after another.

    Students of the same seed, images and settings see the same inputs in the same order, so the answers to those of
    each step are kept for the next student.

    Args:
        network: left as it is, and to be left so.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    @torch.no_grad()
    def answers(
        self, step: int, inputs: Tensor, context: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> Tensor:
        """Logits (N, K), without a graph.

        Args:
            step: number of the student's step.
            inputs: whatever they are, the answers are to them: those to others at this step are not given.
            context: in which a forward pass runs, the same for all students.
        """
        mark = _mark(inputs)
        earlier = self._kept.get(step)
        if earlier is not None and torch.equal(earlier[0], mark):
            return earlier[1]
        with context():
            logits: Tensor = self._network(inputs)
        size = logits.numel() * logits.element_size()
        if earlier is None and self._bytes + size <= MAX_KEPT_BYTES:
            self._kept[step] = mark, logits
            self._bytes += size
        return logits


def _mark(inputs: Tensor) -> Tensor:
    """What tells a batch from others: its size, and each sample's sum and sum of squares, float64."""
    flat = inputs.flatten(1).double()
    return torch.stack([flat.sum(1), flat.square().sum(1)])


def distillation(outputs: Tensor, taught: Tensor) -> Tensor:
    """``T^2 KL(softmax(taught / T) || softmax(outputs / T))``, mean over samples.

    Args:
        outputs: the student's logits (N, K).
        taught: the teacher's (N, K).
    """
    student, teacher = ((logits.float() / TEMPERATURE).log_softmax(-1) for logits in (outputs, taught))
    divergence = nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return TEMPERATURE**2 * divergence
