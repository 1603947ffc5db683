"""Archives: their layout first, then every member as a file of its own."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from defense_core.archives import checked_zip, common_root, damage_as_errors, unpacked
from defense_core.artifact_scan.budget import Budget
from defense_core.artifact_scan.findings import ScanFinding
from defense_core.artifact_scan.pickle_files import scan_raw, scan_torch_pickle
from defense_core.artifact_scan.tensor_files import scan_keras_config, scan_npy
from defense_core.compressed import expand
from defense_core.errors import (
    ArtifactTooLarge,
    CorruptArtifact,
    LoadTimeout,
    QuarantineError,
    StorageError,
    UnsafeArtifact,
)
from defense_core.files import CHUNK_BYTES
from defense_core.limits import LoadLimits
from defense_core.plain_members import PT2_PLAIN, TORCH_PLAIN, check_plain_members
from defense_core.untrusted import torch_root

MAX_DEPTH = 3
_MAX_JSON_BYTES = 64 << 20
_PT2_RAW = ("data/weights/weight_", "data/constants/tensor_")
# Scans the file at a path, shown under a name, at a depth of nesting.
Recurse = Callable[[Path, str, int], list[ScanFinding]]


@contextmanager
def errors_as_findings(found: list[ScanFinding], where: str, rule: str = "archive-unsafe") -> Iterator[None]:
    """Typed errors of the readers as findings; ``rule`` is for what is unsafe rather than damaged."""
    try:
        yield
    except UnsafeArtifact as error:
        found.append(ScanFinding(rule, where, str(error)))
    except ArtifactTooLarge as error:
        found.append(ScanFinding("too-large", where, str(error)))
    except LoadTimeout as error:
        found.append(ScanFinding("too-slow", where, str(error)))
    except CorruptArtifact as error:
        found.append(ScanFinding("damaged", where, str(error)))
    except StorageError as error:
        found.append(ScanFinding("unreadable", where, str(error)))
    except QuarantineError as error:
        found.append(ScanFinding("format-unsupported", where, str(error)))


def scan_torch_zip(path: Path, where: str, limits: LoadLimits) -> list[ScanFinding]:
    """Findings of a zip-format ``torch.save`` file."""
    found: list[ScanFinding] = []
    with errors_as_findings(found, where), checked_zip(path, limits, stored_only=True) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        with errors_as_findings(found, where):
            torch_root(path, archive.namelist())
        for name in pickles[:2]:
            found += scan_torch_pickle(archive, name, where, limits)
        with errors_as_findings(found, where):
            root = common_root(archive.namelist()) or ""
            check_plain_members(archive, root, TORCH_PLAIN, where=path.name)
        found += _damaged_members(archive, where)
    return found


def scan_torchscript(path: Path, where: str, limits: LoadLimits) -> list[ScanFinding]:
    """Findings of a TorchScript archive; never none, because it is a program."""
    found = [ScanFinding("torchscript-code", where, "it holds TorchScript code or its constants")]
    with errors_as_findings(found, where), checked_zip(path, limits, stored_only=False):
        pass
    return found


def scan_pt2(path: Path, where: str, budget: Budget, recurse: Recurse, depth: int) -> list[ScanFinding]:
    """Findings of a ``torch.export`` archive: every member has a known place, and pickles are pickles of tensors."""
    found: list[ScanFinding] = []
    with errors_as_findings(found, where), checked_zip(path, budget.limits, stored_only=True) as archive:
        root = common_root(archive.namelist()) or ""
        for entry in archive.infolist():
            inner, inside = entry.filename.removeprefix(root), f"{where}!/{entry.filename}"
            if inner in PT2_PLAIN or entry.is_dir():
                continue
            if inner.endswith("_config.json"):
                found += _weights_table(archive, entry, inside)
            elif inner.startswith(_PT2_RAW):
                with _extracted(archive, entry, budget) as member:
                    found += scan_raw(member, inside)
            elif inner.endswith((".json", ".pt")):
                with _extracted(archive, entry, budget) as member:
                    found += recurse(member, inside, depth + 1)
            else:
                found.append(ScanFinding("pt2-code", inside, "a member of unknown purpose, or compiled code"))
        with errors_as_findings(found, where):
            check_plain_members(archive, root, PT2_PLAIN, where=path.name)
        found += _damaged_members(archive, where)
    return found


def scan_npz(path: Path, where: str, budget: Budget) -> list[ScanFinding]:
    """Findings of a numpy archive."""
    found: list[ScanFinding] = []
    with errors_as_findings(found, where), checked_zip(path, budget.limits, stored_only=False) as archive:
        budget.spend(sum(entry.file_size for entry in archive.infolist()))
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                found += scan_npy(stream, entry.file_size, f"{where}!/{entry.filename}")  # type: ignore[arg-type]
        found += _damaged_members(archive, where)
    return found


def scan_keras(path: Path, where: str, limits: LoadLimits) -> list[ScanFinding]:
    """Findings of a ``.keras`` archive; never none."""
    found: list[ScanFinding] = []
    with errors_as_findings(found, where), checked_zip(path, limits, stored_only=False) as archive:
        if archive.getinfo("config.json").file_size > _MAX_JSON_BYTES:
            raise ArtifactTooLarge(f"config.json of {where} is too large", expected=f"{_MAX_JSON_BYTES} bytes")
        found += scan_keras_config(archive.read("config.json"), f"{where}!/config.json")
    return found


def scan_container(path: Path, where: str, budget: Budget, recurse: Recurse, depth: int) -> list[ScanFinding]:
    """Findings of a zip or tar archive of files, compressed or not."""
    found: list[ScanFinding] = []
    if depth >= MAX_DEPTH:
        return [ScanFinding("too-deep", where, f"an archive inside {depth} others")]
    with errors_as_findings(found, where), unpacked(path, budget.limits, spend=budget.spend) as folder:
        members = sorted(member for member in folder.rglob("*") if member.is_file())
        if not members:
            found.append(ScanFinding("damaged", where, "an archive without any file"))
        for member in members:
            found += recurse(member, f"{where}!/{member.relative_to(folder)}", depth + 1)
    return found


def scan_compressed(path: Path, where: str, budget: Budget, recurse: Recurse, depth: int) -> list[ScanFinding]:
    """Findings of a compressed stream: of the tar archive in it, or of the file in it."""
    found: list[ScanFinding] = []
    if depth >= MAX_DEPTH:
        return [ScanFinding("too-deep", where, f"a compressed file inside {depth} others")]
    with tempfile.TemporaryDirectory(prefix="quarantine-") as folder:
        plain = Path(folder) / "content"
        with errors_as_findings(found, where), damage_as_errors(path), open(plain, "wb") as sink:
            expand(path, sink, budget.bounds.max_bytes, bare_zlib=True, spend=budget.spend)
        if not found:
            inside = f"{where}!/content"
            found += recurse(plain, inside, depth + 1)
    return found


@contextmanager
def _extracted(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: Budget) -> Iterator[Path]:
    # Only the ending of the member's name is kept: the name is shown, and never used.
    ending = Path(entry.filename).suffix
    with tempfile.TemporaryDirectory(prefix="quarantine-") as folder:
        target = Path(folder) / ("member" + (ending if ending in (".json", ".pt") else ""))
        with archive.open(entry) as source, open(target, "wb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                budget.spend(len(chunk))
                sink.write(chunk)
        yield target


def _weights_table(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, inside: str) -> list[ScanFinding]:
    if entry.file_size > _MAX_JSON_BYTES:
        return [ScanFinding("too-large", inside, f"a table of {entry.file_size} bytes")]
    text = archive.read(entry)
    if not text.lstrip().startswith(b"{"):
        return [ScanFinding("damaged", inside, "no JSON table")]
    if b'"use_pickle":true' in text.replace(b" ", b"").replace(b"\n", b""):
        return [ScanFinding("pt2-code", inside, "weights that are stored as pickles")]
    return []


def _damaged_members(archive: zipfile.ZipFile, where: str) -> list[ScanFinding]:
    damaged = archive.testzip()
    return [] if damaged is None else [ScanFinding("damaged", f"{where}!/{damaged}", "its checksum does not match")]
