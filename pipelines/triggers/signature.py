"""MLflow's webhook signature: who sent a delivery, and when.

``X-MLflow-Signature: v1,<base64 of HMAC-SHA256 over "delivery_id.timestamp.body">``, the key being the
webhook's secret and the body the bytes as they came. Ids hold no dot and timestamps only digits, so that
no two deliveries share the signed text.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SIGNATURE = "x-mlflow-signature"
TIMESTAMP = "x-mlflow-timestamp"
DELIVERY_ID = "x-mlflow-delivery-id"

_SIGNATURE = re.compile(r"v1,([A-Za-z0-9+/]{43}=)", re.ASCII)
_TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)
_DELIVERY_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


class NotAuthentic(Exception):
    """The call does not prove that the registry made it just now.

    Attributes:
        reason: one word for the metrics: ``unsigned``, ``malformed``, ``expired`` or ``forged``.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Envelope:
    """What a delivery says of itself in its headers; nothing is proved before :meth:`Verifier.verify`."""

    delivery_id: str
    timestamp: str
    mac: bytes


class Verifier:
    """Checks deliveries against the current secrets.

    Args:
        secrets: gives the secrets that count now; several while one takes the place of another.
        window_s: how far a timestamp may be from now, either way. MLflow's last repetition carries the
            timestamp of the first attempt, so the window has to hold all its waiting.
    """

    def __init__(
        self, secrets: Callable[[], Sequence[bytes]], *, window_s: float = 300.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._secrets = secrets
        self._window_s = window_s
        self._clock = clock

    def envelope(self, headers: Mapping[str, str]) -> Envelope:
        """What the headers say, refused before a byte of the body is read where it cannot be genuine.

        Args:
            headers: by lower-case name.

        Raises:
            NotAuthentic: a header is missing or malformed, or the timestamp is outside the window.
        """
        signature, timestamp, delivery_id = (headers.get(name) for name in (SIGNATURE, TIMESTAMP, DELIVERY_ID))
        if signature is None or timestamp is None or delivery_id is None:
            raise NotAuthentic("unsigned")
        found = _SIGNATURE.fullmatch(signature)
        if found is None or not _TIMESTAMP.fullmatch(timestamp) or not _DELIVERY_ID.fullmatch(delivery_id):
            raise NotAuthentic("malformed")
        if abs(self._clock() - int(timestamp)) > self._window_s:
            raise NotAuthentic("expired")
        return Envelope(delivery_id, timestamp, _decoded(found[1]))

    def verify(self, envelope: Envelope, body: bytes) -> None:
        """Raise NotAuthentic unless one of the secrets made this signature.

        Every secret is tried and every comparison takes the same time, whichever of them matches.
        """
        signed = f"{envelope.delivery_id}.{envelope.timestamp}.".encode("ascii") + body
        matched = False
        for secret in self._secrets():
            matched |= hmac.compare_digest(hmac.digest(secret, signed, "sha256"), envelope.mac)
        if not matched:
            raise NotAuthentic("forged")


def sign(secret: bytes, delivery_id: str, timestamp: int, body: bytes) -> str:
    """The header that MLflow would send."""
    mac = hmac.digest(secret, f"{delivery_id}.{timestamp}.".encode() + body, "sha256")
    return "v1," + base64.b64encode(mac).decode("ascii")


def _decoded(text: str) -> bytes:
    mac = base64.b64decode(text, validate=True)
    if binascii.b2a_base64(mac, newline=False) != text.encode("ascii"):
        raise NotAuthentic("malformed")  # bits after the last byte: another spelling of the same signature
    return mac
