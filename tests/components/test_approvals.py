"""Approvals as signed files, and the decisions that rest on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components._runtime.approval_texts import ApprovalTexts
from components._runtime.approvals import FOLDER, open_approval, read_approvals, sign_approval
from components._runtime.decision_files import replay_decision
from components._runtime.envelopes import seal
from components._runtime.evidence import DECISION
from components._runtime.signing_keys import generate_key_pair, load_public_key, load_signing_key
from components._runtime.verification_approvals import approval_findings
from components.gate_promotion.step import gate_promotion
from defense_core.errors import ConfigError, EvidenceMismatch, EvidenceMissing, OutputExists
from defense_core.files import sha256_file
from defense_core.policy import decide, parse_policy
from defense_core.verdict import Verdict
from pipelines.options import approvers
from tests.unit.policy_records import AT, OTHER, dated, later, policy_mapping, rule, with_score

POLICY = {**policy_mapping(rule()), "max_unknown_age_days": 7}
EVIDENCE = dated(with_score(None))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ada's and Bob's pairs."""
    root = tmp_path_factory.mktemp("keys")
    return {name: generate_key_pair(root / name) for name in ("ada", "bob")}


def signed(keys: dict[str, Any], *, by: str = "ada", **changes: str) -> bytes:
    parsed = parse_policy(POLICY)
    said = {
        "rule": "r",
        "identity": by,
        "reason": "Looked at it.",
        "approved_at": AT,
        "evidence": decide(parsed, EVIDENCE, at=AT).evidence_digest,
        "policy": parsed.digest,
    }
    return sign_approval(load_signing_key(keys[by].private), **{**said, **changes})


def publics(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: load_public_key(keys[name].public) for name in names or keys}


def decided(folder: Path, keys: dict[str, Any], data: bytes, again: int = 1, **options: Any) -> dict[str, Any]:
    given = [open_approval(data, publics(keys), "file")] * again
    return gate_promotion(EVIDENCE, POLICY, folder, at=later(1), approvals=given, **options)


def test_an_approval_says_who_what_and_why(keys: dict[str, Any]) -> None:
    opened = open_approval(signed(keys), publics(keys), "file").approval
    assert (opened.rule, opened.identity, opened.reason) == ("r", "ada", "Looked at it.")
    assert opened.approved_at == AT


def test_a_decision_rests_on_its_approval_and_replays(tmp_path: Path, keys: dict[str, Any]) -> None:
    data = signed(keys)
    gate = decided(tmp_path / "out", keys, data)
    assert gate["results"]["outcome"] == "allow"
    (file,) = (tmp_path / "out" / FOLDER).iterdir()
    assert (file.name, file.read_bytes()) == ("000-r.json", data)
    replayed = replay_decision(tmp_path / "out")
    assert replayed.decision.outcome == "allow"
    assert replayed.decision.approvals[0].identity == "ada"
    assert replayed.decision.decided_at == later(1)


def test_the_same_approval_given_twice_is_one(tmp_path: Path, keys: dict[str, Any]) -> None:
    data = signed(keys)
    once = gate_promotion(EVIDENCE, POLICY, at=later(1), approvals=[open_approval(data, publics(keys), "file")])
    twice = decided(tmp_path / "out", keys, data, again=2)
    assert twice["results"] == once["results"]
    assert len(replay_decision(tmp_path / "out").decision.approvals) == 1


@pytest.mark.parametrize(
    ("names", "verdict"), [(("ada", "bob"), Verdict.PASS), (("bob",), Verdict.FAIL), (None, Verdict.UNKNOWN)]
)
def test_verify_asks_who_signed_an_approval(
    names: tuple[str, ...] | None, verdict: Verdict, tmp_path: Path, keys: dict[str, Any]
) -> None:
    decided(tmp_path / "out", keys, signed(keys))
    given = publics(keys, *names) if names else {}
    (finding,) = approval_findings(replay_decision(tmp_path / "out"), given)
    assert (finding.rule, finding.verdict) == ("verify.approval", verdict)
    assert (finding.file, finding.bound) == ("evidence/approvals/000-r.json", "signed by ada")


