"""The report: says what the evidence says, escapes what is not ours, and is there whatever failed."""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from typing import Any

import pytest

from defense_core.evaluate.metrics import Proportion
from defense_core.report import build_report, render_report
from defense_core.report_charts import _thinned, training_chart
from defense_core.report_records import Curve, CurvePoint, Training
from defense_core.report_text import command, percent, plain, points, size, text
from tests.unit.report_records import (
    CONTROL,
    MODEL,
    ONNX,
    PURIFIED,
    SOURCE,
    Balance,
    Evidences,
    decision,
    measured,
    parsed,
    record,
    rule,
    sha,
    whole_run,
)


def rendered(evidence: Evidences, **parts: Any) -> Balance:
    return parsed(render_report(build_report(evidence, **parts)))


# -- what it says ----------------------------------------------------------------------


def test_first_screen_says_verdict_origin_result_and_reasons() -> None:
    page = rendered(whole_run())
    said = page.text
    for words in (
        "Allowed: the model purified with TSBD met the one blocking rule of policy “standard”.",
        "Registered as digits, version 4; the alias champion points to it.",
        "s3://incoming/digits.pt",
        "v-17",
        SOURCE.removeprefix("sha256:"),
        PURIFIED.removeprefix("sha256:"),
        ONNX.removeprefix("sha256:"),
        "Met: reason of accuracy-held.",
        "warning only",
    ):
        assert words in said, words
    assert said.index("Allowed: the model") < said.index("What came in") < said.index("Before, after and control")


def test_figures_carry_their_intervals_and_the_control() -> None:
    said = rendered(whole_run()).text
    low, high = Proportion(4, 180).to_results()["low"], Proportion(4, 180).to_results()["high"]
    assert f"2.2 % {100 * low:.1f}–{100 * high:.1f} %" in said
    assert "Fine-tuning control patch" in said
    assert "TSBD chosen patch" in said


def test_json_is_of_the_same_facts_and_reads_back() -> None:
    report = build_report(whole_run())
    mapping = json.loads(report.to_json())
    assert mapping["schema"] == 1
    assert mapping["outcome"] == "allow"
    assert mapping["headline"] == report.headline
    assert [row["method"] for row in mapping["figures"]] == ["before", "tsbd", "fine_tuning"]
    assert [row["role"] for row in mapping["figures"]] == ["before", "after", "control"]
    assert mapping["layers"][0] == {"layer": "conv2.weight", "units": 5, "total": None, "weights": 40}
    assert mapping["parity"][0]["passed"] is True


def test_what_is_not_met_stands_first_and_names_its_reason() -> None:
    evidence = whole_run()
    evidence["gate"]["results"] = decision(
        "deny", "FAIL", rule("a"), rule("b", "UNKNOWN"), rule("c", "FAIL", "warn"), rule("d", "FAIL", value=0.4)
    )
    del evidence["promote"]
    report = build_report(evidence)
    assert report.outcome == "deny"
    assert (
        report.headline
        == "Denied: 1 of 3 blocking rules of policy “standard” is not met, and 1 rule could not be decided."
    )
    assert [row.rule for row in report.rules] == ["d", "c", "b", "a"]
    assert "held back" in rendered(evidence).text


@pytest.mark.parametrize(
    ("outcome", "verdict", "words"),
    [("unknown", "UNKNOWN", "Undecided, so not promoted"), ("observe", "PASS", "Observed only")],
)
def test_other_outcomes_are_not_called_allowed(outcome: str, verdict: str, words: str) -> None:
    evidence = whole_run()
    del evidence["promote"]
    given = decision(outcome, verdict, rule("a", "UNKNOWN" if outcome == "unknown" else "PASS"))
    page = rendered(evidence, decision=given)
    assert words in page.text
    assert "Allowed" not in page.text


def forged(change: str) -> Evidences:
    evidence = whole_run()
    results = evidence["gate"]["results"]
    if change == "no rules":
        results["findings"] = []
    elif change == "failing rule":
        results["findings"].append(rule("forged", "FAIL"))
    elif change == "unknown effect":
        results["findings"].append(rule("forged", "FAIL", "ignore-me"))
    elif change in ("warn", "later", "skipped", "excepted", "approved"):
        verdict = "UNKNOWN" if change == "skipped" else "FAIL"
        results["findings"].append(rule("integrity.lineage", verdict, change))
    elif change == "another later":
        results["findings"].append(rule("forged", "FAIL", "later"))
    elif change == "skipped failure":
        results["findings"].append(rule("forged", "FAIL", "skipped"))
    elif change == "verdict":
        results["verdict"] = "UNKNOWN"
    else:
        evidence["export"]["inputs"]["model"] = CONTROL
    return evidence


