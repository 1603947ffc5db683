"""Neuron weight change and zero reinitialisation: stages 1b and 1c of TSBD
(Lin et al., NeurIPS 2024, arXiv 2405.20291)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from defense_core.layers import UnitLayer

Variant = Literal["v1", "v2", "v3"]
CLOSE_FACTORS = (1.0, 1.15, 1.3, 1.45, 1.6, 1.8, 2.0, 2.3, 2.6, 3.0)
"""By which a neuron ratio is multiplied: wider steps leave accuracy that is permitted unspent (``docs/methods.md``)."""


def weight_changes(layers: list[UnitLayer], moved: Mapping[str, Tensor]) -> list[Tensor]:
    """``d = |theta_ul - theta_bd|`` per weight, float32, shaped like each layer's weight."""
    return [(moved[layer.name].detach() - layer.weight.detach()).abs().float() for layer in layers]


def neuron_weight_change(layers: list[UnitLayer], changes: list[Tensor]) -> list[Tensor]:
    """``NWC[l, i] = sum_j d[l, i, j]``, one (units,) tensor a layer, never rounded."""
    return [layer.rows(change).sum(1) for layer, change in zip(layers, changes, strict=True)]


def zero_masks(
    layers: list[UnitLayer], changes: list[Tensor], *, n: float, m: float, variant: Variant = "v3"
) -> list[Tensor]:
    """Stage 1c: which weights are zeroed, bool, shaped like each layer's weight.

    The ``floor(n * units)`` units of largest NWC over all layers are chosen; ties at the
    threshold of the ``m`` largest changes are included. Without hidden layers there is nothing to zero.
    """
    if not layers:
        return []
    scores = torch.cat(neuron_weight_change(layers, changes))
    count = math.floor(n * len(scores))
    if count == 0:
        return [torch.zeros_like(change, dtype=torch.bool) for change in changes]
    hit = torch.zeros_like(scores, dtype=torch.bool)
    hit[scores.topk(count).indices] = True
    chosen = hit.split([layer.units for layer in layers])
    rows = [layer.rows(change) for layer, change in zip(layers, changes, strict=True)]
    if variant == "v1":
        thresholds = [torch.zeros(layer.units, 1, device=row.device) for layer, row in zip(layers, rows, strict=True)]
    elif variant == "v2":
        thresholds = [_kept_from(row, m).unsqueeze(1) for row in rows]
    else:
        pool = torch.cat([row[part].flatten() for row, part in zip(rows, chosen, strict=True)])
        thresholds = [_kept_from(pool, m)] * len(rows)
    return [
        (part.unsqueeze(1) & (row >= threshold)).reshape(change.shape)
        for part, row, threshold, change in zip(chosen, rows, thresholds, changes, strict=True)
    ]


def _kept_from(values: Tensor, share: float) -> Tensor:
    """Smallest of the ``max(1, floor(share * size))`` largest values along the last dimension."""
    size = values.shape[-1]
    return values.kthvalue(size - max(1, math.floor(share * size)) + 1, dim=-1).values


@torch.no_grad()
def zero(layers: list[UnitLayer], selected: list[Tensor]) -> None:
    """Set the selected weights to zero, in place."""
    for layer, mask in zip(layers, selected, strict=True):
        layer.weight.masked_fill_(mask, 0.0)


@torch.no_grad()
def set_weights(layers: list[UnitLayer], weights: list[Tensor]) -> None:
    """Copy ``weights`` into the layers."""
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.copy_(weight)
