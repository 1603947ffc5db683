"""The parts of a report, each built from whatever evidence is there.

Evidence is read as untrusted: a value that is missing or of the wrong type becomes a gap in the
report, never an exception, because the report is what a person needs most when something broke.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from defense_core.errors import EvidenceMismatch
from defense_core.evaluate.compare import ComparisonRow, Estimate, compare
from defense_core.policy_requirements import SIGNATURES
from defense_core.report_records import (
    CandidateRow,
    ClassRow,
    Curve,
    CurvePoint,
    FailedStep,
    LayerChange,
    MemberRow,
    ParityRow,
    RuleRow,
    Tile,
    Tone,
    Training,
)
from defense_core.report_text import (
    at,
    count,
    items_at,
    mappings_at,
    number,
    percent,
    plain_beside,
    points,
    span,
    text,
)

Evidences = Mapping[str, Mapping[str, Any]]
WAIVED = ("excepted", "approved")
"""Effects of rules that would block, but that an exception or an approval lets rest."""
MAX_ROWS = 2000
"""Rows of one list that are taken over from evidence."""


def decision_rules(decision: Any) -> tuple[RuleRow, ...]:
    """Rules in the order of attention: not met, not decided, warnings, met."""
    rows = []
    for row in mappings_at(decision, "findings")[:MAX_ROWS]:
        verdict = _verdict(row.get("verdict"))
        rows.append(
            RuleRow(
                rule=text(row.get("rule"), 80),
                verdict=verdict,
                effect=_effect(row.get("effect"), verdict, rule=text(row.get("rule"), 80)),
                value=plain_beside(row.get("value"), text(row.get("bound"), 120)),
                bound=text(row.get("bound"), 120),
                why=text(row.get("why")),
            )
        )
    return tuple(sorted(rows, key=lambda row: ({"FAIL": 0, "UNKNOWN": 1}.get(row.verdict, 2), row.effect != "block")))


def _effect(stated: Any, verdict: str, *, rule: str) -> str:
    """What a rule does to the decision; whatever does not plainly say otherwise blocks."""
    if rule.startswith("integrity."):
        return "block"  # whatever is stated: nothing reaches the built-in rules
    rests = stated == "skipped" and verdict == "UNKNOWN"
    after_the_gate = stated == "later" and rule == SIGNATURES
    return str(stated) if stated == "warn" or stated in WAIVED or rests or after_the_gate else "block"


def failed_steps(failures: Iterable[Mapping[str, Any]]) -> tuple[FailedStep, ...]:
    """Failure records as they come: the order in which steps failed."""
    return tuple(
        FailedStep(
            step=text(row.get("name") or row.get("step"), 80) or "unnamed step",
            error=text(row.get("error"), 80),
            message=text(row.get("message") or row.get("what"), 1000),
            hint=text(row.get("hint")),
        )
        for row in failures
    )


def figures(evidence: Evidences, *, selected: str) -> tuple[tuple[ComparisonRow, ...], tuple[str, ...]]:
    """The comparison table, and names of evaluations that could not be read or hold no figures."""
    results: dict[str, Mapping[str, Any]] = {}
    unread = []
    for name, found in by_step(evidence, "evaluate"):
        result = at(found, "results")
        try:
            compare({name: result}, selected=None)
        except EvidenceMismatch:
            unread.append(name)
        else:
            results[name] = result
    controls = [name for name, found in by_step(evidence, "purify") if at(found, "results", "control") is True]
    rows = compare(results, selected=selected or None, control=controls[0] if controls else "fine_tuning")
    return tuple(_clean_row(row) for row in rows), tuple(unread)


def _clean_row(row: ComparisonRow) -> ComparisonRow:
    estimates = [Estimate(number(e.value), number(e.low), number(e.high)) for e in (row.acc, row.asr, row.ra, row.der)]
    probe = None if row.probe is None else text(row.probe, 60)
    return ComparisonRow(text(row.method, 60), row.role, row.selected, probe, *estimates)


def tiles(rows: tuple[ComparisonRow, ...], *, rules: tuple[RuleRow, ...], export: Any) -> tuple[Tile, ...]:
    """The figures of the first screen: attack success, accuracy, rules, parity."""
    chosen = [row for row in rows if row.selected]
    before = [row for row in rows if row.role == "before"]
    found = [_asr_tile(chosen, before), _acc_tile(chosen, before)] if rows else []
    if rules:
        blocking = [row for row in rules if row.effect == "block"]
        met = sum(row.verdict == "PASS" for row in blocking)
        tone: Tone = "pass" if met == len(blocking) else "fail"
        found.append(Tile("Blocking rules met", f"{met} of {len(blocking)}", "", "each with its reason below", tone))
    checked = parity(export)
    if checked:
        apart = [row.max_abs_diff for row in checked if row.max_abs_diff is not None]
        agrees = all(row.passed for row in checked)
        whole = len(apart) == len(checked)
        note = f"logits differ by at most {max(apart):.1e}" if whole else "it answers NaN or Inf"
        found.append(Tile("ONNX file", "agrees" if agrees else "differs", "", note, "pass" if agrees else "fail"))
    return tuple(found)


def _asr_tile(chosen: list[ComparisonRow], before: list[ComparisonRow]) -> Tile:
    measured = [row for row in chosen if row.asr.value is not None]
    name = "Known trigger succeeds"
    if not measured:
        note = "no trigger is known" if chosen else "no purified model was measured"
        return Tile(name, "not measured", "", note, "neutral")
    worst = max(measured, key=lambda row: row.asr.value or 0.0)
    was = next((row.asr.value for row in before if row.probe == worst.probe), None)
    return Tile(
        name,
        percent(worst.asr.value),
        percent(was) if was is not None else "",
        f"95 % interval {span(worst.asr)}",
        "neutral",
    )


def _acc_tile(chosen: list[ComparisonRow], before: list[ComparisonRow]) -> Tile:
    if not chosen:
        value = percent(before[0].acc.value) if before else "not measured"
        return Tile(
            "Accuracy on clean images",
            value,
            "",
            "of the incoming model" if before else "nothing was evaluated",
            "neutral",
        )
    now, was = chosen[0].acc, before[0].acc.value if before else None
    drop = was - now.value if was is not None and now.value is not None else None
    note = points(drop) if drop is not None else f"95 % interval {span(now)}"
    return Tile(
        "Accuracy on clean images", percent(now.value), percent(was) if was is not None else "", note, "neutral"
    )


def classes(evidence: Evidences, *, selected: str) -> tuple[ClassRow, ...]:
    """Accuracy per class of the chosen model, beside the incoming one."""
    names = items_at(evidence, "fetch", "results", "class_names")
    rows = []
    for row in mappings_at(evidence, f"evaluate.{selected}", "results", "classes")[:MAX_ROWS]:
        index = count(row.get("label"))
        if index is None:
            continue
        rows.append(
            ClassRow(
                label=index,
                name=text(names[index], 40) if index < len(names) else f"class {index}",
                before=number(row.get("acc_before")),
                after=number(row.get("acc")),
                drop=number(row.get("drop")),
                trials=count(row.get("trials")) or 0,
            )
        )
    return tuple(rows)


def training(evidence: Evidences) -> tuple[Training, ...]:
    """The history of each method, one curve a phase."""
    found = []
    for method, each in by_step(evidence, "purify"):
        phases: dict[str, list[CurvePoint]] = {}
        for row in mappings_at(each, "results", "history")[:MAX_ROWS]:
            name = text(row.get("phase"), 40) or "training"
            points_so_far = phases.setdefault(name, [])
            step = number(row.get("step"))
            points_so_far.append(
                CurvePoint(
                    len(points_so_far) + 1.0 if step is None else step,
                    number(row.get("loss")),
                    number(row.get("accuracy")),
                )
            )
        control = at(each, "results", "control") is True
        curves = tuple(Curve(name, tuple(rows)) for name, rows in phases.items())
        seconds = number(at(each, "environment", "seconds"))
        found.append(Training(text(method, 60), control, curves, seconds, members(at(each, "results", "facts"))))
    return tuple(sorted(found, key=lambda each: each.control))


def members(facts: Any) -> tuple[MemberRow, ...]:
    """Of whose models a mean is; none where ``facts`` are of a purifier that averages nothing."""
    made, failed, averaged = (at(facts, name) for name in ("members", "failed", "averaged"))
    if not isinstance(made, Mapping) or not isinstance(averaged, (list, tuple)):
        return ()
    lost = [
        MemberRow(text(name, 60), name in averaged, number(at(made, name, "expected_drop")), "")
        for name in list(made)[:MAX_ROWS]
    ]
    gone = failed if isinstance(failed, Mapping) else {}
    return (*lost, *(MemberRow(text(name, 60), False, None, text(gone[name], 200)) for name in list(gone)[:MAX_ROWS]))


def changed_layers(evidence: Evidences, *, selected: str) -> tuple[LayerChange, ...]:
    """Units that the chosen method changed, by layer, first layers first."""
    facts = at(evidence, f"purify.{selected}", "results", "facts")
    units = at(facts, "units")
    if not isinstance(units, Mapping):
        return ()
    rows = [
        LayerChange(text(name, 80), changed, count(at(facts, "unit_totals", name)), count(at(facts, "zeroed", name)))
        for name, value in list(units.items())[:MAX_ROWS]
        if (changed := count(value)) is not None
    ]
    return tuple(
        sorted(
            rows, key=lambda row: [int(each) if each.isdecimal() else each for each in re.split(r"(\d+)", row.layer)]
        )
    )


def parity(results: Any) -> tuple[ParityRow, ...]:
    """ONNX parity rows; one passes only where both figures are there and within their bounds."""
    rows = []
    for row in mappings_at(results, "parity")[:MAX_ROWS]:
        keys = ("max_abs_diff", "bound_abs", "argmax_agreement", "bound_agreement")
        diff, most, share, least = (number(row.get(key)) for key in keys)
        near = diff is not None and most is not None and diff <= most
        same = share is not None and least is not None and share >= least
        rows.append(
            ParityRow(text(row.get("name"), 60), count(row.get("images")), diff, most, share, least, near and same)
        )
    return tuple(rows)


def candidates(evidence: Evidences, *, selected: str) -> tuple[CandidateRow, ...]:
    """What was chosen from, by the rule that the select step states."""
    return tuple(
        CandidateRow(
            method=text(row.get("method"), 60),
            chosen=row.get("method") == selected,
            control=row.get("control") is True,
            accuracy=number(row.get("accuracy")),
            residual=number(row.get("residual")),
            why=text(row.get("why"), 200),
        )
        for row in mappings_at(evidence, "select", "results", "candidates")[:MAX_ROWS]
    )


def by_step(evidence: Evidences, step: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(method, evidence) of every ``<step>.<method>``, by name."""
    found = [(name.partition(".")[2], each) for name, each in evidence.items() if name.startswith(f"{step}.")]
    return sorted(found, key=lambda item: item[0])


def _verdict(value: Any) -> str:
    shown = text(value, 10)
    return shown if shown in ("PASS", "FAIL", "UNKNOWN") else "UNKNOWN"
