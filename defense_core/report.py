"""One report of one run: a frozen dataclass that gives the JSON and the page.

Works with whatever evidence exists; a run that failed at its first step has a page too. The page
is one file: no script, no network, no font, and every string from outside is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from defense_core import report_charts as charts
from defense_core import report_text as words
from defense_core.config import canonical_json, digest, to_mapping
from defense_core.evaluate.compare import ComparisonRow, Estimate
from defense_core.evidence import AFTER_DECISION, UNPURIFIED
from defense_core.report_commands import Command, commands
from defense_core.report_facts import came_in, goes_out
from defense_core.report_page import safe_svg, template
from defense_core.report_provenance import Stage, broken, chain
from defense_core.report_records import (
    CandidateRow,
    ClassRow,
    Fact,
    FailedStep,
    LayerChange,
    ParityRow,
    RuleRow,
    Tile,
    Training,
)
from defense_core.report_scan import (
    ControlPart,
    ScanPart,
    SharpnessRow,
    artifact_scan_sentence,
    control_part,
    scan_part,
    sharpness,
)
from defense_core.report_sections import (
    WAIVED,
    candidates,
    changed_layers,
    classes,
    decision_rules,
    failed_steps,
    figures,
    parity,
    tiles,
    training,
)

REPORT_SCHEMA = 1
WITHOUT_SEED = ("select", *AFTER_DECISION)
"""Steps that draw nothing, and state 0 whatever the run was asked for."""
OUTCOMES = ("allow", "deny", "unknown", "observe")


@dataclass(frozen=True)
class Report:
    """Everything that the page says; figures are fractions in [0, 1], durations seconds.

    Attributes:
        outcome: ``allow``, ``deny``, ``unknown``, ``observe``; ``stopped`` where a step failed before the
            decision, ``incomplete`` where there is simply none.
        headline: the verdict in one sentence.
        detail: what follows from it, in one sentence.
        policy: name and digest of the policy.
        came_in, goes_out: labelled values.
        tiles: figures of the first screen.
        rules: the decision, rule by rule.
        failures: steps that failed.
        figures: before, after and control.
        unread: evaluations that hold no figures.
        selection: the rule by which the model was chosen.
        candidates: what it was chosen from.
        scan, rescan: the backdoor scans of the incoming and of the outgoing model, if there were any.
        control: what became of a backdoor that was planted into a copy of the model, if one was.
        purified: whether the chosen model is another than the incoming one.
        classes: accuracy per class of the chosen model.
        sharpness: of the loss around the weights, before, after and control, where it was measured.
        training: history of each method.
        layers: units that the chosen method changed.
        parity: ONNX against network.
        stages: the chain of digests.
        broken: steps that speak of something else than those before them.
        risks: what this run does not show.
        commands: how to do it again.
        environment: versions, device, seed, when.
        evidence_digest: digest of everything that the report was made from.
    """

    outcome: str
    headline: str
    detail: str
    method: str
    policy: tuple[Fact, ...]
    came_in: tuple[Fact, ...]
    goes_out: tuple[Fact, ...]
    tiles: tuple[Tile, ...]
    rules: tuple[RuleRow, ...]
    failures: tuple[FailedStep, ...]
    figures: tuple[ComparisonRow, ...]
    unread: tuple[str, ...]
    selection: str
    candidates: tuple[CandidateRow, ...]
    scan: ScanPart | None
    rescan: ScanPart | None
    control: ControlPart | None
    purified: bool
    classes: tuple[ClassRow, ...]
    sharpness: tuple[SharpnessRow, ...]
    training: tuple[Training, ...]
    layers: tuple[LayerChange, ...]
    parity: tuple[ParityRow, ...]
    stages: tuple[Stage, ...]
    broken: tuple[str, ...]
    risks: tuple[str, ...]
    commands: tuple[Command, ...]
    environment: tuple[Fact, ...]
    evidence_digest: str

    def to_mapping(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {"schema": REPORT_SCHEMA, **to_mapping(self)}

    def to_json(self) -> bytes:
        """Canonical bytes: the same evidence gives the same report."""
        return canonical_json(self.to_mapping())


def build_report(
    evidence: Mapping[str, Mapping[str, Any]],
    decision: Mapping[str, Any] | None = None,
    failures: Iterable[Mapping[str, Any]] = (),
) -> Report:
    """Collect what a run left.

    Args:
        evidence: evidence mappings by name; any of them may be missing, and none is trusted.
        decision: the decision; by default what the evidence ``gate`` holds.
        failures: records of steps that failed (``name``, ``error``, ``message``, ``hint``), in order.
    """
    records = {str(name): found for name, found in evidence.items() if isinstance(found, Mapping)}
    decided: Any = decision if decision is not None else words.at(records, "gate", "results")
    failed = failed_steps(failures)
    stated = words.at(decided, "outcome")
    outcome = stated if stated in OUTCOMES else ""
    method = words.text(words.at(records, "select", "results", "method"), 60)
    rules = decision_rules(decided)
    rows, unread = figures(records, selected=method)
    exported = words.at(records, "export", "results")
    stages = chain(records, {each.step: each.error for each in failed})
    tally = {v: sum(row.verdict == v for row in rules if row.effect == "block") for v in ("PASS", "FAIL", "UNKNOWN")}
    headline, detail = words.verdict_sentences(
        outcome,
        method=method,
        policy=words.text(words.at(decided, "policy_name"), 80),
        rules=tally,
        failed=[each.step for each in failed],
        promotion=words.at(records, "promote", "results"),
        waived=sum(row.effect in WAIVED for row in rules),
    )
    verdict = words.at(decided, "verdict")
    if problem := words.contradiction(outcome, verdict=verdict, rules=tally, chain=broken(stages)):
        outcome, headline = "unknown", f"Not to be trusted: the decision says allow, but {problem}."
        detail = "Treat the model as not promoted, and find out how this record came about."
    measured = words.at(records, f"evaluate.{method}", "results")
    scan = scan_part(records)
    risks = words.residual_risks(measured, scanned=scan is not None, exported=exported, method=method)
    return Report(
        outcome=outcome or ("stopped" if failed else "incomplete"),
        headline=headline,
        detail=detail,
        method=method,
        policy=_policy(decided),
        came_in=(*came_in(records), *_artifact_scan(records)),
        goes_out=goes_out(records, outcome=outcome, method=method),
        tiles=tiles(rows, rules=rules, export=exported),
        rules=rules,
        failures=failed,
        figures=rows if method != UNPURIFIED else _once(rows),
        unread=tuple(words.text(each, 60) for each in unread),
        selection=words.text(words.at(records, "select", "results", "rule")),
        candidates=candidates(records, selected=method),
        scan=scan,
        rescan=scan_part(records, "rescan"),
        control=control_part(records),
        purified=method != UNPURIFIED,
        classes=classes(records, selected=method),
        sharpness=sharpness(records, selected=method, control=_control(rows)),
        training=training(records) if method != UNPURIFIED else (),
        layers=changed_layers(records, selected=method),
        parity=parity(exported),
        stages=stages,
        broken=broken(stages),
        risks=(*(scan.coverage if scan else ()), *risks),
        commands=commands(records, policy=words.text(words.at(decided, "policy_name"), 80)),
        environment=_environment(records),
        evidence_digest=digest(_without_nonfinite({"evidence": records, "decision": decided})),
    )


def render_report(report: Report) -> str:
    """The page: one self-contained HTML document, the same for the same report."""
    charts_by_name = {name: safe_svg(svg) for name, svg in _drawn(report).items() if svg}
    return template("report.html.j2").render(report=report, charts=charts_by_name)


def _drawn(report: Report) -> dict[str, str]:
    """Charts by name; those without figures are empty."""
    once: dict[str, tuple[ComparisonRow, Estimate]] = {}
    for row in report.figures:
        once.setdefault(row.method, (row, row.acc))
    probes = len({row.probe for row in report.figures}) > 1
    drawn = {
        "acc": charts.estimates_chart(list(once.values()), name="acc", axis="accuracy on clean images", probes=False),
        "asr": charts.estimates_chart(
            [(row, row.asr) for row in report.figures], name="asr", axis="attack success rate", probes=probes
        ),
        "classes": charts.classes_chart(report.classes, name="classes"),
        "layers": charts.layers_chart(report.layers, name="layers"),
    }
    for index, trained in enumerate(report.training):
        drawn[f"training{index}"] = charts.training_chart(trained, name=f"training{index}")
    return drawn


def _control(rows: tuple[ComparisonRow, ...]) -> str:
    return next((row.method for row in rows if row.role == "control"), "")


def _once(rows: tuple[ComparisonRow, ...]) -> tuple[ComparisonRow, ...]:
    """One model that was measured twice, once."""
    return tuple(row for row in rows if row.selected) or rows


def _artifact_scan(records: Mapping[str, Mapping[str, Any]]) -> tuple[Fact, ...]:
    said = artifact_scan_sentence(records)
    return (Fact("File scan", said),) if said else ()


def _policy(decided: Any) -> tuple[Fact, ...]:
    rows = [
        Fact("Policy", words.text(words.at(decided, "policy_name"), 80)),
        Fact("Policy digest", words.text(words.at(decided, "policy_digest"), 100), "code"),
        Fact("Evidence digest", words.text(words.at(decided, "evidence_digest"), 100), "code"),
    ]
    return tuple(row for row in rows if row.value)


def _environment(records: Mapping[str, Mapping[str, Any]]) -> tuple[Fact, ...]:
    found = {name: words.at(each, "environment") for name, each in records.items()}
    # A control that was kept from an earlier run states the time that it was made in, and how long that took.
    own = [each for name, each in found.items() if name != "control" or not _repeats(records[name])]
    starts = sorted(start for each in own if (start := words.text(words.at(each, "started"), 40)))
    started = words.text(words.at(found.get("fetch"), "started"), 40)
    drawing = [each for name, each in found.items() if name.partition(".")[0] not in WITHOUT_SEED]

    def distinct(key: str, steps: Iterable[Any] = found.values()) -> str:
        return ", ".join(sorted({value for each in steps if (value := words.text(words.at(each, key), 60))}))

    total = sum(words.number(words.at(each, "seconds")) or 0.0 for each in own)
    rows = [
        Fact("Started", started or next(iter(starts), "")),
        Fact("Time in steps", words.seconds(total) if total else ""),
        Fact("Model Quarantine", distinct("version")),
        Fact("PyTorch", distinct("torch")),
        Fact("Device", distinct("device")),
        Fact("Accelerator given", distinct("accelerator")),
        Fact("Seed", distinct("seed", drawing)),
    ]
    return tuple(row for row in rows if row.value)


def _repeats(record: Mapping[str, Any]) -> bool:
    return bool(words.text(words.at(record, "results", "repeats")))


def _without_nonfinite(value: Any) -> Any:
    """JSON types only: what JSON cannot hold becomes text, so that any evidence has a digest."""
    if isinstance(value, Mapping):
        return {str(key): _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and words.number(value) is not None:
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()
