"""Learning another network's answers in place of labels (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TEMPERATURE = 2.0
"""At which the student compares itself with the teacher."""


@torch.no_grad()
def answers(
    teacher: nn.Module, inputs: Tensor, context: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Tensor:
    """The teacher's logits (N, K), without a graph.

    Args:
        context: in which the forward pass runs.
    """
    with context():
        logits: Tensor = teacher(inputs)
    return logits


def distillation(outputs: Tensor, taught: Tensor) -> Tensor:
    """``T^2 KL(softmax(taught / T) || softmax(outputs / T))``, mean over samples.

    Args:
        outputs: the student's logits (N, K).
        taught: the teacher's (N, K).
    """
    student, teacher = ((logits.float() / TEMPERATURE).log_softmax(-1) for logits in (outputs, taught))
    divergence = nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return TEMPERATURE**2 * divergence
