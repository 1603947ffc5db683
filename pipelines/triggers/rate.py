"""How many calls one address may make."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable


class RateLimit:
    """A token bucket for each caller; memory is bounded by ``max_callers``.

    Args:
        rate_per_s: calls a second in the long run; 0 or less: no limit.
        burst: calls at once.
    """

    def __init__(
        self,
        rate_per_s: float,
        burst: int,
        *,
        max_callers: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate_per_s = rate_per_s
        self._burst = float(burst)
        self._max_callers = max_callers
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, caller: str) -> bool:
        """Whether ``caller`` may call now; counts the call if so."""
        if self._rate_per_s <= 0:
            return True
        now = self._clock()
        tokens, since = self._buckets.pop(caller, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate_per_s)
        allowed = tokens >= 1
        self._buckets[caller] = (tokens - 1 if allowed else tokens, now)
        while len(self._buckets) > self._max_callers:
            # Whoever has been quiet longest is forgotten; its bucket would have filled again.
            self._buckets.popitem(last=False)
        return allowed

    def __len__(self) -> int:
        return len(self._buckets)