def test_verify_says_nothing_of_approvals_where_there_are_none(tmp_path: Path) -> None:
    gate_promotion(dated(with_score(1.0)), POLICY, tmp_path / "out", at=later(1))
    assert approval_findings(replay_decision(tmp_path / "out"), {}) == []


@pytest.mark.parametrize("names", [(), ("bob",)])
def test_who_is_not_named_cannot_approve(names: tuple[str, ...], keys: dict[str, Any]) -> None:
    given = publics(keys, *names) if names else {}
    with pytest.raises(EvidenceMismatch, match="file is signed by nobody whose approval counts"):
        open_approval(signed(keys), given, "file")


def test_one_key_is_one_person(keys: dict[str, Any]) -> None:
    ada, bob = (str(keys[name].public) for name in ("ada", "bob"))
    assert list(approvers([f"ada={ada}", f"bob={bob}"])) == ["ada", "bob"]
    texts = {name: keys[name].public.read_text() for name in ("ada", "bob")}
    assert list(ApprovalTexts((), texts).keys()) == ["ada", "bob"]
    message = "the approvers ada and carol have the same key: expected a key of their own for each"
    with pytest.raises(ConfigError, match=message):
        approvers([f"ada={ada}", f"bob={bob}", f"carol={ada}"])
    with pytest.raises(ConfigError, match=message):
        # Other bytes of the same key.
        ApprovalTexts((), {**texts, "carol": "Carol's\n" + texts["ada"]}).signed()


def test_nobody_approves_in_the_name_of_another(keys: dict[str, Any]) -> None:
    forged = signed(keys, by="bob", identity="ada")
    with pytest.raises(EvidenceMismatch, match="bob: signed in the name of ada"):
        open_approval(forged, publics(keys), "file")


def test_no_byte_of_an_approval_can_be_changed(keys: dict[str, Any]) -> None:
    data = signed(keys)
    for position in range(0, len(data), 7):
        changed = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with pytest.raises(EvidenceMismatch):
            open_approval(changed, publics(keys), "file")


@pytest.mark.parametrize(
    "payload",
    [
        b"{}", b"[]", b"3", b"not JSON",
        json.dumps({"_type": "https://in-toto.io/Statement/v1", "subject": [], "predicate": {}}).encode(),
    ],
)  # fmt: skip
def test_a_signature_over_something_else_approves_nothing(payload: bytes, keys: dict[str, Any]) -> None:
    data = seal(payload, load_signing_key(keys["ada"].private))
    with pytest.raises(EvidenceMismatch, match="file is no approval"):
        open_approval(data, publics(keys), "file")


def test_what_an_approval_lacks_or_adds_is_refused(keys: dict[str, Any]) -> None:
    key = load_signing_key(keys["ada"].private)
    with pytest.raises(EvidenceMismatch, match="is no approval"):
        open_approval(signed(keys, reason=" "), publics(keys), "file")
    import base64

    statement = json.loads(base64.b64decode(json.loads(signed(keys))["payload"]))
    statement["predicate"]["until"] = "for ever"
    data = seal(json.dumps(statement, sort_keys=True, separators=(",", ":")).encode(), key)
    with pytest.raises(EvidenceMismatch, match="is no approval"):
        open_approval(data, publics(keys), "file")


@pytest.mark.parametrize("field", ["evidence", "policy"])
def test_an_approval_of_another_model_or_policy_decides_nothing(
    field: str, tmp_path: Path, keys: dict[str, Any]
) -> None:
    with pytest.raises(EvidenceMismatch, match=f"is about another {field}"):
        decided(tmp_path / "out", keys, signed(keys, **{field: "sha256:" + "0" * 64}))
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_approvals(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_approvals([tmp_path / "absent"], publics(keys))
    (tmp_path / "big").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="too large"):
        read_approvals([tmp_path / "big"], publics(keys))
    (tmp_path / "text").write_text("approved")
    with pytest.raises(EvidenceMismatch, match="signed by nobody"):
        read_approvals([tmp_path / "text"], publics(keys))


def _replaced(folder: Path, keys: dict[str, Any]) -> None:
    (folder / FOLDER / "000-r.json").write_bytes(signed(keys, reason="Else."))


def _claimed(folder: Path, keys: dict[str, Any]) -> None:
    """The decision says that somebody else approved."""
    content = json.loads((folder / DECISION).read_bytes())
    content["approvals"][0]["identity"] = "bob"
    (folder / DECISION).write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")


