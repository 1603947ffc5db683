"""Paths and addresses that an operator gives: what is copied, under which name, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from components._runtime import copies, registered_files
from components._runtime.addresses import local_path, split_address
from components._runtime.checkpoint_store import files_below
from components._runtime.evidence import read_evidence, read_folder
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.s3_connection import S3Location
from components._runtime.s3_download import look_up
from components._runtime.signing_keys import TrustedSigner
from components._runtime.sources import Acquired, _model_within, acquire
from components._runtime.store import open_store
from components._runtime.verification import verify_release
from defense_core.artifact_scan import scan_artifact
from defense_core.errors import (
    EXIT_USAGE,
    AccessDenied,
    ArtifactTooLarge,
    ConfigError,
    EvidenceMismatch,
    EvidenceMissing,
    OutputExists,
    SourceError,
    SourceNotFound,
    StorageError,
    TransferFailed,
    UnsafeArtifact,
)
from defense_core.files import atomic_directory
from defense_core.progress import NullProgress
from pipelines.cluster_options import require_reachable
from pipelines.local import _reached
from pipelines.options import read_policy
from pipelines.policy_replay import find_runs

LONG = "x" * 300


def fetched(uri: object, tmp_path: Path, max_bytes: int = 1000) -> Acquired:
    (tmp_path / "into").mkdir()
    return acquire(str(uri), tmp_path / "into", max_bytes=max_bytes, progress=NullProgress())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file in a folder."""
    path = tmp_path / "given"
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "a.txt").write_text("hello")
    return path


@pytest.mark.parametrize("given", [".", "..", "inner/..", "../given"])
def test_a_folder_is_copied_however_its_path_ends(
    given: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "inner" if given == ".." else folder)
    found = fetched(given, tmp_path)
    assert found.path == tmp_path / "into" / "given"
    assert (found.path / "inner" / "a.txt").read_text() == "hello"


def test_a_link_that_is_named_gives_its_own_name(folder: Path, tmp_path: Path) -> None:
    """The name tells the format, and a store of blobs has no endings."""
    (tmp_path / "clean.npz").symlink_to(folder / "inner" / "a.txt")
    assert fetched(tmp_path / "clean.npz", tmp_path).path.name == "clean.npz"


@pytest.mark.parametrize(
    "uri", ["file://%00", "file://", "file://relative/a.npz", "file:///a%00b", "s3://[x/y", "//[x"]
)
def test_an_address_that_names_nothing_is_bad_usage(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fetched(uri, tmp_path)
    assert caught.value.exit_code == EXIT_USAGE


def test_a_file_address_names_its_path() -> None:
    assert local_path("file:///a%20b") == local_path("file://localhost/a%20b") == Path("/a b")
    assert local_path("a%20b") == Path("a%20b")


def test_one_function_splits_every_address() -> None:
    for split in (split_address, _reached, files_below, lambda text: open_store(text, "run")):
        with pytest.raises(ConfigError, match="address is malformed"):
            split("s3://[x/y")
    with pytest.raises(ConfigError, match="address is malformed"):
        require_reachable("--clean", "s3://[x/y", ("s3",))


@pytest.mark.parametrize("uri", ["/dev/zero", "file:///dev/null"])
def test_a_device_is_not_copied(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeArtifact, match="something else than files"):
        fetched(uri, tmp_path)
    assert list((tmp_path / "into").iterdir()) == []


def test_a_pipe_in_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "inner" / "pipe")
    with pytest.raises(UnsafeArtifact, match="something else than files"):
        fetched(folder, tmp_path)


def test_a_file_that_grows_is_copied_up_to_the_limit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "CHUNK_BYTES", 100)
    large = folder / "inner" / "a.txt"

    class Grown(copies._Copying):
        def one(self, source: str | Path, target: str | Path) -> None:
            large.write_bytes(bytes(5000))
            super().one(source, target)

    monkeypatch.setattr(copies, "_Copying", Grown)
    with pytest.raises(ArtifactTooLarge, match="at most 1000 bytes, got more, while it was copied"):
        fetched(folder, tmp_path)
    assert (tmp_path / "into" / "given" / "inner" / "a.txt").stat().st_size <= 1000


