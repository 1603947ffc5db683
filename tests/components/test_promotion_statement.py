"""The promotion statement: what it says, where it is kept, and that ``verify`` compares it with what is there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from components._runtime import journal
from components._runtime import registry_tags as tag
from components._runtime.envelopes import seal, unseal
from components._runtime.evidence import PROMOTION
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.outcome import outcome_of
from components._runtime.plan import RunSettings, identity_of
from components._runtime.promotion_files import keep_promotion
from components._runtime.promotion_statement import promotion_statement
from components._runtime.run_election import TrackedRun
from components._runtime.signing_keys import (
    KeyPair,
    TrustedSigner,
    generate_key_pair,
    load_public_key,
    load_signing_key,
)
from components._runtime.statements import PROMOTION_PREDICATE, Destination, parse_statement
from components._runtime.store import Records, open_store
from components._runtime.verification import Verification, verify_release
from components._runtime.verification_promotion import check_promotion
from components._runtime.verification_registry import verify_registered
from components.attest_promotion.step import attest_promotion, keep_statement
from components.promote_model.step import promote_model
from components.report.step import report_run
from defense_core.errors import EvidenceMismatch, EvidenceMissing, QuarantineError
from defense_core.files import sha256_file
from defense_core.verdict import Verdict
from tests.finished_chain import Chain, decide_again, make_release
from tests.small_model import DENYING


@pytest.fixture(scope="module")
def run(connection: MlflowConnection, finished: Chain) -> TrackedRun:
    return journal.parent_run(connection, identity_of(finished.evidence["fetch"]))


@pytest.fixture(scope="module")
def promoted(connection: MlflowConnection, signed: Path) -> dict[str, Any]:
    return promote_model(signed, name="digits", alias="champion", connection=connection)


@pytest.fixture(scope="module")
def envelope(promoted: dict[str, Any], keys: KeyPair) -> bytes:
    made = attest_promotion(promoted, load_signing_key(keys.private))[1]
    assert made is not None
    return made


def payload_of(envelope: bytes, keys: KeyPair) -> dict[str, Any]:
    return parse_statement(unseal(envelope, load_public_key(keys.public), "s"), "s")


def verified(folder: Path, keys: KeyPair, envelope: bytes) -> Verification:
    return verify_release(
        folder,
        TrustedSigner(public_key=keys.public),
        further=lambda check: check_promotion(check, envelope, PROMOTION),
    )


def sealed(promoted: dict[str, Any], keys: KeyPair, **changes: Any) -> bytes:
    """A statement, properly signed, of a promotion that did not happen so."""
    other = copy.deepcopy(promoted)
    other["results"].update(changes)
    return seal(promotion_statement(other).payload, load_signing_key(keys.private))


def test_it_says_what_went_where_by_which_decision(
    promoted: dict[str, Any], envelope: bytes, signed: Path, keys: KeyPair
) -> None:
    statement = payload_of(envelope, keys)
    assert statement["predicateType"] == PROMOTION_PREDICATE
    registry = statement["predicate"]["registry"]
    assert (registry["name"], registry["version"], registry["alias"]) == ("digits", "1", "champion")
    assert (registry["given"], registry["before"], registry["outcome"]) == (True, None, "allow")
    assert registry["decision"] == sha256_file(signed / "evidence" / "decision.json")
    assert statement["predicate"]["started"] == promoted["environment"]["started"]
    assert statement["predicate"]["inputs"]["policy"] == promoted["inputs"]["policy"]
    subjects = {each["name"]: "sha256:" + each["digest"]["sha256"] for each in statement["subject"]}
    assert subjects["evidence/decision.json"] == registry["decision"]
    assert subjects["files"] == registry["files"]


def test_the_version_that_had_the_alias_before_stands_in_it(
    connection: MlflowConnection, finished: Chain, keys: KeyPair, tmp_path: Path
) -> None:
    connection.client.create_registered_model("doors")
    old = connection.client.create_model_version("doors", source=str(tmp_path))
    connection.client.set_registered_model_alias("doors", "champion", old.version)
    make_release(finished, tmp_path / "release", keys.private, destination=Destination("doors", "champion"))
    results = [
        promote_model(tmp_path / "release", name="doors", alias="champion", connection=connection)["results"]
        for _ in range(2)
    ]
    assert [each["alias_before"] for each in results] == ["1", "1"], "a repetition still knows"
    assert [each["alias_moved"] for each in results] == [True, False]


def test_a_release_and_its_statement_hold(signed: Path, keys: KeyPair, envelope: bytes) -> None:
    found = verified(signed, keys, envelope)
    assert found.verdict is Verdict.PASS, found.differences
    assert [each.verdict for each in found.findings if each.rule == "verify.promotion"] == [Verdict.PASS]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"decision_digest": "sha256:" + "0" * 64}, "decision"),
        ({"files_digest": "sha256:" + "0" * 64}, "files"),
        ({"outcome": "deny"}, "outcome"),
        ({"name": "doors"}, "name"),
        ({"alias": "challenger"}, "alias"),
    ],
)
def test_a_statement_of_another_promotion_is_named(
    changes: dict[str, str], field: str, promoted: dict[str, Any], signed: Path, keys: KeyPair
) -> None:
    found = verified(signed, keys, sealed(promoted, keys, **changes))
    (difference,) = found.differences
    assert (difference.rule, difference.file) == ("verify.promotion", PROMOTION)
    assert f"its {field} is" in difference.why


def test_changed_bytes_are_found(signed: Path, keys: KeyPair, envelope: bytes) -> None:
    for index in range(0, len(envelope), max(1, len(envelope) // 12)):
        damaged = envelope[:index] + bytes([envelope[index] ^ 1]) + envelope[index + 1 :]
        assert [each.file for each in verified(signed, keys, damaged).differences] == [PROMOTION], index


def test_another_key_and_another_statement_do_not_count(
    promoted: dict[str, Any], signed: Path, keys: KeyPair, tmp_path: Path
) -> None:
    stranger = generate_key_pair(tmp_path)
    step = next((signed / "evidence" / "attestations").glob("*gate.json")).read_bytes()
    for envelope, says in ((sealed(promoted, stranger), "another key"), (step, "another step")):
        (difference,) = verified(signed, keys, envelope).differences
        assert says in difference.why


def test_a_refusal_is_stated_too(connection: MlflowConnection, keys: KeyPair, chain: Chain, tmp_path: Path) -> None:
    decide_again(chain, DENYING)
    make_release(chain, tmp_path / "release", keys.private, destination=Destination("refused", "champion"))
    done = promote_model(tmp_path / "release", name="refused", alias="champion", connection=connection)
    envelope = attest_promotion(done, load_signing_key(keys.private))[1]
    assert envelope is not None
    said = payload_of(envelope, keys)["predicate"]["registry"]
    assert (said["given"], said["before"], said["outcome"]) == (False, None, "deny")
    assert verified(tmp_path / "release", keys, envelope).verdict is Verdict.PASS


# -- in the registry -----------------------------------------------------------------------


@pytest.fixture
def kept(connection: MlflowConnection, promoted: dict[str, Any], run: TrackedRun, envelope: bytes) -> dict[str, Any]:
    keep_promotion(connection, run, promoted["results"], envelope)
    return promoted


def registered(connection: MlflowConnection, keys: KeyPair) -> Verification:
    return verify_registered(connection, "models:/digits/1", TrustedSigner(public_key=keys.public))


def test_verify_of_a_registered_version_finds_it(
    connection: MlflowConnection, keys: KeyPair, kept: dict[str, Any]
) -> None:
    found = registered(connection, keys)
    assert found.verdict is Verdict.PASS, found.differences
    assert "verify.promotion" in {each.rule for each in found.findings}


def test_a_version_whose_run_is_gone_verifies_without_it(
    connection: MlflowConnection, keys: KeyPair, kept: dict[str, Any]
) -> None:
    number = connection.client.get_model_version("digits", "1")
    tags = dict(number.tags)
    again = connection.client.create_model_version("digits", source=number.source, run_id="f" * 32, tags=tags)
    found = verify_registered(connection, f"models:/digits/{again.version}", TrustedSigner(public_key=keys.public))
    connection.client.delete_model_version("digits", again.version)
    assert found.verdict is Verdict.PASS, found.differences
    assert "verify.promotion" not in {each.rule for each in found.findings}


def test_the_first_statement_stays(
    connection: MlflowConnection, keys: KeyPair, kept: dict[str, Any], run: TrackedRun
) -> None:
    keep_promotion(connection, run, kept["results"], b"another")
    assert registered(connection, keys).verdict is Verdict.PASS


@pytest.mark.parametrize(
    "planted", [{"alias": "../../outside"}, {"alias": "/tmp/outside"}, {"name": "../digits"}, {"version": "../1"}]
)
def test_what_would_lead_elsewhere_is_not_kept(
    planted: dict[str, str], connection: MlflowConnection, promoted: dict[str, Any], run: TrackedRun
) -> None:
    with pytest.raises(QuarantineError):
        keep_promotion(connection, run, {**promoted["results"], **planted}, b"statement")


@pytest.mark.parametrize(
    ("name", "value", "field"), [(tag.BEFORE_PREFIX, "7", "before"), (tag.ALIAS_PREFIX, "no", "given")]
)
def test_a_registry_that_says_otherwise_is_named(
    name: str, value: str, field: str, connection: MlflowConnection, keys: KeyPair, kept: dict[str, Any]
) -> None:
    before = connection.client.get_model_version("digits", "1").tags[f"{name}champion"]
    connection.client.set_model_version_tag("digits", "1", f"{name}champion", value)
    found = registered(connection, keys)
    connection.client.set_model_version_tag("digits", "1", f"{name}champion", before)
    (difference,) = found.differences
    assert difference.file == "promotions/digits/1/champion.json"
    assert f"its {field} is" in difference.why


# -- the step ------------------------------------------------------------------------------


def test_a_retried_step_says_the_same(promoted: dict[str, Any], keys: KeyPair) -> None:
    (one, _), (other, _) = (attest_promotion(promoted, load_signing_key(keys.private)) for _ in range(2))
    assert all(one[key] == other[key] for key in ("inputs", "outputs", "results", "verdict"))


def test_a_statement_that_is_there_must_say_the_same(
    promoted: dict[str, Any], keys: KeyPair, envelope: bytes, tmp_path: Path
) -> None:
    key, stranger = load_signing_key(keys.private), load_signing_key(generate_key_pair(tmp_path / "other").private)
    other = copy.deepcopy(promoted)
    other["results"]["version"] = "9"
    different = attest_promotion(other, key)[1]
    assert different is not None
    payload = unseal(envelope, load_public_key(keys.public), "it")
    for name, planted in (("other", different), ("stranger", seal(payload, stranger)), ("text", b"{}")):
        shelf = open_store(str(tmp_path), name).shelf
        shelf.put_new(PROMOTION, planted)
        with pytest.raises(EvidenceMismatch, match=PROMOTION):
            keep_statement(shelf, envelope, key)
        assert shelf.get(PROMOTION) == planted
    shelf = open_store(str(tmp_path), "retried").shelf
    keep_statement(shelf, envelope, key)
    keep_statement(shelf, seal(payload, key), key)
    assert shelf.get(PROMOTION) == envelope


def test_without_a_key_nothing_is_stated_unless_the_policy_demands_it(promoted: dict[str, Any]) -> None:
    evidence, envelope = attest_promotion(promoted, None)
    assert (envelope, evidence["results"]["signed"]) == (None, False)
    demanding = copy.deepcopy(promoted)
    demanding["results"]["signature_required"] = True
    with pytest.raises(EvidenceMissing, match="no key"):
        attest_promotion(demanding, None)


def test_what_was_not_registered_is_not_stated(promoted: dict[str, Any], keys: KeyPair) -> None:
    observed = {**promoted, "results": {"registered": False, "outcome": "observe", "signature_required": False}}
    evidence, envelope = attest_promotion(observed, load_signing_key(keys.private))
    assert (envelope, evidence["results"]["statement"]) == (None, None)


def test_a_run_whose_attest_step_was_killed_is_not_whole(finished: Chain, promoted: dict[str, Any]) -> None:
    gate = {"results": {"outcome": "allow"}}
    records = {**finished.evidence, "gate": gate, "sign": {}, "promote": promoted}
    assert outcome_of(Records(records)).failed_step == "attest"
    assert outcome_of(Records({**records, "attest": {}})).failed_step == ""


def test_the_report_puts_it_into_mlflow(
    connection: MlflowConnection, promoted: dict[str, Any], envelope: bytes, finished: Chain, tmp_path: Path
) -> None:
    settings = RunSettings(evidence=str(tmp_path), model_name="digits", name="whole")
    store = open_store(settings.evidence, settings.name)
    other = copy.deepcopy(promoted)
    other["results"]["version"] = "9"
    for evidence in (*finished.evidence.values(), other):
        store.put(evidence)
    store.shelf.put_new(PROMOTION, envelope)
    assert not store.records().damaged
    report_run(settings, store, None, environment={"MLFLOW_TRACKING_URI": connection.settings.tracking_uri})
    run = journal.parent_run(connection, identity_of(finished.evidence["fetch"]))
    present = {item.path for item in connection.client.list_artifacts(run.run_id, "promotions/digits/9")}
    assert present == {"promotions/digits/9/champion.json"}
