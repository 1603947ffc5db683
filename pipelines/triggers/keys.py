"""What makes two requests the same work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from defense_core.config import digest


class RegisteredVersion(Protocol):
    """The fields of MLflow's ``ModelVersion`` that say what a version points at."""

    @property
    def source(self) -> str | None: ...
    @property
    def run_id(self) -> str | None: ...
    @property
    def creation_timestamp(self) -> int | None: ...


@dataclass(frozen=True)
class WorkKey:
    """The idempotency key: one key, one run.

    Attributes:
        model: name of the registered model.
        version: number of the version, as text.
        source_digest: of :func:`source_digest`.
        policy_digest: ``"sha256:<hex>"`` of the parsed policy (``parse_policy(mapping).digest``).
    """

    model: str
    version: str
    source_digest: str
    policy_digest: str

    @property
    def digest(self) -> str:
        """``"sha256:<hex>"`` over all four."""
        return digest([self.model, self.version, self.source_digest, self.policy_digest])


def source_digest(version: RegisteredVersion) -> str:
    """``"sha256:<hex>"`` of what the registry says this version points at.

    It names the registry's entry, not the bytes, which nobody has read yet; fetch hashes those. MLflow
    never changes an entry's source. The time of creation is in it because numbers start at 1 again
    when a model is deleted and made anew under its old name.
    """
    return digest([version.source or "", version.run_id or "", int(version.creation_timestamp or 0)])
