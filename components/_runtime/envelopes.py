"""DSSE envelopes: signed and opened by securesystemslib, kept as canonical JSON.

Only the canonical bytes of an envelope are accepted. What a signature does not cover (white space, the
order of keys, spare bits of base64, further fields) could otherwise be changed unnoticed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from components._runtime.signing_keys import SigningKey
from defense_core.config import canonical_json
from defense_core.errors import ConfigError, EvidenceMismatch

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_FIELDS = {"payload", "payloadType", "signatures"}


def seal(payload: bytes, key: SigningKey) -> bytes:
    """``payload`` in a signed envelope, as the bytes of a file."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(key.signer)
    return canonical_json(envelope.to_dict()) + b"\n"


def unseal(data: bytes, key: SSlibKey, where: str) -> bytes:
    """The payload of an envelope that ``key`` signed.

    Args:
        where: names the envelope in messages.

    Raises:
        EvidenceMismatch: no envelope, not the bytes that were written, or not signed with this key.
    """
    from securesystemslib.exceptions import VerificationError

    envelope = _parsed(data, where)
    signers = sorted(envelope.signatures)
    if signers != [key.keyid]:
        raise EvidenceMismatch(
            f"{where} is signed with another key", expected=key.keyid, got=", ".join(signers) or "no signature"
        )
    try:
        envelope.verify([key], 1)
    except VerificationError as error:
        raise EvidenceMismatch(
            f"{where} is not what was signed", expected=f"a signature of {key.keyid} over it", got="another signature"
        ) from error
    payload: bytes = envelope.payload
    return payload


def _parsed(data: bytes, where: str) -> Any:
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import FormatError

    try:
        mapping = json.loads(data)
        plain = isinstance(mapping, dict) and set(mapping) == _FIELDS
        if not plain or any(set(each) != {"keyid", "sig"} for each in mapping["signatures"]):
            raise EvidenceMismatch(
                f"{where} is no DSSE envelope", expected="payload, payloadType and signatures", got=str(mapping)[:80]
            )
        if mapping["payloadType"] != PAYLOAD_TYPE:
            raise EvidenceMismatch(
                f"{where} holds something else", expected=PAYLOAD_TYPE, got=repr(mapping["payloadType"])
            )
        envelope = Envelope.from_dict(mapping)
        again = canonical_json(envelope.to_dict()) + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError, FormatError, ConfigError, RecursionError) as error:
        raise EvidenceMismatch(f"{where} is no DSSE envelope", expected="JSON of one", got=error) from error
    if again != data:
        raise EvidenceMismatch(
            f"{where} was rewritten", expected="the bytes that were signed and written", got="other bytes, same meaning"
        )
    return envelope