@pytest.mark.parametrize(
    "change",
    [
        "no rules", "failing rule", "unknown effect", "skipped failure", "verdict", "chain",
        "warn", "later", "skipped", "excepted", "approved", "another later",
    ],
)  # fmt: skip
def test_an_allow_that_its_own_record_contradicts_is_never_shown_as_allowed(change: str) -> None:
    page = rendered(forged(change))
    assert "Not to be trusted: the decision says allow, but" in page.text
    assert "✓ Allowed" not in page.text


def test_signatures_are_decided_later() -> None:
    evidence = whole_run()
    evidence["gate"]["results"]["findings"].append(rule("require.signatures", "UNKNOWN", "later"))
    assert "✓ Allowed" in rendered(evidence).text


def test_a_whole_number_that_no_float_can_hold_is_a_gap() -> None:
    evidence = whole_run()
    evidence["scan"] = {**evidence["fetch"], "name": "scan", "step": "scan", "results": {"p_value": 10**400}}
    evidence["evaluate.tsbd"]["results"]["acc"] |= {"value": 10**400, "low": -(10**400)}
    report = build_report(evidence)
    assert {row.acc.value for row in report.figures if row.method == "tsbd"} == {None}
    render_report(report)


def test_a_layer_may_be_called_by_a_digit_that_is_no_number() -> None:
    evidence = whole_run()
    evidence["purify.tsbd"]["results"]["facts"]["units"] = {"²": 1, "conv10": 2, "conv2": 3}
    assert [row.layer for row in build_report(evidence).layers] == ["conv2", "conv10", "²"]


def test_a_long_training_with_few_losses_is_drawn() -> None:
    points = tuple(CurvePoint(float(step), 0.5 if step == 2 else None, None) for step in range(1, 1002))
    trained = Training("tsbd", control=False, curves=(Curve("unlearn", points),), seconds=1)
    assert "<svg" in training_chart(trained, name="few")


def test_a_long_training_is_drawn_to_its_last_epoch() -> None:
    points = tuple(CurvePoint(float(step), 1 / step, None) for step in range(1, 1001))
    trained = Training("tsbd", control=False, curves=(Curve("unlearn", points), Curve("repair", points[:3])), seconds=1)
    axis = re.findall(r">(\d+)</text>", training_chart(trained, name="long"))
    assert axis == ["200", "400", "600", "800", "1000"]
    kept = _thinned(points)
    assert len(kept) <= 400
    assert kept[-1] is points[-1]
    assert _thinned(points[:400]) == points[:400]


def averaged(facts: dict[str, Any]) -> Evidences:
    """A run in which a soup was mixed too."""
    results = {"method": "soup", "control": False, "history": [], "facts": facts}
    return {**whole_run(), "purify.soup": record("purify.soup", {"model": MODEL}, {"model": sha("mean")}, results)}


def test_a_mean_says_whose_weights_it_is_of() -> None:
    lost = {"nft": {"expected_drop": 0.012}, "tsbd": {"expected_drop": 0.071}, "fip": {"expected_drop": 0.02}}
    facts = {"averaged": ["nft", "fip"], "members": lost, "failed": {"ngf": "ngf: loss became <NaN>"}}
    said = rendered(averaged(facts)).text
    card = said[said.index("Soup: the mean of several") :]
    rows = ["NFT 1.2 % yes", "TSBD 7.1 % no", "FIP 2.0 % yes", "NGF – ngf: loss became <NaN>"]
    assert [row for row in rows if row in " ".join(card.split())] == rows
    assert "No training history" not in card
    said = rendered(averaged({**facts, "averaged": ["nft"]})).text
    assert "Soup: one of several" in said
    assert "One of these models is handed over as it is" in said


@pytest.mark.parametrize("facts", [{}, {"averaged": "nft", "members": {}}, {"averaged": ["nft"], "members": ["nft"]}])
def test_a_mean_of_nobody_knows_whom_has_no_table(facts: dict[str, Any]) -> None:
    said = rendered(averaged(facts)).text
    assert "the mean of several" not in said
    assert "No training history was recorded." in said


