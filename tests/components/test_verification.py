"""``verify``: what was changed is found, and the file and the difference are named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from components._runtime.decision_files import replay_decision
from components._runtime.envelopes import seal, unseal
from components._runtime.evidence import DECISION
from components._runtime.model_signature import SIGNATURE, sign_folder
from components._runtime.release import ATTESTATIONS
from components._runtime.signing_keys import (
    KeyPair,
    TrustedSigner,
    generate_key_pair,
    load_public_key,
    load_signing_key,
)
from components._runtime.statements import Destination
from components._runtime.verification import Verification, verify_release
from components.gate_promotion.step import gate_promotion
from defense_core.config import canonical_json
from defense_core.errors import EXIT_UNKNOWN, ConfigError, QuarantineError, SourceNotFound, StorageError
from defense_core.policy import parse_policy
from defense_core.verdict import Verdict
from tests.certificates import make_certificates
from tests.finished_chain import Chain, another_model, decide_again, make_release
from tests.small_model import DENYING, POLICY


def verified(release: Path, keys: KeyPair, **options: object) -> Verification:
    return verify_release(release, TrustedSigner(public_key=keys.public), **options)  # type: ignore[arg-type]


def named(verification: Verification) -> set[str]:
    assert verification.verdict is not Verdict.PASS
    assert all(finding.why for finding in verification.differences)
    return {finding.file for finding in verification.differences}


def signed_again(release: Path, key: Path) -> None:
    """A new model signature over what lies there now, by whoever has ``key``."""
    (release / SIGNATURE).unlink()
    sign_folder(release, load_signing_key(key))


def test_a_release_is_whole(signed: Path, keys: KeyPair) -> None:
    found = verified(signed, keys)
    assert found.verdict is Verdict.PASS, found.differences
    assert (found.decision, found.policy, found.signer) == ("allow", "lenient", keys.key_id)
    assert {finding.rule for finding in found.findings} == {
        "verify.signature",
        "verify.files",
        "verify.statement",
        "verify.chain",
        "verify.model",
        "verify.decision",
    }
    assert found.files == len([path for path in signed.rglob("*") if path.is_file()])
    assert found.bytes == sum(path.stat().st_size for path in signed.rglob("*") if path.is_file())


def test_a_byte_of_every_file_is_found(release: Path, keys: KeyPair) -> None:
    for path in sorted(path for path in release.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for index in {0, len(data) // 2, len(data) - 1}:
            spoilt = bytearray(data)
            spoilt[index] ^= 4
            path.write_bytes(bytes(spoilt))
            assert path.relative_to(release).as_posix() in named(verified(release, keys)), (path, index)
        path.write_bytes(data)
    assert verified(release, keys).verdict is Verdict.PASS


def test_every_missing_file_is_named(release: Path, keys: KeyPair, tmp_path: Path) -> None:
    for path in sorted(path for path in release.rglob("*") if path.is_file()):
        path.rename(tmp_path / "away")
        assert path.relative_to(release).as_posix() in named(verified(release, keys))
        (tmp_path / "away").rename(path)


@pytest.mark.parametrize(
    "name", ["evil.py", ".gitattributes", ".git/config", "evidence/scan.json", f"{ATTESTATIONS}/010-scan.json", "a\nb"]
)
def test_an_unexpected_file_is_named(release: Path, keys: KeyPair, name: str) -> None:
    path = release / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    assert name in named(verified(release, keys))


@pytest.mark.parametrize(
    "name", ["evidence/notes.txt", "evidence/report.json", "evidence/scan.failed.json", "evidence/bom/more.json"]
)
def test_what_nothing_accounts_for_is_named_even_where_it_was_signed(release: Path, keys: KeyPair, name: str) -> None:
    (release / name).write_text("{}")
    signed_again(release, keys.private)
    assert named(verified(release, keys)) == {name}


def test_what_is_no_plain_file_is_named(release: Path, keys: KeyPair) -> None:
    (release / "link").symlink_to("model.onnx")
    (release / "empty").mkdir()
    (release / "loop").symlink_to(".")
    assert {"link", "empty", "loop"} <= named(verified(release, keys))


def test_a_file_that_became_a_link_to_its_own_content(release: Path, keys: KeyPair, tmp_path: Path) -> None:
    shutil.move(release / "model.onnx", tmp_path / "model.onnx")
    (release / "model.onnx").symlink_to(tmp_path / "model.onnx")
    assert "model.onnx" in named(verified(release, keys))


# -- statements ------------------------------------------------------------------------------


def statements(release: Path) -> list[Path]:
    return sorted((release / ATTESTATIONS).iterdir())


def test_a_dropped_statement_is_named(release: Path, keys: KeyPair) -> None:
    for path in statements(release):
        data = path.read_bytes()
        path.unlink()
        assert f"{ATTESTATIONS}/{path.name}" in named(verified(release, keys))
        path.write_bytes(data)


def test_reordered_statements_are_named_even_where_they_were_signed_again(release: Path, keys: KeyPair) -> None:
    first, second = statements(release)[:2]
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    expected = {f"{ATTESTATIONS}/{first.name}", f"{ATTESTATIONS}/{second.name}"}
    assert expected <= named(verified(release, keys))
    signed_again(release, keys.private)
    found = verified(release, keys)
    assert expected == named(found)
    assert all(finding.rule == "verify.statement" for finding in found.differences)


def _renamed(statement: dict[str, object]) -> None:
    statement["predicateType"] = "urn:model-quarantine:fetch:v99"


def _foreign(statement: dict[str, object]) -> None:
    statement["predicateType"] = "https://slsa.dev/provenance/v1"


def _untyped(statement: dict[str, object]) -> None:
    del statement["_type"]


def _unnamed(statement: dict[str, object]) -> None:
    statement["predicate"] = {}


def _other_device(statement: dict[str, object]) -> None:
    statement["predicate"]["device"] = "cuda"  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_renamed, "unknown type"),
        (_foreign, "unknown type"),
        (_untyped, "no statement"),
        (_unnamed, "no statement"),
        (_other_device, "predicate.device"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_"),
)
def test_a_statement_that_says_something_else(
    release: Path, keys: KeyPair, change: Callable[[dict[str, object]], None], says: str
) -> None:
    path = statements(release)[0]
    key = load_signing_key(keys.private)
    statement = json.loads(unseal(path.read_bytes(), load_public_key(keys.public), "s"))
    change(statement)
    path.write_bytes(seal(canonical_json(statement), key))
    signed_again(release, keys.private)
    found = verified(release, keys)
    assert named(found) == {f"{ATTESTATIONS}/{path.name}"}
    assert says in found.differences[0].why


def test_a_truncated_envelope_is_named(release: Path, keys: KeyPair) -> None:
    path = statements(release)[3]
    path.write_bytes(path.read_bytes()[:100])
    signed_again(release, keys.private)
    assert named(verified(release, keys)) == {f"{ATTESTATIONS}/{path.name}"}


# -- whole parts from elsewhere ----------------------------------------------------------------


@pytest.fixture(scope="module")
def other(finished: Chain, keys: KeyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model's release, signed with the same key."""
    root = tmp_path_factory.mktemp("other")
    make_release(another_model(finished, root / "chain"), root / "release", keys.private)
    return root / "release"


