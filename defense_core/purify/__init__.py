"""Purifiers. One method is one file, one frozen config, one function and one row here.

A purifier sees the model, the clean set and its configuration; never a trigger, a poisoned
sample or an attack's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from defense_core.checkpoints import NO_CHECKPOINTS, Checkpoints
from defense_core.data import Splits
from defense_core.errors import ConfigError, MethodDiverged
from defense_core.layers import is_finite
from defense_core.loop import seeded
from defense_core.progress import Progress, resumable
from defense_core.purify import anp, clp, distil, fast_fip, fine_pruning, fine_tuning, fip, ft_sam, nft, ngf, soup, tsbd
from defense_core.purify.base import Method, Purified
from defense_core.task import Task

METHODS: dict[str, Method] = {
    row.METHOD.name: row.METHOD
    for row in (fine_tuning, tsbd, distil, fip, fast_fip, nft, ngf, soup, ft_sam, fine_pruning, anp, clp)
}
"""Every method by the name that ``--method`` takes."""

__all__ = ["METHODS", "Method", "Purified", "method_named", "purify"]


def method_named(name: str) -> Method:
    """The registry's row. Raises ConfigError for an unknown name."""
    if name not in METHODS:
        raise ConfigError("method is unknown", expected="one of " + ", ".join(sorted(METHODS)), got=repr(name))
    return METHODS[name]


def purify(
    model: nn.Module,
    clean: Splits,
    config: Any,
    *,
    method: str,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Purified:
    """Run the method called ``method`` with its own ``config`` object.

    Args:
        checkpoints: where the method's loops save how far they have come. With those of a run that was killed,
            of the same model, splits, config, seed and machine, the result is that of a run that was not, bit for bit.

    Raises:
        ConfigError: unknown method, a config of another method, or weights that are not float32.
        MethodNotApplicable: the network has nothing that the method works on.
        MethodDiverged: a loss or weight is or became NaN or Inf.
        Cancelled: a stop was requested.
    """
    row = method_named(method)
    if not isinstance(config, row.config):
        raise ConfigError(
            f"{method} was given another method's config", expected=row.config.__name__, got=type(config).__name__
        )
    others = {str(each.dtype) for each in model.parameters() if each.dtype != torch.float32}
    if others:
        raise ConfigError(
            f"{method} cannot tune this model",
            expected="float32 weights",
            got=", ".join(sorted(others)),
            hint="Convert it first: model.float()",
        )
    if not is_finite(model):
        raise MethodDiverged(
            f"{method} cannot start from this model",
            expected="finite weights and statistics",
            got="NaN or Inf",
            hint="Use another checkpoint",
        )
    progress = resumable(progress, checkpoints)
    with seeded(seed, device):
        return row.function(model, clean, config, task=task, seed=seed, device=device, progress=progress)