def test_a_broken_chain_is_named() -> None:
    report = build_report(forged("chain"))
    assert report.broken == ("export",)
    assert "The chain is broken at export" in parsed(render_report(report)).text
    assert build_report(whole_run()).broken == ()


def test_residual_risk_without_probes_says_that_nothing_is_known() -> None:
    evidence = whole_run()
    for each in evidence.values():
        if each["step"] == "evaluate":
            each["results"]["probes"] = []
    page = rendered(evidence)
    assert "No trigger is known for this model. Attack success was therefore not measured" in page.text
    assert "not measured" in page.text


def test_residual_risk_with_a_probe_gives_its_upper_end() -> None:
    risks = " ".join(build_report(whole_run()).risks).replace("\u00a0", " ")
    high = Proportion(4, 180).to_results()["high"]
    assert (
        f"patch (badnets) still worked on 4 of 180 images; with 95 % confidence on at most {100 * high:.1f} %" in risks
    )
    assert "says nothing about triggers of another" in risks
    assert "The smallest class has 20" in risks
    assert "No backdoor scan was part of this run" in risks


def test_commands_can_be_pasted() -> None:
    evidence = whole_run()
    evidence["fetch"]["results"]["uri"] = "s3://incoming/$(touch canary); rm -rf ~.pt"
    lines = [each.line for each in build_report(evidence).commands]
    assert "'s3://incoming/$(touch canary); rm -rf ~.pt?versionId=v-17'" in lines[0]
    assert "--architecture-args '{\"width\": 8}'" in lines[0]
    assert "--seed 7" in lines[0]
    assert any(line.startswith("quarantine gate --policy") or "quarantine gate" in line for line in lines)


def test_the_seed_is_that_of_the_run_and_not_of_steps_that_draw_nothing() -> None:
    evidence = whole_run()
    evidence = {"attest": record("attest", {}, {}, {}), **evidence}
    for name in ("attest", "gate", "select", "promote"):
        evidence[name]["environment"]["seed"] = 0
    report = build_report(dict(sorted(evidence.items())))
    assert "--seed 7" in report.commands[0].line
    assert [fact.value for fact in report.environment if fact.label == "Seed"] == ["7"]


def test_digests_are_told_as_the_command_prints_them() -> None:
    told = [each for each in build_report(whole_run()).commands if each.line.startswith("sha256sum")]
    assert [each.why.rpartition(" ")[2] for each in told] == [each.removeprefix("sha256:") for each in (SOURCE, ONNX)]


def test_the_decision_is_made_again_at_its_own_time() -> None:
    evidence = whole_run()
    evidence["gate"]["results"]["decided_at"] = "2026-11-21T02:00:00+00:00"
    (line,) = [each.line for each in build_report(evidence).commands if "quarantine gate" in each.line]
    assert "--at 2026-11-21T02:00:00+00:00" in line


def test_a_control_that_was_kept_dates_no_run() -> None:
    evidence = whole_run()
    control = record("control", {"model": MODEL}, {}, {"detected": True, "repeats": "kept since then"})
    control["environment"] |= {"started": "2026-10-01T00:00:00+00:00", "seconds": 4000.0}
    told = {fact.label: fact.value for fact in build_report({**evidence, "control": control}).environment}
    assert (told["Started"], told["Time in steps"]) == ("2026-11-21T01:12:09+00:00", "25.0 s")
    del evidence["fetch"]
    told = {fact.label: fact.value for fact in build_report({**evidence, "control": control}).environment}
    assert told["Started"] == "2026-11-21T01:12:09+00:00"


def test_no_rounding_hides_the_side_of_a_bound() -> None:
    evidence = whole_run()
    evidence["gate"]["results"] = decision(
        "deny", "FAIL", rule("a", "FAIL", value=0.0500001), rule("b", value=0.0499999)
    )
    row = {"images": 2000, "bound_agreement": 0.999}
    near = {**row, "name": "near", "max_abs_diff": 1.2301e-4, "bound_abs": 1.23e-4, "argmax_agreement": 0.9986}
    evidence["export"]["results"]["parity"] = [near, {**near, "name": "far", "argmax_agreement": 0.9}]
    report = build_report(evidence)
    assert [each.value for each in report.rules] == ["0.0500001", "0.05"]
    said = parsed(render_report(report)).text
    for words in ("0.00012301 0.000123 99.86 % 99.90 %", "90.0 % 99.9 %"):
        assert words in said


