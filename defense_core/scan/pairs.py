"""Pair-wise trigger inversion with transferability: backdoors that lead to several classes or away from some only.

Xiang et al., *UMD: Unsupervised model detection for X2X backdoor attacks*, ICML 2023, on the reverse engineering of
*PT-RED* (IEEE TNNLS 2022): for each ordered pair (s, t) the smallest change, common to some images of class *s*, that
sends them to *t*. The change found for one pair of a backdoor does the same to the images of its other pairs, because
it is the trigger; those of unrelated pairs do not. So a core of pairs that transfer among each other is gathered. What
differs from the paper: the change is a patch, found for all pairs in one batch and few steps; size and transfer are
judged after what every source and every target shows anyway is taken off, because some classes are easy to reach on
any model; and no published threshold is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.inference import images_at_once, items_at_once
from defense_core.progress import Phase
from defense_core.scan.base import InvertedTrigger, Observation, Subject, outlying, unmeasured
from defense_core.scan.inversion import Descent, Inversion, Patches
from defense_core.scan.sampling import drawn, halves
from defense_core.scan.transfer import (
    TRANSFER_FLOOR,
    column_scores,
    greedy_core,
    size_residuals,
    transfer_residuals,
)

DETECTOR = "pairs"
MIN_IMAGES_PER_CLASS = 2
"""Clean images a class, on average, below which this detector has nothing to search and to judge with."""
SOURCES, TARGETS_A_SOURCE = 12, 8
"""With more than ``ALL_PAIRS`` classes, so many sources and targets of each are looked at closely."""
ALL_PAIRS = 10
CANDIDATES_A_SOURCE = 64
LONELY = 1.5
"""The smallest of all pairs always stands out a little more than the mean of a core: it counts by 1 / ``LONELY``."""


@dataclass(frozen=True)
class PairsConfig:
    """How pairs are searched.

    Attributes:
        steps: Adam steps a pair.
        images: clean images a pair and step.
        lr: Adam's step, in logits of mask and pattern.
        success: attack success that the search holds.
        growth: factor on a pair's lambda at each step at which the attack succeeds.
        judged: held-out images a class for the transfer from pair to pair.
    """

    steps: int = 32
    images: int = 4
    lr: float = 0.5
    success: float = 0.85
    growth: float = 1.4
    judged: int = 5

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.images >= 1, "images", "1 or more", self.images)
        require(self.lr > 0, "lr", "above 0", self.lr)
        require(0 < self.success <= 1, "success", "in (0, 1]", self.success)
        require(self.growth > 1, "growth", "above 1", self.growth)
        require(self.judged >= 1, "judged", "1 or more", self.judged)


SCREENING = PairsConfig(steps=4, images=2)
"""Of the brief search that chooses the targets of each source."""


def pairs(subject: Subject, config: PairsConfig) -> Observation:
    """Search the smallest change for every pair of classes, and the core of pairs that share one.

    Raises:
        DataError: there are fewer than two clean images.
    """
    generator = subject.generator()
    search, judge = halves(subject, generator)
    with subject.progress.phase(DETECTOR, total=config.steps + SCREENING.steps) as phase:
        both = sorted(set(search.labels.tolist()) & set(judge.labels.tolist()))
        chosen = _chosen(subject, search, torch.tensor(both, dtype=torch.int64), generator, phase)
        if len(chosen) < 2:
            return unmeasured(
                DETECTOR, "the clean images are too few for two pairs of classes to be searched and judged"
            )
        pools = _pools(subject, search, chosen[:, 0].unique().tolist())
        patches = Patches(
            _descended(subject, search, chosen, pools, config=config, generator=generator, phase=phase).best
        )
    transfer = _transfer(subject, judge, chosen, patches, count=config.judged, generator=generator)
    return _observation(chosen, patches, transfer)


def _pools(subject: Subject, clean: CleanSet, sources: list[int]) -> dict[int, Tensor]:
    """Indices of the images of each source that the model classifies correctly; of all of them where it fails."""
    labels = clean.labels.cpu()
    with torch.no_grad():
        parts = clean.images.split(images_at_once(clean.images, 256))
        right = torch.cat([subject.logits(part.float() / 255).argmax(1).cpu() for part in parts])
    pools = {}
    for source in sources:
        members = labels == source
        kept = (members & (right == source)).nonzero().flatten()
        pools[source] = kept if len(kept) else members.nonzero().flatten()
    return pools


def _chosen(subject: Subject, search: CleanSet, present: Tensor, generator: torch.Generator, phase: Phase) -> Tensor:
    """The pairs to look at, int64 (P, 2): all of a few classes; of many, the most promising of some sources. Sources
    are those ``present`` in both halves."""
    count = subject.num_classes
    if count <= ALL_PAIRS:
        phase.advance(SCREENING.steps)
        every = [(source, target) for source in present.tolist() for target in range(count) if source != target]
        return torch.tensor(every, dtype=torch.int64).view(-1, 2)
    sources = present[torch.randperm(len(present), generator=generator)[:SOURCES]].sort().values
    pools = _pools(subject, search, sources.tolist())
    rows = []
    for source, pool in pools.items():
        with torch.no_grad():
            logits = subject.logits(search.images[pool[: SCREENING.images].to(search.images.device)].float() / 255)
        order = logits.mean(0).cpu().argsort(descending=True, stable=True)
        rows += [(source, target) for target in order[order != source][:CANDIDATES_A_SOURCE].tolist()]
    candidates = torch.tensor(rows, dtype=torch.int64).view(-1, 2)
    if not rows:
        phase.advance(SCREENING.steps)
        return candidates
    brief = _descended(subject, search, candidates, pools, config=SCREENING, generator=generator, phase=phase)
    best = []
    for source in sources.tolist():
        mine = (candidates[:, 0] == source).nonzero().flatten()
        best.append(
            mine[brief.losses[mine.to(subject.device)].cpu().argsort(stable=True)[:TARGETS_A_SOURCE]].sort().values
        )
    return candidates[torch.cat(best)]


def _descended(
    subject: Subject,
    clean: CleanSet,
    chosen: Tensor,
    pools: dict[int, Tensor],
    *,
    config: PairsConfig,
    generator: torch.Generator,
    phase: Phase,
) -> Inversion:
    """The smallest patch of each pair."""
    descent = Descent(config.images, config.lr, config.success, config.growth, patience=config.steps)
    sources = [pools[source] for source in chosen[:, 0].tolist()]
    state = Inversion(subject, clean, sources, targets=chosen[:, 1].tolist(), descent=descent, generator=generator)
    for _ in range(config.steps):
        state.step()
        phase.advance()
    return state


@torch.no_grad()
def _transfer(
    subject: Subject, clean: CleanSet, chosen: Tensor, patches: Patches, *, count: int, generator: torch.Generator
) -> Tensor:
    """How well the patch of one pair does the work of another, float32 (P, P), CPU: entry (i, j) is the mean
    probability of the target of pair j on images of the source of pair j under the patch of pair i."""
    sources = chosen[:, 0].unique()
    pools = _pools(subject, clean, sources.tolist())
    index = drawn([pools[source] for source in sources.tolist()], count, generator).flatten()
    pixels = clean.images[index.to(clean.images.device)].float() / 255
    tables = []
    for logits in patches.logits.split(items_at_once(clean.images, len(index))):
        some = Patches(logits)
        parts = [
            subject.logits(some.on(part[None]).flatten(0, 1)).softmax(1).view(len(logits), len(part), -1)
            for part in pixels.split(items_at_once(clean.images, len(logits)))
        ]
        tables.append(torch.cat(parts, 1).view(len(logits), len(sources), count, -1).mean(2).cpu())
    row = torch.searchsorted(sources, chosen[:, 0].contiguous())
    return torch.cat(tables)[:, row, chosen[:, 1]]


def _observation(chosen: Tensor, patches: Patches, transfer: Tensor) -> Observation:
    pixels = patches.masks.sum((1, 2, 3)).cpu()
    log_sizes = pixels.double().clamp_min(0.5).log()
    sizes, transfers = size_residuals(chosen, log_sizes), transfer_residuals(chosen, transfer)
    classes, scores = column_scores(chosen, log_sizes, transfer)
    column, members = outlying(scores, floor=TRANSFER_FLOOR)
    core = greedy_core(chosen, sizes, transfers)
    lonely = float(sizes.max()) / LONELY
    targets = tuple(classes[row] for row in members)
    statistic = max(column, core.score, lonely)
    if statistic == column and targets:
        rows = [row for row in range(len(chosen)) if int(chosen[row, 1]) in targets]
        kind = f"patches found for one class lead others to class {targets[0]} too"
    elif statistic == core.score:
        shared = transfers[list(core.rows)][:, list(core.rows)].sum(1) / max(1, len(core.rows) - 1)
        rows = [row for row, value in zip(core.rows, shared.tolist(), strict=True) if value >= float(shared.mean()) / 2]
        kind = "patches found for one pair of classes work for other pairs too"
    else:
        rows = [int(sizes.argmax())]
        kind = f"one pair needs a patch of {float(pixels[rows[0]]):.1f} pixels only"
    links = transfer[:, rows].mean(1)
    rows.sort(key=lambda row: -float(links[row]))
    named = [(int(source), int(target)) for source, target in chosen[rows].tolist()]
    return Observation(
        DETECTOR,
        statistic,
        f"{kind}: {', '.join(f'{s}→{t}' for s, t in named[:5])}{' …' if len(named) > 5 else ''} "
        f"(mean success of one on another's images {float(transfer[rows][:, rows].mean()):.0%}, "
        f"of any two pairs {float(transfer.mean()):.0%})",
        targets=tuple(dict.fromkeys(target for _, target in named)),
        pairs=tuple(named),
        triggers=tuple(_trigger(patches, row, chosen, one_target=statistic == column) for row in rows[:2]),
        facts={
            "sources": len(chosen[:, 0].unique()),
            "pairs": len(chosen),
            "core": [list(each) for each in named],
            "core_score": core.score,
            "column_score": column,
            # Not class_scores: where every class is a target, no class stands out against the others.
            "column_transfer": dict(zip(map(str, classes), scores, strict=True)),
            "lonely_score": lonely,
            "pixels_median": float(pixels.median()),
            "pixels_core": float(pixels[rows].median()),
        },
    )


def _trigger(patches: Patches, row: int, chosen: Tensor, *, one_target: bool) -> InvertedTrigger:
    source, target = chosen[row].tolist()
    pattern, mask = 255 * patches.patterns[row].cpu(), patches.masks[row].cpu()
    return InvertedTrigger(target, "patch", pattern, mask, () if one_target else (source,))
