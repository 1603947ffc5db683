"""NFT, Neural mask Fine-Tuning (Karim et al., ECCV 2024, arXiv 2407.10052).

Weights stay; multiplicative masks in [mu(l), 1] are trained on MixUp batches of the clean set
and folded into the weights at the end. ``mu(l) = alpha * exp(-beta * l)`` protects early layers.

Four things are ours, and ``docs/methods-nft-ngf.md`` has the measurements behind them. The paper
masks BatchNorm scales; here masks stand on every kernel of the hidden convolutions too, since in
a pre-activation or narrow network no scale reaches the units that carry the trigger. The paper
starts every mask at 1; here the kernels that a short clean unlearning moves most start at the
lower clamp, and MixUp tuning opens what clean images need. A weak pull towards 0,
``sparsity * ||m||_1``, keeps shut what they do not need. And before the labels the masks learn the given model's
answers (:mod:`defense_core.purify.distil`). ``taught_lr=0, sites="norm", ratio=0, sparsity=0`` is the paper's method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense_core.calls import few_inputs
from defense_core.data import Splits
from defense_core.distillation import Teacher
from defense_core.inference import accuracy
from defense_core.layers import UnitLayer, unit_layers
from defense_core.loop import finished, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import chooser, expected_drop, strongest_by_halving, strongest_expected
from defense_core.purify.masks import MaskSite, mask_sites
from defense_core.purify.nft_masks import NFTConfig, Outcome, depth_schedule, train_masks
from defense_core.purify.unlearning import close_most_moved, closed_weights
from defense_core.task import Task


def purify(
    model: nn.Module,
    clean: Splits,
    config: NFTConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Close what clean unlearning moves most, tune the masks from there, and fold them.

    Returns:
        The purified model. ``facts`` holds ``ratio`` and ``sparsity``, the trials behind them, and per masked tensor
        the clamp (``floors``), the mean mask (``means``) and the share of masks at the clamp (``closed``).

    Raises:
        MethodDiverged: a loss, mask or weight became NaN or Inf.
        MethodNotApplicable: there is nothing to mask.
        Cancelled: a stop was requested.
    """
    shared: dict[str, Any] = {"task": task, "seed": seed, "device": device, "progress": progress}
    original = working_copy(model, device).eval()
    sample = few_inputs(clean.fit, task=task, device=device)
    sites = mask_sites(original, sample, sites=config.sites, granularity=config.granularity)
    floors = depth_schedule(len(sites), alpha=config.alpha, beta=config.beta, depth=config.depth)
    openness = config.eta * task.num_classes / max(len(clean.fit), task.num_classes)
    closable = any(site.kind == "unit" for site in sites) and config.ratio != 0 and config.epochs
    closing = _closing(original, clean, config, **shared) if closable else None

    given = Teacher(original)

    def trained(starts: list[Tensor], sparsity: float, *, taught: bool) -> Outcome:
        return train_masks(
            original, clean.fit, config, sites, floors,
            starts=starts, sparsity=sparsity, openness=openness, teacher=given if taught else None, **shared,
        )  # fmt: skip

    def change(made: Outcome) -> float:
        return -expected_drop(original, made.model, chooser(clean), precision=config.precision, **shared)

    weakest = min(config.sparsity_grid) if config.sparsity is None else config.sparsity

    def begun(factor: float) -> tuple[float, tuple[float, Outcome, float]]:
        starts, ratio = [torch.ones(site.shape, device=device) for site in sites], 0.0
        if closing is not None:
            ratio = min(closing.ratio * factor, 1.0)
            _close(starts, sites, floors, closing.at(ratio))
        if not config.taught_lr:
            return 0.0, (0.0, Outcome(original, [], starts), ratio)
        made = trained(starts, weakest, taught=True)
        return (reached := change(made)), (reached, made, ratio)

    def ended(sparsity: float) -> tuple[float, Outcome]:
        if not config.lr or (config.taught_lr and config.sparsity is None and not sparsity):
            return reached, beginning
        made = trained(beginning.values, sparsity, taught=False)
        return change(made), Outcome(made.model, beginning.history + made.history, made.values)

    bound: dict[str, Any] = {"clean": clean, "max_drop": config.max_drop}
    # With nothing closed or learnt every candidate is the same.
    free = closing is not None and config.ratio is None and config.taught_lr
    factors = config.factors if free else (1.0,)
    _, (reached, beginning, ratio), factor_trials = strongest_by_halving(factors, begun, **bound)
    strengths = config.sparsity_grid if config.sparsity is None else (config.sparsity,)
    if config.taught_lr and config.sparsity is None:
        strengths = (0.0, *strengths)
    # Without steps every strength gives the same masks.
    sparsity, made, trials = strongest_expected(
        strengths if config.epochs and config.lr else (min(strengths),), ended, **bound
    )
    closed = [float((v <= floor).float().mean()) for v, floor in zip(made.values, floors, strict=True)]
    facts: dict[str, Any] = {
        "ratio": ratio,
        "ratio_trials": closing.trials if closing is not None else [],
        "factor_trials": factor_trials,
        "sparsity": sparsity,
        "sparsity_trials": trials,
        "floors": {site.name: floor for site, floor in zip(sites, floors, strict=True)},
        "means": {site.name: float(value.mean()) for site, value in zip(sites, made.values, strict=True)},
        "closed": {site.name: share for site, share in zip(sites, closed, strict=True)},
    }
    return Purified(finished(made.model, "nft"), tuple(made.history), facts)


@dataclass(frozen=True, eq=False)
class _Closing:
    """What a short unlearning told, and the share of units that the *select* split permits to close."""

    ratio: float
    trials: list[dict[str, float | None]]
    changes: list[Tensor]
    layers: list[UnitLayer]

    def at(self, ratio: float) -> dict[str, Tensor]:
        """Kernels that close at ``ratio``, bool (units, input channels), by the weight's name."""
        closed = closed_weights(self.layers, self.changes, ratio=ratio, granularity="kernel")
        return {layer.name: part for layer, part in zip(self.layers, closed, strict=True)}


def _closing(
    original: nn.Module,
    clean: Splits,
    config: NFTConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> _Closing:
    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=task, device=device, precision=config.precision)

    pruned = working_copy(original, device)
    ratio, _, trials, changes = close_most_moved(
        pruned,
        clean,
        config,
        granularity="kernel",
        select_accuracy=select_accuracy,
        reference=select_accuracy(original),
        task=task,
        seed=seed,
        device=device,
        progress=progress,
    )
    return _Closing(ratio, trials, changes, unit_layers(original))


def _close(starts: list[Tensor], sites: list[MaskSite], floors: list[float], closed: dict[str, Tensor]) -> None:
    """Start closed kernels' masks at the lower clamp, in place."""
    for start, site, floor in zip(starts, sites, floors, strict=True):
        part = closed.get(site.name)
        if part is not None:
            # A mask of whole units closes in proportion to the kernels that do.
            share = part.float() if start.dim() > 1 else part.float().mean(1)
            start.lerp_(torch.full_like(start, floor), share)


METHOD = Method(
    name="nft",
    config=NFTConfig,
    function=purify,
    summary="close what clean unlearning moves most, tune masks on kernels with MixUp, fold them (NFT)",
    zero_steps={"epochs": 0},
)