def test_a_set_that_the_onnx_file_answers_with_nan_is_not_passed_over() -> None:
    evidence = whole_run()
    (row,) = evidence["export"]["results"]["parity"]
    evidence["export"]["results"]["parity"] = [row, {**row, "name": "patch", "max_abs_diff": None}]
    (tile,) = [each for each in build_report(evidence).tiles if each.label == "ONNX file"]
    assert (tile.value, tile.note) == ("differs", "it answers NaN or Inf")


@pytest.mark.parametrize("outcome", ["allow", "observe"])
def test_what_was_waived_is_not_said_to_be_met(outcome: str) -> None:
    evidence = whole_run()
    del evidence["promote"]
    rules = (rule("a"), rule("b", "FAIL", "excepted"), rule("c", "FAIL", "warn"))
    evidence["gate"]["results"] = decision(outcome, "PASS", *rules)
    failed = [{"name": "promote", "error": "RegistryUnavailable", "message": "no answer"}]
    report = build_report(evidence, failures=failed)
    said = f"{report.headline} {report.detail}"
    assert "met the one blocking rule; 1 more rule is waived, see below." in said
    assert "Every rule" not in said


def test_commands_repeat_numbers_to_the_last_digit() -> None:
    evidence = whole_run()
    evidence["fetch"]["results"] |= {"mean": [0.49139968, 0.1, 0], "std": [0.24703223, 1.0, 1e-05]}
    evidence["scan"] = {**evidence["fetch"], "name": "scan", "step": "scan", "results": {"fpr": 0.012345678}}
    line = build_report(evidence).commands[0].line
    for words in ("--input-size 1,8,8 ", "--mean 0.49139968,0.1,0 ", "--std 0.24703223,1,1e-05 ", "fpr=0.012345678 "):
        assert words in line


def test_commands_name_what_was_not_the_default() -> None:
    evidence = whole_run()
    evidence["fetch"]["inputs"]["pool"] = "sha256:" + "a" * 64
    evidence["fetch"]["results"]["asked"] = {
        "device": "cuda",
        "licence": "MIT",
        "augment": "none",
        "class_names": ["a", "b"],
        "configs": {"tsbd": {"n": 0.15}},
        "scan": {"budget_s": 60, "settings": {"patch": {"steps": 40}}},
        "loading": {"trusted_modules": ["own.nets"], "limits": {"max_bytes": 7, "max_parameters": 9}},
    }
    evidence["gate"]["results"]["approvals"] = [{"identity": "ada"}]
    lines = [" ".join(each.line.replace("\\\n", " ").split()) for each in build_report(evidence).commands]
    for words in (
        "--pool POOL",
        "--scan-set budget_s=60 --scan-set settings.patch.steps=40",
        "--set tsbd.n=0.15",
        "--licence MIT --class-names a,b --augment none --device cuda --trusted-module own.nets --max-bytes 7"
        " --max-parameters 9",
    ):
        assert words in lines[0]
    assert "--load-timeout-s" not in lines[0]
    assert "--approval APPROVAL.json --approver-key ada=ada.pub" in " ".join(lines)


def test_commands_cut_no_value_and_say_what_cannot_be_shown() -> None:
    evidence = whole_run()
    names = [f"class  {number}" + "x" * 90 for number in range(300)]
    evidence["fetch"]["results"] |= {
        "asked": {"class_names": names, "licence": "MIT\u202e", "loading": {"trusted_modules": ["a" * 500, "b\nc"]}},
    }
    line = build_report(evidence).commands[0].line
    assert f"--class-names '{','.join(names)}'" in line
    assert f"--trusted-module {'a' * 500} " in line
    assert line.startswith("# Add what cannot be shown here: --licence, --trusted-module\nquarantine run")
    assert "--licence" not in line.partition("\n")[2]
    assert "\u202e" not in line


def test_commands_leave_out_what_was_the_default() -> None:
    evidence = whole_run()
    usual = {"device": "auto", "licence": "", "augment": None, "configs": {}, "scan": {}, "loading": {}}
    evidence["fetch"]["results"]["asked"] = usual
    line = build_report(evidence).commands[0].line
    assert not [each for each in ("--pool", "--scan-set", "--set", "--licence", "--device") if each in line.split()]


# -- whatever is there -----------------------------------------------------------------


