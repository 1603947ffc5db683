"""quarantine policy, gate with time and approvals, and approve: exit codes, sentences, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from components._runtime.evidence import write_evidence
from components.gate_promotion.step import gate_promotion
from pipelines.options import POLICIES
from tests.pipelines.commands import Answer, Call
from tests.unit.policy_records import AT, dated, later, policy_mapping, rule, with_score

EXCEPTION = {"rule": "r", "owner": "Ada", "reason": "Known.", "expires": "2020-01-31"}
BASE = policy_mapping(rule(), rule(id="other", value="images", min=0))


def policy_file(folder: Path, name: str = "p", **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))
    return path


def evidence_folder(folder: Path, score: object) -> Path:
    for name, each in dated(with_score(score)).items():
        write_evidence(folder / f"{name}.json", each)
    return folder


# -- lint ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["strict", "standard", "observe"])
def test_lint_has_nothing_to_say_of_shipped_policies(name: str, quarantine: Call) -> None:
    for policy in (name, POLICIES / f"{name}.yaml"):
        answer = quarantine("policy", "lint", policy)
        assert (answer.code, answer.out.strip()) == (0, f"{name}: valid; remarks: 0")
    assert quarantine("policy", "lint", name, "--json").json["remarks"] == []


def test_lint_remarks_what_is_valid_and_wrong(tmp_path: Path, quarantine: Call) -> None:
    file = policy_file(tmp_path, exceptions=[EXCEPTION])
    answer = quarantine("policy", "lint", file)
    assert answer.code == 1
    assert "exception of r: It expired on 2020-01-31" in answer.out
    assert quarantine("policy", "lint", file, "--at", "2020-01-31T23:00:00Z").code == 0
    (remark,) = quarantine("policy", "lint", file, "--json").json["remarks"]
    assert remark["about"] == "exception of r"
    assert quarantine("policy", "lint", file, "--at", "2020-01-31").code == 3


def test_a_day_need_not_be_quoted(tmp_path: Path, quarantine: Call) -> None:
    file = policy_file(tmp_path, exceptions=[EXCEPTION])
    file.write_text(file.read_text().replace("'2020-01-31'", "2020-01-31"))
    assert "2020-01-31\n" in file.read_text()
    assert quarantine("policy", "lint", file).code == 1


@pytest.mark.parametrize("command", ["lint", "explain"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: [", "malformed"),
        ("schema: 1", "lacks name, promote, rules"),
        ("- 1", "a mapping with text keys"),
        (yaml.safe_dump({**BASE, "requires": {}}), "Did you mean 'require'?"),
        (yaml.safe_dump(BASE) + "promote: false\n", "repeated key promote"),
    ],
)
def test_malformed_policies_end_with_3(command: str, text: str, words: str, tmp_path: Path, quarantine: Call) -> None:
    (tmp_path / "p.yaml").write_text(text)
    answer = quarantine("policy", command, tmp_path / "p.yaml")
    assert answer.code == 3
    assert words in answer.err
    said = quarantine("policy", command, tmp_path / "p.yaml", "--json")
    assert said.json["exit_code"] == said.code == 3
    assert quarantine("policy", command, tmp_path / "absent.yaml").code == 3


# -- explain and diff ----------------------------------------------------------------


def test_explain_says_it_in_sentences(quarantine: Call) -> None:
    answer = quarantine("policy", "explain", "standard")
    assert answer.code == 0
    assert "- accuracy-held: Blocks unless acc_drop_interval.high of evaluate.selected is at most 0.05." in answer.out
    about = [each["about"] for each in quarantine("policy", "explain", "standard", "--json").json["sentences"]]
    assert {"promote", "integrity", "max_unknown_age_days", "accuracy-held"} <= set(about)


@pytest.mark.parametrize(
    ("old", "new", "code", "overall"),
    [
        ({}, {}, 0, None),
        ({}, {"max_unknown_age_days": 7}, 0, "stricter"),
        ({}, {"description": "Text."}, 0, "wording"),
        ({"max_unknown_age_days": 7}, {}, 1, "looser"),
        ({}, {"max_unknown_age_days": 7, "exceptions": [EXCEPTION]}, 1, "looser"),
        ({}, {"rules": [rule(value="else"), BASE["rules"][1]]}, 2, "other"),
    ],
)
def test_diff(old: Any, new: Any, code: int, overall: str | None, tmp_path: Path, quarantine: Call) -> None:
    words = ["policy", "diff", policy_file(tmp_path, "old", **old), policy_file(tmp_path, "new", **new)]
    answer = quarantine(*words)
    assert answer.code == code
    assert ("no difference" in answer.out) == (overall is None)
    said = quarantine(*words, "--json")
    assert (said.code, said.json["overall"]) == (code, overall)
    assert bool(said.json["changes"]) == (overall is not None)


# -- replay --------------------------------------------------------------------------


def runs(folder: Path) -> Path:
    """Three decided runs (allow, deny, unknown) and one that was never decided."""
    for name, score in (("good", 0.45), ("bad", 0.9), ("open", None)):
        gate_promotion(dated(with_score(score)), BASE, folder / name / "evidence", at=later(1))
    evidence_folder(folder / "undecided", 0.1)
    return folder


def test_replay_shows_which_decisions_would_change(tmp_path: Path, quarantine: Call) -> None:
    folder = runs(tmp_path / "runs")
    stricter = policy_file(tmp_path, rules=[rule(max=0.4), BASE["rules"][1]])
    answer = quarantine("policy", "replay", "--policy", stricter, "--evidence", folder, "--json")
    assert answer.code == 1
    found = {Path(run["folder"]).relative_to(folder).parts[0]: run for run in answer.json["runs"]}
    outcomes = {name: (run["was"], run["becomes"]) for name, run in found.items()}
    assert outcomes == {
        "good": ("allow", "deny"), "bad": ("deny", "deny"), "open": ("unknown", "unknown"),
        "undecided": (None, "allow"),
    }  # fmt: skip
    assert found["good"]["at"] == later(1)
    assert found["good"]["reasons"] == ["r: FAIL, <= 0.4. Not met: score is 0.45, demanded is <= 0.4. Because."]
    assert "No decision was recorded" in found["undecided"]["problem"]
    shown = quarantine("policy", "replay", "--policy", stricter, "--evidence", folder)
    assert shown.code == 1
    assert "1 of 4 would be decided otherwise" in shown.out


def test_replay_by_the_same_policy_changes_nothing(tmp_path: Path, quarantine: Call) -> None:
    folder, same = runs(tmp_path / "runs"), policy_file(tmp_path)
    words = ["policy", "replay", "--policy", same]
    for name in ("good", "bad", "open"):
        assert quarantine(*words, "--evidence", folder / name).code == 0
    assert quarantine(*words, "--evidence", folder / "good", "--evidence", folder / "bad").code == 0
    assert quarantine(*words, "--evidence", folder / "undecided").code == 2


def test_replay_says_what_blocks_no_longer(tmp_path: Path, quarantine: Call) -> None:
    folder = runs(tmp_path / "runs")
    looser = policy_file(tmp_path, rules=[rule(severity="warn"), BASE["rules"][1]])
    answer = quarantine("policy", "replay", "--policy", looser, "--evidence", folder / "bad", "--json")
    assert answer.code == 1
    (run,) = answer.json["runs"]
    assert (run["was"], run["becomes"], run["reasons"]) == ("deny", "allow", ["r: blocks no longer (was FAIL)."])


def test_replay_at_another_time(tmp_path: Path, quarantine: Call) -> None:
    folder = runs(tmp_path / "runs") / "open"
    timed = policy_file(tmp_path, max_unknown_age_days=7)
    words = ["policy", "replay", "--policy", timed, "--evidence", folder]
    assert quarantine(*words).code == 0
    answer = quarantine(*words, "--at", later(9), "--json")
    assert answer.code == 1
    assert (answer.json["runs"][0]["was"], answer.json["runs"][0]["becomes"]) == ("unknown", "deny")


@pytest.mark.parametrize("at", ["nonsense", "2026-11-01"])
def test_replay_at_no_time_is_wrong_usage(at: str, tmp_path: Path, quarantine: Call) -> None:
    folder = runs(tmp_path / "runs") / "open"
    answer = quarantine("policy", "replay", "--policy", policy_file(tmp_path), "--evidence", folder, "--at", at)
    assert answer.code == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"findings": None}, {"findings": [{}]}, {"findings": [None]}, {"findings": 3}, {"outcome": 5},
        {"findings": [{"rule": "r", "effect": "block", "verdict": None}]}, {"supersedes": 5}, {"approvals": 3},
    ],
)  # fmt: skip
def test_replay_of_a_damaged_decision_is_a_problem(changes: dict[str, Any], tmp_path: Path, quarantine: Call) -> None:
    folder = runs(tmp_path / "runs") / "good" / "evidence"
    path = folder / "decision.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    answer = quarantine("policy", "replay", "--policy", policy_file(tmp_path), "--evidence", folder, "--json")
    assert answer.code == 2
    assert "damaged" in answer.json["runs"][0]["problem"]


@pytest.mark.parametrize("changes", [{"environment": None}, {"environment": {"started": 3}}])
def test_replay_of_evidence_without_a_time(changes: dict[str, Any], tmp_path: Path, quarantine: Call) -> None:
    folder = evidence_folder(tmp_path / "run", 0.1)
    path = folder / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    answer = quarantine("policy", "replay", "--policy", policy_file(tmp_path), "--evidence", folder, "--json")
    assert (answer.code, answer.json["runs"][0]["at"]) == (2, AT)


def test_replay_reads_the_gates_evidence_where_there_is_no_decision_file(tmp_path: Path, quarantine: Call) -> None:
    folder = evidence_folder(tmp_path / "run", 0.9)
    write_evidence(folder / "gate.json", gate_promotion(dated(with_score(0.9)), BASE, at=later(2)))
    answer = quarantine("policy", "replay", "--policy", policy_file(tmp_path), "--evidence", folder, "--json")
    assert answer.code == 0
    assert (answer.json["runs"][0]["was"], answer.json["runs"][0]["at"]) == ("deny", later(2))


def test_replay_of_damaged_and_absent_evidence(tmp_path: Path, quarantine: Call) -> None:
    folder, same = runs(tmp_path / "runs"), policy_file(tmp_path)
    (folder / "good" / "evidence" / "fetch.json").write_text("{")
    answer = quarantine("policy", "replay", "--policy", same, "--evidence", folder / "good", "--json")
    assert answer.code == 2
    assert "damaged" in answer.json["runs"][0]["problem"]
    (tmp_path / "empty").mkdir()
    assert quarantine("policy", "replay", "--policy", same, "--evidence", tmp_path / "empty").code == 2
    assert quarantine("policy", "replay", "--policy", same, "--evidence", tmp_path / "absent").code == 3


# -- gate and approve ----------------------------------------------------------------


@pytest.fixture(scope="module")
def ada(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ada's key pair."""
    from components._runtime.signing_keys import generate_key_pair

    return generate_key_pair(tmp_path_factory.mktemp("ada"))