def test_a_name_that_no_file_can_have_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="File name too long"):
        fetched(tmp_path / LONG, tmp_path)
    with pytest.raises(SourceError, match="File name too long"):
        scan_artifact(tmp_path / LONG)
    with pytest.raises(ConfigError, match="File name too long"):
        read_policy(LONG)
    with pytest.raises(StorageError, match="File name too long"), atomic_directory(tmp_path / LONG):
        pass
    with pytest.raises(EvidenceMismatch, match="File name too long"):
        read_evidence(tmp_path / LONG)


def test_what_is_not_there_stays_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        fetched(tmp_path / "none", tmp_path)
    with pytest.raises(SourceNotFound):
        scan_artifact(tmp_path / "none")
    with pytest.raises(EvidenceMissing):
        read_evidence(tmp_path / "none")
    with pytest.raises(OutputExists), atomic_directory(tmp_path):
        pass


def test_a_file_in_a_folder_that_may_not_be_entered_is_not_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, **options: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(AccessDenied, match="Permission denied"):
        scan_artifact(tmp_path / "model.pt")
    with pytest.raises(AccessDenied, match="Permission denied"):
        fetched(tmp_path / "model.pt", tmp_path)
    with pytest.raises(AccessDenied, match="Permission denied"):
        read_evidence(tmp_path / "fetch.json")
    with pytest.raises(AccessDenied, match="Permission denied"):
        read_folder(tmp_path / "evidence")
    keys = Path(__file__).parents[1] / "formats" / "v1"
    with pytest.raises(AccessDenied, match="Permission denied"):
        verify_release(tmp_path / "release", TrustedSigner(public_key=keys / "signing.pub"))


@pytest.mark.parametrize("locked", ["run", "below"])
def test_a_folder_that_may_not_be_listed_is_not_called_empty(
    locked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "below").mkdir(parents=True)

    def refusing(real: Any) -> Any:
        def listed(path: Any) -> Any:
            if Path(path).name == locked:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return listed

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(AccessDenied, match="Permission denied"):
        find_runs(tmp_path / "run")
    with pytest.raises(AccessDenied, match="Permission denied"):
        read_folder(tmp_path / "run" if locked == "run" else tmp_path / "run" / "below")
    if locked == "run":
        with pytest.raises(AccessDenied, match="Permission denied"):
            open_store(str(tmp_path), "run").records()


def test_a_registered_checkpoint_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "net.ckpt").write_bytes(b"weights")
    assert _model_within(tmp_path, "models:/net/1") == tmp_path / "net.ckpt"


def test_a_folder_in_the_place_of_evidence_is_damage(tmp_path: Path) -> None:
    (tmp_path / "run" / "fetch.json").mkdir(parents=True)
    with pytest.raises(EvidenceMismatch, match="cannot be read"):
        read_folder(tmp_path / "run")
    with pytest.raises(EvidenceMismatch, match="cannot be read"):
        open_store(str(tmp_path), "run").earlier("fetch")


@pytest.mark.parametrize("missing", ["ETag", "ContentLength"])
def test_an_answer_of_s3_that_lacks_what_pins_an_object(missing: str) -> None:
    answer = {"ETag": '"1"', "ContentLength": 1, "ResponseMetadata": {}}
    client = SimpleNamespace(head_object=lambda **_: {key: each for key, each in answer.items() if key != missing})
    with pytest.raises(TransferFailed, match=f"no {missing}"):
        look_up(client, S3Location("bucket", "key"))


def test_files_of_a_version_are_added_up_while_they_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repository: object, path: str, folder: Path, what: str) -> None:
        asked.append(path)
        (folder / path).write_bytes(bytes(100))

    monkeypatch.setattr(registered_files, "_repository", lambda *_: None)
    monkeypatch.setattr(registered_files, "_listing", lambda *_: dict.fromkeys("abc", 1))
    monkeypatch.setattr(registered_files, "_download", download)
    monkeypatch.setattr(registered_files, "require_allowed_source", lambda *_: None)
    connection = cast(MlflowConnection, SimpleNamespace(settings=None))
    with pytest.raises(ArtifactTooLarge):
        registered_files.download_files(connection, tmp_path.as_uri(), tmp_path, "models:/m/1", max_bytes=150)
    assert asked == ["a", "b"]