def test_a_run_that_failed_at_its_first_step_has_a_page() -> None:
    failure = {
        "name": "fetch",
        "error": "SourceNotFound",
        "message": "s3://incoming/x.pt does not exist: expected an object, got 404. Check the key.",
        "hint": "Check the key",
    }
    page = rendered({}, failures=[failure])
    assert "Stopped at fetch: no decision was made." in page.text
    assert "expected an object, got 404" in page.text
    assert "No policy was applied in this run, so nothing was allowed." in page.text
    assert "nothing goes out" in page.text


def test_nothing_at_all_still_gives_a_page() -> None:
    assert "Incomplete: no decision was made." in rendered({}).text


def test_every_prefix_of_a_run_gives_a_page() -> None:
    whole = whole_run()
    for length in range(len(whole)):
        part = dict(list(whole.items())[:length])
        report = build_report(part, failures=[{"name": "next", "error": "Cancelled", "message": "stopped"}])
        assert parsed(render_report(report)).text
        assert report.outcome == ("allow" if "gate" in part else "stopped")


def test_an_allow_whose_promotion_failed_is_not_finished() -> None:
    evidence = whole_run()
    del evidence["promote"]
    page = rendered(evidence, failures=[{"name": "promote", "error": "RegistryUnavailable", "message": "no answer"}])
    assert "Allowed, but not finished: the step promote failed." in page.text
    assert "Nothing was registered." in page.text
    assert "✕ did not finish" in page.text


@pytest.mark.parametrize("junk", [None, 0, "text", [], [1, None], {"a": 1}, float("nan"), True, -3, 1e308])
def test_any_value_of_the_wrong_type_is_a_gap_not_a_crash(junk: Any) -> None:
    whole = whole_run()
    for name in whole:
        for key in ("inputs", "outputs", "results", "environment", "verdict"):
            evidence = copy.deepcopy(whole)
            evidence[name][key] = junk
            build_report(evidence).to_json()
        for part in ("inputs", "outputs", "results", "environment"):
            for key in whole[name][part]:
                evidence = copy.deepcopy(whole)
                evidence[name][part][key] = junk
                build_report(evidence).to_json()
    worst = {name: {**each, "results": junk} for name, each in whole.items()}
    assert parsed(render_report(build_report(worst, decision={"outcome": junk, "findings": junk}))).text


def test_an_evaluation_without_figures_is_named() -> None:
    evidence = whole_run()
    evidence["evaluate.fine_tuning"]["results"] = {}
    assert "Fine-tuning: its evaluation holds no figures." in rendered(evidence).text


# -- strings from outside --------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(2)>",
    "</style></svg><iframe src=//evil.example>",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "$\\frac{$",
    "javascript:alert(3)",
    "--><!--",
    "&lt;b&gt;",
)


def poisoned(value: Any, poison: str) -> Any:
    """Poison before every string but digests and the words that steer the page."""
    if isinstance(value, str):
        keep = value.startswith("sha256:") or value in ("PASS", "FAIL", "UNKNOWN", "allow", "tsbd", "block", "warn")
        return value if keep else poison + value
    if isinstance(value, list):
        return [poisoned(item, poison) for item in value]
    if isinstance(value, dict):
        return {key if key in KEYS else poison + key: poisoned(item, poison) for key, item in value.items()}
    return value


def keys_of(value: Any) -> set[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = {key for key in value if "conv" not in key} if isinstance(value, dict) else set()
    return own.union(*map(keys_of, inner))


KEYS = keys_of(whole_run())


@pytest.mark.parametrize("poison", HOSTILE)
def test_hostile_strings_are_text(poison: str) -> None:
    plain_page = render_report(
        build_report(whole_run(), failures=[{"name": "a", "error": "b", "message": "c", "hint": "d"}])
    )
    failure = {"name": poison, "error": poison, "message": poison + " message", "hint": poison}
    evidence = {name: poisoned(each, poison) for name, each in whole_run().items()}
    page = render_report(build_report(evidence, failures=[failure]))
    reader, wanted = parsed(page), parsed(plain_page)
    assert {tag for tag, _ in reader.tags} <= {tag for tag, _ in wanted.tags} | {"li", "code"}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert " ".join(poison.split()) in reader.text


def test_control_and_direction_characters_never_reach_the_page() -> None:
    evidence = whole_run()
    evidence["fetch"]["results"]["uri"] = "s3://b/\u202egpj.tp\x00\x1b[31m\u200b\ud800\n\r\nx"
    page = render_report(build_report(evidence))
    page.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u200b\ud800-\udfff]", page)
    build_report(evidence).to_json()


