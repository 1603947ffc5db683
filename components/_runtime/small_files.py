"""Small files of a folder that nobody vouches for yet: read under a limit, before their signature is checked."""

from __future__ import annotations

from pathlib import Path

from defense_core.errors import EvidenceMismatch

MAX_EVIDENCE_BYTES = 64 << 20


def read_small(path: Path) -> bytes:
    """The content of ``path``.

    Raises:
        OSError: it is not there, or cannot be read.
        EvidenceMismatch: it has more than :data:`MAX_EVIDENCE_BYTES`.
    """
    with Path(path).open("rb") as stream:
        data = stream.read(MAX_EVIDENCE_BYTES + 1)
    if len(data) > MAX_EVIDENCE_BYTES:
        raise EvidenceMismatch(f"{path} is too large", expected=f"at most {MAX_EVIDENCE_BYTES} bytes", got="more")
    return data
