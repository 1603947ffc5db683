"""Trigger inversion inside one token: what a vision transformer can be told by a single patch of the image.

A transformer reads an image as a grid of patches, each through the same embedding. A soft mask over all pixels
(:mod:`defense_core.scan.patch`) descends badly through that grid; here the place is not descended to but tried: for
each class and each cell of the grid a pattern p minimises

    CE(f((1 - m) x + m p), t)    over clean images x of other classes, m the cell

first for a few steps everywhere, then for the most promising cells of each class (successive halving, the idea of
K-Arm, Shen et al., ICML 2021). A local trigger lies in few cells, so that one of them suffices for the class that it
leads to; a clean model is not convinced of any class by one patch in sixteen or more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.inference import images_at_once, items_at_once
from defense_core.progress import Phase
from defense_core.scan.base import InvertedTrigger, Observation, Subject, outlying, shortlist, unmeasured
from defense_core.scan.sampling import Adam, drawn, ease, halves, others

DETECTOR = "token"
FLOOR = 0.5
"""Added to the deviation of the class scores, in log-odds."""
FEWEST_CELLS, MOST_CELLS = 4, 64
"""Of the grid. With fewer, a cell is no small part of the image; of finer grids, neighbouring patches are one cell."""
SUREST = 0.999
"""Mean probabilities count up to this one and down to its opposite."""


@dataclass(frozen=True)
class TokenConfig:
    """How the pattern in a cell is searched.

    Attributes:
        tried: steps in every cell.
        images_tried: clean images a class and step there.
        kept: cells of each class that are searched further.
        steps: further steps.
        batch_size: clean images a class and step there.
        lr: Adam's step, in logits of the pattern.
    """

    tried: int = 10
    images_tried: int = 3
    kept: int = 4
    steps: int = 30
    batch_size: int = 8
    lr: float = 0.3

    def __post_init__(self) -> None:
        require(self.tried >= 1, "tried", "1 or more", self.tried)
        require(self.images_tried >= 1, "images_tried", "1 or more", self.images_tried)
        require(self.kept >= 1, "kept", "1 or more", self.kept)
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.lr > 0, "lr", "above 0", self.lr)


def token(subject: Subject, config: TokenConfig = TokenConfig()) -> Observation:
    """The pattern in one cell of the grid that convinces the model most, for every class; of many classes, for those
    that clean images of other classes come closest to.

    A class's score is the log-odds of its mean probability on unseen images of other classes that carry the pattern.

    Raises:
        DataError: there are fewer than two clean images.
        NonFiniteOutputs: the model answers NaN or Inf.
        OutOfTime: the scan's time is used up.
        Cancelled: a stop was requested.
    """
    size = patch_size(subject.model, subject.task.input_size[0])
    if size is None:
        return unmeasured(DETECTOR, "it does not cut images into patches")
    cells = grid(*subject.task.input_size[1:], size, device=subject.device)
    if len(cells.masks) < FEWEST_CELLS:
        return unmeasured(DETECTOR, f"it cuts images into {len(cells.masks)} patches only")
    generator = subject.generator()
    search, judge = halves(subject, generator)
    classes = _classes(subject, search)
    with subject.progress.phase(DETECTOR, total=config.tried + config.steps) as phase:
        state = _Descent(subject, search, classes, cells, lr=config.lr, generator=generator, phase=phase)
        state.run(config.tried, config.images_tried)
        state.keep(config.kept)
        state.run(config.steps, config.batch_size)
    found = []
    for row, target in enumerate(classes):
        places, patterns = state.of(row)
        found.append(_judged(subject, judge, target, cells=cells, places=places, patterns=patterns))
    return _observation(classes, cells, found)


def patch_size(model: nn.Module, channels: int) -> tuple[int, int] | None:
    """(height, width) of the patches that the network cuts images of ``channels`` into: the kernel of its first
    convolution, where that is applied to every patch once. ``None`` where it is not."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != channels or first.groups != 1:
        return None
    height, width = first.kernel_size
    once = first.stride == first.kernel_size and first.dilation == (1, 1) and first.padding in (0, (0, 0), "valid")
    return (height, width) if once and height * width > 1 else None


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells that images are cut into.

    Attributes:
        masks: float32 (T, 1, H, W) of zeros and ones, one for each cell.
        cell: height and width of one, pixels.
    """

    masks: Tensor
    cell: tuple[int, int]

    def on(self, pixels: Tensor, places: Tensor, patterns: Tensor) -> Tensor:
        """Images (N, B, C, H, W) in [0, 1] with the pattern (N, C, h, w) of their item in the cell (N,) of that."""
        height, width = pixels.shape[-2:]
        rows, columns = height // self.cell[0], width // self.cell[1]
        everywhere = patterns.repeat(1, 1, rows, columns)  # the mask leaves one of them
        rest = (0, width - everywhere.shape[-1], 0, height - everywhere.shape[-2])
        return torch.where(self.masks[places][:, None].bool(), F.pad(everywhere, rest)[:, None], pixels)


def grid(height: int, width: int, size: tuple[int, int], *, device: torch.device | str = "cpu") -> Grid:
    """Every patch a cell, or squares of neighbouring patches, the smallest of which there are at most ``MOST_CELLS``.
    A rest at the right and lower edge belongs to no cell.

    Args:
        height, width: of the image, pixels.
        size: of a patch, pixels.
    """
    times = 1
    while (rows := height // (times * size[0])) * (columns := width // (times * size[1])) > MOST_CELLS:
        times += 1
    cell = times * size[0], times * size[1]
    masks = torch.zeros(rows * columns, 1, height, width, device=device)
    for number in range(rows * columns):
        top, left = number // columns * cell[0], number % columns * cell[1]
        masks[number, :, top : top + cell[0], left : left + cell[1]] = 1
    return Grid(masks, cell)


@torch.no_grad()
def _classes(subject: Subject, search: CleanSet) -> tuple[int, ...]:
    parts = search.images.split(images_at_once(search.images, 256))
    logits = torch.cat([subject.logits(part.float() / 255) for part in parts])
    return shortlist(ease(logits, search.labels.to(logits.device)).tolist())


class _Descent:
    """Adam on patterns: an item is a class and a cell. ``logits`` (N, C, h, w) of the patterns, of a cell's size."""

    def __init__(
        self,
        subject: Subject,
        clean: CleanSet,
        classes: tuple[int, ...],
        cells: Grid,
        *,
        lr: float,
        generator: torch.Generator,
        phase: Phase,
    ) -> None:
        self._subject, self._clean, self._generator, self._phase = subject, clean, generator, phase
        self._classes = torch.tensor(classes, device=subject.device)
        self._pools = [others(clean, target) for target in classes]
        self._cells = cells
        self.rows = torch.arange(len(classes), device=subject.device).repeat_interleave(len(cells.masks))
        self.places = torch.arange(len(cells.masks), device=subject.device).repeat(len(classes))
        noise = torch.randn(len(self.rows), clean.images.shape[1], *cells.cell, generator=generator)
        self.logits = (0.1 * noise).to(subject.device)
        self._adam = Adam(self.logits, lr)
        self._losses = torch.zeros(len(self.rows), device=subject.device)
        self._items = torch.arange(len(self.rows), device=subject.device)

    def run(self, steps: int, batch_size: int) -> None:
        """So many steps of every item that is left; all items of a class see the same images."""
        at_once = items_at_once(self._clean.images, batch_size)
        for _ in range(steps):
            index = drawn(self._pools, batch_size, self._generator).to(self._clean.images.device)
            for some in self._items.split(at_once):
                self._down(some, self._clean.images[index[self.rows[some]]].float() / 255)
            self._phase.advance()

    def _down(self, some: Tensor, pixels: Tensor) -> None:
        logits = self.logits[some].requires_grad_(True)
        outputs = self._subject.logits(self._cells.on(pixels, self.places[some], logits.sigmoid()).flatten(0, 1))
        wanted = self._classes[self.rows[some]].repeat_interleave(pixels.shape[1])
        losses = self._subject.task.losses(outputs, wanted).view(len(some), -1).mean(1)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        self._losses[some] = 0.6 * self._losses[some] + 0.4 * losses.detach()
        self.logits[some] -= self._adam.step(gradient, some)

    def keep(self, count: int) -> None:
        """Leave the ``count`` cells of each class with the smallest running loss."""
        losses = self._losses.view(len(self._classes), -1)
        kept = losses.argsort(dim=1, stable=True)[:, :count]
        first = torch.arange(len(self._classes), device=kept.device)[:, None] * losses.shape[1]
        self._items = (first + kept).sort(1).values.flatten()

    def of(self, row: int) -> tuple[Tensor, Tensor]:
        """Numbers (n,) of the cells that are left of one class, and patterns (n, C, h, w) in [0, 1] for them."""
        mine = self._items[self.rows[self._items] == row]
        return self.places[mine], self.logits[mine].sigmoid()


