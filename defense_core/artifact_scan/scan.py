"""The scan of a file or of a folder."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from defense_core import __version__
from defense_core.artifact_scan import archive_files, kinds, pickle_files, tensor_files
from defense_core.artifact_scan.budget import Budget
from defense_core.artifact_scan.findings import MAX_FINDINGS, ArtifactScan, FileScan, ScanFinding, State
from defense_core.artifact_scan.kinds import Kind, kind_of
from defense_core.artifact_scan.onnx_files import looks_like_onnx, scan_onnx
from defense_core.errors import (
    AccessDenied,
    CorruptArtifact,
    LoadTimeout,
    ScanInconclusive,
    SourceError,
    SourceNotFound,
    UnsafeArtifact,
)
from defense_core.files import reading, sha256_file
from defense_core.limits import LoadLimits

_SCANNERS = ("fickling",)
# What parsers of damaged bytes raise beside the typed errors; the file is then inconclusive.
_DAMAGE = (
    ValueError, KeyError, IndexError, TypeError, EOFError, OverflowError, RecursionError, MemoryError,
    NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# Rules that say what loading would say too: damaged, or of no format that is accepted.
_NO_MODEL = ("damaged", "format-unknown", "format-unsupported", "name-differs")


def scan_artifact(path: Path, limits: LoadLimits | None = None) -> ArtifactScan:
    """What may be said of the file, or of every file in the folder, at ``path``; nothing is loaded.

    A link that is named itself is followed, as the operator named it; links inside a folder are dangerous. What all
    archives expand to together, and the time, is bounded by :class:`Budget`; what it does not reach is inconclusive.

    Raises:
        SourceNotFound: nothing is at ``path``.
        AccessDenied: this account may not look at it.
        SourceError: no file can have that name.
    """
    path, limits = Path(path), limits or LoadLimits()
    with reading(path, SourceError, "a file or a folder", denied=AccessDenied):
        if not path.exists() and not path.is_symlink():
            raise SourceNotFound(f"{path} does not exist", expected="a file or a folder", hint="Check the path")
        is_folder = path.is_dir()
    budget = Budget(limits)
    one = (_scan_file(path, path.name, budget, follow=True),) if not is_folder else ()
    files = one or tuple(_folder(path, budget))
    return ArtifactScan(files, {"model-quarantine": __version__, **_versions()})


def require_clean(scan: ArtifactScan) -> None:
    """Refuse what is not clean, naming the first reason.

    Raises:
        UnsafeArtifact: dangerous.
        CorruptArtifact: damaged, or of no accepted format.
        ScanInconclusive: the scan could not finish.
    """
    if scan.state is State.CLEAN:
        return
    first = scan.findings[0] if scan.findings else ScanFinding("format-unknown", ".", "there is no file")
    kind = (
        UnsafeArtifact
        if scan.state is State.DANGEROUS
        else CorruptArtifact
        if first.rule in _NO_MODEL
        else ScanInconclusive
    )
    more = f" and {len(scan.findings) - 1} more" if len(scan.findings) > 1 else ""
    raise kind(
        f"the scan found {first.where} {scan.state.value}",
        expected="a clean artifact",
        got=f"{first.rule}: {first.message}{more}",
        hint="Nothing was loaded. " + first.advice,
    )


def _folder(folder: Path, budget: Budget) -> Iterator[FileScan]:
    limits = budget.bounds
    unread: list[ScanFinding] = []

    def note(error: OSError) -> None:
        unread.append(ScanFinding("unreadable", str(error.filename), str(error.strerror)))

    count = 0
    for parent, folders, names in os.walk(folder, followlinks=False, onerror=note):
        folders.sort()
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*names, *links]):
            count += 1
            if count > limits.max_entries:
                unread.append(ScanFinding("too-large", ".", f"more than {limits.max_entries} files"))
                break
            path = Path(parent) / name
            yield _scan_file(path, str(path.relative_to(folder)), budget)
        if count > limits.max_entries:
            break
    if unread:
        yield FileScan(".", kinds.SPECIAL, 0, "", tuple(unread[:MAX_FINDINGS]))


def _scan_file(path: Path, shown: str, budget: Budget, *, follow: bool = False) -> FileScan:
    limits = budget.bounds
    named = [] if shown.isprintable() else [ScanFinding("file-name", shown, "its name holds invisible characters")]
    try:
        status = path.stat() if follow else path.lstat()
    except OSError as error:
        what = "a link to nothing" if path.is_symlink() else str(error.strerror)
        found = ScanFinding("file-special" if path.is_symlink() else "unreadable", shown, what)
        return FileScan(shown, kinds.SPECIAL, 0, "", (*named, found))
    if not stat.S_ISREG(status.st_mode):
        found = ScanFinding("file-special", shown, f"no regular file ({stat.filemode(status.st_mode)})")
        return FileScan(shown, kinds.SPECIAL, 0, "", (*named, found))
    if status.st_size > limits.max_bytes:
        found = ScanFinding("too-large", shown, f"{status.st_size} bytes where {limits.max_bytes} are allowed")
        return FileScan(shown, kinds.UNKNOWN, status.st_size, "", (*named, found))
    try:
        kind, findings = _judge(path, shown, budget, 0)
        digest = sha256_file(path)
    except OSError as error:
        found = ScanFinding("unreadable", shown, str(error.strerror or error))
        return FileScan(shown, kinds.UNKNOWN, status.st_size, "", (*named, found))
    findings = [*named, *_of_name(path.name, kind, shown), *findings]
    worst_first = sorted(findings, key=lambda each: each.state is not State.DANGEROUS)
    return FileScan(shown, kind.note or kind.name, status.st_size, digest, tuple(worst_first[:MAX_FINDINGS]))


def _judge(path: Path, where: str, budget: Budget, depth: int) -> tuple[Kind, list[ScanFinding]]:
    try:
        budget.require_time()
    except LoadTimeout as error:
        return Kind(kinds.UNKNOWN), [ScanFinding("too-slow", where, str(error))]
    size, limits = path.stat().st_size, budget.bounds
    kind = kind_of(path, limits.max_entries)
    if kind.name == kinds.UNKNOWN and looks_like_onnx(path):
        kind = Kind(kinds.ONNX)
    try:
        found = _by_kind(_Job(path, where, size, depth, budget, kind))
        if kind.name not in (kinds.PICKLE, kinds.TORCH_LEGACY, kinds.EMPTY):
            found += pickle_files.hidden_pickle(path, where)
    except _DAMAGE as error:
        found = [ScanFinding("damaged", where, f"{type(error).__name__}: {error}")]
    zips = (kinds.ZIP, kinds.TORCH_ZIP, kinds.PT2, kinds.NPZ, kinds.KERAS, kinds.TORCHSCRIPT)
    if kind.name not in zips and kinds.ends_as_zip(path, size):
        found.append(ScanFinding("archive-polyglot", where, "its end is that of a zip archive"))
    with open(path, "rb") as stream:
        if kind.name not in (kinds.TAR, kinds.EMPTY) and kinds.is_tar(stream.read(512)):
            found.append(ScanFinding("archive-polyglot", where, "its start is that of a tar archive"))
    return kind, found


@dataclass(frozen=True)
class _Job:
    """One file to judge: where it lies, how it is shown, how large and how deep in archives it is."""

    path: Path
    where: str
    size: int
    depth: int
    budget: Budget
    kind: Kind


def _by_kind(job: _Job) -> list[ScanFinding]:
    path, where, limits = job.path, job.where, job.budget.limits
    container = (path, where, job.budget, _recurse(job.budget), job.depth)
    scans: dict[str, Callable[[], list[ScanFinding]]] = {
        kinds.SAFETENSORS: lambda: tensor_files.scan_safetensors(path, job.size, where),
        kinds.TORCH_ZIP: lambda: archive_files.scan_torch_zip(path, where, limits),
        kinds.TORCH_LEGACY: lambda: pickle_files.scan_legacy(path, where, limits),
        kinds.PICKLE: lambda: pickle_files.scan_bare_pickle(path, where),
        kinds.NPY: lambda: tensor_files.scan_npy_file(path, where),
        kinds.PT2: lambda: archive_files.scan_pt2(*container),
        kinds.TORCHSCRIPT: lambda: archive_files.scan_torchscript(path, where, limits),
        kinds.NPZ: lambda: archive_files.scan_npz(path, where, job.budget),
        kinds.KERAS: lambda: archive_files.scan_keras(path, where, limits),
        kinds.HDF5: lambda: tensor_files.scan_hdf5(path, where),
        kinds.ONNX: lambda: scan_onnx(path, where, limits.max_bytes),
        kinds.ZIP: lambda: archive_files.scan_container(*container),
        kinds.TAR: lambda: archive_files.scan_container(*container),
        kinds.COMPRESSED: lambda: archive_files.scan_compressed(*container),
        kinds.JSON: lambda: pickle_files.scan_text(path, where),
        kinds.TEXT: lambda: pickle_files.scan_text(path, where),
        kinds.PROGRAM: lambda: [ScanFinding("executable", where, "it starts like a program or script", 0)],
        kinds.EMPTY: lambda: [ScanFinding("damaged", where, "the file is empty")],
        kinds.OTHER: lambda: [ScanFinding("format-unsupported", where, f"a {job.kind.note}")],
    }
    return scans.get(job.kind.name, lambda: _unknown(path, where))()


def _unknown(path: Path, where: str) -> list[ScanFinding]:
    with open(path, "rb") as stream:
        return [ScanFinding("format-unknown", where, "it starts with " + stream.read(8).hex(" "), 0)]


def _recurse(budget: Budget) -> archive_files.Recurse:
    def scan(path: Path, where: str, depth: int) -> list[ScanFinding]:
        kind, found = _judge(path, where, budget, depth)
        return [*_of_name(Path(where).name, kind, where), *found]

    return scan


def _of_name(name: str, kind: Kind, where: str) -> list[ScanFinding]:
    rule = kinds.name_objection(name, kind)
    what = kind.note or kind.name
    return [] if rule is None else [ScanFinding(rule, where, f"the content is {what}, the name is {name!r}")]


def _versions() -> dict[str, str]:
    found = {}
    for name in _SCANNERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
