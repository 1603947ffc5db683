"""A change of an image that depends on it, no larger than a budget: what the generator finds, as plain tensors.

``x' = x + min(1, budget / |d|) d``, where ``d = warp(x) + picture + network(x) - x`` and ``|d|`` is the root mean
square.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SHIFT = 0.12
"""Largest displacement of a warp, in half sides of the image."""
PARTS = ("first", "second", "last", "budget", "embedding", "picture", "warp")


def bounded_change(pixels: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Images changed within the budget.

    Args:
        pixels: float32 (T, B, C, H, W) in [0, 1]; B images for each of T classes.
        parts: ``first`` (F, C, 3, 3), ``second`` (F, F, 3, 3), ``last`` (C, F, 3, 3): kernels; ``embedding``
            (T, 4, F): scale and shift of the filters of both hidden layers; ``picture`` (T, C, H, W); ``warp``
            (T, 2, G, G): displacements on a coarse grid, before ``tanh``; ``budget`` (): share of the pixel range.

    Returns:
        float32 (T, B, C, H, W); not clipped.
    """
    batch, budget = pixels.shape[1], parts["budget"]
    flat = pixels.flatten(0, 1)
    embedding = parts["embedding"].repeat_interleave(batch, 0)[..., None, None]
    hidden = F.relu(F.conv2d(flat - 0.5, parts["first"], padding=1) * (1 + embedding[:, 0]) + embedding[:, 1])
    hidden = F.relu(F.conv2d(hidden, parts["second"], padding=1) * (1 + embedding[:, 2]) + embedding[:, 3])
    residual = F.conv2d(hidden, parts["last"], padding=1) * (4 * budget)
    change = _warped(flat, parts["warp"], batch) - flat + parts["picture"].repeat_interleave(batch, 0) + residual
    size = change.square().mean((1, 2, 3), keepdim=True).add(1e-12).sqrt()
    return (flat + change * (budget / size).clamp_max(1)).view_as(pixels)


def _warped(flat: Tensor, warps: Tensor, batch: int) -> Tensor:
    height, width = flat.shape[-2:]
    fields = MAX_SHIFT * warps.tanh()
    fields = F.interpolate(fields, size=(height, width), mode="bilinear", align_corners=True)
    identity = torch.eye(2, 3, device=flat.device)[None].expand(len(warps), 2, 3)
    grid = F.affine_grid(identity, [len(warps), 1, height, width], align_corners=False) + fields.permute(0, 2, 3, 1)
    return F.grid_sample(flat, grid.repeat_interleave(batch, 0), padding_mode="border", align_corners=False)