def test_evidence_of_another_model_is_found(release: Path, other: Path, keys: KeyPair) -> None:
    assert verified(other, keys).verdict is Verdict.PASS
    shutil.rmtree(release / "evidence")
    shutil.copytree(other / "evidence", release / "evidence")
    found = verified(release, keys)
    assert "bundle/bundle.json" in named(found)
    assert "evidence/select.json" in named(found)


def test_one_evidence_file_of_another_model_is_found(release: Path, other: Path, keys: KeyPair) -> None:
    shutil.copyfile(other / "evidence" / "export.json", release / "evidence" / "export.json")
    found = verified(release, keys)
    assert {"evidence/export.json", "evidence/decision.json"} <= named(found)
    signed_again(release, keys.private)
    again = verified(release, keys)
    assert "evidence/export.json" in named(again)
    assert "verify.chain" in {finding.rule for finding in again.differences}


def test_an_older_decision_is_found(release: Path, chain: Chain, keys: KeyPair, tmp_path: Path) -> None:
    older = gate_promotion(chain.evidence, DENYING, tmp_path / "older")
    assert older["results"]["outcome"] == "deny"
    for name in ("decision.json", "policy.json"):
        shutil.copyfile(tmp_path / "older" / name, release / "evidence" / name)
    found = verified(release, keys)
    assert {"evidence/decision.json", "evidence/policy.json"} <= named(found)
    # Even whoever could sign the folder again would have to change what fetch and the gate said.
    signed_again(release, keys.private)
    assert {"evidence/decision.json", "evidence/gate.json"} & named(verified(release, keys))


