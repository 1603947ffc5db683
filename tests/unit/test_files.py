"""Files and folders are whole or absent, whatever happens."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import pytest

from defense_core.errors import EXIT_UNKNOWN, OutputExists, StorageError
from defense_core.files import atomic_directory, require_writable, sha256_bytes, sha256_file, write_atomic


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


# -- digests ---------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"abc", b"x" * (3 << 20)])
def test_digests_agree(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    expected = "sha256:" + hashlib.sha256(data).hexdigest()
    assert sha256_bytes(data) == sha256_file(tmp_path / "file") == expected


# -- one file --------------------------------------------------------------------------


def test_file_is_written_readable_and_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["file.json"]


@pytest.mark.parametrize("failing", ["fsync", "fdopen"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left on device") as caught:  # noqa: PT012
        patch.setattr(os, failing, full_disk)
        write_atomic(path, b"new")
    assert caught.value.exit_code == EXIT_UNKNOWN
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.json"]


def test_ctrl_c_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(os, "fsync", interrupt)
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.json"]


def test_a_file_in_the_place_of_the_folder_is_a_storage_error(tmp_path):
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "folder" / "file", b"data")
    with pytest.raises(StorageError), atomic_directory(tmp_path / "folder" / "out"):
        pass


# -- a folder --------------------------------------------------------------------------


def fill(folder: Path, text: str = "new") -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text(text)


def test_folder_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "a" / "out") as folder:
        fill(folder)
        (folder / "link").symlink_to("deep/file")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "deep" / "file").read_text() == "new"
    assert (tmp_path / "a" / "out" / "link").read_text() == "new"
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755
    assert names(tmp_path / "a") == ["out"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:
        fill(folder)
    assert names(tmp_path / "out") == ["deep"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bug"),
        KeyboardInterrupt(),
        SystemExit(1),
        OSError(errno.ENOSPC, "full"),
        FileNotFoundError(2, "no", "in"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("existing", [False, True])
def test_any_exception_leaves_nothing_new(tmp_path, error, existing):
    if existing:
        with atomic_directory(tmp_path / "out") as folder:
            fill(folder, "old")
    with pytest.raises(BaseException) as caught, atomic_directory(tmp_path / "out", replace=existing) as folder:  # noqa: PT011,PT012
        fill(folder)
        raise error
    assert caught.value is error or isinstance(caught.value, StorageError)
    assert names(tmp_path) == (["out"] if existing else [])
    if existing:
        assert (tmp_path / "out" / "deep" / "file").read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_disk_errors_of_the_block_are_storage_errors(tmp_path, code):
    with pytest.raises(StorageError, match="cannot write") as caught, atomic_directory(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert caught.value.got == os.strerror(code)
    assert names(tmp_path) == []


def test_errors_about_files_in_the_folder_are_storage_errors(tmp_path):
    with pytest.raises(StorageError), atomic_directory(tmp_path / "out") as folder:
        (folder / "missing" / "file").write_text("x")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "no such file", "/in/model.pt"), ConnectionResetError(errno.ECONNRESET, "reset")],
)
def test_other_errors_of_the_block_keep_their_name(tmp_path, error):
    """A lost connection or a missing input is not 'cannot write the output'."""
    with pytest.raises(type(error)) as caught, atomic_directory(tmp_path / "out"):
        raise error
    assert caught.value is error
    assert names(tmp_path) == []


def test_full_disk_while_flushing_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(StorageError), atomic_directory(tmp_path / "out") as folder:  # noqa: PT012
        fill(folder)
        patch.setattr(os, "fsync", full_disk)
    assert names(tmp_path) == []


def test_a_folder_in_use_is_refused_before_the_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(OutputExists, match="in use"), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(OutputExists, match="in use"), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "keep"


def test_a_folder_that_was_filled_meanwhile_is_not_deleted(tmp_path):
    with pytest.raises(StorageError), atomic_directory(tmp_path / "out") as folder:  # noqa: PT012
        fill(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("keep")
    assert (tmp_path / "out" / "other").read_text() == "keep"
    assert names(tmp_path) == ["out"]


def test_replace_swaps_the_whole_folder(tmp_path):
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "out", replace=True) as folder:
            fill(folder, text)
            (folder / text).write_text("")
    assert names(tmp_path / "out") == ["deep", "new"]
    assert names(tmp_path) == ["out"]


def test_replace_that_fails_at_the_last_moment_restores_the_old_folder(tmp_path, monkeypatch):
    with atomic_directory(tmp_path / "out") as folder:
        fill(folder, "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.") and ".old." not in self.parent.name:
            raise OSError(errno.EIO, "disk trouble")
        return rename(self, target)

    with (  # noqa: PT012
        monkeypatch.context() as patch,
        pytest.raises(StorageError),
        atomic_directory(tmp_path / "out", replace=True) as folder,
    ):
        fill(folder)
        patch.setattr(Path, "rename", refuse)
    assert (tmp_path / "out" / "deep" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("place", [".", "folder", "file/pool.json"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(place, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError if "/" in place else OutputExists):
        require_writable(Path(place))
    require_writable(Path("new/deep/pool.json"))
    require_writable(Path("file"))
    assert names(tmp_path) == ["file", "folder"]


def test_a_folder_without_the_right_to_write_is_refused_before_the_work(tmp_path, monkeypatch):
    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        require_writable(tmp_path / "pool.json")
