"""CLP, Channel Lipschitzness Pruning (Zheng et al., ECCV 2022, arXiv 2208.03111), a baseline.

The bound on a channel's Lipschitz constant is the spectral norm of its filter times what the
normalisation behind it makes of it (eq. 9): ``sigma_k = sigma_max(W_k) |gamma_k| / sqrt(var_k)``.
Channels with ``sigma_k > mean + u * std`` over their layer are cut. The paper takes a fixed ``u``
and no data; here accuracy on the *select* split sets it. Normalisations are paired with the layer
whose output they take, found by a forward pass, not with the module that stands before them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from defense_core.calls import few_inputs
from defense_core.config import require
from defense_core.data import Splits
from defense_core.inference import accuracy
from defense_core.layers import UnitLayer, unit_layers
from defense_core.loop import finished, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import chooser, choosers, strongest_within
from defense_core.purify.fine_tuning import FineTuningConfig, tune_within
from defense_core.purify.masks import following_norms
from defense_core.task import Task


@dataclass(frozen=True)
class CLPConfig(FineTuningConfig):
    """Settings of CLP.

    Attributes:
        u: channels beyond so many standard deviations are cut, or ``None`` to choose it from
            ``u_grid`` by :func:`~defense_core.purify.choice.strongest_within`, smaller is stronger.
        u_grid: candidates.
        epochs: passes of plain fine-tuning after the cut; 0 is the paper's.
        lr, lr_grid, max_drop, batch_size, weight_decay, schedule, precision: of that
            fine-tuning; ``max_drop`` bounds the cut too.
    """

    u: float | None = None
    u_grid: tuple[float, ...] = (6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)
    epochs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.u is None or self.u >= 0, "u", "0 or more, or null", self.u)
        require(bool(self.u_grid) and min(self.u_grid) >= 0, "u_grid", "numbers of 0 or more", self.u_grid)


@torch.no_grad()
def channel_bounds(layer: UnitLayer, norm: nn.Module | None) -> Tensor:
    """``sigma_k`` of each unit, (units,).

    A filter is taken as the matrix (input channels, kernel elements); a linear layer's unit as a
    row. BatchNorm's ``eps`` is part of the root, which keeps dead channels finite.
    """
    weight = layer.weight.detach().float()
    kernels = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    bounds: Tensor = torch.linalg.matrix_norm(kernels, ord=2)
    scale = getattr(norm, "weight", None)
    if isinstance(scale, Tensor):
        bounds = bounds * scale.detach().abs()
    if isinstance(norm, _BatchNorm) and norm.running_var is not None:
        bounds = bounds / (norm.running_var + norm.eps).sqrt()
    return bounds


def purify(
    model: nn.Module,
    clean: Splits,
    config: CLPConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Cut channels of outlying bounds. ``facts`` holds ``u``, its ``trials`` and the channels cut.

    Raises:
        MethodDiverged: the weights are not finite.
        Cancelled: a stop was requested.
    """

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=task, device=device, precision=config.precision)

    original = working_copy(model, device)
    reference = select_accuracy(original)
    layers = unit_layers(original)
    followed = following_norms(original, few_inputs(clean.fit, task=task, device=device))
    norms = {
        layer.name: followed[layer.name]
        for layer in layers
        if layer.name in followed and _by_unit(original.get_submodule(followed[layer.name]), layer)
    }
    bounds = [
        channel_bounds(layer, original.get_submodule(n) if (n := norms.get(layer.name)) else None) for layer in layers
    ]
    candidates = config.u_grid if config.u is None else (config.u,)
    with progress.phase("choose u", total=len(candidates)) as choosing:

        def attempt(strength: float) -> tuple[float, nn.Module]:
            pruned = working_copy(original, device)
            for layer, bound in zip(layers, bounds, strict=True):
                _cut(pruned, layer.name, norms.get(layer.name), outlying(bound, -strength))
            reached = select_accuracy(pruned)
            choosing.advance()
            return reached, pruned

        strength, pruned, trials = strongest_within(
            tuple(-u for u in candidates),
            attempt,
            reference=reference,
            max_drop=config.max_drop,
            images=choosers(clean),
        )
    tuned, rows, facts = tune_within(
        pruned,
        clean,
        config,
        task=task,
        seed=seed,
        device=device,
        progress=progress,
        name="fine-tune",
        reference=reference,
    )
    cut = {layer.name: int(outlying(bound, -strength).sum()) for layer, bound in zip(layers, bounds, strict=True)}
    return Purified(finished(tuned, "clp"), tuple(rows), {**facts, "u": -strength, "trials": trials, "pruned": cut})


def outlying(bounds: Tensor, u: float) -> Tensor:
    """Which units exceed ``mean + u * std`` of their layer, bool (units,)."""
    return bounds > bounds.mean() + u * bounds.std(correction=0)


def _by_unit(norm: nn.Module, layer: UnitLayer) -> bool:
    """Whether the norm is BatchNorm or has one scale for each unit: not LayerNorm over (C, H, W)."""
    scale = getattr(norm, "weight", None)
    return isinstance(norm, _BatchNorm) or (isinstance(scale, Tensor) and scale.shape == layer.weight.shape[:1])


@torch.no_grad()
def _cut(model: nn.Module, name: str, norm: str | None, selected: Tensor) -> None:
    """Zero the scale and shift behind the selected units, or the units, and their mean, where there is no scale."""
    path, _, part = name.rpartition(".")
    own = model.get_submodule(path)
    units = [getattr(own, part), getattr(own, "bias", None)]
    if norm is not None:
        behind = model.get_submodule(norm)
        units = [*units, behind.running_mean] if behind.weight is None else [behind.weight, behind.bias]
    for tensor in units:
        if tensor is not None and len(tensor) == len(selected):
            tensor[selected] = 0.0


METHOD = Method(
    name="clp",
    config=CLPConfig,
    function=purify,
    summary="cut channels of outlying Lipschitz bound (CLP), a baseline",
    zero_steps={"u": 1e9, "epochs": 0},
    baseline=True,
)
