"""MM-BD without the class's own features: how firmly a class is reached by what its clean images do not show.

CSO (class subspace orthogonalisation, ICML 2026, arXiv 2512.08129): while the margin of class *c* is maximised as in
:mod:`defense_core.scan.margin`, the features of the images found are kept from those that make clean images a *c*. What
is left of an ordinary class's margin is little; of a backdoor's target, the trigger's part. First the class's own
features are told apart by a mask M_c in [0, 1] on the features phi before the last layer h,

    minimise  CE(h(M_c phi), c) - CE(h((1 - M_c) phi), c)   over the clean images of class c,

then the margin is maximised less ``weight`` times ``|margin| * mean_j relu(cos(phi(x), M_c phi(x_j)))``.

What differs from the paper: the penalty counts in units of the margin reached, so that it means the same whatever the
scale of the logits; steps as in ``margin``; the margin is counted where the search ends, mean over the starts, in
standard deviations of the logits of the clean images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_core.calls import Recorded, recorded
from defense_core.config import require
from defense_core.inference import images_at_once
from defense_core.layers import classifier_head
from defense_core.progress import Phase
from defense_core.scan.base import Observation, Subject, outlying, shortlist, unmeasured
from defense_core.scan.margin import at_once, margins_of, stepped
from defense_core.scan.sampling import ease

DETECTOR, HEAD = "subspace", "head"
FLOOR = 0.25
"""Added to the deviation of the class scores, in standard deviations of the clean logits."""
MASK_STEPS, MASK_LR = 60, 0.1
AGREEING = 0.9
"""Share of the images to which the last layer must give the network's own answer."""
CERTAIN = 5.0
"""Once the features outside the mask miss the class by so much cross-entropy, they are not pushed further."""


@dataclass(frozen=True)
class SubspaceConfig:
    """Settings of the search.

    Attributes:
        starts: random images, the same for every class.
        steps: ascent steps from each, with momentum.
        step_size: root mean square of the first step's changes, as a share of the pixel range; falls linearly to zero.
        weight: of the cosine to the class's own features, in margins.
    """

    starts: int = 4
    steps: int = 80
    step_size: float = 0.1
    weight: float = 3.0

    def __post_init__(self) -> None:
        require(self.starts >= 1, "starts", "1 or more", self.starts)
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(0 < self.step_size <= 1, "step_size", "in (0, 1]", self.step_size)
        require(self.weight >= 0, "weight", "0 or more", self.weight)


def subspace(subject: Subject, config: SubspaceConfig = SubspaceConfig()) -> Observation:
    """The margin that each class reaches without its own features; of many classes, those of the largest margins on
    clean images of other classes are looked at.

    Raises:
        NonFiniteOutputs: the model answers NaN or Inf.
        OutOfTime: the scan's time is used up.
        Cancelled: a stop was requested.
    """
    head = classifier_head(subject.model)
    images = subject.images
    if head is None or images is None:
        return unmeasured(
            DETECTOR, "it has no last layer whose input could be read" if head is None else "there are no images"
        )
    with recorded({HEAD: head}) as seen, torch.no_grad():
        parts = images.images.to(subject.device).split(images_at_once(images.images, 256))
        outputs = torch.cat([subject.logits(part.float() / 255) for part in parts])
        features = _read(seen)
    if features.dim() != 2 or len(features) != len(images):
        return unmeasured(DETECTOR, "its last layer does not see one vector an image")
    if not _decides(head, features, outputs):
        return unmeasured(DETECTOR, "its last linear layer in module order is not its classifier")
    labels = images.labels.to(subject.device)
    # A class without images would keep the whole margin that the others lose to their own features.
    present = labels.unique().tolist()
    easy = ease(outputs, labels)
    classes = tuple(present[row] for row in shortlist(easy[present].tolist()))
    own = {label: _own_features(head, features[labels == label], label) for label in classes}
    starts = torch.rand(config.starts, *subject.task.input_size, generator=subject.generator())
    with recorded({HEAD: head}) as seen:
        search = _Search(subject, config, starts.to(subject.device), seen)
        margins, cosines = search.run(own)
    scale = float(outputs.std().clamp_min(1e-6))
    return _observation(classes, margins.mean(1) / scale, cosines.mean(1))


