"""What the report says of scans, waivers and commands; two runs side by side; the fleet."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
from dataclasses import replace
from typing import Any

import numpy
import pytest
from PIL import Image

from defense_core.evaluate.compare import Estimate
from defense_core.report import Report, build_report, render_report
from defense_core.report_compare import compare_reports, render_comparison
from defense_core.report_fleet import (
    FleetVersion,
    build_fleet,
    render_fleet,
    version_of_report,
    version_without_evidence,
)
from defense_core.report_scan import MAX_PICTURE_BYTES, MAX_PICTURES
from tests.unit.report_records import (
    MODEL,
    ONNX,
    PURIFIED,
    SOURCE,
    Evidences,
    decision,
    measured,
    parsed,
    record,
    rule,
    whole_run,
)

POISON = "\"'></style></script><script>alert(1)</script>{{ 7 * 7 }}"


def png(seed: int = 0, side: int = 8) -> str:
    stream = io.BytesIO()
    pixels = numpy.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def scanned(**results: Any) -> Evidences:
    evidence = whole_run()
    scan = record("scan", {"model": MODEL}, {}, {"p_value": 0.0004, "suspects": [0, 9], **results})
    found = {"rule": "inversion", "verdict": "FAIL", "value": 4.1, "bound": "<= 2", "why": "Class 0 is too easy."}
    evidence["scan"] = {**scan, "verdict": "FAIL", "findings": [found]}
    return evidence


# -- scan, sharpness, file scan --------------------------------------------------------


def test_a_scan_is_shown_with_its_pictures_and_what_it_would_have_found() -> None:
    covers = "Would have found a patch of 4×4 px at p = 0.01; says nothing about warps."
    picture = {"title": "Class zero", "note": "norm 3", "alt": "inverted trigger of class zero", "png": png()}
    page = parsed(render_report(build_report(scanned(pictures=[picture], coverage=[covers]))))
    assert "Suspected target: zero, class 9." in page.text
    assert "Class 0 is too easy." in page.text
    assert page.text.index("Residual risk What this run") < page.text.index(covers)
    assert "No backdoor scan was part of this run" not in page.text
    (image,) = [a for tag, a in page.tags if tag == "img"]
    assert image["alt"] == "inverted trigger of class zero"
    assert str(image["src"]).startswith("data:image/png;base64,")


def test_without_a_scan_there_is_no_such_section() -> None:
    page = render_report(build_report(whole_run()))
    assert 'id="scan"' not in page
    assert "img-src" not in page


@pytest.mark.parametrize(
    "data",
    [None, 7, "not base64!", base64.b64encode(b"<svg onload=alert(1)>").decode(), png() + '" onerror="alert(1)'],
)
def test_only_png_files_become_pictures(data: Any) -> None:
    assert "<img" not in render_report(build_report(scanned(pictures=[{"title": "x", "png": data}])))


def test_many_large_pictures_stay_within_what_a_report_may_weigh() -> None:
    side = 140
    assert MAX_PICTURE_BYTES * 0.7 < len(base64.b64decode(png(side=side))) <= MAX_PICTURE_BYTES
    pictures = [{"title": str(k), "alt": "noise", "png": png(k, side)} for k in range(3 * MAX_PICTURES)]
    page = render_report(build_report(scanned(pictures=pictures)))
    assert page.count("<img") == MAX_PICTURES
    assert len(page.encode()) < 3_000_000


def test_sharpness_stands_side_by_side_where_it_was_measured() -> None:
    evidence = whole_run()
    for name, value in (("before", 320.0), ("tsbd", 81.0), ("fine_tuning", 180.0)):
        evidence[f"evaluate.{name}"]["results"]["sharpness"] = {"fisher_trace": value, "bad": "x"}
    report = build_report(evidence)
    (row,) = report.sharpness
    assert (row.measure, row.before, row.after, row.control) == ("fisher trace", 320.0, 81.0, 180.0)
    assert "Sharpness" in parsed(render_report(report)).text
    assert build_report(whole_run()).sharpness == ()


def test_the_file_scan_is_part_of_what_came_in() -> None:
    evidence = whole_run()
    evidence["fetch"]["results"]["artifact_scan"] = {"verdict": "clean", "files": 2, "findings": []}
    page = parsed(render_report(build_report(evidence)))
    assert "clean: 2 files looked at before loading, no findings" in page.text


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (
            {"signed": True, "key_id": "sha256:" + "a1" * 32, "statements": 9},
            "model and 9 statements, key a1a1a1a1a1a1a1a1",
        ),
        ({"signed": False, "key_id": None, "statements": 0}, "Signature none"),
    ],
)
def test_it_says_whether_the_release_was_signed(results: dict[str, Any], said: str) -> None:
    evidence = whole_run()
    evidence["sign"] = record("sign", {"model": PURIFIED, "onnx": ONNX}, {}, results)
    report = build_report(evidence)
    assert said in parsed(render_report(report)).text
    assert [stage.title for stage in report.stages][-3:] == ["Decide", "Sign", "Promote"]
    evidence["sign"]["inputs"]["model"] = SOURCE
    assert build_report(evidence).broken == ("sign",)


# -- waivers and commands --------------------------------------------------------------


def test_a_waived_rule_does_not_contradict_an_allow_but_is_named() -> None:
    evidence = whole_run()
    waived = (rule("asr-low", "FAIL", "excepted"), rule("looked-at", "UNKNOWN", "approved"))
    evidence["gate"]["results"] = decision("allow", "PASS", rule("accuracy-held"), *waived)
    report = build_report(evidence)
    assert report.outcome == "allow"
    assert "met the one blocking rule of policy “standard”; 2 more rules are waived, see below." in report.headline
    said = parsed(render_report(report)).text
    assert "waived by an exception" in said
    assert "waived by approval" in said


def test_built_in_rules_are_never_waived() -> None:
    evidence = whole_run()
    evidence["gate"]["results"] = decision("allow", "PASS", rule("a"), rule("integrity.model", "FAIL", "excepted"))
    assert build_report(evidence).outcome == "unknown"


def test_the_command_that_repeats_a_run_holds_what_the_run_was_told() -> None:
    evidence = whole_run()
    evidence["fetch"]["results"] |= {"mean": [0.5], "std": [0.25]}
    evidence["purify.tsbd"]["results"]["config"] = {"epochs": 3, "no_such_key": "x y"}
    line = build_report(evidence).commands[0].line.replace("\\\n", " ")
    words = shlex.split(line)
    assert words[:2] == ["quarantine", "run"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--input-size"] == "1,8,8"
    assert (given["--mean"], given["--std"]) == ("0.5", "0.25")
    assert given["--methods"] == "tsbd,fine_tuning"
    assert given["--policy"] == "standard"
    assert "tsbd.epochs=3" in words
    assert any("quarantine verify models:/digits/4" in each.line for each in build_report(evidence).commands)


# -- two runs --------------------------------------------------------------------------


def other_run() -> Evidences:
    evidence = whole_run()
    evidence["evaluate.tsbd"]["results"] = measured(194, 60, 0.8)
    failing = (rule("accuracy-held"), rule("trigger-dead", "FAIL", value=0.33))
    evidence["gate"]["results"] = decision("deny", "FAIL", *failing)
    del evidence["promote"]
    return evidence


def test_a_comparison_says_how_both_ended_and_what_lies_apart() -> None:
    both = compare_reports(build_report(whole_run()), build_report(other_run()), names=("monday", "tuesday"))
    assert both.headline == "The runs ended differently: monday allowed, tuesday denied."
    assert "The incoming model is the same." in both.detail
    (row,) = [row for row in both.figures if (row.model, row.measure) == ("tsbd", "ASR")]
    assert row.apart is True
    assert row.change == pytest.approx(56 / 180)
    (held,) = [row for row in both.figures if (row.model, row.measure) == ("tsbd", "ACC")]
    assert held.apart is False
    changed = [(row.rule, row.first, row.second) for row in both.rules if row.first != row.second]
    assert ("trigger-dead", "", "FAIL") in changed
    said = parsed(render_comparison(both)).text
    for words in ("monday", "tuesday", "+31.1 points", "no such rule", SOURCE.removeprefix("sha256:")):
        assert words in said


def test_a_rule_that_only_warns_now_is_another_result() -> None:
    first, second = whole_run(), whole_run()
    first["gate"]["results"] = decision("deny", "FAIL", rule("held", "FAIL"), rule("same"))
    second["gate"]["results"] = decision("allow", "PASS", rule("held", "FAIL", "warn"), rule("same"))
    both = compare_reports(build_report(first), build_report(second), names=("a", "b"))
    row, other = both.rules
    assert (row.rule, row.same, row.first_effect, row.second_effect) == ("held", False, "block", "warn")
    assert other.same
    assert "Rules with another result: held." in both.detail
    assert "warning only" in parsed(render_comparison(both)).text


def test_a_run_compared_with_itself_differs_in_nothing() -> None:
    report = build_report(whole_run())
    both = compare_reports(report, report, names=("a", "b"))
    assert both.headline == "Both runs ended the same way: allowed."
    assert all(fact.same for fact in both.facts)
    assert not any(row.apart for row in both.figures)
    assert json.loads(both.to_json())["schema"] == 1


def test_runs_with_other_probes_are_compared_by_what_both_measured() -> None:
    """Accuracy is on clean images, whatever the probe is called."""
    other = other_run()
    for name, each in other.items():
        if name.startswith("evaluate."):
            each["results"]["probes"] = [{**probe, "name": "another"} for probe in each["results"]["probes"]]
    other["evaluate.tsbd"]["results"]["acc"] |= {"value": 0.5, "low": 0.45, "high": 0.55}
    both = compare_reports(build_report(whole_run()), build_report(other), names=("a", "b"))
    (accuracy,) = [row for row in both.figures if (row.model, row.measure) == ("tsbd", "ACC")]
    assert accuracy.apart is True
    assert "Apart by more than their 95 % intervals: TSBD ACC." in both.detail
    assert {row.apart for row in both.figures if row.measure == "ASR"} == {None}


def test_nothing_is_said_of_intervals_where_nothing_could_be_compared() -> None:
    alone = {name: each for name, each in whole_run().items() if not name.startswith("evaluate.")}
    both = compare_reports(build_report(whole_run()), build_report(alone), names=("a", "b"))
    assert both.figures
    assert "No figure can be compared." in both.detail
    assert "overlap" not in both.detail


def test_comparisons_with_a_run_that_failed_at_once_have_a_page() -> None:
    failed = build_report({}, failures=[{"name": "fetch", "error": "SourceNotFound", "message": "no such object"}])
    both = compare_reports(failed, build_report(whole_run()), names=("a", POISON))
    for pair in (both, compare_reports(failed, failed, names=("a", "b"))):
        assert pair.detail.startswith("Whether the incoming model is the same is not known.")
    page = render_comparison(both)
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in parsed(page).text


# -- the fleet -------------------------------------------------------------------------


def version(number: str, *, report: Report | None = None, **changes: Any) -> FleetVersion:
    row = version_of_report(report or build_report(whole_run()), model="digits", version=number)
    return replace(row, **changes)


def test_a_fleet_in_order_has_no_drift() -> None:
    fleet = build_fleet([version("9"), version("10", aliases=("champion",)), version("2")])
    assert fleet.drift == ()
    assert fleet.headline == "No drift: 3 versions of 1 model, 1 served by an alias."
    assert [row.version for row in fleet.versions] == ["10", "9", "2"]
    assert all(row.covered for row in fleet.versions)


def test_an_alias_without_an_allow_decision_is_drift() -> None:
    denied = version("3", report=build_report(other_run()), aliases=("champion",))
    stranger = version_without_evidence("resnet", "1", aliases=["production"], problem="It never went through.")
    fleet = build_fleet([denied, stranger, version("2")])
    assert [each.where for each in fleet.drift] == ["digits, version 3", "resnet, version 1"]
    assert "no allow decision covers it: Denied" in fleet.drift[0].why
    assert fleet.headline.startswith("Drift in 2 places")


def test_tags_that_contradict_the_evidence_are_drift_and_so_is_a_broken_chain() -> None:
    tagged = version("1", problems=("Its tag quarantine.decision says allow.",))
    evidence = whole_run()
    evidence["export"]["inputs"]["model"] = SOURCE
    broken = version("2", report=build_report(evidence))
    assert [each.where for each in build_fleet([tagged, broken]).drift] == ["digits, version 2", "digits, version 1"]
    assert not tagged.covered


def test_a_decision_that_its_evidence_does_not_give_is_drift_without_an_alias_too() -> None:
    lost = version_without_evidence("digits", "1", aliases=[], problem="It does not replay.", decided=True)
    served = replace(lost, version="2", aliases=("champion",))
    never = version_without_evidence("digits", "3", aliases=[], problem="It never went through.")
    fleet = build_fleet([lost, served, never])
    assert [each.where for each in fleet.drift] == ["digits, version 2", "digits, version 1"]
    assert fleet.drift[1].why == "It does not replay."


def test_a_decision_that_its_record_contradicts_does_not_cover_a_version() -> None:
    evidence = whole_run()
    evidence["gate"]["results"]["findings"].append(rule("forged", "FAIL"))
    row = version("1", report=build_report(evidence), aliases=("champion",))
    assert row.outcome == "unknown"
    assert build_fleet([row]).drift


def test_the_fleet_page_filters_without_a_network_and_draws_the_trend() -> None:
    rows = [version(str(k), accuracy=Estimate(0.9 + k / 100, 0.9, 0.99)) for k in range(1, 5)]
    page = render_fleet(build_fleet([*rows, version_without_evidence(POISON, "1", aliases=[POISON], problem=POISON)]))
    reader = parsed(page.replace("<script>", "<!--").replace("</script>", "-->"))
    assert page.count("<script>") == 1
    code = page[page.index("<script>") + len("<script>") : page.index("</script>")]
    policy = next(str(a["content"]) for tag, a in reader.tags if tag == "meta" and a.get("http-equiv"))
    stated = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{stated}'" in policy
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?://|eval\(|innerHTML", code)
    data = [a for tag, a in reader.tags if tag == "tr" and "data-model" in a]
    assert [a["data-drifted"] for a in data].count("yes") == 1
    assert data[-1]["data-model"] in (POISON, "digits")
    assert [a.get("aria-label") for tag, a in reader.tags if tag == "figure"]


def test_an_empty_fleet_and_a_large_one_have_a_page() -> None:
    assert "No version was found." in parsed(render_fleet(build_fleet([]))).text.replace("<script>", "")
    one = version("0")
    rows = [replace(one, version=str(k), model=f"m{k % 40}") for k in range(2000)]
    page = render_fleet(build_fleet(rows))
    assert len(page.encode()) < 6_000_000
    assert render_fleet(build_fleet(reversed(rows))) == page


@pytest.mark.parametrize("made", ["report", "comparison", "fleet"])
def test_every_page_can_be_used_without_eyes_or_mouse(made: str) -> None:
    report = build_report(scanned(pictures=[{"title": "a", "png": png()}]))
    pages = {
        "report": lambda: render_report(report),
        "comparison": lambda: render_comparison(compare_reports(report, report, names=("a", "b"))),
        "fleet": lambda: render_fleet(build_fleet([version("1"), version("2", aliases=("champion",))])),
    }
    reader = parsed(re.sub(r"<script>.*?</script>", "", pages[made](), flags=re.DOTALL))
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("main") == tags.count("h1") == 1
    assert all(a.get("scope") in ("col", "row") for tag, a in reader.tags if tag == "th")
    assert all(a.get("alt") for tag, a in reader.tags if tag == "img")
    identifiers = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
