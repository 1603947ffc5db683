"""How much an untrusted artifact may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from defense_core.config import require

_MAX_BYTES = 1 << 48
_MAX_TIMEOUT_S = 7 * 86400.0


@dataclass(frozen=True)
class LoadLimits:
    """Bounds on reading one artifact.

    Attributes:
        max_bytes: size of the file, of what an archive declares and unpacks to, and of all tensors; at most 2**48.
        max_parameters: parameters of the network that the artifact names.
        max_activation_bytes: the largest tensor that the network may make of one image, where that can be told
            before it runs.
        timeout_s: wall-clock time for reading a pickle-bearing file in its child process; starting
            that process takes about 3 s of it; at most 7 days.
        max_entries: files in an archive.
    """

    max_bytes: int = 2 << 30
    max_parameters: int = 500_000_000
    timeout_s: float = 120.0
    max_entries: int = 20_000
    max_activation_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        # Beyond these the readers' own arithmetic overflows, and a good file would be called damaged.
        require(
            0 < self.max_bytes <= _MAX_BYTES, "max_bytes", f"a positive number, at most {_MAX_BYTES}", self.max_bytes
        )
        require(self.max_parameters > 0, "max_parameters", "a positive number", self.max_parameters)
        require(
            0 < self.timeout_s <= _MAX_TIMEOUT_S,
            "timeout_s",
            f"a positive number of seconds, at most {_MAX_TIMEOUT_S:g}",
            self.timeout_s,
        )
        require(self.max_entries > 0, "max_entries", "a positive number", self.max_entries)
        require(self.max_activation_bytes > 0, "max_activation_bytes", "a positive number", self.max_activation_bytes)
