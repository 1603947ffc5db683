"""``verify models:/name/version``: tags and aliases are compared with what was signed."""

from __future__ import annotations

from pathlib import Path

import pytest

from components._runtime import registry_tags as tag
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.signing_keys import KeyPair, TrustedSigner
from components._runtime.statements import Destination
from components._runtime.verification import Verification
from components._runtime.verification_registry import verify_registered
from components.promote_model.step import promote_model
from defense_core.errors import RegistryConflict, SourceNotFound
from defense_core.verdict import Verdict
from tests.finished_chain import Chain, decide_again, make_release
from tests.small_model import DENYING


@pytest.fixture(scope="module")
def version(connection: MlflowConnection, signed: Path) -> str:
    done = promote_model(signed, name="digits", alias="champion", connection=connection)
    return str(done["results"]["version"])


def verified(connection: MlflowConnection, keys: KeyPair, uri: str = "models:/digits@champion") -> Verification:
    return verify_registered(connection, uri, TrustedSigner(public_key=keys.public))


def test_a_registered_version_is_whole(connection: MlflowConnection, keys: KeyPair, version: str) -> None:
    found = verified(connection, keys)
    assert found.verdict is Verdict.PASS, found.differences
    assert found.what == f"models:/digits/{version}"
    assert "verify.registry" in {finding.rule for finding in found.findings}


@pytest.mark.parametrize(
    "name",
    [
        tag.DECISION,
        tag.POLICY,
        tag.IDENTITY,
        tag.SOURCE_DIGEST,
        tag.ONNX_DIGEST,
        tag.BUNDLE_DIGEST,
        tag.EVIDENCE_DIGEST,
        tag.FILES_DIGEST,
    ],
)
@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "edited"])
def test_a_tag_that_says_something_else_is_named(
    connection: MlflowConnection, keys: KeyPair, version: str, name: str, deleted: bool
) -> None:
    before = connection.client.get_model_version("digits", version).tags[name]
    if deleted:
        connection.client.delete_model_version_tag("digits", version, name)
    else:
        connection.client.set_model_version_tag("digits", version, name, "edited")
    try:
        found = verified(connection, keys, f"models:/digits/{version}")
    finally:
        connection.client.set_model_version_tag("digits", version, name, before)
    assert found.verdict is Verdict.FAIL
    (difference,) = found.differences
    assert difference.file == f"tag {name}"
    assert before in difference.why


def test_a_reason_on_an_allowed_version_is_named(connection: MlflowConnection, keys: KeyPair, version: str) -> None:
    connection.client.set_model_version_tag("digits", version, tag.REASON, tag.DENIED)
    found = verified(connection, keys)
    connection.client.delete_model_version_tag("digits", version, tag.REASON)
    assert [each.file for each in found.differences] == [f"tag {tag.REASON}"]


def test_a_pending_version_is_not_yet_known(connection: MlflowConnection, keys: KeyPair, version: str) -> None:
    connection.client.set_model_version_tag("digits", version, tag.DECISION, tag.PENDING)
    found = verified(connection, keys)
    connection.client.set_model_version_tag("digits", version, tag.DECISION, tag.ALLOW)
    assert found.verdict is Verdict.UNKNOWN


def test_registered_bytes_that_changed_are_named(connection: MlflowConnection, keys: KeyPair, version: str) -> None:
    source = connection.client.get_model_version("digits", version).source
    path = Path(source.removeprefix("file://")) / "bundle" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = verified(connection, keys)
    path.write_bytes(data)
    assert "bundle/model.safetensors" in {each.file for each in found.differences}


def test_a_release_registered_under_another_name_is_found(
    connection: MlflowConnection, keys: KeyPair, version: str
) -> None:
    old = connection.client.get_model_version("digits", version)
    connection.client.create_registered_model("doors")
    connection.client.create_model_version("doors", source=old.source, run_id=old.run_id, tags=dict(old.tags))
    found = verified(connection, keys, "models:/doors/1")
    assert [each.file for each in found.differences] == ["name"]
    assert "digits" in found.differences[0].why


def test_an_alias_on_a_refused_version_is_found(
    connection: MlflowConnection, keys: KeyPair, chain: Chain, tmp_path: Path
) -> None:
    decide_again(chain, DENYING)
    make_release(chain, tmp_path / "release", keys.private, destination=Destination("refused", "champion"))
    done = promote_model(tmp_path / "release", name="refused", alias="champion", connection=connection)
    uri = f"models:/refused/{done['results']['version']}"
    assert verified(connection, keys, uri).verdict is Verdict.PASS
    connection.client.set_registered_model_alias("refused", "champion", done["results"]["version"])
    found = verified(connection, keys, uri)
    assert [each.file for each in found.differences] == ["alias champion"]


def test_an_unsigned_version_does_not_stand_for_signed_work(
    connection: MlflowConnection, keys: KeyPair, chain: Chain, tmp_path: Path
) -> None:
    make_release(chain, tmp_path / "unsigned", None)
    make_release(chain, tmp_path / "signed", keys.private)
    promote_model(tmp_path / "unsigned", name="late", alias="champion", connection=connection)
    with pytest.raises(RegistryConflict, match="without a signature"):
        promote_model(tmp_path / "signed", name="late", alias="champion", connection=connection)


def test_an_address_that_names_nothing(connection: MlflowConnection, keys: KeyPair) -> None:
    with pytest.raises(SourceNotFound):
        verified(connection, keys, "models:/nothing/1")
