"""The rules that cannot be switched off, and evidence that is damaged."""

import json

import pytest

from defense_core.errors import EXIT_USAGE, EvidenceMismatch
from defense_core.policy import decide
from defense_core.verdict import Verdict
from tests.unit.policy_records import (
    CLEANED,
    FAIL,
    INTEGRITY,
    ONNX,
    OTHER,
    PASS,
    SOURCE,
    UNKNOWN,
    damage,
    finding,
    policy,
    record,
    rule,
    run,
    scanned,
    unpurified,
    untouched,
)

# -- integrity -----------------------------------------------------------------------


def integrity(files: dict) -> dict[str, Verdict]:
    decision = decide(policy(rule(value="images", min=0)), files)
    return {each.rule: each.verdict for each in decision.findings if each.rule.startswith("integrity.")}


def only(identifier: str, verdict: Verdict) -> dict[str, Verdict]:
    return {each: verdict if each == identifier else PASS for each in INTEGRITY}


def test_a_good_run_has_integrity():
    assert integrity(run()) == dict.fromkeys(INTEGRITY, PASS)
    assert all(each.effect == "block" for each in decide(policy(), run()).findings)


def test_integrity_rules_come_first_and_each_rule_gives_one_finding():
    decision = decide(policy(rule(id="z"), rule(id="a")), run())
    assert [each.rule for each in decision.findings] == [*INTEGRITY, "z", "a"]


@pytest.mark.parametrize("name", list(run()))
def test_evidence_of_another_source_fails(name):
    files = run()
    files[name]["inputs"]["source"] = OTHER
    assert integrity(files) == only("integrity.source", FAIL)
    decision = decide(policy(rule(value="images", min=0)), files)
    assert decision.outcome == "deny"
    assert decision.subject.source is None
    assert f"{name} says sha256:eeeeeeeeeeee…" in finding(decision, "integrity.source").why


@pytest.mark.parametrize("name", list(run()))
@pytest.mark.parametrize("how", ["null", "gone"])
def test_evidence_without_source_is_unknown(name, how):
    files = run()
    files[name]["inputs"] = {key: value for key, value in files[name]["inputs"].items() if key != "source"}
    if how == "null":
        files[name]["inputs"]["source"] = None
    assert integrity(files) == only("integrity.source", UNKNOWN)
    found = finding(decide(policy(), files), "integrity.source")
    assert found.why == f"No digest from: {name}. All evidence must speak of the same fetched artifact."


def mixed(**members: str) -> dict:
    """A good run whose chosen model is the mean of ``members``."""
    files = run()
    files["purify.tsbd"]["inputs"]["members"] = members
    return files


def test_the_members_of_a_mean_are_what_the_purifiers_left():
    assert integrity(mixed(fine_tuning=OTHER)) == dict.fromkeys(INTEGRITY, PASS)
    assert integrity(mixed(fine_tuning=CLEANED)) == only("integrity.lineage", FAIL)
    not_there = {"integrity.lineage": UNKNOWN, "integrity.steps": UNKNOWN}
    assert integrity(mixed(fine_tuning=OTHER, ngf=ONNX)) == dict.fromkeys(INTEGRITY, PASS) | not_there
    both = {"integrity.lineage": FAIL, "integrity.steps": UNKNOWN}
    assert integrity(mixed(ngf=ONNX, fine_tuning=CLEANED)) == dict.fromkeys(INTEGRITY, PASS) | both
    found = finding(decide(policy(), mixed(fine_tuning=CLEANED)), "integrity.lineage")
    assert "What was averaged must be what the purifiers of this run left" in found.why


@pytest.mark.parametrize("verdict", ["FAIL", "UNKNOWN"])
def test_a_member_that_did_not_end_well_does_not_count_as_a_step_that_did(verdict):
    files = mixed(fine_tuning=OTHER)
    files["purify.fine_tuning"]["verdict"] = verdict
    assert integrity(files) == only("integrity.steps", Verdict(verdict))
    assert "purify.fine_tuning" in finding(decide(policy(), files), "integrity.steps").why


def test_a_member_was_made_of_the_fetched_model():
    files = mixed(fine_tuning=OTHER)
    files["purify.fine_tuning"]["inputs"]["model"] = ONNX
    assert integrity(files) == only("integrity.lineage", FAIL)
    assert "made of the fetched model" in finding(decide(policy(), files), "integrity.lineage").why
    del files["purify.fine_tuning"]["inputs"]["model"]
    assert integrity(files) == only("integrity.lineage", UNKNOWN)


