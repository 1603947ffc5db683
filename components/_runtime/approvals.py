"""Approvals: a person signs that one rule need not hold for one model; the gate takes the signed file.

An approval is an in-toto statement in a DSSE envelope. Its subject is the digest of the evidence that the
person looked at, so that it counts for nothing else. Who the person is, the operator of the gate says: by
the name under which the public key is given.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components._runtime.envelopes import seal, unseal
from components._runtime.signing_keys import SigningKey
from defense_core.config import canonical_json
from defense_core.errors import ConfigError, EvidenceMismatch
from defense_core.files import sha256_bytes
from defense_core.policy import Approval

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

FOLDER = "approvals"
"""Where a decision's folder keeps the signed files."""
MAX_BYTES = 1 << 20
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "urn:model-quarantine:approval:v1"
_SAID = ("rule", "identity", "reason", "approved_at", "policy")


@dataclass(frozen=True)
class SignedApproval:
    """An approval whose signature was checked.

    Attributes:
        approval: what it says.
        envelope: the bytes of the signed file.
    """

    approval: Approval
    envelope: bytes


def sign_approval(
    key: SigningKey, *, rule: str, identity: str, reason: str, approved_at: str, evidence: str, policy: str
) -> bytes:
    """The bytes of an approval's file. ``evidence`` and ``policy`` are digests; the rest is text."""
    said = {
        "rule": rule,
        "identity": identity,
        "reason": reason,
        "approved_at": approved_at,
        "policy": policy,
    }
    return seal(_payload(said, evidence), key)


def require_distinct(approvers: Mapping[str, SSlibKey]) -> None:
    """Refuse one key under two names, with which one person would count as two. Raises ConfigError."""
    names: dict[str, str] = {}
    for name, key in approvers.items():
        other = names.setdefault(str(key.keyid), name)
        if other != name:
            raise ConfigError(
                f"the approvers {other} and {name} have the same key",
                expected="a key of their own for each",
                got=f"the key {key.keyid} twice",
                hint="Give each person's key under one name",
            )


def open_approval(data: bytes, approvers: Mapping[str, SSlibKey], where: str) -> SignedApproval:
    """Check who signed an approval.

    Args:
        data: the bytes of its file.
        approvers: whose approvals count: public key by name.

    Raises:
        EvidenceMismatch: no approval, signed by none of ``approvers``, or in the name of another.
    """
    refused: list[str] = []
    for name, key in approvers.items():
        try:
            payload = unseal(data, key, where)
        except EvidenceMismatch as error:
            refused.append(f"{name}: {error.what}")
            continue
        approval = _parsed(payload, data, where)
        if approval.identity == name:
            return SignedApproval(approval, data)
        refused.append(f"{name}: signed in the name of {approval.identity}")
    raise EvidenceMismatch(
        f"{where} is signed by nobody whose approval counts",
        expected="one of " + ", ".join(approvers) if approvers else "an approver, named by --approver-key",
        got="; ".join(refused) or "no approver's key",
        hint="Nothing was decided",
    )


def read_approvals(paths: Sequence[Path], approvers: Mapping[str, SSlibKey]) -> list[SignedApproval]:
    """Open the files ``paths``. Raises as :func:`open_approval`, and ConfigError for one that cannot be read."""
    return [open_approval(read_envelope(path), approvers, str(path)) for path in paths]


def approval_files(folder: Path, stated: Iterable[Approval]) -> list[Path]:
    """The signed files of a decision's folder, in the order of the decision's approvals.

    Signatures are not looked at here (that needs the approvers' keys), but each file must be the one that the
    decision names, and say what the decision says.

    Raises:
        EvidenceMismatch: a file is missing, is unexpected, or says something else.
    """
    folder = Path(folder) / FOLDER
    present = sorted(folder.iterdir()) if folder.is_dir() else []
    by_digest = {sha256_bytes(read_envelope(path)): path for path in present}
    found: list[Path] = []
    for approval in stated:
        path = by_digest.get(approval.envelope)
        if path is None:
            raise EvidenceMismatch(
                f"the approval of {approval.rule} by {approval.identity} is missing in {folder}",
                expected=approval.envelope,
                got=", ".join(each.name for each in present) or "no file",
            )
        data = read_envelope(path)
        said = _parsed(_unchecked_payload(data, str(path)), data, str(path))
        if said != approval:
            raise EvidenceMismatch(f"{path} says something else than the decision", expected=approval, got=said)
        found.append(path)
    spare = [path.name for path in present if path not in found]
    if spare:
        raise EvidenceMismatch(f"{folder} holds what the decision does not name", expected="its approvals", got=spare)
    return found


def file_name(index: int, approval: Approval) -> str:
    """The file of the approval at ``index``, from 0."""
    return f"{index:03d}-{approval.rule}.json"


def _payload(said: Mapping[str, str], evidence: str) -> bytes:
    algorithm, _, value = evidence.partition(":")
    return canonical_json(
        {
            "_type": _STATEMENT,
            "subject": [{"name": "evidence", "digest": {algorithm: value}}],
            "predicateType": _PREDICATE,
            "predicate": dict(said),
        }
    )


def _parsed(payload: bytes, envelope: bytes, where: str) -> Approval:
    try:
        statement: Any = json.loads(payload)
        said = {key: statement["predicate"][key] for key in _SAID}
        evidence = "sha256:" + statement["subject"][0]["digest"]["sha256"]
        whole = all(isinstance(value, str) and value.strip() for value in said.values())
        if not whole or _payload(said, evidence) != payload:
            raise EvidenceMismatch(f"{where} is no approval", expected=_PREDICATE, got=str(statement)[:80])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise EvidenceMismatch(f"{where} is no approval", expected=_PREDICATE, got=error) from error
    return Approval(**said, evidence=evidence, envelope=sha256_bytes(envelope))


def _unchecked_payload(data: bytes, where: str) -> bytes:
    try:
        return base64.b64decode(json.loads(data)["payload"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise EvidenceMismatch(f"{where} is no DSSE envelope", expected="a payload", got=error) from error


def read_envelope(path: Path) -> bytes:
    """The bytes of a signed file. Raises ConfigError for one that cannot be read, or is too large to be one."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"approval {path} cannot be read", expected="a signed file", got=error.strerror) from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"approval {path} is too large", expected=f"at most {MAX_BYTES} bytes", got="more")
    return data