@dataclass(frozen=True, eq=False)
class _Found:
    """The best cell (1,) of a class with its pattern (1, C, h, w), mean probability and success on unseen images."""

    place: Tensor
    pattern: Tensor
    probability: float
    success: float


@torch.no_grad()
def _judged(subject: Subject, judge: CleanSet, target: int, *, cells: Grid, places: Tensor, patterns: Tensor) -> _Found:
    pixels = judge.images[others(judge, target).to(judge.images.device)].float() / 255
    best = _Found(places[:1], patterns[:1], -1.0, 0.0)
    for place, pattern in zip(places.split(1), patterns.split(1), strict=True):
        parts = pixels.split(items_at_once(judge.images, 1))
        outputs = torch.cat([subject.logits(cells.on(part[None], place, pattern)[0]) for part in parts])
        probability = float(outputs.softmax(1)[:, target].mean())
        if probability > best.probability:
            best = _Found(place, pattern, probability, float((outputs.argmax(1) == target).float().mean()))
    return best


def _observation(classes: tuple[int, ...], cells: Grid, found: list[_Found]) -> Observation:
    probabilities = torch.tensor([each.probability for each in found], dtype=torch.float64)
    scores = tuple(probabilities.clamp(1 - SUREST, SUREST).logit().tolist())
    statistic, members = outlying(scores, floor=FLOOR)
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    first = order[0]
    typical = sorted(each.success for each in found)[len(found) // 2]
    return Observation(
        DETECTOR,
        statistic,
        f"one of {len(cells.masks)} parts of the image, whatever the rest shows, sends {found[first].success:.0%} of "
        f"unseen images to class {classes[first]}, and {typical:.0%} to the median class",
        scores,
        classes,
        tuple(classes[row] for row in members),
        triggers=tuple(InvertedTrigger(classes[row], "patch", *_whole(cells, found[row])) for row in order),
        facts={
            "cells": len(cells.masks),
            "cell_pixels": math.prod(cells.cell),
            "success": [round(each.success, 4) for each in found],
        },
    )


def _whole(cells: Grid, found: _Found) -> tuple[Tensor, Tensor]:
    """Pattern (C, H, W), grey levels, and mask (1, H, W) of the whole image, each with memory of its own."""
    mask = cells.masks[found.place[0]].clone()
    black = mask.new_zeros(1, 1, found.pattern.shape[1], *mask.shape[1:])
    return 255 * cells.on(black, found.place, found.pattern)[0, 0].cpu(), mask.cpu()
