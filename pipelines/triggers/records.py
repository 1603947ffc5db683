"""What stands in the queue."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.triggers.keys import WorkKey

PENDING, CLAIMED, SUBMITTED, FAILED = "pending", "claimed", "submitted", "failed"
STATES = (PENDING, CLAIMED, SUBMITTED, FAILED)

HOOK, SWEEP = "hook", "sweep"
"""Who asked for work."""


@dataclass(frozen=True)
class Delivery:
    """One accepted webhook call, reduced to what is used of it."""

    delivery_id: str
    model: str
    version: str


@dataclass(frozen=True)
class Hint:
    """A version that the registry is to be asked about.

    Attributes:
        seen: how many deliveries named it; one that comes meanwhile keeps the hint alive.
        attempts: how often the registry was asked in vain, this time included.
        received_at: when it was first named, unix seconds.
    """

    model: str
    version: str
    seen: int
    attempts: int
    received_at: float


@dataclass(frozen=True)
class Known:
    """How work stands.

    Attributes:
        changed_at: since when, unix seconds; of submitted work: when it was submitted.
        repeated: how often it was submitted again without a decision.
    """

    state: str
    changed_at: float
    repeated: int = 0


@dataclass(frozen=True)
class Work:
    """Claimed work.

    Attributes:
        claim: what this claim is known by; it lapses with its lease.
        attempts: claims so far, this one included.
        round: 0, and one more for each time that a finished run did not lead to a decision.
        received_at: when it was asked for, in this round or after it had failed, unix seconds.
    """

    id: int
    key: WorkKey
    round: int
    attempts: int
    origin: str
    received_at: float
    claim: str

    @property
    def run_key(self) -> str:
        """What the run is looked up by before it is created: the key's digest, and the round after the first."""
        return self._run_key(self.round)

    @property
    def former_run_key(self) -> str:
        """That of the round before; empty in the first."""
        return self._run_key(self.round - 1) if self.round else ""

    def _run_key(self, number: int) -> str:
        return f"{self.key.digest}.{number}" if number else self.key.digest
