"""Checkpoints: a loop that was killed goes on from where it was saved last, and ends with the same bytes.

They come to a method with its :class:`~defense_core.progress.Progress`, so that a loop which shows its progress
can be resumed too, and a method need not know of it. Whatever runs outside loops is done again, from the same
inputs and the same random numbers; :mod:`defense_core.course` says what a loop saves.

What checkpoints are written to is in :mod:`defense_core.stored_checkpoints`; this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Saved:
    """Where a loop stood.

    Attributes:
        done: steps taken.
        finished: whether that was the end of the loop.
        history: rows of the epochs that had ended.
        tensors: what the loop changes, by name, on the CPU, in their own memory layout.
    """

    done: int
    finished: bool
    history: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Tensor]


class Checkpoint(Protocol):
    """The place of one loop."""

    def load(self) -> Saved | None:
        """Where the loop stood when it was saved last; ``None``: it begins."""
        ...

    def save(self, take: Callable[[], Saved], *, finished: bool) -> None:
        """Offer what ``take`` gives; it is called and written only where that is due."""
        ...


class Checkpoints(Protocol):
    """The places of all loops of one piece of work, which runs its loops in the same order each time."""

    def of_loop(self, name: str) -> Checkpoint:
        """The place of the next loop, called ``name`` in messages."""
        ...


class _Nowhere:
    def of_loop(self, name: str) -> Checkpoint:
        return self

    def load(self) -> Saved | None:
        return None

    def save(self, take: Callable[[], Saved], *, finished: bool) -> None:
        """Nothing is ever due."""


NO_CHECKPOINTS: Checkpoints = _Nowhere()
"""Saves nothing and finds nothing."""
