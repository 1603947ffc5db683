"""DSSE envelopes: only the bytes that were signed and written are accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components._runtime.envelopes import PAYLOAD_TYPE, seal, unseal
from components._runtime.signing_keys import KeyPair, generate_key_pair, load_public_key, load_signing_key
from defense_core.config import canonical_json
from defense_core.errors import EvidenceMismatch

PAYLOAD = b'{"a":1}'


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return generate_key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def envelope(pair: KeyPair) -> bytes:
    return seal(PAYLOAD, load_signing_key(pair.private))


def test_what_was_sealed_comes_back(envelope: bytes, pair: KeyPair) -> None:
    assert unseal(envelope, load_public_key(pair.public), "e") == PAYLOAD
    assert json.loads(envelope)["payloadType"] == PAYLOAD_TYPE


def test_every_flipped_bit_is_found(envelope: bytes, pair: KeyPair) -> None:
    key = load_public_key(pair.public)
    for index in range(len(envelope)):
        spoilt = bytearray(envelope)
        spoilt[index] ^= 1 << (index % 8)
        with pytest.raises(EvidenceMismatch, match="e "):
            unseal(bytes(spoilt), key, "e")


def test_another_key_is_named(envelope: bytes, tmp_path: Path) -> None:
    other = generate_key_pair(tmp_path)
    with pytest.raises(EvidenceMismatch, match="another key") as caught:
        unseal(envelope, load_public_key(other.public), "e")
    assert caught.value.expected == other.key_id


def test_a_signature_of_another_key_under_the_right_name(envelope: bytes, pair: KeyPair, tmp_path: Path) -> None:
    other = json.loads(seal(PAYLOAD, load_signing_key(generate_key_pair(tmp_path).private)))
    other["signatures"][0]["keyid"] = pair.key_id
    with pytest.raises(EvidenceMismatch, match="not what was signed"):
        unseal(canonical_json(other) + b"\n", load_public_key(pair.public), "e")


def _twice(mapping: dict[str, Any]) -> None:
    mapping["signatures"] *= 2


def _unsigned(mapping: dict[str, Any]) -> None:
    mapping["signatures"] = []


def _further_field(mapping: dict[str, Any]) -> None:
    mapping["note"] = "unsigned"


def _field_in_signature(mapping: dict[str, Any]) -> None:
    mapping["signatures"][0]["cert"] = "x"


def _other_type(mapping: dict[str, Any]) -> None:
    mapping["payloadType"] = "text/plain"


def _other_payload(mapping: dict[str, Any]) -> None:
    mapping["payload"] = "eyJhIjoyfQ=="


def _no_base64(mapping: dict[str, Any]) -> None:
    mapping["payload"] = "§"


@pytest.mark.parametrize(
    "change",
    [_twice, _unsigned, _further_field, _field_in_signature, _other_type, _other_payload, _no_base64],
    ids=lambda change: change.__name__.strip("_"),
)
def test_other_envelopes_are_refused(envelope: bytes, pair: KeyPair, change: Callable[[dict[str, Any]], None]) -> None:
    mapping = json.loads(envelope)
    change(mapping)
    with pytest.raises(EvidenceMismatch):
        unseal(canonical_json(mapping) + b"\n", load_public_key(pair.public), "e")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"5", b'{"payload":1}', b"[" * 100_000, b"\xff\xfe"],
    ids=["empty", "truncated", "list", "null", "number", "lacking", "deep", "binary"],
)
def test_what_is_no_envelope(data: bytes, pair: KeyPair) -> None:
    with pytest.raises(EvidenceMismatch, match="no DSSE envelope"):
        unseal(data, load_public_key(pair.public), "e")


@pytest.mark.parametrize("change", [b" ", b"\n"])
def test_the_same_meaning_in_other_bytes_is_refused(envelope: bytes, pair: KeyPair, change: bytes) -> None:
    with pytest.raises(EvidenceMismatch, match="rewritten"):
        unseal(envelope + change, load_public_key(pair.public), "e")
    with pytest.raises(EvidenceMismatch):
        unseal(envelope[: len(envelope) // 2], load_public_key(pair.public), "e")