def test_a_mean_is_not_its_own_member():
    assert integrity(mixed(tsbd=CLEANED, fine_tuning=OTHER)) == only("integrity.lineage", FAIL)


def test_a_mean_names_whom_it_averages():
    """But for purifiers that a soup ran by itself: no step of the run left their models."""
    files = mixed()
    files["purify.tsbd"]["results"]["facts"] = {"averaged": ["fine_tuning", "nft"]}
    assert integrity(files) == only("integrity.lineage", UNKNOWN)
    files["purify.tsbd"]["inputs"]["members"] = {"fine_tuning": OTHER}
    assert integrity(files) == dict.fromkeys(INTEGRITY, PASS)
    del files["purify.fine_tuning"], files["purify.tsbd"]["inputs"]["members"]
    assert integrity(files) == dict.fromkeys(INTEGRITY, PASS)


@pytest.mark.parametrize("facts", [None, 3, {"averaged": "fine_tuning"}, {"averaged": [3, None]}, ["averaged"]])
def test_facts_of_another_shape_name_nobody(facts):
    files = run()
    files["purify.tsbd"]["results"]["facts"] = facts
    assert integrity(files) == dict.fromkeys(INTEGRITY, PASS)


@pytest.mark.parametrize(
    "members", [["sha256:1"], {"fine_tuning": "sha256:1"}, {"fine_tuning": 3}, {"fine_tuning": None}, "all"]
)
def test_members_that_are_no_digests_are_damaged_evidence(members):
    files = run()
    files["purify.tsbd"]["inputs"]["members"] = members
    with pytest.raises(EvidenceMismatch, match="members"):
        decide(policy(), files)


@pytest.mark.parametrize(
    ("name", "direction", "broken"),
    [
        ("select", "outputs", {"integrity.model"}),
        ("evaluate.tsbd", "inputs", {"integrity.model"}),
        ("export", "inputs", {"integrity.model"}),
        ("purify.tsbd", "outputs", {"integrity.model"}),
        ("purify.tsbd", "inputs", {"integrity.lineage"}),
        ("fetch", "outputs", {"integrity.lineage"}),
        ("evaluate.before", "inputs", {"integrity.lineage"}),
    ],
)
def test_evidence_of_another_model_fails_and_silence_is_unknown(name, direction, broken):
    for value, verdict in ((OTHER, FAIL), (None, UNKNOWN)):
        files = run()
        files[name][direction]["model"] = value
        assert integrity(files) == {each: verdict if each in broken else PASS for each in INTEGRITY}
        assert decide(policy(rule(value="images", min=0)), files).verdict is verdict


def test_a_drop_against_another_reference_fails():
    for value, verdict in ((OTHER, FAIL), (None, UNKNOWN)):
        files = run()
        files["evaluate.tsbd"]["inputs"]["reference"] = value
        assert integrity(files) == only("integrity.lineage", verdict)
    files = run()
    del files["evaluate.tsbd"]["inputs"]["reference"]
    assert integrity(files) == only("integrity.lineage", PASS)


def test_evidence_before_is_not_required():
    files = run()
    del files["evaluate.before"]
    assert integrity(files) == dict.fromkeys(INTEGRITY, PASS)


def test_other_candidates_models_do_not_matter():
    files = run()
    files["purify.fine_tuning"]["outputs"]["model"] = None
    files["evaluate.fine_tuning"]["verdict"] = "UNKNOWN"
    files["purify.fine_tuning"]["verdict"] = "FAIL"
    assert integrity(files) == dict.fromkeys(INTEGRITY, PASS)


@pytest.mark.parametrize("name", ["fetch", "purify.tsbd", "evaluate.tsbd", "select", "export"])
def test_every_step_on_the_way_must_end_well(name):
    for text, verdict, fact in (("FAIL", FAIL, "Failed"), ("UNKNOWN", UNKNOWN, "Missing or undecided")):
        files = run()
        files[name]["verdict"] = text
        assert integrity(files) == only("integrity.steps", verdict)
        found = finding(decide(policy(), files), "integrity.steps")
        assert (found.value, found.bound) == (name, "every step PASS")
        assert found.why == f"{fact}: {name}. Each step on the way of a model must have ended well."


