"""The rules that always run and that no policy can switch off: one model, one chain, whole evidence.

Evidence that speaks of *another* model makes the decision FAIL, not UNKNOWN: the check was made
and it found a contradiction. Nobody can resolve that by waiting or by adding a file, and a
folder whose parts contradict each other must be refused. Evidence that is *not there* is UNKNOWN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from defense_core.evidence import DIGEST, UNPURIFIED, Evidence
from defense_core.verdict import Finding, Verdict, combine

UNTOUCHED = "before"
"""The candidate that is the fetched model itself."""


@dataclass(frozen=True)
class Subject:
    """What a decision is about, as fetch, select and export state it.

    ``None`` where they do not; ``source`` also where the evidence contradicts itself.
    """

    source: str | None
    method: str | None
    model: str | None
    onnx: str | None


def selected_method(evidence: Mapping[str, Evidence]) -> str | None:
    """The chosen method's name; ``None`` if nothing was chosen."""
    select = evidence.get("select")
    method = select.results.get("method") if select else None
    return method if isinstance(method, str) and method else None


def subject_of(evidence: Mapping[str, Evidence]) -> Subject:
    """The digests that the decision binds."""
    sources = {each.input_digest("source") for each in evidence.values()}
    return Subject(
        source=sources.pop() if len(sources) == 1 else None,
        method=selected_method(evidence),
        model=_outgoing(evidence, "select", "model"),
        onnx=_outgoing(evidence, "export", "onnx"),
    )


def integrity_findings(evidence: Mapping[str, Evidence]) -> tuple[Finding, ...]:
    """One finding per built-in rule, always the same five in the same order."""
    method = selected_method(evidence)
    return (
        _one_source(evidence),
        _one_model(evidence, method),
        _lineage(evidence, method),
        _onnx(evidence),
        _chain_passed(evidence, method),
    )


def _one_source(evidence: Mapping[str, Evidence]) -> Finding:
    claims = [(name, each.input_digest("source")) for name, each in evidence.items()]
    return _same("integrity.source", "All evidence must speak of the same fetched artifact", claims)


def _one_model(evidence: Mapping[str, Evidence], method: str | None) -> Finding:
    claims = [
        ("select", _outgoing(evidence, "select", "model")),
        (f"evaluate.{method or 'selected'}", _incoming(evidence, f"evaluate.{method}", "model")),
        ("export", _incoming(evidence, "export", "model")),
    ]
    if method != UNTOUCHED:
        claims.append((f"purify.{method or 'selected'}", _outgoing(evidence, f"purify.{method}", "model")))
    if "rescan" in evidence:
        claims.append(("rescan", _incoming(evidence, "rescan", "model")))
    return _same("integrity.model", "The chosen, the evaluated and the exported model must be the same", claims)


def _lineage(evidence: Mapping[str, Evidence], method: str | None) -> Finding:
    claims = [("fetch", _outgoing(evidence, "fetch", "model"))]
    if method == UNTOUCHED:
        claims.append(("select", _outgoing(evidence, "select", "model")))
    else:
        claims.append((f"purify.{method or 'selected'}", _incoming(evidence, f"purify.{method}", "model")))
    if method == UNPURIFIED:
        claims.append(("select", _outgoing(evidence, "select", "model")))
    claims += [
        (name, _incoming(evidence, name, "model"))
        for name in ("scan", "control", "evaluate.before")
        if name in evidence
    ]
    after = evidence.get(f"evaluate.{method}")
    if after and "reference" in after.inputs:
        claims.append((after.name, after.input_digest("reference")))
    lineage = _same("integrity.lineage", "What was purified and compared with must be the fetched model", claims)
    findings = [lineage, *_members(evidence, method)]
    worst = combine(each.verdict for each in findings)
    return next(each for each in findings if each.verdict is worst)


