"""A whole run as evidence, and a reader of pages: for the tests of every page that is made from evidence."""

from __future__ import annotations

import hashlib
from html.parser import HTMLParser
from typing import Any

from defense_core.evaluate.metrics import Proportion

Evidences = dict[str, dict[str, Any]]


def sha(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


SOURCE, MODEL, PURIFIED, CONTROL, ONNX = map(sha, ("source", "model", "purified", "control", "onnx"))


def record(name: str, inputs: dict[str, Any], outputs: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    environment = {"version": "0.1.0", "torch": "2.15.0", "device": "cpu", "seed": 7, "seconds": 2.5}
    return {
        "schema": 1,
        "step": name.partition(".")[0],
        "name": name,
        "inputs": {"source": SOURCE, **inputs},
        "outputs": outputs,
        "results": results,
        "verdict": "PASS",
        "findings": [],
        "environment": {**environment, "started": "2026-11-21T01:12:09+00:00"},
    }


def measured(correct: int, fooled: int, der: float | None) -> dict[str, Any]:
    classes = [{"label": k, "acc": 0.9, "acc_before": 0.95, "drop": 0.05, "trials": 20} for k in range(3)]
    probe = {
        "name": "patch",
        "kind": "badnets",
        "target": 0,
        "asr": Proportion(fooled, 180).to_results(),
        "ra": Proportion(180 - fooled, 180).to_results(),
        "der": der,
    }
    return {"images": 200, "acc": Proportion(correct, 200).to_results(), "classes": classes, "probes": [probe]}


def rule(name: str, verdict: str = "PASS", effect: str = "block", value: Any = 0.01) -> dict[str, Any]:
    why = {"PASS": "Met", "FAIL": "Not met", "UNKNOWN": "Not decided"}[verdict] + f": reason of {name}."
    return {"rule": name, "verdict": verdict, "value": value, "bound": "<= 0.05", "why": why, "effect": effect}


def decision(outcome: str, verdict: str, *rules: dict[str, Any]) -> dict[str, Any]:
    digests = {"policy_digest": sha("policy"), "evidence_digest": sha("evidence")}
    return {"verdict": verdict, "outcome": outcome, "policy_name": "standard", **digests, "findings": list(rules)}


def whole_run() -> Evidences:
    fetch = {
        "uri": "s3://incoming/digits.pt",
        "version_id": "v-17",
        "bytes": 714211,
        "architecture": {"name": "small_cnn", "args": {"width": 8}},
        "input_size": [1, 8, 8],
        "num_classes": 3,
        "class_names": ["zero", "one", "two"],
        "parameters": 5000,
        "methods": ["tsbd", "fine_tuning"],
    }
    history = [{"phase": "unlearn", "step": k, "loss": 0.1 * k, "lr": 0.1} for k in (1, 2)]
    history += [{"phase": "repair", "step": k, "loss": 1.0 / k, "lr": 0.1} for k in (1, 2, 3)]
    facts = {"units": {"conv10.weight": 2, "conv2.weight": 5}, "zeroed": {"conv10.weight": 18, "conv2.weight": 40}}
    row = {"name": "clean", "images": 200, "max_abs_diff": 3.1e-6, "bound_abs": 1e-4, "argmax_agreement": 1.0}
    row["bound_agreement"] = 0.999
    export = {"opset": 18, "sha256": ONNX, "bytes": 12345, "dynamic_batch": True, "parity": [row]}
    tsbd = {"method": "tsbd", "control": False, "facts": facts, "history": history}
    tuned = {"method": "fine_tuning", "control": True, "facts": {}, "history": history[:2]}
    chosen = {
        "method": "tsbd",
        "rule": "the best on the select split",
        "candidates": [{"method": "tsbd", "accuracy": 0.97}],
    }
    registered = {"name": "digits", "version": "4", "decision": "allow", "alias": "champion", "alias_version": "4"}
    decided = decision("allow", "PASS", rule("accuracy-held"), rule("one-class", "FAIL", "warn"))
    records = [
        record("fetch", {}, {"model": MODEL}, fetch),
        record("evaluate.before", {"model": MODEL}, {}, measured(196, 178, None)),
        record("purify.tsbd", {"model": MODEL}, {"model": PURIFIED}, tsbd),
        record("purify.fine_tuning", {"model": MODEL}, {"model": CONTROL}, tuned),
        record("evaluate.tsbd", {"model": PURIFIED, "reference": MODEL}, {}, measured(194, 4, 0.97)),
        record("evaluate.fine_tuning", {"model": CONTROL, "reference": MODEL}, {}, measured(195, 90, 0.74)),
        record("select", {}, {"model": PURIFIED}, chosen),
        record("export", {"model": PURIFIED}, {"onnx": ONNX}, export),
        record("gate", {"model": PURIFIED, "onnx": ONNX}, {}, decided),
        record("promote", {"model": PURIFIED, "onnx": ONNX}, {}, registered),
    ]
    return {each["name"]: each for each in records}


class Balance(HTMLParser):
    """Fails on tags that do not match; collects what a test wants to know."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input", "use", "path"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


def parsed(page: str) -> Balance:
    reader = Balance()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader
