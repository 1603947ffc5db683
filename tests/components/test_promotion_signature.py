"""Promotion lets a release pass only where whom it trusts signed it, for where it goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components._runtime.journal import parent_run
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.release import ATTESTATIONS
from components._runtime.signing_keys import (
    PUBLIC_KEY_VARIABLE,
    KeyPair,
    TrustedSigner,
    generate_key_pair,
    load_signing_key,
)
from components._runtime.statements import Destination
from components.promote_model.step import promote_model
from components.sign_evidence.step import sign_evidence
from defense_core import errors
from tests.certificates import make_certificates
from tests.finished_chain import Chain, decide_again, make_release
from tests.small_model import DEMANDING, POLICY


@pytest.fixture
def connection(mlflow_sqlite: MlflowConnection) -> MlflowConnection:
    return mlflow_sqlite


@pytest.fixture(scope="module")
def demanding(finished: Chain, keys: KeyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed release for digits and champion, decided by a policy that demands signatures."""
    root = tmp_path_factory.mktemp("demanding")
    shutil.copytree(finished.root, root / "chain")
    chain = Chain(finished.plan, root / "chain", dict(finished.evidence))
    decide_again(chain, DEMANDING)
    make_release(chain, root / "release", keys.private)
    return root / "release"


def promoted(folder: Path, connection: MlflowConnection, keys: KeyPair | None, **changes: Any) -> dict[str, Any]:
    wishes: dict[str, Any] = {"name": "digits", "alias": "champion", **changes}
    trusted = TrustedSigner(public_key=keys.public) if keys is not None else None
    results: dict[str, Any] = promote_model(folder, connection=connection, trusted=trusted, **wishes)["results"]
    return results


def is_untouched(connection: MlflowConnection) -> bool:
    """Whether neither a model nor a run was recorded."""
    experiments = connection.client.search_experiments()
    runs = connection.client.search_runs([each.experiment_id for each in experiments])
    return not connection.client.search_registered_models() and not runs


def forge(release: Path) -> None:
    (release / "model.sig").write_bytes(b"nobody signed this")


def strip(release: Path) -> None:
    shutil.rmtree(release / ATTESTATIONS)


def forge_and_strip(release: Path) -> None:
    forge(release)
    strip(release)


def drop_one(release: Path) -> None:
    next((release / ATTESTATIONS).glob("*gate.json")).unlink()


def add(release: Path) -> None:
    (release / "evidence" / "bom" / "more.json").write_text("{}")


@pytest.mark.parametrize("damage", [forge, strip, forge_and_strip, drop_one, add])
@pytest.mark.parametrize("policy", ["demanding", "lenient"])
def test_what_does_not_verify_is_not_registered(
    damage: Callable[[Path], None],
    policy: str,
    demanding: Path,
    signed: Path,
    connection: MlflowConnection,
    keys: KeyPair,
    tmp_path: Path,
) -> None:
    shutil.copytree(demanding if policy == "demanding" else signed, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(errors.EvidenceMismatch, match="does not verify"):
        promoted(tmp_path / "copy", connection, keys)
    assert is_untouched(connection)


@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        ({"name": "doors"}, "signed for the model name digits, and goes to doors"),
        ({"alias": "challenger"}, "signed for the alias champion, and goes to challenger"),
    ],
)
def test_what_was_signed_for_elsewhere_is_not_registered(
    elsewhere: dict[str, str], said: str, demanding: Path, connection: MlflowConnection, keys: KeyPair
) -> None:
    with pytest.raises(errors.EvidenceMismatch, match=said):
        promoted(demanding, connection, keys, **elsewhere)
    assert is_untouched(connection)


def test_another_key_does_not_count(demanding: Path, connection: MlflowConnection, tmp_path: Path) -> None:
    with pytest.raises(errors.EvidenceMismatch, match="not signed by whom you trust"):
        promoted(demanding, connection, generate_key_pair(tmp_path / "stranger"))
    assert is_untouched(connection)


def test_where_nobody_is_trusted_a_demanding_policy_lets_nothing_pass(
    demanding: Path, connection: MlflowConnection
) -> None:
    with pytest.raises(errors.ConfigError, match=f"Set {PUBLIC_KEY_VARIABLE}"):
        promoted(demanding, connection, None)
    assert is_untouched(connection)


def test_what_is_rightly_signed_is_promoted(demanding: Path, connection: MlflowConnection, keys: KeyPair) -> None:
    first, again = (promoted(demanding, connection, keys) for _ in range(2))
    assert (first["alias_moved"], first["signed"]) == (True, True)
    assert (again["reused"], again["signed"]) == (True, True)


def test_what_a_certificate_signed_counts_by_its_root(
    finished: Chain, connection: MlflowConnection, tmp_path: Path
) -> None:
    made, other = make_certificates(tmp_path / "made"), make_certificates(tmp_path / "other")
    make_release(finished, tmp_path / "release", made.key, certificate=made.certificate)
    wishes: dict[str, Any] = {"name": "digits", "alias": "champion", "connection": connection}
    with pytest.raises(errors.EvidenceMismatch, match="does not verify"):
        promote_model(tmp_path / "release", trusted=TrustedSigner(certificate_chain=other.root), **wishes)
    assert is_untouched(connection)
    done = promote_model(tmp_path / "release", trusted=TrustedSigner(certificate_chain=made.root), **wishes)
    assert done["results"]["signed"] is True


def test_a_lenient_policy_says_honestly_what_was_checked(
    finished: Chain, signed: Path, connection: MlflowConnection, keys: KeyPair, tmp_path: Path
) -> None:
    make_release(finished, tmp_path / "unsigned", None)
    assert promoted(tmp_path / "unsigned", connection, None, name="bare")["signed"] is False
    assert promoted(signed, connection, None)["signed"] is None
    assert promoted(signed, connection, keys)["signed"] is True


@pytest.mark.parametrize("policy", [POLICY, {**POLICY, "promote": False}])
def test_no_release_sheds_its_signature_by_the_policy_that_it_brings(
    policy: dict[str, Any], chain: Chain, connection: MlflowConnection, keys: KeyPair, tmp_path: Path
) -> None:
    decide_again(chain, policy)
    make_release(chain, tmp_path / "unsigned", None)
    with pytest.raises(errors.EvidenceMissing, match="told whose signature counts and the release has none"):
        promoted(tmp_path / "unsigned", connection, keys)
    assert is_untouched(connection)


def test_an_unsigned_version_of_earlier_work_stands_for_nothing_where_somebody_is_trusted(
    finished: Chain, signed: Path, connection: MlflowConnection, keys: KeyPair, tmp_path: Path
) -> None:
    make_release(finished, tmp_path / "unsigned", None)
    promoted(tmp_path / "unsigned", connection, None)
    with pytest.raises(errors.RegistryConflict, match="without a signature"):
        promoted(signed, connection, keys)


def test_a_version_that_nobody_checked_does_not_stand_for_signed_work(
    finished: Chain, signed: Path, connection: MlflowConnection, keys: KeyPair, tmp_path: Path
) -> None:
    shutil.copytree(signed, tmp_path / "forged")
    forge(tmp_path / "forged")
    assert promoted(tmp_path / "forged", connection, None)["signed"] is None
    make_release(finished, tmp_path / "again", keys.private, destination=Destination("digits", "challenger"))
    with pytest.raises(errors.RegistryConflict, match="without a good signature"):
        promoted(tmp_path / "again", connection, keys, alias="challenger")
    assert "challenger" not in connection.client.get_registered_model("digits").aliases


def test_signed_work_gets_a_second_alias(
    finished: Chain, signed: Path, connection: MlflowConnection, keys: KeyPair, tmp_path: Path
) -> None:
    promoted(signed, connection, keys)
    make_release(finished, tmp_path / "again", keys.private, destination=Destination("digits", "challenger"))
    second = promoted(tmp_path / "again", connection, keys, alias="challenger")
    assert (second["reused"], second["alias_moved"], second["signed"]) == (True, True, True)


def test_a_release_that_changes_after_its_check_gets_no_alias(
    demanding: Path, connection: MlflowConnection, keys: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.promote_model import step

    shutil.copytree(demanding, tmp_path / "copy")
    found = parent_run

    def swap(*arguments: Any) -> Any:
        add(tmp_path / "copy")
        return found(*arguments)

    monkeypatch.setattr(step, "parent_run", swap)
    with pytest.raises(errors.RegistryConflict, match="without a good signature"):
        promoted(tmp_path / "copy", connection, keys)
    assert not connection.client.get_registered_model("digits").aliases


def test_a_statement_of_the_sign_step_is_needed_for_the_destination(
    chain: Chain, connection: MlflowConnection, keys: KeyPair, tmp_path: Path
) -> None:
    """The model signature alone says nothing of where the release may go."""
    from components._runtime.model_signature import sign_folder

    sign_evidence(
        chain["selected"],
        chain["onnx"],
        chain["decision"],
        tmp_path / "release",
        destination=Destination("digits", "champion"),
        key=None,
    )
    sign_folder(tmp_path / "release", load_signing_key(keys.private))
    with pytest.raises(errors.EvidenceMismatch, match="does not verify"):
        promoted(tmp_path / "release", connection, keys)
    assert is_untouched(connection)
