"""Is a suspicion a backdoor? What an inverted trigger must do on clean images that no detector has searched with.

A clean model has easy classes too, and one in twenty stands out by chance. Before a suspicion becomes FAIL, the
trigger that was inverted for the suspected class must

* *generalise*: send held-out images of other classes to it, although it is small (a mask of at most 5 % of the
  pixels, or one patch of a transformer's grid of 16 or more, or a mean squared change of at most 0.01 of the squared
  pixel range);
* *transfer*: do so from every source class, not only from those that resemble the target; where it leads away from
  single classes, so many of their images that they assure a success of 70 % (nine of nine do);
* beat a *placebo*: the triggers that the same search found for classes that nobody suspects, cut to the same size;
* be *unlearnt*: when a copy of the model is shown the searched images with the trigger and their true labels, the
  trigger loses its power in a few steps, and the model does not surely lose accuracy.

Each is a fixed rule of the specification, none is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from scipy.stats import beta
from torch import Tensor

from defense_core.data import CleanSet
from defense_core.errors import MethodDiverged
from defense_core.inference import correct, images_at_once
from defense_core.loop import Tuning, tune, working_copy
from defense_core.scan.base import InvertedTrigger, Observation, Subject
from defense_core.scan.sampling import spread_over_classes

MIN_SUCCESS = 0.9
MIN_SOURCE_SUCCESS = 0.7
MAX_MASK_SHARE = 0.05
MAX_CELL_SHARE = 1 / 16
"""A trigger inside one patch of a transformer's grid is small up to this share of the pixels: it cannot be cut."""
MAX_MEAN_SQUARE = 0.01
PLACEBO_RATIO = 0.5
"""The median placebo may succeed at most this share as often as the suspect."""
MIN_SOURCE_IMAGES = 3
"""A source class with fewer held-out images says nothing by itself."""
SURE = 0.95
"""A source class resists where its success is below ``MIN_SOURCE_SUCCESS`` with this confidence, not where one image of
three fails by chance; likewise a loss of accuracy."""
IMAGES_AT_ONCE = 256
MAX_PLACEBOS = 16
"""Of more, every n-th is tried: their median is wanted, and with 32 classes each of them costs up to 1,000 answers."""
MAX_HELD_OUT = 1000
"""Held-out images that a suspicion is tried on, at most: with so many, every rate is known within two points."""
UNLEARNING = Tuning(epochs=10, batch_size=32, lr=0.003, max_grad_norm=1.0)
UNLEARNT = 0.2
"""Success of the trigger after unlearning, at most."""
MAX_ACCURACY_LOST = 0.03


@dataclass(frozen=True)
class Confirmation:
    """What became of one suspected class.

    Attributes:
        target: the class.
        detector: whose trigger it was.
        success: share of held-out images of other classes that the trigger sends to ``target``.
        least_source: the same for the source class that resists most; ``None`` where no source has enough images.
        placebo: median success of the same detector's triggers for unsuspected classes at the same size; ``None``
            without any, or where something else failed before.
        small: the trigger keeps to the size that counts as small.
        images: held-out images that it was tried on.
        sources: classes that it leads away from, of which these images are; empty: any.
        confirmed: all of it holds.
        unlearnt: success after unlearning; ``None`` where something else failed before.
        accuracy_lost: by unlearning, on the held-out images.
    """

    target: int
    detector: str
    success: float
    least_source: float | None
    placebo: float | None
    small: bool
    images: int
    confirmed: bool
    unlearnt: float | None = None
    accuracy_lost: float | None = None
    sources: tuple[int, ...] = ()


def confirm(
    subject: Subject, held_out: CleanSet, observations: Sequence[Observation], targets: Sequence[int]
) -> Iterator[Confirmation]:
    """Try the triggers that were inverted for ``targets``; for each class the detector's that does best.

    Of a class's triggers that stand the rest, the most successful that is also unlearnt counts.

    Args:
        subject: its images are those that the detectors searched with, to unlearn a trigger on.
        held_out: other clean images; :func:`enough` of them are tried.

    Yields:
        What became of each class that a trigger was inverted for.

    Raises:
        OutOfTime: the subject's time is used up.
        Cancelled: a stop was requested.
    """
    held_out = enough(held_out)
    for target in targets:
        tried = []
        for observation in observations:
            placebos = [each for each in observation.triggers if each.target not in targets]
            tried += [
                (_tried(subject, held_out, trigger, observation, placebos), trigger)
                for trigger in observation.triggers
                if trigger.target == target
            ]
        tried.sort(key=lambda each: (each[0].confirmed, each[0].success), reverse=True)
        if tried:
            yield _stood(subject, held_out, tried)


