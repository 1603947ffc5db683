"""What the report says of scan, re-scan, positive control, and of a model that nothing was done to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from components._runtime.model_card import model_card
from defense_core.report import build_report, render_report
from defense_core.report_provenance import broken, chain
from tests.unit.report_records import MODEL, PURIFIED, Evidences, decision, parsed, record, rule, sha, whole_run

SENTENCE = "A small change that was found for class 1 sends 97% of 300 held-out clean images there"
CONTROL = "A patch of 4×4 pixels planted into a copy of this model would have been detected (p = 0.016)"


def scan_results(p_value: float | None, *, targets: list[int], trace: float) -> dict[str, Any]:
    channels = [
        {"name": "margin", "p_value": 0.2, "adjusted": 0.4, "score": 0.1, "targets": []},
        {"name": "inversion", "p_value": 0.0164, "adjusted": p_value, "score": 3.0, "targets": targets},
    ]
    curvature = {"measured": True, "log_trace": trace, "eigenvalue": 2.0**trace}
    return {
        "p_value": p_value,
        "probability": 0.93,
        "fpr": 0.05,
        "suspects": targets,
        "target_classes": targets,
        "channels": channels,
        "detectors": [{"name": "curvature", "facts": curvature}],
        "coverage": ["Says nothing about triggers that nobody has tested"],
    }


def scan_record(name: str, verdict: str, model: str, results: dict[str, Any], why: str = SENTENCE) -> dict[str, Any]:
    findings = [
        {"rule": f"{name}.verdict", "verdict": verdict, "value": results["p_value"], "bound": "p > 0.05", "why": why},
        {"rule": f"{name}.margin", "verdict": "PASS", "value": 0.4, "bound": "p > 0.05", "why": "margin: seen nothing"},
        {
            "rule": f"{name}.inversion",
            "verdict": verdict,
            "value": 0.03,
            "bound": "p > 0.05",
            "why": "patch: small mask",
        },
    ]
    return {**record(name, {"model": model}, {}, results), "verdict": verdict, "findings": findings}


def scanned_run() -> Evidences:
    evidence = whole_run()
    evidence["scan"] = scan_record("scan", "FAIL", MODEL, scan_results(0.033, targets=[1], trace=4.0))
    residuals = [
        {"detector": "patch", "target": 1, "before": 0.97, "after": 0.02, "images": 300},
        {"detector": "additive", "target": 2, "before": 0.61, "after": 0.58, "images": 299},
    ]
    after = {**scan_results(0.48, targets=[], trace=1.5), "residuals": residuals}
    why = "No evidence of a backdoor found at a false positive rate of 0.05 (p = 0.480)"
    evidence["rescan"] = scan_record("rescan", "PASS", PURIFIED, after, why)
    evidence["control"] = record("control", {"model": MODEL}, {}, {"sentence": CONTROL, "detected": True})
    return evidence


def unpurified_run() -> Evidences:
    evidence = whole_run()
    untouched = {"method": "untouched", "control": False, "facts": {}, "history": []}
    for method in ("tsbd", "fine_tuning"):
        del evidence[f"purify.{method}"], evidence[f"evaluate.{method}"]
    evidence["purify.untouched"] = record("purify.untouched", {"model": MODEL}, {"model": MODEL}, untouched)
    figures = evidence["evaluate.before"]["results"]
    evidence["evaluate.untouched"] = record("evaluate.untouched", {"model": MODEL, "reference": MODEL}, {}, figures)
    chosen = {"method": "untouched", "purified": False, "rule": "The scan found no evidence."}
    chosen["candidates"] = [{"method": "untouched"}]
    evidence["select"] = record("select", {}, {"model": MODEL}, chosen)
    for name in ("export", "gate", "promote"):
        evidence[name]["inputs"]["model"] = MODEL
    why = "No evidence of a backdoor found at a false positive rate of 0.05 (p = 0.480)"
    evidence["scan"] = scan_record("scan", "PASS", MODEL, scan_results(0.48, targets=[], trace=1.0), why)
    evidence["rescan"] = scan_record("rescan", "PASS", MODEL, scan_results(0.48, targets=[], trace=1.0), why)
    return evidence


def said(evidence: Evidences) -> str:
    return parsed(render_report(build_report(evidence))).text


def test_the_scan_says_verdict_channels_probability_and_suspects() -> None:
    report = build_report(scanned_run())
    assert report.scan is not None
    assert [(row.name, row.p_value, row.adjusted, row.suspects) for row in report.scan.channels] == [
        ("margin", 0.2, 0.4, ()),
        ("inversion", 0.0164, 0.033, ("one",)),
    ]
    assert report.scan.detectors == ()
    page = said(scanned_run())
    for words in (
        SENTENCE,
        "p = 0.033",
        "probability of a backdoor is 93 %",
        "Suspected target: one",
        "patch: small mask",
    ):
        assert words in page, words


def test_the_re_scan_shows_p_before_and_after_and_what_is_left_of_each_trigger() -> None:
    report = build_report(scanned_run())
    assert report.rescan is not None
    assert [(row.detector, row.target, row.before, row.after, row.suspected) for row in report.rescan.residuals] == [
        ("patch", "one", 0.97, 0.02, True),
        ("additive", "two", 0.61, 0.58, False),
    ]
    page = said(scanned_run())
    for words in (
        "The same scan of the model that goes out",
        "p = 0.48, before it was 0.033",
        "patch one suspected 97.0 % 2.0 % 300",
        "additive two not suspected 61.0 % 58.0 % 299",
        CONTROL,
    ):
        assert words in page, words


def test_sharpness_comes_from_the_scans_before_and_after() -> None:
    rows = {row.measure: (row.before, row.after, row.control) for row in build_report(scanned_run()).sharpness}
    assert rows["Fisher trace in units of the weights, logarithm"] == (4.0, 1.5, None)
    assert rows["largest Hessian eigenvalue in units of the weights"] == (16.0, 2.0**1.5, None)
    unmeasured = scanned_run()
    for name in ("scan", "rescan"):
        unmeasured[name]["results"]["detectors"][0]["facts"]["measured"] = False
    assert build_report(unmeasured).sharpness == ()


def test_the_chain_holds_both_scans_to_their_models() -> None:
    evidence = scanned_run()
    assert [stage.title for stage in chain(evidence, {})][:3] == ["Fetch", "Scan", "Positive control"]
    assert "Scan again" in [stage.title for stage in chain(evidence, {})]
    assert broken(chain(evidence, {})) == ()
    for name in ("scan", "rescan", "control"):
        swapped = {**evidence, name: {**evidence[name], "inputs": {**evidence[name]["inputs"], "model": sha("other")}}}
        assert broken(chain(swapped, {})) == (name,)
        assert build_report(swapped).headline.startswith("Not to be trusted")


def test_a_model_that_nothing_was_done_to_is_called_so() -> None:
    evidence = unpurified_run()
    report = build_report(evidence)
    assert (report.outcome, report.purified, report.method) == ("allow", False, "untouched")
    assert report.headline.startswith("Allowed: the model as it came in, not purified, met")
    assert report.training == ()
    assert report.broken == ()
    page = said(evidence)
    for words in (
        "Purified with nothing",
        "Nothing was done to the network",
        "Nothing was purified: the model that goes out is the one that came in.",
        "That is not a proof that there is none: a trigger that the scan does not look for would still work.",
        "The same scan again; nothing was purified in between",
    ):
        assert words in page, words
    assert "purified with" not in page
    assert "The control is plain fine-tuning" not in page
    assert all("untouched" not in each.line for each in report.commands)


@pytest.mark.parametrize("left_out", ["scan", "rescan", "control"])
def test_any_part_may_be_missing(left_out: str) -> None:
    evidence = scanned_run()
    del evidence[left_out]
    page = said(evidence)
    assert "Backdoor scan of the incoming model" in page
    assert ("The incoming model was not scanned" in page) is (left_out == "scan")


@pytest.mark.parametrize("junk", [None, 7, "x", [], {}, [1, None], float("nan"), True])
@pytest.mark.parametrize("name", ["scan", "rescan", "control"])
def test_a_value_of_the_wrong_type_is_a_gap(junk: Any, name: str) -> None:
    for key in ("p_value", "probability", "channels", "detectors", "residuals", "target_classes", "sentence"):
        evidence = scanned_run()
        evidence[name]["results"][key] = junk
        render_report(build_report(evidence))
    for key in ("results", "findings", "verdict"):
        evidence = scanned_run()
        evidence[name][key] = junk
        render_report(build_report(evidence))


def test_strangers_words_in_a_scan_are_text() -> None:
    evidence = scanned_run()
    poison = "<script>alert(1)</script>"
    evidence["rescan"]["results"]["residuals"][0]["detector"] = poison
    evidence["scan"]["results"]["channels"][0]["name"] = poison
    evidence["control"]["results"]["sentence"] = poison
    page = render_report(build_report(evidence))
    assert "<script" not in page
    assert poison in parsed(page).text


def test_the_rate_of_the_scan_is_part_of_the_command_where_it_was_another() -> None:
    evidence = scanned_run()
    assert "--scan-set" not in build_report(evidence).commands[0].line
    evidence["scan"]["results"]["fpr"] = 0.01
    assert "--scan-set fpr=0.01" in build_report(evidence).commands[0].line


def test_the_json_holds_both_scans_and_the_control() -> None:
    mapping = json.loads(build_report(scanned_run()).to_json())
    assert mapping["scan"]["verdict"] == "FAIL"
    assert mapping["rescan"]["residuals"][0]["after"] == 0.02
    assert mapping["control"] == {"verdict": "PASS", "sentence": CONTROL}
    assert mapping["purified"] is True


def test_the_model_card_says_what_the_scans_said() -> None:
    card = model_card(build_report(scanned_run()))
    assert "- Backdoor scan: FAIL (p = 0.033) A small change" in card
    assert "- Scan of the outgoing model: PASS (p = 0.48)" in card
    assert "- Positive control: PASS A patch of 4×4 pixels" in card
    assert "- Purified with: nothing" in model_card(build_report(unpurified_run()))


def test_a_denied_model_that_nothing_was_done_to() -> None:
    evidence = unpurified_run()
    evidence["gate"]["results"] = decision("deny", "FAIL", rule("require.purification", "FAIL"))
    del evidence["promote"]
    assert build_report(evidence).headline.startswith("Denied: 1 of 1 blocking rule")