def test_the_steps_that_ended_badly_are_named_together():
    files = run()
    for name in ("fetch", "export"):
        files[name]["verdict"] = "FAIL"
    files["select"]["verdict"] = "UNKNOWN"
    assert finding(decide(policy(), files), "integrity.steps").value == "fetch, export"
    found = finding(decide(policy(), run()), "integrity.steps")
    assert found.value is None
    assert found.why.startswith("Every step on the way of this model ended well. ")


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("fetch", {"integrity.lineage", "integrity.steps"}),
        ("purify.tsbd", {"integrity.model", "integrity.lineage", "integrity.steps"}),
        ("evaluate.tsbd", {"integrity.model", "integrity.steps"}),
        ("select", {"integrity.model", "integrity.lineage", "integrity.steps"}),
        ("export", {"integrity.model", "integrity.onnx", "integrity.steps"}),
    ],
)
def test_missing_evidence_on_the_way_is_unknown(name, unknown):
    files = run()
    del files[name]
    assert integrity(files) == {each: UNKNOWN if each in unknown else PASS for each in INTEGRITY}
    assert decide(policy(rule(evidence="fetch", value="bytes", min=0)), files).outcome == "unknown"


def test_no_evidence_at_all_is_unknown():
    decision = decide(policy(), {})
    assert {each.verdict for each in decision.findings} == {UNKNOWN}
    assert decision.outcome == "unknown"
    assert vars(decision.subject) == {"source": None, "method": None, "model": None, "onnx": None}
    assert finding(decision, "integrity.source").why.startswith("No digest from: all evidence.")
    assert "evaluate.selected, export, purify.selected" in finding(decision, "integrity.steps").value
    assert "select, evaluate.selected, export, purify.selected" in finding(decision, "integrity.model").why
    assert "fetch, purify.selected" in finding(decision, "integrity.lineage").why


@pytest.mark.parametrize(
    ("outputs", "results", "verdict"),
    [
        (ONNX, ONNX, PASS),
        (ONNX, OTHER, FAIL),
        (None, ONNX, UNKNOWN),
        (ONNX, None, UNKNOWN),
        (ONNX, "d" * 64, UNKNOWN),
        (ONNX, ONNX + "0", UNKNOWN),
        (ONNX, 3, UNKNOWN),
    ],
)
def test_the_exported_file_must_be_named_by_its_digest(outputs, results, verdict):
    files = run()
    files["export"]["outputs"]["onnx"] = outputs
    files["export"]["results"]["sha256"] = results
    assert integrity(files) == only("integrity.onnx", verdict)


def test_the_digest_of_the_exported_file_may_stand_in_outputs_alone():
    files = run()
    del files["export"]["results"]["sha256"]
    assert integrity(files) == dict.fromkeys(INTEGRITY, PASS)
    assert finding(decide(policy(), files), "integrity.onnx").why.startswith("Export outputs states it. ")


def test_the_untouched_model_needs_no_purification_after_a_passed_scan():
    assert integrity(untouched()) == dict.fromkeys(INTEGRITY, PASS)


def test_evidence_that_was_read_from_files_is_judged_the_same():
    assert integrity(json.loads(json.dumps(untouched()))) == dict.fromkeys(INTEGRITY, PASS)
    assert integrity(json.loads(json.dumps(run()))) == dict.fromkeys(INTEGRITY, PASS)


def test_an_untouched_model_must_be_the_fetched_one():
    files = untouched()
    for name, direction in (("select", "outputs"), ("export", "inputs"), ("evaluate.before", "inputs")):
        files[name][direction]["model"] = CLEANED
    assert integrity(files) == only("integrity.lineage", FAIL)
    files = untouched()
    files["select"]["outputs"]["model"] = CLEANED
    assert integrity(files) == {**dict.fromkeys(INTEGRITY, PASS), "integrity.model": FAIL, "integrity.lineage": FAIL}


def test_agreement_is_said_in_words():
    found = finding(decide(policy(), run()), "integrity.model")
    assert (found.value, found.bound) == (CLEANED, "one digest")
    assert found.why == (
        "Select, evaluate.tsbd, export, purify.tsbd agree."
        " The chosen, the evaluated and the exported model must be the same."
    )


def test_contradictions_list_every_digest():
    files = run()
    files["export"]["inputs"]["model"] = OTHER
    found = finding(decide(policy(), files), "integrity.model")
    assert found.value == f"{CLEANED}, {OTHER}"
    assert found.why.startswith("Contradiction: select says sha256:cccccccccccc…; evaluate.tsbd says ")


def test_a_contradiction_outweighs_silence():
    files = run()
    files["export"]["inputs"]["model"] = OTHER
    files["select"]["outputs"]["model"] = None
    assert integrity(files)["integrity.model"] is FAIL