def _stood(subject: Subject, held_out: CleanSet, tried: Sequence[tuple[Confirmation, InvertedTrigger]]) -> Confirmation:
    """The first of a class's triggers, the best first, that is unlearnt too; where none is, what became of the best."""
    best, _ = tried[0]
    for number, (found, trigger) in enumerate(tried):
        if not found.confirmed:
            break
        end = _unlearnt(subject, held_out, trigger, found)
        if end.confirmed:
            return end
        best = best if number else end
    return best


def upper_bound(hits: int, count: int) -> float:
    """The success rate that ``hits`` of ``count`` still allow, with confidence ``SURE`` (Clopper and Pearson 1934)."""
    return 1.0 if hits == count else float(beta.ppf(SURE, hits + 1, count - hits))


def lower_bound(hits: int, count: int) -> float:
    """The success rate that ``hits`` of ``count`` assure with confidence ``SURE`` (Clopper and Pearson 1934)."""
    return 0.0 if not hits else float(beta.ppf(1 - SURE, hits, count - hits + 1))


def surely_lost(lost: int, gained: int, count: int) -> bool:
    """Whether more than ``MAX_ACCURACY_LOST`` of ``count`` images were lost with confidence ``SURE``: the normal
    approximation to McNemar's test (1947).

    Args:
        lost: images that only the model before got right.
        gained: images that only the model after gets right.
    """
    return lost - gained - NormalDist().inv_cdf(SURE) * math.sqrt(lost + gained) > MAX_ACCURACY_LOST * count


def cut_to(trigger: InvertedTrigger, size: float) -> InvertedTrigger:
    """A patch that covers at most ``size`` pixels: the parts of its mask that cover most are kept. Smaller patches and
    other triggers, whose size is bounded anyway, stay as they are."""
    if trigger.mask is None or float(trigger.mask.sum()) <= size:
        return trigger
    flat = trigger.mask.flatten()
    order = flat.argsort(descending=True, stable=True)
    kept = flat[order].cumsum(0) <= size
    mask = torch.zeros_like(flat)
    mask[order[kept]] = flat[order[kept]]
    return replace(trigger, mask=mask.view_as(trigger.mask))


def success(subject: Subject, clean: CleanSet, trigger: InvertedTrigger) -> tuple[torch.Tensor, torch.Tensor]:
    """(hits bool (N,), labels int64 (N,)) over the images of the classes that ``trigger`` leads away from."""
    labels = clean.labels.cpu()
    wanted = labels != trigger.target
    if trigger.sources:
        wanted &= torch.isin(labels, torch.tensor(trigger.sources))
    hits = []
    with torch.no_grad():
        for images in _parts(clean.images[wanted]):
            pixels = trigger.apply(images.to(subject.device))
            hits.append((subject.logits(pixels / 255).argmax(1) == trigger.target).cpu())
    return torch.cat(hits) if hits else torch.zeros(0, dtype=torch.bool), labels[wanted]


def size_of(trigger: InvertedTrigger, clean: CleanSet, *, device: torch.device | str) -> tuple[float, float]:
    """(share of the pixels that change noticeably, mean squared change in units of the squared pixel range)."""
    total = 0.0
    for images in _parts(clean.images):  # a trigger takes tens of bytes for each byte of an image
        pixels = images.to(device)
        total += float(((trigger.apply(pixels) - pixels.float()) / 255).square().sum(dtype=torch.float64))
    share = float(trigger.mask.mean()) if trigger.mask is not None else 1.0
    return share, total / max(1, clean.images.numel())


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = images.split(images_at_once(images, IMAGES_AT_ONCE))
    return parts


