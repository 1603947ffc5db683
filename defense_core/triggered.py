"""Images that carry a known trigger, as evaluation and parity ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from defense_core.errors import DataError

CLEAN = "clean"
"""What reports call images as they are; no trigger is called so."""


class NamedTrigger(Protocol):
    """A known trigger: what it does to images, and what reports call it."""

    @property
    def name(self) -> str:
        """Unique among those that are measured together."""
        ...

    def apply(self, images: Tensor) -> Tensor:
        """Triggered uint8 images (N, C, H, W)."""
        ...


def triggered(trigger: NamedTrigger, images: Tensor) -> Tensor:
    """What ``trigger`` makes of uint8 ``images`` (N, C, H, W), which stay as they are.

    Raises:
        DataError: it returned something else than so many such images.
    """
    changed = trigger.apply(images.clone())
    if changed.dtype != torch.uint8 or changed.shape != images.shape:
        raise DataError(
            f"probe {trigger.name} returns something else than images",
            expected=f"uint8 {tuple(images.shape)}",
            got=f"{changed.dtype} {tuple(changed.shape)}",
        )
    return changed


def require_own_names(names: Sequence[str]) -> None:
    """Every probe is called something else, and none :data:`CLEAN`.

    Raises:
        DataError: a name repeats or is taken.
    """
    taken = [*names, CLEAN]
    repeated = sorted({name for name in taken if taken.count(name) > 1})
    if repeated:
        raise DataError(
            "probe names repeat",
            expected=f"one name a probe, other than {CLEAN!r}",
            got=", ".join(repeated),
            hint="Rename one of them",
        )
