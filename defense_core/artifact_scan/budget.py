"""What one scan may spend: bytes that archives expand to, and time; shared by everything that it looks at."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from defense_core.errors import ArtifactTooLarge, LoadTimeout
from defense_core.limits import LoadLimits

EXPANDED_TIMES = 4
"""All archives of a scan together may expand to so many times ``max_bytes``: each alone to once."""
TIMEOUT_TIMES = 10
"""A scan may take so many times ``timeout_s``, which each child process has alone."""
_LEAST_TIMEOUT_S = 0.001


@dataclass
class Budget:
    """What is left of it. Once spent it stays spent: nothing more is expanded, and no further file judged.

    Attributes:
        bounds: of each file alone.
        clock: monotonic seconds.
        bytes_left: that archives may still expand to.
        deadline_s: when the scan ends, by ``clock``.
    """

    bounds: LoadLimits
    clock: Callable[[], float] = time.monotonic
    bytes_left: int = field(init=False)
    deadline_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.bytes_left = EXPANDED_TIMES * self.bounds.max_bytes
        self.deadline_s = self.clock() + TIMEOUT_TIMES * self.bounds.timeout_s

    @property
    def limits(self) -> LoadLimits:
        """The bounds of the next file: no child process outlives the scan's time."""
        left_s = max(self.deadline_s - self.clock(), _LEAST_TIMEOUT_S)
        return dataclasses.replace(self.bounds, timeout_s=min(self.bounds.timeout_s, left_s))

    def spend(self, count: int) -> None:
        """Take ``count`` bytes that are about to be written or read expanded.

        Raises:
            ArtifactTooLarge: there are not so many left.
            LoadTimeout: the time is over.
        """
        self.require_time()
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise ArtifactTooLarge(
                "the archives expand to too much together",
                expected=f"at most {EXPANDED_TIMES} times max_bytes, {EXPANDED_TIMES * self.bounds.max_bytes} bytes",
                got="more",
                hint="Raise max_bytes if the archives are known to be good",
            )

    def require_time(self) -> None:
        """Raise LoadTimeout if the time is over."""
        if self.clock() > self.deadline_s:
            raise LoadTimeout(
                "the scan takes too long",
                expected=f"at most {TIMEOUT_TIMES} times timeout_s, {TIMEOUT_TIMES * self.bounds.timeout_s:g} s",
                got="more",
                hint="Raise timeout_s if the file's origin is trusted",
            )