@torch.no_grad()
def _decides(head: nn.Module, features: Tensor, outputs: Tensor) -> bool:
    """Whether ``outputs`` are those of ``head``, up to a change of scale that keeps each row's order: bfloat16 rounds
    the one and not the other, and a network may end in a softmax."""
    answers = head(features)
    return answers.shape == outputs.shape and bool((answers.argmax(1) == outputs.argmax(1)).float().mean() >= AGREEING)


def own_features(head: Callable[[Tensor], Tensor], features: Tensor, label: int) -> Tensor:
    """The mask of the features that make these images class ``label``: float32 (D,) in [0, 1].

    Args:
        head: from features (N, D) to logits (N, K), differentiable.
        features: of clean images of the class, float32 (N, D).
    """
    raw = torch.zeros(features.shape[1], device=features.device, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=MASK_LR)
    wanted = torch.full((len(features),), label, device=features.device)
    for _ in range(MASK_STEPS):
        mask = raw.sigmoid()
        inside = F.cross_entropy(head(mask * features), wanted)
        outside = F.cross_entropy(head((1 - mask) * features), wanted).clamp_max(CERTAIN)
        (raw.grad,) = torch.autograd.grad(inside - outside, raw)
        adam.step()
    return raw.detach().sigmoid()


def _own_features(head: nn.Module, features: Tensor, label: int) -> Tensor:
    """Directions (n, D), of length 1, of what makes clean images a ``label``."""
    return F.normalize(own_features(head, features, label) * features, dim=1)


def _read(seen: Recorded) -> Tensor:
    """What the last layer was given since the last look, float32."""
    seen.outputs.clear()
    return torch.cat(seen.inputs.pop(HEAD)).float()


@dataclass(frozen=True, eq=False)
class _Search:
    """What the ascent of every class shares; ``seen`` is where the last layer's inputs are recorded."""

    subject: Subject
    config: SubspaceConfig
    starts: Tensor
    seen: Recorded

    def run(self, own: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Margins and cosines where the search ends, (classes, starts), CPU."""
        chunks = at_once(tuple(own), self.starts)
        with self.subject.progress.phase(DETECTOR, total=self.config.steps * len(chunks)) as phase:
            found = [self._ascend(chunk.tolist(), own, phase) for chunk in chunks]
        margins, cosines = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return margins, cosines

    def _ascend(self, classes: list[int], own: Mapping[int, Tensor], phase: Phase) -> tuple[Tensor, Tensor]:
        config, count = self.config, len(self.starts)
        images = self.starts.repeat(len(classes), 1, 1, 1)
        wanted = torch.tensor(classes, device=images.device).repeat_interleave(count)
        velocity = torch.zeros_like(images)
        margins = cosines = torch.zeros(len(images))
        for step in range(config.steps):
            images.requires_grad_(True)
            margins = margins_of(self.subject.logits(images), wanted)
            directions = F.normalize(_read(self.seen), dim=1).split(count)
            cosines = torch.cat(
                [(each @ own[label].T).relu().mean(1) for each, label in zip(directions, classes, strict=True)]
            )
            kept = margins - config.weight * margins.detach().abs() * cosines
            (gradient,) = torch.autograd.grad(kept.sum(), images)
            images, velocity = stepped(images, velocity, gradient, config.step_size * (1 - step / config.steps))
            phase.advance()
        return margins.detach().view(len(classes), -1), cosines.detach().view(len(classes), -1)


def _observation(classes: tuple[int, ...], scores: Tensor, cosines: Tensor) -> Observation:
    values = scores.tolist()
    statistic, members = outlying(values, floor=FLOOR)
    named = tuple(classes[member] for member in members)
    best = max(range(len(values)), key=values.__getitem__)
    typical = float(scores.median())
    return Observation(
        DETECTOR,
        statistic,
        f"Without the features that its clean images share, class {classes[best]} is still reached with a margin of "
        f"{values[best]:.1f} (the usual class: {typical:.1f}), in standard deviations of the model's answers",
        class_scores=tuple(values),
        classes=classes,
        targets=named,
        facts=MappingProxyType({"measured": True, "cosine": float(cosines.mean())}),
    )
