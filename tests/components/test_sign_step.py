"""The sign step: what it lays out, what it refuses, and that no key gets out."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from components._runtime.decision_files import replay_decision
from components._runtime.envelopes import unseal
from components._runtime.evidence import IMAGE_DIGEST_VARIABLE, Clock
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.release import ATTESTATIONS, BOM_FOLDER
from components._runtime.signing_keys import (
    KEY_VARIABLE,
    KeyPair,
    TrustedSigner,
    load_public_key,
    load_signing_key,
)
from components._runtime.statements import LICENSED_FETCH_PREDICATE, PREDICATES, chain_order, parse_statement
from components._runtime.verification import verify_release
from components.gate_promotion.step import gate_promotion
from components.promote_model.step import promote_model
from components.sign_evidence.step import sign_evidence
from defense_core import errors
from defense_core.files import sha256_bytes, sha256_file
from defense_core.verdict import Verdict
from tests.finished_chain import DESTINATION, Chain, decide_again, make_release
from tests.small_model import DEMANDING, POLICY


def statements(release: Path, keys: KeyPair) -> list[dict[str, Any]]:
    key = load_public_key(keys.public)
    paths = sorted((release / ATTESTATIONS).iterdir())
    return [parse_statement(unseal(path.read_bytes(), key, path.name), path.name) for path in paths]


def demanding(chain: Chain) -> Chain:
    """The chain, decided by a policy that demands signatures."""
    decide_again(chain, DEMANDING)
    return chain


def test_there_is_a_statement_for_every_step_in_order(signed: Path, finished: Chain, keys: KeyPair) -> None:
    found = statements(signed, keys)
    names = [each["predicate"]["name"] for each in found]
    assert names == [*chain_order([*finished.evidence, "gate"]), "release"]
    assert names[0] == "fetch"
    assert names[-2:] == ["gate", "release"]
    previous = None
    expected_types = {**PREDICATES, "fetch": LICENSED_FETCH_PREDICATE}
    for index, each in enumerate(found):
        place = each["predicate"]["sequence"]
        assert (place["index"], place["count"], place["previous"]) == (index, len(found), previous)
        assert each["predicateType"] == expected_types[names[index].partition(".")[0]]
        path = sorted((signed / ATTESTATIONS).iterdir())[index]
        previous = sha256_bytes(unseal(path.read_bytes(), load_public_key(keys.public), "s"))


def test_a_statement_binds_what_the_step_took_and_gave(signed: Path, finished: Chain, keys: KeyPair) -> None:
    (purify,) = [each for each in statements(signed, keys) if each["predicate"]["name"] == "purify.tsbd"]
    evidence = finished.evidence["purify.tsbd"]
    predicate = purify["predicate"]
    assert predicate["inputs"] == evidence["inputs"]
    assert predicate["outputs"] == evidence["outputs"]
    assert (predicate["config"], predicate["clean_set"]) == (evidence["inputs"]["config"], evidence["inputs"]["clean"])
    environment = evidence["environment"]
    assert predicate["code"] == {"version": environment["version"], "torch": environment["torch"]}
    assert (predicate["device"], predicate["seed"], predicate["image"]) == ("cpu", "0", None)
    subjects = {each["name"]: "sha256:" + each["digest"]["sha256"] for each in purify["subject"]}
    assert subjects["model"] == evidence["outputs"]["model"]
    assert subjects["evidence/purify.tsbd.json"] == sha256_file(signed / "evidence" / "purify.tsbd.json")


def test_the_image_comes_from_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = "sha256:" + "a" * 64
    monkeypatch.setenv(IMAGE_DIGEST_VARIABLE, digest)
    assert Clock.start().environment(device="cpu", seed=0)["image"] == digest
    monkeypatch.delenv(IMAGE_DIGEST_VARIABLE)
    assert Clock.start().environment(device="cpu", seed=0)["image"] is None


def test_the_bill_of_materials_is_among_what_is_signed(signed: Path) -> None:
    (bom,) = (signed / BOM_FOLDER).iterdir()
    assert json.loads(bom.read_text())["bomFormat"] == "CycloneDX"


def test_no_file_and_no_message_holds_the_key(
    finished: Chain, keys: KeyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    evidence = make_release(finished, tmp_path / "release", keys.private)
    secret = [line for line in keys.private.read_text().splitlines() if "-----" not in line]
    said = [caplog.text, *capsys.readouterr(), json.dumps(evidence)]
    said += [path.read_bytes().decode("latin-1") for path in (tmp_path / "release").rglob("*") if path.is_file()]
    assert not any(line in text for line in secret for text in said)
    assert not any(str(keys.private) in text for text in said)


def test_a_retried_step_says_the_same(finished: Chain, keys: KeyPair, tmp_path: Path) -> None:
    first, second = (make_release(finished, tmp_path / name, keys.private) for name in ("a", "b"))
    assert all(first[key] == second[key] for key in ("inputs", "outputs", "results", "verdict"))


def test_without_a_key_a_demanding_policy_releases_nothing(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(errors.EvidenceMissing, match=KEY_VARIABLE):
        make_release(demanding(chain), tmp_path / "release", None)
    assert not (tmp_path / "release").exists()


def test_a_demanding_policy_promotes_what_is_signed_only(
    chain: Chain, keys: KeyPair, tmp_path: Path, mlflow_sqlite: MlflowConnection
) -> None:
    connection = mlflow_sqlite
    make_release(demanding(chain), tmp_path / "release", keys.private)
    stripped = tmp_path / "stripped"
    shutil.copytree(tmp_path / "release", stripped)
    (stripped / "model.sig").unlink()
    wishes: dict[str, Any] = {"name": "digits", "alias": "champion", "connection": connection}
    wishes["trusted"] = TrustedSigner(public_key=keys.public)
    with pytest.raises(errors.EvidenceMissing, match="demands a signature"):
        promote_model(stripped, **wishes)
    assert not connection.client.search_registered_models()
    done = promote_model(tmp_path / "release", **wishes)
    assert done["results"]["alias_moved"]


@pytest.mark.parametrize(
    ("damaged", "error"),
    [
        ("onnx/model.onnx", errors.DigestMismatch),
        ("selected/model.safetensors", errors.DigestMismatch),
        ("selected/bundle.json", errors.CorruptArtifact),
    ],
)
def test_other_files_than_decided_are_not_signed(
    damaged: str, error: type[Exception], chain: Chain, keys: KeyPair, tmp_path: Path
) -> None:
    data = bytearray(chain[damaged].read_bytes())
    data[-2] ^= 1
    chain[damaged].write_bytes(data)
    with pytest.raises(error):
        make_release(chain, tmp_path / "release", keys.private)
    assert not (tmp_path / "release").exists()


def test_what_another_policy_decided_is_not_signed(chain: Chain, keys: KeyPair, tmp_path: Path) -> None:
    asked = {**POLICY, "name": "asked"}
    parts: Any = (chain["selected"], chain["onnx"], chain["decision"])
    wishes: dict[str, Any] = {"destination": DESTINATION, "key": load_signing_key(keys.private)}
    with pytest.raises(errors.EvidenceMismatch, match="another policy decided"):
        sign_evidence(*parts, tmp_path / "release", policy=json.dumps(asked), **wishes)
    assert not (tmp_path / "release").exists()
    sign_evidence(*parts, tmp_path / "release", policy=json.dumps(POLICY), **wishes)


def test_what_is_checked_is_what_is_signed(
    chain: Chain, keys: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(folder: Path) -> Any:
        replayed = replay_decision(folder)
        for path in chain["decision"].glob("*.json"):
            path.write_text("{}")
        return replayed

    monkeypatch.setattr("components.sign_evidence.step.replay_decision", swapped)
    make_release(chain, tmp_path / "release", keys.private)
    assert verify_release(tmp_path / "release", TrustedSigner(public_key=keys.public)).verdict is Verdict.PASS


def test_what_is_no_chain_is_not_signed(chain: Chain, keys: KeyPair, tmp_path: Path) -> None:
    evidence = json.loads(json.dumps(chain.evidence))
    evidence["purify.tsbd"]["inputs"]["model"] = "sha256:" + "0" * 64
    shutil.rmtree(chain["decision"])
    gate_promotion(evidence, dict(chain.plan.policy), chain["decision"])
    with pytest.raises(errors.EvidenceMismatch, match=r"no chain.*purify\.tsbd\.json"):
        make_release(chain, tmp_path / "release", keys.private)
    assert not (tmp_path / "release").exists()


def test_a_decision_about_no_exported_model_becomes_no_release(chain: Chain, tmp_path: Path) -> None:
    evidence = {name: each for name, each in chain.evidence.items() if name != "export"}
    shutil.rmtree(chain["decision"])
    gate_promotion(evidence, dict(chain.plan.policy), chain["decision"])
    with pytest.raises(errors.EvidenceMissing, match="names no single model"):
        make_release(chain, tmp_path / "release", None)
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize("missing", ["onnx", "selected", "decision"])
def test_a_missing_folder_is_named(missing: str, chain: Chain, keys: KeyPair, tmp_path: Path) -> None:
    shutil.rmtree(chain[missing])
    with pytest.raises(errors.QuarantineError, match=missing):
        make_release(chain, tmp_path / "release", keys.private)
    assert not (tmp_path / "release").exists()