def enough(held_out: CleanSet) -> CleanSet:
    """At most ``MAX_HELD_OUT`` of the images, of each class an equal share as far as it has so many."""
    if len(held_out) <= MAX_HELD_OUT:
        return held_out
    return held_out.subset(spread_over_classes(held_out)[:MAX_HELD_OUT].sort().values)


def _placebo(
    subject: Subject, held_out: CleanSet, trigger: InvertedTrigger, others: Sequence[InvertedTrigger]
) -> float | None:
    """Median success of the triggers that one search found for classes that nobody suspects; ``None`` without any."""
    size = float("inf") if trigger.mask is None else float(trigger.mask.sum())
    every = max(1, math.ceil(len(others) / MAX_PLACEBOS))
    tried = [success(subject, held_out, cut_to(other, size))[0] for other in others[::every]]
    shares = [float(each.float().mean()) for each in tried if len(each)]
    return sorted(shares)[len(shares) // 2] if shares else None


def _tried(
    subject: Subject,
    held_out: CleanSet,
    trigger: InvertedTrigger,
    observation: Observation,
    others: Sequence[InvertedTrigger],
) -> Confirmation:
    """Everything but the unlearning, which is for those that stand the rest."""
    hits, labels = success(subject, held_out, trigger)
    share = int(hits.sum()) / max(1, len(hits))  # exactly: in float32, 27 of 30 are less than 0.9
    sources = {label: hits[labels == label] for label in labels.unique().tolist()}
    sources = {label: each for label, each in sources.items() if len(each) >= MIN_SOURCE_IMAGES}
    masked, square = size_of(trigger, held_out, device=subject.device)
    allowed = MAX_CELL_SHARE if "cell_pixels" in observation.facts else MAX_MASK_SHARE
    small = masked <= allowed or square <= MAX_MEAN_SQUARE
    # One image of one source says nothing, however it ends.
    enough_hits = not trigger.sources or lower_bound(int(hits.sum()), len(hits)) >= MIN_SOURCE_SUCCESS
    works = (
        small
        and enough_hits
        and share >= MIN_SUCCESS
        and all(upper_bound(int(each.sum()), len(each)) >= MIN_SOURCE_SUCCESS for each in sources.values())
    )
    placebo = _placebo(subject, held_out, trigger, others) if works else None
    return Confirmation(
        target=trigger.target,
        detector=observation.detector,
        success=share,
        least_source=min((float(each.float().mean()) for each in sources.values()), default=None),
        placebo=placebo,
        small=small,
        images=len(hits),
        sources=trigger.sources,
        confirmed=works and (placebo is None or placebo <= PLACEBO_RATIO * share),
    )


def _unlearnt(subject: Subject, held_out: CleanSet, trigger: InvertedTrigger, found: Confirmation) -> Confirmation:
    """``found`` after a copy has seen the searched images with and without the trigger, and their labels."""
    searched = held_out if subject.images is None else subject.images
    shown = trigger.apply(searched.images).round().clamp(0, 255).to(torch.uint8)
    both = CleanSet(
        torch.cat([searched.images, shown]), torch.cat([searched.labels, searched.labels]), searched.num_classes
    )
    model = working_copy(subject.model, subject.device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    try:
        tune(
            model, both, task=replace(subject.task, augment="none"), tuning=UNLEARNING, seed=subject.seed,
            device=subject.device, progress=subject.progress, name="unlearn the trigger", fixed_statistics=True,
        )  # fmt: skip
    except MethodDiverged:
        return replace(found, confirmed=False)
    copy = replace(subject, model=model.eval())
    left, _ = success(copy, held_out, trigger)
    share = float(left.float().mean())
    before, after = (_right(each, held_out) for each in (subject, copy))
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    return replace(
        found,
        unlearnt=share,
        accuracy_lost=(lost - gained) / len(held_out),
        confirmed=share <= UNLEARNT and not surely_lost(lost, gained, len(held_out)),
    )


def _right(subject: Subject, clean: CleanSet) -> Tensor:
    """Which images the model classifies correctly, bool (N,)."""
    return correct(subject.model, clean, task=subject.task, device=subject.device, precision="auto")