def _removed(folder: Path, keys: dict[str, Any]) -> None:
    (folder / FOLDER / "000-r.json").unlink()


def _added(folder: Path, keys: dict[str, Any]) -> None:
    (folder / FOLDER / "001-r.json").write_bytes(signed(keys, by="bob"))


@pytest.mark.parametrize("change", [_replaced, _claimed, _removed, _added])
def test_a_decision_folder_that_was_changed_does_not_replay(change: Any, tmp_path: Path, keys: dict[str, Any]) -> None:
    decided(tmp_path / "out", keys, signed(keys))
    change(tmp_path / "out", keys)
    with pytest.raises(EvidenceMismatch):
        replay_decision(tmp_path / "out")


def test_another_time_is_another_decision(tmp_path: Path) -> None:
    gate_promotion(EVIDENCE, POLICY, tmp_path / "out", at=AT)
    content = json.loads((tmp_path / "out" / DECISION).read_bytes())
    content["decided_at"] = later(30)  # by then the undecided rule has failed
    (tmp_path / "out" / DECISION).write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")
    with pytest.raises(EvidenceMismatch, match="not what its policy and evidence give"):
        replay_decision(tmp_path / "out")


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b'{"approvals": [3]}', b'{"approvals": 3}', b'{"approvals": [{"x": 1}]}']
)
def test_a_damaged_decision_is_named(content: bytes, tmp_path: Path, keys: dict[str, Any]) -> None:
    decided(tmp_path / "out", keys, signed(keys))
    (tmp_path / "out" / DECISION).write_bytes(content)
    with pytest.raises(EvidenceMismatch, match=r"decision\.json is damaged"):
        replay_decision(tmp_path / "out")


# -- superseding ---------------------------------------------------------------------


def test_a_decision_is_superseded_and_never_edited(tmp_path: Path, keys: dict[str, Any]) -> None:
    first = gate_promotion(EVIDENCE, POLICY, tmp_path / "first", at=AT)
    assert first["results"]["outcome"] == "unknown"
    before = (tmp_path / "first" / DECISION).read_bytes()
    with pytest.raises(OutputExists, match="in use"):
        decided(tmp_path / "first", keys, signed(keys))
    second = decided(tmp_path / "second", keys, signed(keys), supersedes=tmp_path / "first")
    assert second["results"]["outcome"] == "allow"
    assert second["results"]["supersedes"] == sha256_file(tmp_path / "first" / DECISION)
    assert replay_decision(tmp_path / "second").decision.supersedes == sha256_file(tmp_path / "first" / DECISION)
    assert (tmp_path / "first" / DECISION).read_bytes() == before


def test_a_decision_about_another_artifact_is_not_superseded(tmp_path: Path) -> None:
    gate_promotion(EVIDENCE, POLICY, tmp_path / "first", at=AT)
    other = {name: {**each, "inputs": {**each["inputs"], "source": OTHER}} for name, each in EVIDENCE.items()}
    with pytest.raises(EvidenceMismatch, match="is a decision about another artifact"):
        gate_promotion(other, POLICY, tmp_path / "second", at=AT, supersedes=tmp_path / "first")
    assert not (tmp_path / "second").exists()


def test_a_changed_or_absent_decision_is_not_superseded(tmp_path: Path) -> None:
    with pytest.raises(EvidenceMissing):
        gate_promotion(EVIDENCE, POLICY, tmp_path / "second", at=AT, supersedes=tmp_path / "absent")
    gate_promotion(EVIDENCE, POLICY, tmp_path / "first", at=AT)
    content = (tmp_path / "first" / DECISION).read_bytes()
    (tmp_path / "first" / DECISION).write_bytes(content.replace(b'"unknown"', b'"allow"'))
    with pytest.raises(EvidenceMismatch):
        gate_promotion(EVIDENCE, POLICY, tmp_path / "second", at=AT, supersedes=tmp_path / "first")


def test_the_gate_states_now_where_it_is_told_no_time() -> None:
    gate = gate_promotion(EVIDENCE, policy_mapping(rule()))
    assert gate["results"]["decided_at"] == gate["environment"]["started"]