def test_the_page_asks_nobody() -> None:
    page = render_report(build_report(whole_run()))
    reader = parsed(page)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
    targets = [
        v or ""
        for _, attributes in reader.tags
        for name, v in attributes.items()
        if name in ("href", "src", "xlink:href")
    ]
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"@import|url\((?!#)|https?://", page)
    policy = next(a["content"] for tag, a in reader.tags if tag == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in str(policy)


# -- form ------------------------------------------------------------------------------


def test_same_evidence_gives_the_same_bytes() -> None:
    first, second = build_report(whole_run()), build_report(dict(reversed(whole_run().items())))
    assert first.to_json() == second.to_json()
    assert render_report(first) == render_report(second)


def test_identifiers_are_unique_and_links_lead_somewhere() -> None:
    reader = rendered(whole_run())
    identifiers = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    for _, attributes in reader.tags:
        for name in ("href", "aria-labelledby"):
            if attributes.get(name):
                assert str(attributes[name]).removeprefix("#") in identifiers


def test_page_can_be_used_without_eyes_or_mouse() -> None:
    reader = rendered(whole_run())
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("main") == tags.count("h1") == tags.count("nav") == 1
    assert dict(reader.tags)["html"] == {"lang": "en"}
    assert all(a.get("scope") in ("col", "row") for tag, a in reader.tags if tag == "th")
    assert all(a.get("aria-hidden") == "true" for tag, a in reader.tags if tag == "svg")
    assert all(a.get("aria-label") for tag, a in reader.tags if tag == "figure")
    regions = [a for tag, a in reader.tags if a.get("role") == "region"]
    assert regions
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions)
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_at_least_aa_in_both_schemes() -> None:
    page = render_report(build_report(whole_run()))
    blocks = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)[:2]
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", block))
        for tone in ("pass", "fail", "unknown", "neutral"):
            assert contrast(colours[tone], colours[f"{tone}-bg"]) >= 4.5, tone
            assert contrast(colours[tone], colours["card"]) >= 4.5, tone
        for name in ("ink", "muted", "accent"):
            assert contrast(colours[name], colours["card"]) >= 4.5, name
            assert contrast(colours[name], colours["page"]) >= 4.5, name
        assert contrast(colours["control"], colours["card"]) >= 3
    assert len(blocks) == 2


def test_a_large_run_stays_small_and_quick() -> None:
    evidence = whole_run()
    rows = [{"label": k, "acc": 0.9, "acc_before": 0.95, "drop": 0.05, "trials": 9} for k in range(1000)]
    evidence["evaluate.tsbd"]["results"]["classes"] = rows
    units = {f"blocks.{k}.attn.qkv.weight": k for k in range(300)}
    evidence["purify.tsbd"]["results"]["facts"] = {"units": units, "zeroed": units}
    evidence["purify.tsbd"]["results"]["history"] = [{"phase": "repair", "step": k, "loss": 1.0} for k in range(5000)]
    for k in range(20):
        evidence[f"evaluate.m{k}"] = record(f"evaluate.m{k}", {"model": MODEL}, {}, measured(190, k, 0.9))
        evidence[f"purify.m{k}"] = record(f"purify.m{k}", {"model": MODEL}, {"model": sha(str(k))}, {"method": f"m{k}"})
    started = time.perf_counter()
    page = render_report(build_report(evidence, failures=[{"name": "x", "error": "E", "message": "y" * 10**6}]))
    assert time.perf_counter() - started < 5.0
    assert len(page.encode()) < 3_000_000
    assert page.index("blocks.2.attn") < page.index("blocks.10.attn")


def test_words() -> None:
    assert percent(0.9723) == "97.2\u00a0%"
    assert percent(None) == plain(None) == points(None) == "–"
    assert (points(0.012), points(-0.012), points(0.0001)) == ("−1.2 points", "+1.2 points", "±0.0 points")
    assert (size(999), size(44_700_000), size("x")) == ("999 bytes", "44.7 MB", "")
    assert (plain(True), plain(0.123456), plain(7)) == ("yes", "0.1235", "7")
    assert text("a\n b\u202e" + "c" * 700) == "a b\ufffd" + "c" * 595 + "…"
    assert command("do", [("--x", "a b"), ("--y", None)]) == "do --x 'a b'"