def _members(evidence: Mapping[str, Evidence], method: str | None) -> list[Finding]:
    """Findings of each member, where the chosen model is the mean of several."""
    rule, findings = "integrity.lineage", []
    for name, digest in _averaged(evidence, method).items():
        member, made = f"purify.{name}", "What was averaged must be what the purifiers of this run left"
        if name == method:
            findings.append(Finding(rule, Verdict.FAIL, digest, "one digest", f"{member} names itself. {made}."))
            continue
        findings.append(
            _same(rule, made, [(f"purify.{method}", digest), (member, _outgoing(evidence, member, "model"))])
        )
        origin = [("fetch", _outgoing(evidence, "fetch", "model")), (member, _incoming(evidence, member, "model"))]
        findings.append(_same(rule, "What was averaged must have been made of the fetched model", origin))
    return findings


def _averaged(evidence: Mapping[str, Evidence], method: str | None) -> dict[str, str | None]:
    """Digests of the models whose mean the chosen one is, by the purifier that made each; empty where it is none.

    ``None``: of a purifier of this run, which the mean says that it averages but does not name by digest.
    """
    purified = evidence.get(f"purify.{method}")
    if purified is None:
        return {}
    facts = purified.results.get("facts")
    stated = facts.get("averaged") if isinstance(facts, Mapping) else None
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, (list, tuple)) else []
    # A soup that ran its members by itself averages what no step of the run left.
    silent = dict.fromkeys(name for name in names if f"purify.{name}" in evidence)
    return {**silent, **purified.member_digests()}


def _onnx(evidence: Mapping[str, Evidence]) -> Finding:
    export = evidence.get("export")
    claims = [("export outputs", export.output_digest("onnx") if export else None)]
    if export and "sha256" in export.results:
        stated = export.results["sha256"]
        claims.append(("export results", stated if isinstance(stated, str) and DIGEST.fullmatch(stated) else None))
    return _same("integrity.onnx", "The exported file must be named by its digest", claims)


def _chain_passed(evidence: Mapping[str, Evidence], method: str | None) -> Finding:
    chain = ["fetch", "select", f"evaluate.{method or 'selected'}", "export"]
    if method != UNTOUCHED:
        chain.append(f"purify.{method or 'selected'}")
    chain += [f"purify.{name}" for name in _averaged(evidence, method) if name != method]
    if method in (UNPURIFIED, UNTOUCHED):
        # Nothing but a scan that found no evidence spares a model its purification.
        chain.append("scan")
    verdicts = {name: evidence[name].verdict if name in evidence else Verdict.UNKNOWN for name in chain}
    verdict = combine(verdicts.values())
    bad = [name for name, each in verdicts.items() if each is (verdict if verdict is not Verdict.PASS else None)]
    fact = {
        Verdict.PASS: "Every step on the way of this model ended well",
        Verdict.FAIL: f"Failed: {', '.join(bad)}",
        Verdict.UNKNOWN: f"Missing or undecided: {', '.join(bad)}",
    }[verdict]
    why = f"{fact}. Each step on the way of a model must have ended well."
    return Finding("integrity.steps", verdict, ", ".join(bad) or None, "every step PASS", why)


def _same(rule: str, demand: str, claims: Sequence[tuple[str, str | None]]) -> Finding:
    """PASS if all claims are one digest; FAIL if two differ; else UNKNOWN."""
    named = {name: value for name, value in claims if value is not None}
    silent = [name for name, value in claims if value is None]
    values = sorted(set(named.values()))
    bound = "one digest"
    if len(values) > 1:
        said = "; ".join(f"{name} says {value[:19]}…" for name, value in named.items())
        return Finding(rule, Verdict.FAIL, ", ".join(values), bound, f"Contradiction: {said}. {demand}.")
    if silent or not values:
        lacking = ", ".join(silent) or "all evidence"
        return Finding(rule, Verdict.UNKNOWN, None, bound, f"No digest from: {lacking}. {demand}.")
    agreed = f"{', '.join(named)} {'agree' if len(named) > 1 else 'states it'}"
    return Finding(rule, Verdict.PASS, values[0], bound, f"{agreed[0].upper()}{agreed[1:]}. {demand}.")


def _incoming(evidence: Mapping[str, Evidence], name: str, key: str) -> str | None:
    return evidence[name].input_digest(key) if name in evidence else None


def _outgoing(evidence: Mapping[str, Evidence], name: str, key: str) -> str | None:
    return evidence[name].output_digest(key) if name in evidence else None
