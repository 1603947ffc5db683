"""Positive controls that were made before, in a store that the operator names: ``<store>/<work>/control.json``.

A control is deterministic: the same model, images, settings, seed, program and kind of machine give the same one, so
it is worth making once. What cannot be read or kept costs a line in the log, and the control is made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from components._runtime.checkpoint_store import SECRET_VARIABLE, files_below
from components._runtime.evidence import parse_evidence
from defense_core.config import canonical_json
from defense_core.errors import DigestMismatch, EvidenceMismatch, QuarantineError
from defense_core.policy_time import days_between, parse_time
from defense_core.seals import sealed, unsealed

FILE = "control.json"

logger = logging.getLogger("quarantine")


@dataclass(frozen=True)
class ControlStore:
    """Controls by their work, see :func:`defense_core.stored_checkpoints.work_key`.

    Attributes:
        root: a path, ``file://…`` or ``s3://bucket/prefix``.
        max_age_days: an older control is made again; ``None``: none is too old.
        secret: seals what is kept; what is found must have its seal. Empty: nothing does.
    """

    root: str
    max_age_days: float | None = None
    secret: bytes = field(default=b"", repr=False)

    def find(self, key: str) -> dict[str, Any] | None:
        """The evidence that was kept under ``key``; ``None`` where there is none that can be used."""
        try:
            data = files_below(self._address(key)).read(FILE)
            found = None if data is None else self._opened(data, key)
            return None if found is None or self._too_old(found) else found
        except QuarantineError as error:
            logger.warning("the control that was kept is not used, another is made: %s", error)
            return None

    def keep(self, key: str, evidence: Mapping[str, Any]) -> None:
        """Keep ``evidence`` under ``key``."""
        body = key.encode() + b"\n" + canonical_json(evidence)
        try:
            files_below(self._address(key)).write(FILE, sealed(body, self.secret))
        except QuarantineError as error:
            logger.warning("the control is not kept: %s", error)

    def _address(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key.removeprefix('sha256:')}"

    def _opened(self, data: bytes, key: str) -> dict[str, Any]:
        named, _, body = unsealed(data, self.secret, FILE).partition(b"\n")
        if named != key.encode():
            raise DigestMismatch(f"{FILE} is of other work", expected=key, got=named[:80])
        found = parse_evidence(body, FILE)
        try:  # what is read of it
            (finding,) = found["findings"]
            _ = found["inputs"], found["results"], found["environment"]["started"], finding["why"]
        except (KeyError, TypeError, ValueError) as error:
            raise EvidenceMismatch(
                f"{FILE} is no evidence of a control",
                expected="inputs, results, one finding and when it was made",
                got=", ".join(sorted(found)),
            ) from error
        return found

    def _too_old(self, evidence: Mapping[str, Any]) -> bool:
        if self.max_age_days is None:
            return False
        made = parse_time(evidence["environment"]["started"], FILE)
        return days_between(made, datetime.now(UTC)) > self.max_age_days


def control_store(
    root: str, *, max_age_days: float | None = None, environment: Mapping[str, str] | None = None
) -> ControlStore | None:
    """The store at ``root``, with the environment's secret; ``None`` where ``root`` is empty.

    Args:
        max_age_days: how old evidence may be at the gate. A control is repeated for half of that time, so that it is
            young enough when the gate is reached.
    """
    given = os.environ if environment is None else environment
    usable_days = None if max_age_days is None else max_age_days / 2
    return ControlStore(root, usable_days, given.get(SECRET_VARIABLE, "").encode()) if root else None
