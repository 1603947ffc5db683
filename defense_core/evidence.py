"""Evidence files as checked records, and how a rule reads a value out of one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from defense_core.config import digest
from defense_core.errors import ConfigError, EvidenceMismatch
from defense_core.verdict import Verdict

EVIDENCE_SCHEMA = 1
BEFORE_DECISION = ("fetch", "scan", "control", "purify", "evaluate", "rescan", "select", "export")
"""Steps that a decision can rest on."""
AFTER_DECISION = ("gate", "sign", "promote", "attest", "report", "reopen")
"""Steps that come after the decision; their evidence is never an input of it."""
UNPURIFIED = "untouched"
"""In a purifier's place: the scan found no evidence of a backdoor, and the fetched model goes on as it is."""

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
SELECTED = "selected"
"""In a method's place in rules: the method that was chosen."""
_PART = r"[A-Za-z0-9_-]+"
_NAME = re.compile(rf"([a-z_]+)(?:\.({_PART}))?")


@dataclass(frozen=True)
class Evidence:
    """One evidence file. ``results`` is step-specific and may hold anything that JSON can.

    ``started`` is when the step began, as the file states it; unchecked, since old files may lack it.
    """

    name: str
    step: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    results: Mapping[str, Any]
    verdict: Verdict
    started: Any = None

    def input_digest(self, key: str) -> str | None:
        """The digest of what went in (``source``, ``model``, …); ``None`` where none is named."""
        return _digest(self.inputs, key, self.name, "inputs")

    def output_digest(self, key: str) -> str | None:
        """The digest of what came out (``model``, ``onnx``); ``None`` where none is named."""
        return _digest(self.outputs, key, self.name, "outputs")

    def member_digests(self) -> Mapping[str, str]:
        """Digests of the models that were averaged, by the purifier that made each; empty where none were."""
        members = self.inputs.get("members", {})
        if not isinstance(members, Mapping):
            raise _damaged(self.name, "inputs.members as digests by name", repr(members))
        digests = {str(name): _digest(members, name, self.name, "inputs.members") for name in members}
        named = {name: found for name, found in digests.items() if found is not None}
        if len(named) < len(digests):
            raise _damaged(self.name, "inputs.members as digests by name", repr(members))
        return named


def require_part(name: str) -> None:
    """Refuse what cannot follow the dot in the name of evidence, such as ``tsbd`` in ``evaluate.tsbd``.

    Raises:
        ConfigError: other characters than these take, or the name that rules use for the chosen method.
    """
    if not re.fullmatch(_PART, name) or name == SELECTED:
        raise ConfigError(
            "name is malformed", expected=f"letters, digits, - and _, and not {SELECTED}", got=repr(name)[:120]
        )


def parse_evidence(files: Mapping[str, Any]) -> dict[str, Evidence]:
    """Check evidence mappings by name; those of steps after the decision are left out.

    Raises:
        EvidenceMismatch: one of them is damaged, has another schema, or stands under another name.
    """
    if not isinstance(files, Mapping):
        raise EvidenceMismatch(
            "evidence is malformed", expected="a mapping of evidence by name", got=type(files).__name__
        )
    parsed = [_parse(name, files[name]) for name in sorted(files, key=str)]
    return {each.name: each for each in parsed if each.step not in AFTER_DECISION}


def evidence_digest(files: Mapping[str, Any], names: Mapping[str, Evidence]) -> str:
    """``"sha256:<hex>"`` over the evidence called ``names``, environment and findings included.

    Raises:
        EvidenceMismatch: something in it has no JSON form.
    """
    try:
        return digest({name: _without_nan(files[name]) for name in names})
    except (ConfigError, RecursionError) as error:
        raise EvidenceMismatch(
            "evidence is malformed", expected="JSON values", got=str(error), hint="Run the step again"
        ) from error