def test_the_subject_is_bound():
    assert vars(decide(policy(), run()).subject) == {"source": SOURCE, "method": "tsbd", "model": CLEANED, "onnx": ONNX}


def test_built_in_findings_say_what_they_demand():
    demands = {
        "integrity.source": "All evidence must speak of the same fetched artifact.",
        "integrity.model": "The chosen, the evaluated and the exported model must be the same.",
        "integrity.lineage": "What was purified and compared with must be the fetched model.",
        "integrity.onnx": "The exported file must be named by its digest.",
        "integrity.steps": "Each step on the way of a model must have ended well.",
    }
    for files in (run(), {}, damage("export", inputs={"source": OTHER, "model": OTHER}, outputs={"onnx": OTHER})):
        for identifier, demand in demands.items():
            found = finding(decide(policy(), files), identifier)
            assert found.why.endswith(f". {demand}")
            assert found.bound == ("every step PASS" if identifier == "integrity.steps" else "one digest")


def test_lineage_and_file_say_who_agrees():
    decision = decide(policy(), run())
    lineage = finding(decision, "integrity.lineage").why
    assert lineage.startswith("Fetch, purify.tsbd, evaluate.before, evaluate.tsbd agree. ")
    assert finding(decision, "integrity.onnx").why.startswith("Export outputs, export results agree. ")
    chosen = finding(decide(policy(), untouched()), "integrity.lineage")
    assert chosen.why.startswith("Fetch, select, scan, evaluate.before agree. ")


def test_steps_that_ended_badly_are_listed_in_words():
    for text, fact in (("FAIL", "Failed: fetch, export. "), ("UNKNOWN", "Missing or undecided: fetch, export. ")):
        files = run()
        files["fetch"]["verdict"] = files["export"]["verdict"] = text
        assert finding(decide(policy(), files), "integrity.steps").why.startswith(fact)


# -- damaged evidence ----------------------------------------------------------------


@pytest.mark.parametrize("key", ["schema", "step", "name", "inputs", "outputs", "results", "verdict"])
def test_evidence_without_a_key_is_an_error(key):
    files = run()
    del files["fetch"][key]
    with pytest.raises(EvidenceMismatch, match="evidence fetch is damaged"):
        decide(policy(), files)


@pytest.mark.parametrize(
    "name", ["Fetch", "fetch.", "cook", "fetch tsbd", "", "evaluate.selected", "purify.selected", "gate x"]
)
def test_evidence_of_no_known_name_is_an_error(name):
    with pytest.raises(EvidenceMismatch, match="is damaged"):
        decide(policy(), {**run(), name: record(name, {}, {}, {})})


STEPS = (
    "step fetch | scan | control | purify | evaluate | rescan | select | export | gate | sign | promote | attest "
    "| report | reopen"
)
HEX = "as sha256:<64 hex digits>"


@pytest.mark.parametrize(
    ("changes", "expected", "got"),
    [
        ({"schema": 2}, "schema 1", "2"),
        ({"schema": None}, "schema 1", "None"),
        ({"schema": True}, "schema 1", "True"),
        ({"schema": "1"}, "schema 1", "'1'"),
        ({"name": "evaluate.anp"}, "evidence of evaluate.tsbd", "evidence of 'evaluate.anp'"),
        ({"name": None}, "evidence of evaluate.tsbd", "evidence of None"),
        ({"step": "purify"}, STEPS, "'purify'"),
        ({"step": None}, STEPS, "None"),
        ({"inputs": None}, "a mapping inputs", "None"),
        ({"inputs": []}, "a mapping inputs", "[]"),
        ({"outputs": "x"}, "a mapping outputs", "'x'"),
        ({"results": [1]}, "a mapping results", "[1]"),
        ({"verdict": "pass"}, "verdict PASS, FAIL or UNKNOWN", "'pass'"),
        ({"verdict": None}, "verdict PASS, FAIL or UNKNOWN", "None"),
        ({"verdict": True}, "verdict PASS, FAIL or UNKNOWN", "True"),
        ({"verdict": ["PASS"]}, "verdict PASS, FAIL or UNKNOWN", "['PASS']"),
        ({"inputs": {"source": "a"}}, f"inputs.source {HEX}", "'a'"),
        ({"inputs": {"source": 3}}, f"inputs.source {HEX}", "3"),
        ({"inputs": {"model": SOURCE[7:]}}, f"inputs.model {HEX}", repr(SOURCE[7:])),
        ({"inputs": {"reference": SOURCE + "0"}}, f"inputs.reference {HEX}", repr(SOURCE + "0")),
        ({"outputs": {"model": SOURCE.upper()}}, f"outputs.model {HEX}", repr(SOURCE.upper())),
        ({"outputs": {"model": SOURCE[:-1]}}, f"outputs.model {HEX}", repr(SOURCE[:-1])),
        ({"outputs": {"onnx": "md5:1"}}, f"outputs.onnx {HEX}", "'md5:1'"),
    ],
)
def test_damaged_evidence_is_an_error_never_a_decision(changes, expected, got):
    with pytest.raises(EvidenceMismatch) as caught:
        decide(policy(), damage("evaluate.tsbd", **changes))
    assert caught.value.exit_code == EXIT_USAGE
    assert str(caught.value) == (
        f"evidence evaluate.tsbd is damaged: expected {expected}, got {got}. Run the step again; never edit evidence."
    )


