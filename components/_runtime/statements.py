"""in-toto statements: one per step, each bound to the bytes of its evidence and to the statement before it.

Predicate types and their fields are documented in ``docs/evidence-format.md``. Statements of steps are a
function of the evidence alone, so a verifier makes them again and compares bytes. A field that is added
later needs a new version of the predicate type beside this one: what was signed stays verifiable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defense_core.config import canonical_json
from defense_core.errors import ConfigError, EvidenceMismatch
from defense_core.evidence import DIGEST
from defense_core.files import sha256_bytes

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATES = {
    "fetch": "urn:model-quarantine:fetch:v1",
    "scan": "urn:model-quarantine:scan:v1",
    "control": "urn:model-quarantine:control:v1",
    "purify": "urn:model-quarantine:purify:v1",
    "evaluate": "urn:model-quarantine:evaluate:v1",
    "select": "urn:model-quarantine:select:v1",
    "rescan": "urn:model-quarantine:rescan:v1",
    "export": "urn:model-quarantine:export:v1",
    "gate": "urn:model-quarantine:decision:v1",
    "release": "urn:model-quarantine:release:v1",
}
"""Predicate type by step, in the order of the chain."""
RELEASE = "release"
PROMOTION_PREDICATE = "urn:model-quarantine:promotion:v1"
"""Of the statement that is made after the release, and lies beside it."""
LICENSED_FETCH_PREDICATE = "urn:model-quarantine:fetch:v2"
"""Of fetch since it says what licence the model has; v1 stays what earlier evidence gives."""
_KNOWN = {*PREDICATES.values(), PROMOTION_PREDICATE, LICENSED_FETCH_PREDICATE}
_CIRCUMSTANCES = ("version", "torch", "device", "image", "seed", "started")


@dataclass(frozen=True)
class Destination:
    """Where a release is meant to go; a release under another name is not the one that was signed.

    Attributes:
        model_name: the registered model.
        alias: what moves to it on allow.
    """

    model_name: str
    alias: str


@dataclass(frozen=True)
class Statement:
    """A statement as it is signed.

    Attributes:
        name: of the evidence, or ``release``.
        payload: its bytes.
    """

    name: str
    payload: bytes

    @property
    def digest(self) -> str:
        """``"sha256:<hex>"`` of the payload, which the next statement holds."""
        return sha256_bytes(self.payload)


def chain_order(names: Sequence[str]) -> list[str]:
    """Names of evidence in the order of their statements; those without a predicate type are left out."""
    steps = list(PREDICATES)
    known = [name for name in names if name.partition(".")[0] in PREDICATES]
    return sorted(known, key=lambda name: (steps.index(name.partition(".")[0]), name))


def step_statements(evidence: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str]) -> list[Statement]:
    """The statements of all steps; that of the release comes after them.

    Args:
        evidence: by name.
        digests: of the evidence files, by name of the evidence.
    """
    order = chain_order(list(evidence))
    made: list[Statement] = []
    for name in order:
        made.append(_step_statement(evidence[name], digests[name], _place(made, len(order) + 1)))
    return made


def release_statement(
    earlier: Sequence[Statement],
    destination: Destination,
    *,
    outputs: Mapping[str, str],
    environment: Mapping[str, Any],
) -> Statement:
    """The last statement: what the folder is, and where it is meant to go.

    Args:
        outputs: digest by name of the files that are served.
        environment: of the sign step.
    """
    predicate = {
        "name": RELEASE,
        "destination": {"model_name": destination.model_name, "alias": destination.alias},
        "outputs": dict(outputs),
        **circumstances(environment),
        "sequence": _place(earlier, len(earlier) + 1),
    }
    return Statement(RELEASE, statement_payload(PREDICATES[RELEASE], dict(outputs), predicate))


def release_predicate_problem(
    statement: Mapping[str, Any], earlier: Sequence[Statement], outputs: Mapping[str, str]
) -> str:
    """What the evidence demands of a release statement and it does not say; empty where it fits.

    Its destination and circumstances are its own: nothing else in the folder says them.
    """
    predicate = statement["predicate"]
    destination = predicate.get("destination")
    if not isinstance(destination, dict) or set(destination) != {"model_name", "alias"}:
        return "a destination with model_name and alias"
    code = predicate.get("code")
    environment = {
        **(code if isinstance(code, dict) else {}),
        **{key: predicate.get(key) for key in _CIRCUMSTANCES[2:]},
    }
    again = release_statement(earlier, Destination(**destination), outputs=outputs, environment=environment)
    wanted = json.loads(again.payload)
    different = [key for key in sorted({*wanted, *statement}) if wanted.get(key) != statement.get(key)]
    return f"{', '.join(different)} as the evidence gives" if different else ""


def parse_statement(payload: bytes, where: str) -> dict[str, Any]:
    """A statement's mapping.

    Raises:
        EvidenceMismatch: no statement, of an unknown predicate type, or not canonical.
    """
    try:
        mapping: Any = json.loads(payload)
        known = mapping["_type"] == STATEMENT_TYPE and mapping["predicateType"] in _KNOWN
        whole = isinstance(mapping["predicate"]["name"], str) and canonical_json(mapping) == payload
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise EvidenceMismatch(f"{where} holds no statement", expected="an in-toto statement", got=error) from error
    if not known:
        raise EvidenceMismatch(
            f"{where} is of an unknown type",
            expected=f"{STATEMENT_TYPE} with a predicate urn:model-quarantine:<step>:v1",
            got=f"{mapping['_type']} with {mapping['predicateType']}",
            hint="Verify it with the release of this program that made it, or a later one",
        )
    if not whole:
        raise EvidenceMismatch(
            f"{where} holds no statement", expected="canonical JSON with a named predicate", got="others"
        )
    parsed: dict[str, Any] = mapping
    return parsed


def file_name(index: int, name: str) -> str:
    """The file of the statement at ``index``, from 0."""
    return f"{index:03d}-{name}.json"


def flat_inputs(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Digests by dotted name, ``candidates.tsbd`` for nested ones; what is not there is left out."""
    flat: dict[str, str] = {}
    for key, value in inputs.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": digest for inner, digest in flat_inputs(value).items()})
        elif value is not None:
            flat[key] = str(value)
    return flat