def _parse(name: object, mapping: Any) -> Evidence:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _damaged(repr(name), "a name such as fetch or evaluate.tsbd", repr(name))
    if not isinstance(mapping, Mapping):
        raise _damaged(name, "a mapping", type(mapping).__name__)
    schema = mapping.get("schema")
    if isinstance(schema, bool) or schema != EVIDENCE_SCHEMA:
        raise _damaged(name, f"schema {EVIDENCE_SCHEMA}", repr(schema))
    if mapping.get("name") != name:
        raise _damaged(name, f"evidence of {name}", f"evidence of {mapping.get('name')!r}")
    step = name.partition(".")[0]
    if mapping.get("step") != step or step not in BEFORE_DECISION + AFTER_DECISION:
        raise _damaged(name, "step " + " | ".join(BEFORE_DECISION + AFTER_DECISION), repr(mapping.get("step")))
    if name == f"{step}.{SELECTED}":
        raise _damaged(name, "a method's name", f"{SELECTED}, which rules use for the chosen method")
    for key in ("inputs", "outputs", "results"):
        if not isinstance(mapping.get(key), Mapping):
            raise _damaged(name, f"a mapping {key}", repr(mapping.get(key)))
    verdict = mapping.get("verdict")
    if verdict not in [each.value for each in Verdict]:
        raise _damaged(name, "verdict PASS, FAIL or UNKNOWN", repr(verdict))
    environment = mapping.get("environment")
    started = environment.get("started") if isinstance(environment, Mapping) else None
    evidence = Evidence(
        name, step, mapping["inputs"], mapping["outputs"], mapping["results"], Verdict(verdict), started
    )
    for key in ("source", "model", "reference"):
        evidence.input_digest(key)
    for key in ("model", "onnx"):
        evidence.output_digest(key)
    evidence.member_digests()
    return evidence


def _digest(section: Mapping[str, Any], key: str, name: str, where: str) -> str | None:
    value = section.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise _damaged(name, f"{where}.{key} as sha256:<64 hex digits>", repr(value))
    return value


def _damaged(name: str, expected: str, got: str) -> EvidenceMismatch:
    return EvidenceMismatch(
        f"evidence {name} is damaged", expected=expected, got=got, hint="Run the step again; never edit evidence"
    )


def _without_nan(value: Any) -> Any:
    """NaN and Inf as a marker, so that evidence that holds them has a digest too."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$nonfinite": str(value)}
    return value


# -- values ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One value that a path leads to.

    Attributes:
        value: what stands there; ``None`` where nothing readable does.
        problem: why nothing readable stands there; empty where something does.
        element: the list elements on the way (``badnets``); empty without lists.
        absent: the path met a list without elements.
    """

    value: Any = None
    problem: str = ""
    element: str = ""
    absent: bool = False


def read(results: Mapping[str, Any], path: str) -> tuple[Reading, ...]:
    """Every value at ``path``, e.g. ``acc.low`` or ``probes[*].asr.high``; never empty."""
    return tuple(_walk(results, path.split("."), "", ""))


def _walk(node: Any, segments: list[str], element: str, passed: str) -> Iterator[Reading]:
    if not segments:
        yield _leaf(node, element, passed)
        return
    segment, rest = segments[0], segments[1:]
    key = segment.removesuffix("[*]")
    here = f"{passed}.{key}" if passed else key
    if node is None:
        yield Reading(problem=f"{passed} was not measured", element=element)
    elif not isinstance(node, Mapping):
        yield Reading(problem=f"{passed} is {_kind(node)}, not a mapping", element=element)
    elif key not in node:
        yield Reading(problem=f"{here} is missing", element=element)
    elif key == segment:
        why = node.get(f"{key}_why")
        if node[key] is None and isinstance(why, str) and why:
            yield Reading(problem=f"{here} is not known: {why}", element=element)
        else:
            yield from _walk(node[key], rest, element, here)
    elif not isinstance(node[key], (list, tuple)):
        yield Reading(problem=f"{here} is {_kind(node[key])}, not a list", element=element)
    elif not node[key]:
        yield Reading(problem=f"{here} is empty", element=element, absent=True)
    else:
        for index, item in enumerate(node[key]):
            yield from _walk(item, rest, _label(element, item, index), f"{here}[{index}]")


def _leaf(node: Any, element: str, passed: str) -> Reading:
    if node is None:
        return Reading(problem=f"{passed} was not measured", element=element)
    if isinstance(node, float) and not math.isfinite(node):
        return Reading(problem=f"{passed} is {node}", element=element)
    return Reading(value=node, element=element)


def _label(element: str, item: Any, index: int) -> str:
    name = item.get("name") if isinstance(item, Mapping) else None
    own = name if isinstance(name, str) else f"element {index}"
    return f"{element}, {own}" if element else own


def _kind(value: Any) -> str:
    return {bool: "a truth value", str: "text", int: "a number", float: "a number"}.get(type(value), "something else")
