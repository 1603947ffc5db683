"""A run that ended at its decision goes on with approvals: decided again, promoted once, nothing measured again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components._runtime import registry_tags as tag
from components._runtime.approval_texts import ApprovalTexts
from components._runtime.approvals import sign_approval
from components._runtime.evidence import Clock, write_evidence
from components._runtime.mlflow_connection import MlflowConnection, MlflowSettings, connect
from components._runtime.resumption import Resumption, acquire_release
from components._runtime.signing_keys import KeyPair, TrustedSigner, generate_key_pair, load_signing_key
from components._runtime.statements import Destination
from components._runtime.verification import verify_release
from components.gate_promotion import step
from components.gate_promotion.step import decide_given
from components.promote_model.step import promote_model
from components.reopen_release.step import reopen_release
from components.sign_evidence.step import sign_evidence
from defense_core import errors
from defense_core.files import sha256_file
from defense_core.policy import parse_policy
from defense_core.policy_time import parse_time, time_text
from defense_core.progress import NullProgress
from defense_core.verdict import Verdict
from pipelines.sweep import SweepReport, SweepSettings, open_memory, sweep
from pipelines.sweep_aliases import Journal
from pipelines.sweep_scope import Scope
from tests.finished_chain import Chain, decide_again, make_release
from tests.small_model import DENYING, POLICY

UNDECIDED = {**POLICY, "name": "careful", "require": {"positive_control": True}}
REFUSED = {**DENYING, "name": "open", "rules": [{**DENYING["rules"][0], "approvable": "fail"}]}
RULES = {"careful": "require.positive_control", "open": "acc"}


@dataclass(frozen=True)
class Former:
    """A run that ended at its decision, registered under ``name``."""

    release: Path
    name: str
    connection: MlflowConnection
    keys: KeyPair
    ada: KeyPair

    @property
    def address(self) -> str:
        return f"models:/{self.name}/1"

    def approval(self, **changes: str) -> str:
        decision = json.loads((self.release / "evidence" / "decision.json").read_text())
        said = {
            "rule": RULES[decision["policy_name"]],
            "identity": "ada",
            "reason": "Looked at it.",
            "approved_at": decision["decided_at"],
            "evidence": decision["evidence_digest"],
            "policy": decision["policy_digest"],
        }
        return sign_approval(load_signing_key(self.ada.private), **{**said, **changes}).decode()

    def request(self, *approvals: str, **changes: Any) -> Resumption:
        given = ApprovalTexts(approvals, {"ada": self.ada.public.read_text()})
        asked = {"release": self.address, "given": given, "public_key": self.keys.public.read_text()}
        return Resumption(**{**asked, **changes})

    def resumed(self, folder: Path, request: Resumption) -> dict[str, Any]:
        """What promote did, after every step of the promote run."""
        parts = {name: folder / name for name in ("bundle", "onnx", "former")}
        reopen_release(request, parts["bundle"], parts["onnx"], parts["former"])
        decide_given([], "", folder / "decision", former=parts["former"], approvals=request.given.signed())
        sign_evidence(
            parts["bundle"],
            parts["onnx"],
            folder / "decision",
            folder / "release",
            destination=Destination(self.name, "champion"),
            key=load_signing_key(self.keys.private),
        )
        done = promote_model(
            folder / "release",
            name=self.name,
            alias="champion",
            connection=self.connection,
            trusted=TrustedSigner(public_key=self.keys.public),
            approvers=request.given.keys(),
        )
        results: dict[str, Any] = done["results"]
        return results

    def versions(self) -> dict[str, dict[str, str]]:
        found = self.connection.client.search_model_versions(f"name = '{self.name}'")
        return {str(each.version): dict(each.tags) for each in found}


both = pytest.mark.parametrize("former", [UNDECIDED, REFUSED], ids=["undecided", "refused"], indirect=True)


@pytest.fixture
def former(
    request: pytest.FixtureRequest, chain: Chain, keys: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Former:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    policy = getattr(request, "param", UNDECIDED)
    decide_again(chain, policy)
    release = tmp_path / "release"
    make_release(chain, release, keys.private, destination=Destination("digits", "champion"))
    connection = connect(MlflowSettings(uri))
    done = promote_model(release, name="digits", alias="champion", connection=connection)
    assert done["results"]["decision"] == tag.QUARANTINED
    return Former(release, "digits", connection, keys, generate_key_pair(tmp_path / "ada"))


@both
def test_an_approval_promotes_once(former: Former, tmp_path: Path) -> None:
    request = former.request(former.approval())
    first = former.resumed(tmp_path / "first", request)
    assert (first["decision"], first["version"], first["alias_moved"]) == (tag.ALLOW, "2", True)
    again = former.resumed(tmp_path / "again", request)
    assert (again["version"], again["alias_moved"], again["reused"]) == ("2", False, True)
    tags = former.versions()
    assert set(tags) == {"1", "2"}
    assert tags["1"][tag.SUPERSEDED_BY] == "2"
    assert tags["2"][tag.DECISION] == tag.ALLOW


def test_a_registry_that_is_not_mounted_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'volume' / 'mlflow.db'}")
    with pytest.raises(errors.RegistryUnavailable, match="there is no registry"):
        acquire_release("models:/digits/1", tmp_path, max_bytes=1000, progress=NullProgress())
    assert list(tmp_path.iterdir()) == []


def test_a_record_from_before_the_reopening_sets_no_time(
    former: Former, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = former.request(former.approval())
    evidence, _ = reopen_release(request, tmp_path / "bundle", tmp_path / "onnx", tmp_path / "former")
    began = parse_time(evidence["environment"]["started"], "started")
    reopened = tmp_path / "reopen.json"

    def decided(folder: str, earlier: dict[str, Any] | None, reopening: Path | None = reopened) -> dict[str, Any]:
        given: dict[str, Any] = {"former": tmp_path / "former", "approvals": request.given.signed()}
        return decide_given([], "", tmp_path / folder, earlier=earlier, reopened=reopening, **given)

    write_evidence(reopened, evidence)
    first = decided("first", None)
    monkeypatch.setattr(step, "Clock", SimpleNamespace(start=lambda: Clock(time_text(began + timedelta(hours=2)), 0.0)))
    at = first["results"]["decided_at"]
    assert decided("again", first)["results"]["decided_at"] == at
    assert decided("unknown", first, None)["results"]["decided_at"] != at
    environment = {**evidence["environment"], "started": time_text(began + timedelta(hours=1))}
    write_evidence(tmp_path / "later.json", {**evidence, "environment": environment})
    assert decided("planted", first, tmp_path / "later.json")["results"]["decided_at"] != at


def test_the_new_decision_names_the_former_and_verifies(former: Former, tmp_path: Path) -> None:
    former.resumed(tmp_path / "new", former.request(former.approval()))
    decision = json.loads((tmp_path / "new" / "release" / "evidence" / "decision.json").read_text())
    assert decision["supersedes"] == sha256_file(former.release / "evidence" / "decision.json")
    assert [each["identity"] for each in decision["approvals"]] == ["ada"]
    found = verify_release(
        tmp_path / "new" / "release",
        TrustedSigner(public_key=former.keys.public),
        approvers=former.request().given.keys(),
    )
    assert found.verdict is Verdict.PASS, found.differences


def test_what_was_measured_is_taken_over_byte_for_byte(former: Former, tmp_path: Path) -> None:
    evidence, steps = reopen_release(former.request(), tmp_path / "bundle", tmp_path / "onnx", tmp_path / "former")
    assert {each["name"] for each in steps} >= {"fetch", "select", "export", "purify.tsbd", "evaluate.before"}
    assert not {"gate", "sign"} & {each["name"] for each in steps}
    assert evidence["inputs"]["decision"] == sha256_file(former.release / "evidence" / "decision.json")
    for path in (tmp_path / "former").glob("*.json"):
        assert path.read_bytes() == (former.release / "evidence" / path.name).read_bytes()
    assert not (tmp_path / "former" / "attestations").exists(), "statements of the former release are not the new one's"


@both
def test_without_an_approval_nothing_changes(former: Former, tmp_path: Path) -> None:
    before = former.versions()["1"][tag.REASON]
    done = former.resumed(tmp_path / "new", former.request())
    assert (done["decision"], done["reason"], done["alias_moved"]) == (tag.QUARANTINED, before, False)


def test_a_release_folder_does_as_well(former: Former, tmp_path: Path) -> None:
    request = former.request(former.approval(), release=str(former.release))
    assert former.resumed(tmp_path / "new", request)["alias_moved"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"evidence": "sha256:" + "0" * 64}, errors.EvidenceMismatch),
        ({"policy": "sha256:" + "0" * 64}, errors.EvidenceMismatch),
        ({"rule": "require.licences"}, errors.PolicyError),
        ({"identity": "bob"}, errors.EvidenceMismatch),
    ],
)
def test_an_approval_of_something_else_decides_nothing(
    changes: dict[str, str], error: type[Exception], former: Former, tmp_path: Path
) -> None:
    with pytest.raises(error):
        former.resumed(tmp_path / "new", former.request(former.approval(**changes)))
    assert set(former.versions()) == {"1"}


@pytest.mark.parametrize("damaged", ["model.onnx", "evidence/fetch.json", "bundle/model.safetensors", "model.sig"])
def test_a_former_release_that_was_changed_is_refused(damaged: str, former: Former, tmp_path: Path) -> None:
    path = former.release / damaged
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    request = former.request(former.approval(), release=str(former.release))
    with pytest.raises(errors.QuarantineError):
        former.resumed(tmp_path / "new", request)


def test_a_signed_release_needs_a_named_signer(former: Former, tmp_path: Path) -> None:
    stranger = generate_key_pair(tmp_path / "stranger").public.read_text()
    with pytest.raises(errors.ConfigError, match="nobody was named"):
        former.resumed(tmp_path / "none", former.request(public_key=""))
    with pytest.raises(errors.EvidenceMismatch, match="does not verify"):
        former.resumed(tmp_path / "other", former.request(public_key=stranger))


def test_a_request_does_not_widen_whom_promotion_trusts(former: Former, tmp_path: Path) -> None:
    operator = TrustedSigner(public_key=generate_key_pair(tmp_path / "operator").public)
    parts = [tmp_path / name for name in ("bundle", "onnx", "decision")]
    with pytest.raises(errors.EvidenceMismatch, match="does not verify"):
        reopen_release(former.request(), *parts, trusted=operator)
    stranger = former.request(public_key=generate_key_pair(tmp_path / "stranger").public.read_text())
    with pytest.raises(errors.EvidenceMismatch, match="does not verify"):
        reopen_release(stranger, *parts, trusted=TrustedSigner(public_key=former.keys.public))
    assert not any(path.exists() for path in parts)


@pytest.mark.parametrize("address", ["s3://bucket/release", "https://example.org/release", "model.onnx"])
def test_an_address_that_is_no_release(address: str, former: Former, tmp_path: Path) -> None:
    named = str(former.release / address) if "://" not in address else address
    with pytest.raises(errors.ConfigError):
        former.resumed(tmp_path / "new", former.request(release=named))


def test_what_nobody_signed_is_not_resumed_where_releases_are_signed(
    former: Former, finished: Chain, keys: KeyPair, tmp_path: Path
) -> None:
    trusted = TrustedSigner(public_key=keys.public)
    parts = [tmp_path / name for name in ("bundle", "onnx", "former")]
    make_release(finished, tmp_path / "unsigned", None)
    with pytest.raises(errors.EvidenceMismatch, match="does not verify"):
        reopen_release(Resumption(str(tmp_path / "unsigned")), *parts, trusted=trusted)
    assert not any(path.exists() for path in parts)
    evidence, _ = reopen_release(Resumption(str(former.release)), *parts, trusted=trusted)
    assert evidence["results"]["signed"] is True


def test_an_unsigned_release_is_replayed_and_hashed(
    chain: Chain, keys: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    decide_again(chain, UNDECIDED)
    make_release(chain, tmp_path / "release", None)
    request = Resumption(str(tmp_path / "release"))
    evidence, _ = reopen_release(request, tmp_path / "bundle", tmp_path / "onnx", tmp_path / "former")
    assert (evidence["results"]["signed"], evidence["results"]["outcome"]) == (False, "unknown")
    edited = tmp_path / "edited"
    shutil.copytree(tmp_path / "release", edited)
    decision = edited / "evidence" / "decision.json"
    decision.write_text(decision.read_text().replace('"outcome":"unknown"', '"outcome":"allow"'))
    with pytest.raises(errors.EvidenceMismatch):
        reopen_release(Resumption(str(edited)), tmp_path / "b", tmp_path / "o", tmp_path / "f")


# -- what a sweep makes of it --------------------------------------------------------


def swept(former: Former, folder: Path, approvers: ApprovalTexts | None, memory: Path | None = None) -> SweepReport:
    """A sweep that enforces, and trusts the signer of the release."""
    keys = {} if approvers is None else approvers.keys()
    settings = SweepSettings(trusted=TrustedSigner(public_key=former.keys.public), approvers=keys)
    known = open_memory(former.connection, memory)
    scope = Scope(policy=parse_policy(UNDECIDED), aliases=("champion",))
    try:
        return sweep(former.connection, known, scope, settings, journal=Journal(folder / "journal.jsonl"))
    finally:
        known.close()


def champion(former: Former) -> str | None:
    found = former.connection.client.get_registered_model(former.name).aliases.get("champion")
    return None if found is None else str(found)


def test_a_sweep_takes_no_alias_for_an_approval_that_it_cannot_check(former: Former, tmp_path: Path) -> None:
    former.resumed(tmp_path / "new", former.request(former.approval()))
    report = swept(former, tmp_path, None)
    assert (report.found["unknown"], report.found["drift"], report.moves) == (1, 0, ())
    (finding,) = [each for each in report.findings if each.alias]
    assert finding.why == "Whether ada signed it was not checked: name the key by --approver-key."
    assert (champion(former), report.exit_code) == ("2", 2)


def test_a_sweep_counts_the_approvers_that_it_is_given(former: Former, tmp_path: Path) -> None:
    former.resumed(tmp_path / "new", former.request(former.approval()))
    memory = tmp_path / "memory.db"
    report = swept(former, tmp_path, former.request().given, memory)
    assert (report.found["unknown"], report.found["drift"], champion(former)) == (0, 0, "2")
    # The memory of the one sweep is none for another that trusts other people under the same names.
    stranger = generate_key_pair(tmp_path / "stranger").public.read_text()
    report = swept(former, tmp_path, ApprovalTexts((), {"ada": stranger}), memory)
    assert [(each.origin, each.state) for each in report.moves] == [("2", "removed")]


def test_the_memory_of_a_sweep_is_none_for_another_key_at_the_same_path(former: Former, tmp_path: Path) -> None:
    former.resumed(tmp_path / "new", former.request(former.approval()))
    memory, given = tmp_path / "memory.db", former.request().given
    path = tmp_path / "trusted.pub"
    shutil.copyfile(former.keys.public, path)
    mounted = replace(former, keys=replace(former.keys, public=path))
    assert swept(mounted, tmp_path, given, memory).found["drift"] == 0
    shutil.copyfile(generate_key_pair(tmp_path / "successor").public, path)
    assert swept(mounted, tmp_path, given, memory).found["drift"] == 1


def test_a_signers_key_that_went_away_costs_no_alias(former: Former, tmp_path: Path) -> None:
    former.resumed(tmp_path / "new", former.request(former.approval()))
    gone = replace(former, keys=replace(former.keys, public=tmp_path / "gone.pub"))
    report = swept(gone, tmp_path, former.request().given)
    assert (report.found["unknown"], report.moves, champion(former)) == (1, (), "2")
