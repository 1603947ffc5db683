"""The statement of the promotion: which files went to which name, version and alias, by which decision.

It is made after the release, which it speaks of by digest, so it lies beside the release: in the run's evidence
store as ``promotion.json``, and in MLflow with the run that keeps the version's files. It is a function of the
evidence of promote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components._runtime import registry_tags as tag
from components._runtime.envelopes import unseal
from components._runtime.release import EVIDENCE_FOLDER
from components._runtime.statements import (
    PROMOTION_PREDICATE,
    Statement,
    circumstances,
    flat_inputs,
    parse_statement,
    statement_payload,
)
from defense_core.config import canonical_json, from_mapping, to_mapping
from defense_core.errors import ConfigError, EvidenceMismatch
from defense_core.files import sha256_bytes

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey


@dataclass(frozen=True)
class Promoted:
    """What a promotion statement says of the registry.

    Attributes:
        name: the registered model.
        version: the version's number.
        alias: the alias that was asked for.
        given: whether the version was given it: on allow only.
        before: the version that had it before; ``None`` if none had, or it was not given.
        outcome: of the decision.
        decision: digest of the version's ``decision.json``.
        files: digest over names and contents of the version's files.
    """

    name: str
    version: str
    alias: str
    given: bool
    before: str | None
    outcome: str
    decision: str
    files: str


def promotion_statement(evidence: Mapping[str, Any]) -> Statement:
    """The statement of a promotion that registered a version, from the evidence ``promote``.

    Raises:
        EvidenceMismatch: the evidence names no version or no decision.
    """
    results = evidence["results"]
    try:
        promoted = from_mapping(
            Promoted,
            {
                **{key: results[key] for key in ("name", "version", "alias", "outcome")},
                "given": results["decision"] == tag.ALLOW,
                "before": results["alias_before"],
                "decision": results["decision_digest"],
                "files": results["files_digest"],
            },
        )
    except (KeyError, ConfigError) as error:
        raise EvidenceMismatch(
            "evidence promote makes no statement", expected="a registered version", got=error
        ) from error
    predicate = {
        "name": "promote",
        "verdict": evidence["verdict"],
        "inputs": flat_inputs(evidence["inputs"]),
        "registry": to_mapping(promoted),
        **circumstances(evidence.get("environment")),
    }
    subjects = {
        "promote.json": sha256_bytes(canonical_json(evidence) + b"\n"),
        f"{EVIDENCE_FOLDER}/decision.json": promoted.decision,
        "files": promoted.files,
    }
    return Statement("promote", statement_payload(PROMOTION_PREDICATE, subjects, predicate))


def read_promotion(envelope: bytes, key: SSlibKey, where: str) -> Promoted:
    """What a promotion statement says, after its signature was checked.

    Args:
        where: names it in messages.

    Raises:
        EvidenceMismatch: not signed with ``key``, rewritten, or another statement.
    """
    statement = parse_statement(unseal(envelope, key, where), where)
    try:
        if statement["predicateType"] != PROMOTION_PREDICATE:
            raise EvidenceMismatch(
                f"{where} is of another step", expected=PROMOTION_PREDICATE, got=statement["predicateType"]
            )
        promoted: Promoted = from_mapping(Promoted, statement["predicate"]["registry"])
    except (KeyError, ConfigError) as error:
        raise EvidenceMismatch(f"{where} holds no promotion", expected="what was promoted", got=error) from error
    return promoted
