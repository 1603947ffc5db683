"""Evidence of a good run and small policies, for the tests of the gate."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import yaml

from defense_core.evaluate import PairedCounts, Proportion
from defense_core.policy import Policy, parse_policy
from defense_core.verdict import Verdict

PASS, FAIL, UNKNOWN = Verdict.PASS, Verdict.FAIL, Verdict.UNKNOWN
POLICIES = Path(__file__).parents[2] / "pipelines" / "policies"
SHIPPED = ("strict", "standard", "observe")
INTEGRITY = ["integrity.source", "integrity.model", "integrity.lineage", "integrity.onnx", "integrity.steps"]


def sha(letter: str) -> str:
    return "sha256:" + letter * 64


SOURCE, FETCHED, CLEANED, ONNX, OTHER = sha("a"), sha("b"), sha("c"), sha("d"), sha("e")


def record(name: str, inputs: dict, outputs: dict, results: dict) -> dict:
    return {
        "schema": 1,
        "step": name.split(".", maxsplit=1)[0],
        "name": name,
        "inputs": {"source": SOURCE, **inputs},
        "outputs": outputs,
        "results": results,
        "verdict": "PASS",
        "findings": [],
        "environment": {"version": "0.1.0", "seed": 0},
    }


def probe(successes: int = 0, trials: int = 1800, name: str = "badnets") -> dict:
    return {"name": name, "kind": "badnets", "target": 0, "asr": Proportion(successes, trials).to_results()}


def evaluation(table: PairedCounts, *probes: dict) -> dict:
    return {
        "images": table.trials,
        "acc": table.after.to_results(),
        "acc_drop": table.drop,
        "acc_drop_interval": table.to_results(),
        "class_acc_drop_max": 0.02,
        "probes": list(probes),
    }


GOOD = PairedCounts(1860, 16, 8, 116)


def run(table: PairedCounts = GOOD, *probes: dict) -> dict:
    """The evidence of one good run: TSBD was chosen, fine-tuning stands beside it."""
    after = record("evaluate.tsbd", {"model": CLEANED, "reference": FETCHED}, {}, evaluation(table, *probes))
    parity = [{"name": "clean", "argmax_agreement": 1.0}, {"name": "badnets", "argmax_agreement": 1.0}]
    records = [
        record("fetch", {}, {"model": FETCHED}, {"bytes": 10, "clean_images": 500}),
        record("purify.tsbd", {"model": FETCHED}, {"model": CLEANED}, {}),
        record("purify.fine_tuning", {"model": FETCHED}, {"model": OTHER}, {}),
        record("evaluate.before", {"model": FETCHED}, {}, evaluation(GOOD, probe(1750))),
        record("evaluate.fine_tuning", {"model": OTHER}, {}, evaluation(GOOD, probe(900))),
        after,
        record("select", {}, {"model": CLEANED}, {"method": "tsbd"}),
        record("export", {"model": CLEANED}, {"onnx": ONNX}, {"sha256": ONNX, "parity": parity, "dynamic_batch": True}),
    ]
    return {each["name"]: each for each in records}


def rule(**changes: object) -> dict:
    base = {
        "id": "r",
        "evidence": "evaluate.selected",
        "value": "score",
        "max": 0.5,
        "severity": "block",
        "why": "Because.",
    }
    if {"min", "equals", "one_of", "matches"} & set(changes):
        del base["max"]
    return {**base, **changes}


def policy_mapping(*rules: dict, promote: bool = True) -> dict:
    return {"schema": 1, "name": "test", "promote": promote, "rules": list(rules or (rule(),))}


def policy(*rules: dict, promote: bool = True) -> Policy:
    return parse_policy(policy_mapping(*rules, promote=promote))


def with_score(score: object) -> dict:
    evidence = run()
    evidence["evaluate.tsbd"]["results"]["score"] = score
    return evidence


def shipped(name: str) -> dict:
    return yaml.safe_load((POLICIES / f"{name}.yaml").read_text())


def finding(decision, identifier: str):
    found = [each for each in decision.findings if each.rule == identifier]
    assert len(found) == 1
    return found[0]


def untouched() -> dict:
    """The fetched model itself was chosen: no purification on its way, because a scan found no evidence."""
    files = {name: each for name, each in run().items() if not name.startswith("purify.")}
    files["select"] |= {"outputs": {"model": FETCHED}, "results": {"method": "before"}}
    files["export"]["inputs"]["model"] = FETCHED
    return {**files, "scan": record("scan", {"model": FETCHED}, {}, {"verdict": "PASS"})}


def scanned(files: dict, *, scan="FAIL", rescan="PASS", control="PASS", left=(0.02,)) -> dict:
    """``files`` with what scan, re-scan and positive control say; purified models state that they are."""
    method = files["select"]["results"]["method"]
    outgoing = files["select"]["outputs"]["model"]
    residuals = [{"detector": "patch", "target": 0, "before": 0.97, "after": after, "images": 300} for after in left]
    after = {"verdict": rescan, "p_value": 0.4, "suspected_residuals": residuals}
    detected = {"PASS": True, "FAIL": False}.get(control)
    added = [
        {**record("scan", {"model": FETCHED}, {}, {"verdict": scan, "p_value": 0.017}), "verdict": scan},
        {**record("rescan", {"model": outgoing, "reference": FETCHED}, {}, after), "verdict": rescan},
        {**record("control", {"model": FETCHED}, {}, {"detected": detected}), "verdict": control},
    ]
    chosen = {**files["select"], "results": {"method": method, "purified": method not in ("before", "untouched")}}
    return {**files, "select": chosen, **{each["name"]: each for each in added}}


def unpurified() -> dict:
    """A run whose scan found no evidence: the fetched model stands where a purifier's would."""
    renamed = {name.replace("tsbd", "untouched"): each for name, each in run().items() if "fine_tuning" not in name}
    text = json.dumps(renamed).replace("tsbd", "untouched").replace(CLEANED, FETCHED)
    return scanned(json.loads(text), scan="PASS", left=())


def damage(which: str, **changes: object) -> dict:
    files = run()
    files[which] = {**files[which], **changes}
    return files


AT = "2027-01-01T00:00:00+00:00"


def later(days: float) -> str:
    """A time so many days after :data:`AT`."""
    return (datetime.fromisoformat(AT) + timedelta(days=days)).isoformat()


def dated(files: dict | None = None) -> dict:
    """The evidence of a good run, or ``files``, all made at :data:`AT`."""
    files = run() if files is None else files
    return {name: {**each, "environment": {**each["environment"], "started": AT}} for name, each in files.items()}


FULL_RULE = rule(when_absent="skip", approvable="fail")
FULL = {
    **policy_mapping(FULL_RULE, rule(id="other")),
    "description": "Text.",
    "max_unknown_age_days": 3,
    "require": {
        "max_evidence_age_days": 3, "min_clean_images": 3, "purification": True, "positive_control": True,
        "sources": ["a"], "licences": ["a"], "formats": ["a"], "signatures": ["model"], "approvals": 2,
    },
    "exceptions": [
        {"rule": "r", "owner": "Ada", "reason": "Why.", "expires": "2027-01-31", "source": "sha256:" + "0" * 64}
    ],
}  # fmt: skip
"""A policy that uses every key."""