@pytest.mark.parametrize(
    ("direction", "key"),
    [("inputs", "source"), ("inputs", "model"), ("inputs", "reference"), ("outputs", "model"), ("outputs", "onnx")],
)
def test_damage_is_found_in_evidence_that_no_rule_reads(direction, key):
    with pytest.raises(
        EvidenceMismatch, match=rf"evidence evaluate.fine_tuning is damaged: expected {direction}\.{key} as"
    ):
        decide(policy(), damage("evaluate.fine_tuning", **{direction: {key: "sha256:1"}}))


@pytest.mark.parametrize("value", [{1, 2}, b"1", {"deep": [object()]}])
def test_evidence_that_is_not_json_is_an_error(value):
    message = r"^evidence is malformed: expected JSON values, got .*JSON.* Run the step again\.$"
    with pytest.raises(EvidenceMismatch, match=message):
        decide(policy(), damage("evaluate.tsbd", results={"x": value}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "evidence is malformed: expected a mapping of evidence by name, got NoneType."),
        ([], "evidence is malformed: expected a mapping of evidence by name, got list."),
        ({3: {}}, "evidence 3 is damaged: expected a name such as fetch or evaluate.tsbd, got 3."),
        ({"a b": {}}, "evidence 'a b' is damaged: expected a name such as fetch or evaluate.tsbd, got 'a b'."),
        ({"fetch": None}, "evidence fetch is damaged: expected a mapping, got NoneType."),
        ({"fetch": [1]}, "evidence fetch is damaged: expected a mapping, got list."),
    ],
)
def test_what_is_no_evidence_is_an_error(files, message):
    with pytest.raises(EvidenceMismatch) as caught:
        decide(policy(), files)
    assert str(caught.value).startswith(message)


def test_the_name_selected_is_reserved():
    message = "expected a method's name, got selected, which rules use for the chosen method"
    with pytest.raises(EvidenceMismatch, match=message):
        decide(policy(), {"evaluate.selected": record("evaluate.selected", {}, {}, {})})


# -- scan, re-scan, and a model that was not purified ----------------------------------


def test_a_scanned_run_has_integrity_whatever_the_scan_found():
    for verdict in ("PASS", "FAIL", "UNKNOWN"):
        assert integrity(scanned(run(), scan=verdict, rescan=verdict, control=verdict)) == dict.fromkeys(
            INTEGRITY, PASS
        )


@pytest.mark.parametrize(
    ("name", "broken"),
    [("scan", "integrity.lineage"), ("control", "integrity.lineage"), ("rescan", "integrity.model")],
)
def test_a_scan_of_another_model_fails(name, broken):
    files = scanned(run())
    files[name]["inputs"]["model"] = OTHER
    assert integrity(files) == only(broken, FAIL)
    del files[name]["inputs"]["model"]
    assert integrity(files) == only(broken, UNKNOWN)


def test_the_fetched_model_goes_on_after_a_scan_without_findings():
    files = unpurified()
    assert integrity(files) == dict.fromkeys(INTEGRITY, PASS)
    files["select"]["outputs"]["model"] = CLEANED
    assert integrity(files)["integrity.lineage"] is FAIL


@pytest.mark.parametrize(("verdict", "expected"), [("FAIL", FAIL), ("UNKNOWN", UNKNOWN), (None, UNKNOWN)])
@pytest.mark.parametrize("chosen", [unpurified, untouched])
def test_nothing_but_a_passed_scan_spares_a_model_its_purification(chosen, verdict, expected):
    files = chosen()
    if verdict is None:
        del files["scan"]
    else:
        files["scan"]["verdict"] = verdict
    assert integrity(files) == only("integrity.steps", expected)
