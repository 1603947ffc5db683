"""Progress of long work: nothing, a bar on a terminal, or log lines in a pod.

A method opens a phase and advances it once per step::

    with progress.phase("unlearn", total=40) as phase:
        for _ in range(40):
            ...
            phase.advance(loss=0.3)

``advance`` is also the cancellation point: it raises :class:`Cancelled` once the operator
has asked to stop, so every method cancels within one step. And progress may be kept: with
:func:`resumable` the loops of a method save where they stand, and go on from there.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm

from defense_core.checkpoints import NO_CHECKPOINTS, Checkpoints
from defense_core.errors import Cancelled

logger = logging.getLogger("quarantine")


class Phase(Protocol):
    """One stretch of work with a known or unknown number of steps."""

    def advance(self, steps: int = 1, **metrics: float) -> None:
        """Count ``steps`` more as done; a metric that is NaN is not known yet. Raises Cancelled if a stop was
        requested."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Progress(Protocol):
    """What a method is given; it never prints by itself."""

    @property
    def checkpoints(self) -> Checkpoints:
        """Where loops save how far they have come."""
        ...

    def phase(self, name: str, total: int | None = None) -> Phase:
        """Open a phase called ``name`` of ``total`` steps (``None``: unknown)."""
        ...


class _Phase:
    def __init__(self, name: str, total: int | None, stop: Callable[[], bool]) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._stop = stop

    def advance(self, steps: int = 1, **metrics: float) -> None:
        self.done += steps
        self._show(steps, {name: value for name, value in metrics.items() if not math.isnan(value)})
        if self._stop():
            raise Cancelled(
                f"stopped during {self.name}", got=f"a stop request at step {self.done}", hint="Nothing was written"
            )

    def _show(self, steps: int, metrics: dict[str, float]) -> None:
        """Null progress shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _BarPhase(_Phase):
    def __init__(self, name: str, total: int | None, stop: Callable[[], bool]) -> None:
        super().__init__(name, total, stop)
        self._bar: Any = tqdm(total=total, desc=name, leave=False, dynamic_ncols=True, file=sys.stderr)

    def _show(self, steps: int, metrics: dict[str, float]) -> None:
        if metrics:
            self._bar.set_postfix({k: f"{v:.3f}" for k, v in metrics.items()}, refresh=False)
        self._bar.update(steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


class _LogPhase(_Phase):
    def __init__(self, name: str, total: int | None, stop: Callable[[], bool], every_s: float) -> None:
        super().__init__(name, total, stop)
        self._every_s = every_s
        self._started = self._last = time.monotonic()

    def _show(self, steps: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._log(metrics)

    def _log(self, metrics: dict[str, float]) -> None:
        of = f"/{self.total}" if self.total else ""
        facts = " ".join(f"{k}={v:.4f}" for k, v in metrics.items())
        logger.info("%s %d%s %.0fs %s", self.name, self.done, of, time.monotonic() - self._started, facts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._log({})


class NullProgress:
    """Shows nothing; still honours a stop request."""

    checkpoints: Checkpoints = NO_CHECKPOINTS

    def __init__(self, stop: Callable[[], bool] = lambda: False) -> None:
        self._stop = stop

    def phase(self, name: str, total: int | None = None) -> Phase:
        return _Phase(name, total, self._stop)


class BarProgress(NullProgress):
    """A bar per phase on standard error."""

    def phase(self, name: str, total: int | None = None) -> Phase:
        return _BarPhase(name, total, self._stop)


class LogProgress(NullProgress):
    """A log line per phase and at most one every ``every_s`` seconds in between."""

    def __init__(self, stop: Callable[[], bool] = lambda: False, every_s: float = 10.0) -> None:
        super().__init__(stop)
        self._every_s = every_s

    def phase(self, name: str, total: int | None = None) -> Phase:
        return _LogPhase(name, total, self._stop, self._every_s)


@dataclass(frozen=True)
class _Resumable:
    progress: Progress
    checkpoints: Checkpoints

    def phase(self, name: str, total: int | None = None) -> Phase:
        return self.progress.phase(name, total)


def resumable(progress: Progress, checkpoints: Checkpoints) -> Progress:
    """``progress`` whose loops save to, and go on from, ``checkpoints``."""
    return _Resumable(progress, checkpoints)


def default_progress(stop: Callable[[], bool] = lambda: False) -> NullProgress:
    """A bar when standard error is a terminal, log lines otherwise."""
    return BarProgress(stop) if sys.stderr.isatty() else LogProgress(stop)