def test_a_folder_signed_by_somebody_else_is_refused(release: Path, keys: KeyPair, tmp_path: Path) -> None:
    other = generate_key_pair(tmp_path / "other")
    signed_again(release, other.private)
    found = verified(release, keys)
    assert SIGNATURE in named(found)
    assert found.signer == ""
    # Who trusts the other key still sees that the statements are not that key's.
    theirs = verified(release, other)
    assert named(theirs) >= {f"{ATTESTATIONS}/{path.name}" for path in statements(release)}


def test_an_unsigned_release_is_nobodys(finished: Chain, keys: KeyPair, tmp_path: Path) -> None:
    evidence = make_release(finished, tmp_path / "release", None)
    assert evidence["results"] == {"signed": False, "key_id": None, "statements": 0}
    found = verified(tmp_path / "release", keys)
    assert SIGNATURE in named(found)
    assert found.verdict is Verdict.FAIL
    assert found.decision == "allow"


# -- policy, certificates, usage ---------------------------------------------------------------


def test_the_policy_can_be_demanded(signed: Path, keys: KeyPair) -> None:
    assert verified(signed, keys, policy=parse_policy(POLICY)).verdict is Verdict.PASS
    found = verified(signed, keys, policy=parse_policy({**POLICY, "name": "other"}))
    assert named(found) == {"evidence/policy.json"}
    assert "another policy" in found.differences[0].why


def test_a_denied_release_verifies_as_denied(chain: Chain, keys: KeyPair, tmp_path: Path) -> None:
    decide_again(chain, DENYING)
    make_release(chain, tmp_path / "release", keys.private)
    found = verified(tmp_path / "release", keys)
    assert (found.verdict, found.decision) == (Verdict.PASS, "deny")


def test_a_certificate_chain(finished: Chain, tmp_path: Path) -> None:
    made, stranger = make_certificates(tmp_path / "a"), make_certificates(tmp_path / "b")
    make_release(finished, tmp_path / "release", made.key, certificate=made.certificate)
    found = verify_release(tmp_path / "release", TrustedSigner(certificate_chain=made.root))
    assert found.verdict is Verdict.PASS, found.differences
    refused = verify_release(tmp_path / "release", TrustedSigner(certificate_chain=stranger.root))
    assert SIGNATURE in named(refused)
    with pytest.raises(ConfigError, match="certificates in PEM"):
        verify_release(tmp_path / "release", TrustedSigner(certificate_chain=made.key))


def test_a_certificate_of_the_same_root_for_other_uses_signs_nothing(finished: Chain, tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "server", usage=ExtendedKeyUsageOID.SERVER_AUTH)
    with pytest.raises(ConfigError, match="code signing"):
        load_signing_key(made.key, made.certificate)
    make_release(finished, tmp_path / "release", made.key)
    (tmp_path / "release" / SIGNATURE).unlink()
    # Who has the key of such a certificate needs no leave of this program to sign.
    sign_folder(tmp_path / "release", replace(load_signing_key(made.key), certificate=made.certificate))
    found = verify_release(tmp_path / "release", TrustedSigner(certificate_chain=made.root))
    assert SIGNATURE in named(found)
    assert any("for other uses" in each.why for each in found.differences)