def _step_statement(evidence: Mapping[str, Any], file_digest: str, place: Mapping[str, Any]) -> Statement:
    name = str(evidence["name"])
    inputs, outputs = flat_inputs(evidence["inputs"]), flat_inputs(evidence["outputs"])
    predicate = {
        "name": name,
        "verdict": evidence["verdict"],
        "inputs": inputs,
        "outputs": outputs,
        "config": inputs.get("config"),
        "clean_set": inputs.get("clean"),
        **circumstances(evidence.get("environment")),
        "sequence": place,
    }
    subjects = {f"evidence/{name}.json": file_digest, **outputs}
    predicate_type = PREDICATES[name.partition(".")[0]]
    if name == "fetch" and "licence" in evidence["results"]:
        predicate_type, predicate["licence"] = LICENSED_FETCH_PREDICATE, evidence["results"]["licence"]
    return Statement(name, statement_payload(predicate_type, subjects, predicate))


def circumstances(environment: Any) -> dict[str, Any]:
    """The predicate's ``code``, ``device``, ``image``, ``seed`` and ``started``, from an evidence's environment."""
    given = environment if isinstance(environment, Mapping) else {}
    # The seed is text too: readers of JSON that know only doubles would round a large one.
    found = {key: None if given.get(key) is None else str(given[key]) for key in _CIRCUMSTANCES}
    code = {key: found.pop(key) for key in ("version", "torch")}
    return {"code": code, **found}


def _place(earlier: Sequence[Statement], count: int) -> dict[str, Any]:
    return {"index": len(earlier), "count": count, "previous": earlier[-1].digest if earlier else None}


def statement_payload(predicate_type: str, subjects: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
    """The bytes of a statement; subjects that are no digests are left out. Raises EvidenceMismatch."""
    from google.protobuf import json_format
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement as InTotoStatement

    described = [
        _descriptor(ResourceDescriptor, subject, digest)
        for subject, digest in sorted(subjects.items())
        if DIGEST.fullmatch(digest)
    ]
    try:
        statement = InTotoStatement(described, predicate_type, dict(predicate))
        statement.validate()
    except (ValueError, TypeError) as error:
        what = f"evidence {predicate.get('name')} makes no statement"
        raise EvidenceMismatch(what, expected="digests and text", got=error) from error
    # The library holds numbers as doubles; the predicate's own values are kept as they are.
    return canonical_json({**json_format.MessageToDict(statement.pb), "predicate": predicate})


def _descriptor(kind: Any, name: str, digest: str) -> Any:
    algorithm, _, value = digest.partition(":")
    return kind(name=name, digest={algorithm: value}).pb
