"""Seals of files that one step leaves for a later one, in a store that others may write to."""

from __future__ import annotations

import hmac

from defense_core.errors import CorruptArtifact
from defense_core.files import sha256_bytes


def sealed(body: bytes, secret: bytes) -> bytes:
    """A line with the seal, then ``body``. Without a secret the seal is a digest, which anybody can make."""
    return _seal(body, secret) + b"\n" + body


def unsealed(data: bytes, secret: bytes, what: str) -> bytes:
    """The body of what :func:`sealed` made.

    Raises:
        CorruptArtifact: ``what``, as the message calls it, is damaged, truncated or sealed by another secret.
    """
    promised, _, body = data.partition(b"\n")
    if not hmac.compare_digest(promised, _seal(body, secret)):
        expected = "the seal of this secret" if secret else "the digest of what follows, and no secret's seal"
        raise CorruptArtifact(f"{what} is damaged or forged", expected=expected, got=promised[:80])
    return body


def _seal(body: bytes, secret: bytes) -> bytes:
    if not secret:
        return sha256_bytes(body).encode()
    return b"hmac-sha256:" + hmac.digest(secret, body, "sha256").hex().encode()
