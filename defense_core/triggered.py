"""Images that carry a known trigger, as evaluation and parity ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from defense_core.errors import DataError


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


def require_own_names(names: Sequence[str], *, but: str = "") -> None:
    """Every probe is called something else.

    Args:
        but: a name that is taken already.

    Raises:
        DataError: a name repeats or is taken.
    """
    taken = [*names, *([but] if but else [])]
    repeated = sorted({name for name in taken if taken.count(name) > 1})
    if repeated:
        raise DataError(
            "probe names repeat",
            expected="one name a probe" + (f", other than {but!r}" if but else ""),
            got=", ".join(repeated),
            hint="Rename one of them",
        )