def approve(quarantine: Call, evidence: Path, out: Path, ada: Any, *more: object, rule_id: str = "r") -> Answer:
    said = ["--identity", "ada", "--reason", "Looked at it.", "--key", ada.private, "--out", out, "--at", AT]
    return quarantine("approve", "--evidence", evidence, "--rule", rule_id, *said, *more)


def test_the_gate_states_and_counts_to_its_time(tmp_path: Path, quarantine: Call) -> None:
    folder, timed = evidence_folder(tmp_path / "run", None), policy_file(tmp_path, max_unknown_age_days=7)
    words = ["gate", "--policy", timed, "--evidence", folder, "--json", "--at"]
    assert quarantine(*words, later(7)).code == 2
    answer = quarantine(*words, later(8))
    assert (answer.code, answer.json["results"]["decided_at"]) == (1, later(8))
    assert quarantine(*words, "2027-01-01").code == 3


def test_a_person_approves_and_the_gate_goes_on(tmp_path: Path, quarantine: Call, ada: Any) -> None:
    folder, policy = evidence_folder(tmp_path / "run", None), policy_file(tmp_path)
    words = ["gate", "--policy", policy, "--at", later(1), "--evidence"]
    assert quarantine(*words, folder, "--out", tmp_path / "first").code == 2
    # The decision's folder holds policy and evidence: nothing else is needed to approve.
    answer = approve(quarantine, tmp_path / "first", tmp_path / "approval.json", ada)
    assert answer.code == 0
    assert "ada approves r" in answer.out
    given = ["--approval", tmp_path / "approval.json", "--approver-key", f"ada={ada.public}"]
    again = quarantine(
        *words, folder, *given, "--supersedes", tmp_path / "first", "--out", tmp_path / "second", "--json"
    )
    assert (again.code, again.json["results"]["outcome"]) == (0, "allow")
    assert again.json["results"]["approvals"][0]["identity"] == "ada"
    decided = json.loads((tmp_path / "second" / "decision.json").read_bytes())
    assert decided["supersedes"].startswith("sha256:")
    assert quarantine("policy", "replay", "--policy", policy, "--evidence", tmp_path / "second").code == 0
    other = policy_file(tmp_path, "other", description="Another.")
    replayed = quarantine("policy", "replay", "--policy", other, "--evidence", tmp_path / "second", "--json")
    assert replayed.code == 1
    assert "approvals were given under another policy" in replayed.json["runs"][0]["reasons"][-1]