def test_a_signature_over_another_kind_of_list_is_refused(release: Path, keys: KeyPair) -> None:
    """Every file is in it, but it was made by a rule that would leave some out."""
    from model_signing import hashing, signing

    (release / SIGNATURE).unlink()
    rule = (
        hashing.Config().use_file_serialization().set_ignored_paths(paths=[SIGNATURE, "code"], ignore_git_paths=False)
    )
    config = signing.Config().set_hashing_config(rule).use_elliptic_key_signer(private_key=keys.private)
    config.sign(release, release / SIGNATURE)
    found = verified(release, keys)
    assert named(found) == {SIGNATURE}
    assert any("covers another kind of list" in each.why for each in found.differences)


@pytest.mark.parametrize(("signer", "holds"), [("signer", True), ("ci.example.org", True), ("root", False)])
def test_the_operator_names_one_signer_under_a_root(signer: str, holds: bool, finished: Chain, tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "made", hosts=["ci.example.org"])
    make_release(finished, tmp_path / "release", made.key, certificate=made.certificate)
    found = verify_release(tmp_path / "release", TrustedSigner(certificate_chain=made.root, signer=signer))
    assert (found.verdict is Verdict.PASS) == holds
    assert holds or SIGNATURE in named(found)


def test_a_key_is_no_certificate(signed: Path, tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    assert SIGNATURE in named(verify_release(signed, TrustedSigner(certificate_chain=made.root)))


def test_a_missing_folder_is_no_finding(keys: KeyPair, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="no folder"):
        verified(tmp_path / "nowhere", keys)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceNotFound, match="no folder"):
        verified(tmp_path / "file", keys)


def test_an_empty_folder_is_nobodys(keys: KeyPair, tmp_path: Path) -> None:
    assert SIGNATURE in named(verified(tmp_path, keys))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"verificationMaterial":{},"dsseEnvelope":{}}', b"\xff"]
)
def test_what_is_no_signature(release: Path, keys: KeyPair, data: bytes) -> None:
    (release / SIGNATURE).write_bytes(data)
    assert SIGNATURE in named(verified(release, keys))


@pytest.mark.parametrize("data", [b"{", b"[]", b"[" * 100_000, b'{"schema":1,"name":"fetch"}', b"\xff", b"null"])
def test_what_is_no_evidence(release: Path, keys: KeyPair, data: bytes) -> None:
    (release / "evidence" / "fetch.json").write_bytes(data)
    signed_again(release, keys.private)
    found = verified(release, keys)
    assert any("fetch" in finding.why for finding in found.differences)


@pytest.mark.parametrize("value", [5, [1], {}, True, "sha256:1"])
@pytest.mark.parametrize("key", ["supersedes", "decided_at"])
def test_what_is_no_decision(release: Path, keys: KeyPair, key: str, value: object) -> None:
    path = release / "evidence" / DECISION
    path.write_text(json.dumps({**json.loads(path.read_bytes()), key: value}))
    signed_again(release, keys.private)
    assert "evidence/decision.json" in named(verified(release, keys))


@pytest.mark.parametrize("data", [b"{", b"[" * 200_000, b"\xff", b"null"])
def test_what_is_no_policy(release: Path, keys: KeyPair, data: bytes) -> None:
    (release / "evidence" / "policy.json").write_bytes(data)
    signed_again(release, keys.private)
    assert "evidence/policy.json" in named(verified(release, keys))
    with pytest.raises(QuarantineError):
        replay_decision(release / "evidence")


def test_a_folder_that_cannot_be_listed_is_no_pass(
    release: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (release / "more").mkdir()
    (release / "more" / "file").write_text("x")
    real = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "more":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(StorageError, match="cannot be read") as caught:
        verified(release, keys)
    assert caught.value.exit_code == EXIT_UNKNOWN


def test_a_release_says_where_it_goes(finished: Chain, keys: KeyPair, tmp_path: Path) -> None:
    make_release(finished, tmp_path / "release", keys.private, destination=Destination("doors", "champion"))
    payload = unseal(statements(tmp_path / "release")[-1].read_bytes(), load_public_key(keys.public), "s")
    predicate = json.loads(payload)["predicate"]
    assert predicate["destination"] == {"model_name": "doors", "alias": "champion"}
    assert predicate["sequence"]["index"] == predicate["sequence"]["count"] - 1
