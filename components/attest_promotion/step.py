"""Attest: what promote did in the registry, as a signed statement beside the release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components._runtime.envelopes import seal, unseal
from components._runtime.evidence import PROMOTION, Clock, compose
from components._runtime.outcome import TO_ATTEST
from components._runtime.promotion_statement import promotion_statement
from components._runtime.signing_keys import KEY_VARIABLE, SigningKey
from components._runtime.store import Shelf
from defense_core.errors import EvidenceMismatch, EvidenceMissing
from defense_core.files import sha256_bytes
from defense_core.verdict import Finding, Verdict


def attest_promotion(promoted: Mapping[str, Any], key: SigningKey | None) -> tuple[dict[str, Any], bytes | None]:
    """State a promotion.

    Args:
        promoted: evidence of promote.
        key: ``None``: nothing is signed, and nothing stated.

    Returns:
        Evidence ``attest`` with ``results`` ``signed``, ``key_id`` and ``statement``, its payload's digest; and the
        signed envelope, or ``None`` where nothing was registered or there is no key.

    Raises:
        EvidenceMissing: the policy demands signatures and there is no key.
        EvidenceMismatch: the evidence names no registered version.
    """
    clock = Clock.start()
    facts: dict[str, Any] = {"signed": False, "key_id": None, "statement": None}
    envelope = None
    if not promoted["results"]["registered"]:
        said = "Nothing was registered, so there is nothing to state"
    elif key is None:
        _require_none_needed(promoted)
        said = f"Not signed: {KEY_VARIABLE} names no key"
    else:
        statement = promotion_statement(promoted)
        envelope = seal(statement.payload, key)
        facts = {"signed": True, "key_id": key.key_id, "statement": statement.digest}
        said = f"Signed with the key {key.key_id}"
    bound = "a key, where the policy demands one"
    evidence = compose(
        "attest",
        clock,
        inputs={name: promoted["inputs"].get(name) for name in ("source", "model", "onnx", "policy")},
        results=facts,
        findings=[Finding("attest.signed", Verdict.PASS, facts["signed"], bound, f"{said}.")],
    )
    return evidence, envelope


def keep_statement(shelf: Shelf, envelope: bytes, key: SigningKey) -> None:
    """Put the statement beside the release. One that is there stays, if it says the same: a retried step signs anew.

    Raises:
        EvidenceMismatch: another statement is there, or one that this key did not sign.
    """
    if shelf.put_new(PROMOTION, envelope):
        return
    public = key.signer.public_key
    there, here = (unseal(data, public, PROMOTION) for data in (shelf.get(PROMOTION), envelope))
    if there != here:
        raise EvidenceMismatch(
            f"{PROMOTION} of this run is there already and states something else",
            expected=sha256_bytes(here),
            got=sha256_bytes(there),
            hint="Find out who wrote it, and start a new run; the promotion itself is done",
        )


def _require_none_needed(promoted: Mapping[str, Any]) -> None:
    if promoted["results"][TO_ATTEST]:
        raise EvidenceMissing(
            "the policy demands signatures and there is no key for the statement of the promotion",
            expected=f"{KEY_VARIABLE} to name a private key",
            got="nothing",
            hint="Mount the secret of the sign step into this step too and run again; the promotion itself is done",
        )