def test_an_approval_without_its_key_decides_nothing(tmp_path: Path, quarantine: Call, ada: Any) -> None:
    folder, policy = evidence_folder(tmp_path / "run", None), policy_file(tmp_path)
    assert approve(quarantine, folder, tmp_path / "a.json", ada, "--policy", policy).code == 0
    words = ["gate", "--policy", policy, "--evidence", folder, "--approval", tmp_path / "a.json"]
    for key in ([], ["--approver-key", f"bob={ada.public}"]):
        answer = quarantine(*words, *key, "--out", tmp_path / "out")
        assert answer.code == 3
        assert "signed by nobody whose approval counts" in answer.err
    for key in ("ada", "=x", f"ada={ada.private}", f"ada={tmp_path / 'absent'}"):
        assert quarantine(*words, "--approver-key", key).code == 3
    twice = ["--approver-key", f"ada={ada.public}"] * 2
    assert quarantine(*words, *twice).code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("score", "changes", "rule_id", "words"),
    [
        (0.9, {}, "r", "a failure of this rule cannot be approved"),
        (0.1, {}, "r", "needs no approval"),
        (None, {}, "integrity.source", "no rule that can be approved"),
        (None, {}, "absent", "no rule that can be approved"),
        (None, {"rules": [rule(approvable="never"), BASE["rules"][1]]}, "r", "no rule that can be approved"),
        (None, {"rules": [rule(severity="warn"), BASE["rules"][1]]}, "r", "no rule that can be approved"),
    ],
)
def test_what_cannot_be_approved_is_not_signed(
    score: object, changes: Any, rule_id: str, words: str, tmp_path: Path, quarantine: Call, ada: Any
) -> None:
    folder, policy = evidence_folder(tmp_path / "run", score), policy_file(tmp_path, **changes)
    answer = approve(quarantine, folder, tmp_path / "a.json", ada, "--policy", policy, rule_id=rule_id)
    assert answer.code == 3
    assert words in answer.err
    assert not (tmp_path / "a.json").exists()


def test_approve_refuses_bad_input(tmp_path: Path, quarantine: Call, ada: Any) -> None:
    folder, policy = evidence_folder(tmp_path / "run", None), policy_file(tmp_path)
    given = ["--policy", policy]
    assert approve(quarantine, folder, tmp_path / "a.json", ada).code == 3  # bare evidence names no policy
    for more in (
        ["--reason", " "],
        ["--identity", ""],
        ["--key", ada.public],
        ["--key", tmp_path / "no"],
        ["--at", "now"],
        ["--at", "2020-01-01T00:00:00Z"],  # before the evidence that is approved
    ):
        assert approve(quarantine, folder, tmp_path / "a.json", ada, *given, *more).code == 3, more
    assert not (tmp_path / "a.json").exists()
    said = approve(quarantine, folder, tmp_path / "a.json", ada, *given, "--json")
    assert (said.code, said.json["rule"], said.json["approved_at"]) == (0, "r", AT)
    before = (tmp_path / "a.json").read_bytes()
    assert approve(quarantine, folder, tmp_path / "a.json", ada, *given).code == 3
    assert (tmp_path / "a.json").read_bytes() == before
