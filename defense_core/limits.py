"""How much an untrusted artifact may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from defense_core.config import require


@dataclass(frozen=True)
class LoadLimits:
    """Bounds on reading one artifact.

    Attributes:
        max_bytes: size of the file, of what an archive declares and unpacks to, and of all tensors.
        max_parameters: parameters of the network that the artifact names.
        timeout_s: wall-clock time for reading a pickle-bearing file in its child process; starting
            that process takes about 3 s of it.
        max_entries: files in an archive.
    """

    max_bytes: int = 2 << 30
    max_parameters: int = 500_000_000
    timeout_s: float = 120.0
    max_entries: int = 20_000

    def __post_init__(self) -> None:
        require(self.max_bytes > 0, "max_bytes", "a positive number", self.max_bytes)
        require(self.max_parameters > 0, "max_parameters", "a positive number", self.max_parameters)
        require(self.timeout_s > 0, "timeout_s", "a positive number of seconds", self.timeout_s)
        require(self.max_entries > 0, "max_entries", "a positive number", self.max_entries)
