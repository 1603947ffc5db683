"""The promotion statement, compared with the release that it speaks of and with the registry."""

from __future__ import annotations

from collections.abc import Iterator

from components._runtime import registry_tags as tag
from components._runtime.evidence import DECISION
from components._runtime.promotion_statement import Promoted, read_promotion
from components._runtime.registered_files import RegisteredModel
from components._runtime.release import EVIDENCE_FOLDER
from components._runtime.verification import signed_destination
from components._runtime.verification_files import Check, FileFinding
from defense_core.config import digest
from defense_core.verdict import Verdict

RULE = "verify.promotion"
_BOUND = "what lies here and in the registry"


def check_promotion(check: Check, envelope: bytes, file: str, registered: RegisteredModel | None = None) -> None:
    """One finding that it holds, or one for each difference.

    Args:
        envelope: the bytes of the statement's file.
        file: names it in findings.
        registered: the version, where the release was downloaded from a registry.
    """
    key = check.signers_key
    if key is None:
        why = f"Whose signature {file} needs would stand in the certificate of a good model.sig."
        check.findings.append(FileFinding(RULE, Verdict.UNKNOWN, None, _BOUND, why, file))
        return
    with check.part(RULE, _BOUND, "The promotion statement says what lies here and in the registry.", file):
        promoted = read_promotion(envelope, key, file)
        differences = [*_from_release(check, promoted)]
        if registered is not None:
            differences += _from_registry(promoted, registered)
        for name, here, said in differences:
            check.differ(RULE, file, expected=here, got=said, why=f"{file}: its {name} is {said}, here it is {here}.")


def _from_release(check: Check, promoted: Promoted) -> Iterator[tuple[str, object, object]]:
    """(field, here, said) of what the statement says otherwise than the release."""
    here = {
        "decision": check.hashed.get(f"{EVIDENCE_FOLDER}/{DECISION}", "no such file"),
        "files": digest(check.hashed),
    }
    if check.replayed is not None:
        here["outcome"] = check.replayed.decision.outcome
    destination = signed_destination(check)
    if destination:
        here |= {"name": destination["model_name"], "alias": destination["alias"]}
    yield from ((name, value, said) for name, value in here.items() if (said := getattr(promoted, name)) != value)


def _from_registry(promoted: Promoted, registered: RegisteredModel) -> Iterator[tuple[str, object, object]]:
    before = registered.tags.get(tag.BEFORE_PREFIX + promoted.alias)
    here = {
        "name": registered.name,
        "version": registered.version,
        "given": registered.tags.get(tag.ALIAS_PREFIX + promoted.alias) == tag.ALIAS_SET,
        "before": None if before == tag.NO_VERSION else before,
    }
    yield from ((name, value, said) for name, value in here.items() if (said := getattr(promoted, name)) != value)
