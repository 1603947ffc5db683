"""The chain of a run: which digest went into each step, which came out, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from defense_core.report_text import at, label, number, text

SHORT = 12
"""Hex digits of a digest that the picture shows; the whole digests stand in the table beside it."""


@dataclass(frozen=True)
class Token:
    """A digest that a step names; ``fits`` is whether it is the one that an earlier step gave.

    Attributes:
        name: what it is a digest of (``model``).
        digest: 64 hex digits.
        fits: ``None`` where there is no earlier step to compare with.
    """

    name: str
    digest: str
    fits: bool | None

    @property
    def short(self) -> str:
        """The first digits."""
        return self.digest[:SHORT]


@dataclass(frozen=True)
class Node:
    """One step of the run."""

    name: str
    title: str
    verdict: str
    inputs: tuple[Token, ...]
    outputs: tuple[Token, ...]
    started: str
    seconds: float | None


@dataclass(frozen=True)
class Stage:
    """Steps that stand beside each other."""

    title: str
    nodes: tuple[Node, ...]


_STAGES = (
    ("Fetch", ("fetch",)),
    ("Scan", ("scan",)),
    ("Positive control", ("control",)),
    ("Purify", ("purify",)),
    ("Evaluate", ("evaluate",)),
    ("Select", ("select",)),
    ("Scan again", ("rescan",)),
    ("Export", ("export",)),
    ("Reopen", ("reopen",)),
    ("Decide", ("gate",)),
    ("Sign", ("sign",)),
    ("Promote", ("promote",)),
    ("Attest", ("attest",)),
)
_SHOWN_INPUTS = ("source", "model", "reference", "onnx", "clean", "policy", "evidence")
_SHOWN_OUTPUTS = ("model", "onnx")


def chain(evidence: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]) -> tuple[Stage, ...]:
    """The steps that ran, in order, and those that failed.

    Args:
        evidence: by name.
        failed: error type by the name of a failed step.
    """
    stages = []
    for title, steps in _STAGES:
        names = sorted({name for name in (*evidence, *failed) if name.partition(".")[0] in steps}, key=_before_first)
        if names:
            stages.append(Stage(title, tuple(_node(name, title, evidence, name in failed) for name in names)))
    return tuple(stages)


def broken(stages: tuple[Stage, ...]) -> tuple[str, ...]:
    """Names of steps that speak of something else than the steps before them."""
    nodes = [node for stage in stages for node in stage.nodes]
    return tuple(node.name for node in nodes if any(token.fits is False for token in (*node.inputs, *node.outputs)))


def _node(name: str, stage: str, evidence: Mapping[str, Mapping[str, Any]], failed: bool) -> Node:
    found = evidence.get(name)
    method = name.partition(".")[2]
    verdict = text(at(found, "verdict"), 10)
    return Node(
        name=text(name, 80),
        title=label(text(method, 60)) if method else stage,
        verdict="FAILED"
        if found is None and failed
        else verdict
        if verdict in ("PASS", "FAIL", "UNKNOWN")
        else "UNKNOWN",
        inputs=_tokens(name, "inputs", _SHOWN_INPUTS, evidence),
        outputs=_tokens(name, "outputs", _SHOWN_OUTPUTS, evidence),
        started=text(at(found, "environment", "started"), 40),
        seconds=number(at(found, "environment", "seconds")),
    )


def _tokens(
    name: str, side: str, keys: tuple[str, ...], evidence: Mapping[str, Mapping[str, Any]]
) -> tuple[Token, ...]:
    tokens = []
    for key in keys:
        value = at(evidence, name, side, key)
        if isinstance(value, str) and value:
            given = _given(name, side, key, evidence)
            digest = text(value, 100).removeprefix("sha256:")
            tokens.append(Token(key, digest, value in given if given else None))
    return tuple(tokens)


def _given(name: str, side: str, key: str, evidence: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Digests, of which this one should be one; empty where nothing is known."""
    step, _, method = name.partition(".")
    fetched, selected = ("fetch", "outputs", "model"), ("select", "outputs", "model")
    where: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {
        ("scan", "inputs", "model"): [fetched],
        ("control", "inputs", "model"): [fetched],
        ("purify", "inputs", "model"): [fetched],
        ("evaluate", "inputs", "reference"): [fetched],
        ("evaluate", "inputs", "model"): [fetched if method == "before" else (f"purify.{method}", "outputs", "model")],
        ("select", "outputs", "model"): [(each, "outputs", "model") for each in evidence if each.startswith("purify.")],
        ("rescan", "inputs", "model"): [selected],
        ("export", "inputs", "model"): [selected],
        ("reopen", "inputs", "model"): [selected],
        ("gate", "inputs", "model"): [selected],
        ("sign", "inputs", "model"): [selected],
        ("promote", "inputs", "model"): [selected],
        ("attest", "inputs", "model"): [selected],
        ("reopen", "inputs", "onnx"): [("export", "outputs", "onnx")],
        ("gate", "inputs", "onnx"): [("export", "outputs", "onnx")],
        ("sign", "inputs", "onnx"): [("export", "outputs", "onnx")],
        ("promote", "inputs", "onnx"): [("export", "outputs", "onnx")],
        ("attest", "inputs", "onnx"): [("export", "outputs", "onnx")],
        ("reopen", "inputs", "policy"): [("fetch", "inputs", "policy")],
        ("gate", "inputs", "policy"): [("fetch", "inputs", "policy")],
        ("sign", "inputs", "policy"): [("fetch", "inputs", "policy")],
        ("promote", "inputs", "policy"): [("fetch", "inputs", "policy")],
        ("attest", "inputs", "policy"): [("fetch", "inputs", "policy")],
    }
    paths = where.get((step, side, key), [])
    if key == "source" and step != "fetch":
        paths = [("fetch", "inputs", "source")]
    return {value for path in paths if isinstance(value := at(evidence, *path), str)}


def _before_first(name: str) -> tuple[bool, str]:
    return (name != "evaluate.before", name)
