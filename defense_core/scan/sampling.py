"""What detectors that search with clean images share: two halves, batches for many targets at once, and Adam's step."""

from __future__ import annotations

import torch
from torch import Tensor

from defense_core.data import CleanSet
from defense_core.errors import DataError
from defense_core.scan.base import DRAWS, Subject

ADAM_BETAS = (0.5, 0.9)
"""Of Neural Cleanse: short memory, because the balance of its two terms moves all the time."""


def halves(subject: Subject, generator: torch.Generator) -> tuple[CleanSet, CleanSet]:
    """The clean images in two halves, one to search with and one to judge on, on the subject's device. Each class is
    split evenly; a class with one image gives it to either side in turn.

    Raises:
        DataError: there are fewer than two images.
    """
    images = subject.images
    if images is None or len(images) < 2:
        raise DataError(
            "this detector needs clean images", expected="2 or more", got=0 if images is None else len(images),
            hint="Give a clean set, or leave the detector out",
        )  # fmt: skip
    order = torch.randperm(len(images), generator=generator)
    by_class = order[images.labels.cpu()[order].argsort(stable=True)]
    return images.subset(by_class[0::2]).to(subject.device), images.subset(by_class[1::2]).to(subject.device)


def spread_over_classes(clean: CleanSet) -> Tensor:
    """Positions of all images, one of every class before a second of any, drawn by the fixed seed. int64 (N,), CPU."""
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(DRAWS))
    labels = clean.labels.cpu()[order]
    rank = torch.zeros(len(order), dtype=torch.int64)
    for label in labels.unique():
        member = labels == label
        rank[member] = torch.arange(int(member.sum()))
    return order[rank.argsort(stable=True)]


def others(clean: CleanSet, target: int) -> Tensor:
    """Indices of the images that are not of class ``target``; of all images where that leaves none. int64, CPU."""
    labels = clean.labels.cpu()
    found = (labels != target).nonzero().flatten()
    return found if len(found) else torch.arange(len(labels))


def drawn(pools: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices from each pool, with replacement: int64 (len(pools), count), CPU."""
    return torch.stack([pool[torch.randint(len(pool), (count,), generator=generator)] for pool in pools])


def ease(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean logit of each class on images of other classes, relative to the mean over the classes: (K,).

    Args:
        logits: float32 (N, K).
        labels: int64 (N,), where the logits are.
    """
    relative = logits - logits.mean(1, keepdim=True)
    other = labels[:, None] != torch.arange(logits.shape[1], device=labels.device)
    return (relative * other).sum(0) / other.sum(0).clamp_min(1)


class Adam:
    """Adam (Kingma and Ba, ICLR 2015, algorithm 1) over items of one tensor that may be stepped separately.

    Args:
        like: float32 (T, ...), gives the shape; item t keeps its own moments and count of steps.
        lr: step size.
    """

    def __init__(self, like: Tensor, lr: float) -> None:
        self._lr = lr
        self._first, self._second = torch.zeros_like(like), torch.zeros_like(like)
        self._count = torch.zeros(len(like), *[1] * (like.dim() - 1), device=like.device)

    def step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """What to subtract from the items ``rows`` (int64), given their gradient."""
        slow, fast = ADAM_BETAS
        self._count[rows] += 1
        self._first[rows] = slow * self._first[rows] + (1 - slow) * gradient
        self._second[rows] = fast * self._second[rows] + (1 - fast) * gradient.square()
        count = self._count[rows]
        first = self._first[rows] / (1 - slow**count)
        second = self._second[rows] / (1 - fast**count)
        return self._lr * first / (second.sqrt() + 1e-12)
