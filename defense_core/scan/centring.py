"""What is changed in the copy that is scanned, so that detectors see margins: its answers to an image stay the same.

What a model adds to the logits of all classes alike is taken out.

A bias, or a direction of the features, that every class gets changes no answer and no probability. But logits that all
lie near 100,000 are the same number once they are rounded to bfloat16, and a spread over classes and images grows with
what the images have in common: with either, whoever made the model could hide it from detectors that measure margins
or count in standard deviations of the logits. In ordinary models that part is small (the standard deviation of all
logits was at most 0.5 % larger with it, on 78 clean and backdoored ones), so that a pool read with it stays valid.

And a network that ends in a softmax answers with the logarithms of its probabilities, which are logits: taken for
logits themselves, numbers between 0 and 1 would flatten every margin, loss and gradient.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from defense_core.errors import NonFiniteOutputs
from defense_core.inference import are_probabilities, autocast, channels_last, logarithms
from defense_core.layers import classifier_head
from defense_core.task import ImageClassification

SAME = 0.05
"""Two answers are the same where they differ by so much of their deviation at most, apart from what all classes get."""
ROUNDED_AWAY = 0.25
"""The share of the logits' deviation that the machine's precision may change."""
TRIED = 8
"""Random images on which that is looked at."""


@torch.no_grad()
def centred(model: nn.Module, task: ImageClassification) -> nn.Module:
    """A copy of ``model`` whose last layer's weights and biases are centred over the classes; ``model`` itself where
    that would be another one: where its answers are neither those of its last layer nor a shift of them. Where it ends
    in a softmax, the copy answers with logarithms.

    Args:
        model: in eval mode.
    """
    inputs = _inputs(model, task)
    answers = _answers(model, inputs)
    found = copy.deepcopy(model)
    head = classifier_head(found)
    if head is not None:
        for part in head.parameters(recurse=False):
            part.sub_(part.mean(0, keepdim=True))
    if head is None or _differ(answers, _answers(found, inputs)) > SAME:
        found = model
    return Logarithms(found) if are_probabilities(answers) else found


class Logarithms(nn.Module):
    """A network that ends in a softmax, answering with the logarithms of its outputs (N, K); 0 counts as 1e-30.

    What looked like probabilities on a few images may be no softmax: logits that were made to look so there would have
    no gradient where they are negative. So every answer is looked at.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Log-probabilities (N, K), float32.

        Raises:
            NonFiniteOutputs: the network's answers are no probabilities.
        """
        outputs: Tensor = self.network(inputs).float()
        if not are_probabilities(outputs):
            raise NonFiniteOutputs(
                "the model's outputs are probabilities on some images and not on others",
                expected="a softmax of every image, or logits",
                got="numbers below 0, or rows that do not sum to 1",
                hint="Give the network without what looks like a softmax at its end",
            )
        return logarithms(outputs)


@torch.no_grad()
def rounded_away(model: nn.Module, task: ImageClassification, device: torch.device) -> bool:
    """Whether the precision that detectors run in leaves too little of the model's answers to look at. Answers that are
    no finite logits are for the detectors to refuse."""
    inputs = _inputs(model, task)
    exact = _answers(model, inputs)
    with autocast(model, "auto", device)():
        gap = _differ(_answers(model, inputs), exact)
    return ROUNDED_AWAY < gap < math.inf


def _inputs(model: nn.Module, task: ImageClassification) -> Tensor:
    pixels = torch.rand(TRIED, *task.input_size, generator=torch.Generator().manual_seed(0))
    place = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return channels_last(task.inputs(pixels.to(place)))


def _answers(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs: Tensor = model(inputs)
    return outputs.float()


def _differ(one: Tensor, other: Tensor) -> float:
    """Standard deviation of the difference over that of ``other``, both apart from what all classes get; 0 where they
    are equal, infinite for what are no finite logits."""
    if one.dim() != 2 or one.shape != other.shape or not bool(torch.isfinite(one).all() & torch.isfinite(other).all()):
        return math.inf
    one, other = (each.double() - each.double().mean(1, keepdim=True) for each in (one, other))
    gap, spread = float((one - other).square().mean().sqrt()), float(other.square().mean().sqrt())
    return 0.0 if gap == 0 else min(gap / max(spread, 1e-300), 1e300)
