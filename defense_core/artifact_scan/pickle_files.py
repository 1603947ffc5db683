"""Pickles in files: the opcode check first, then fickling and the tensors' claims; clean only where all agree."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from defense_core.artifact_scan.findings import MAX_FINDINGS, ScanFinding
from defense_core.artifact_scan.kinds import ends_as_zip
from defense_core.artifact_scan.second_opinion import SecondOpinionMissing, second_opinion
from defense_core.limits import LoadLimits
from defense_core.pickles import LEGACY_MAGIC, MAX_PICKLE_BYTES, PickleWalk, walk_pickle

_LEGACY_PICKLES = 5
_MAX_PICKLES = 1000


def scan_one_pickle(
    data: bytes, where: str, limits: LoadLimits, sizes: Mapping[str, int] | None = None
) -> list[ScanFinding]:
    """Findings of ``data``, which must be exactly one pickle of plain tensors; ``sizes`` are their records' bytes."""
    stream = io.BytesIO(data)
    walk = walk_pickle(stream, max_objections=MAX_FINDINGS)
    found = _objections(walk, where, 0)
    if not found and stream.tell() != len(data):
        found = [ScanFinding("pickle-hidden", where, "bytes follow the pickle's end", stream.tell())]
        found += _objections(walk_pickle(stream, max_objections=MAX_FINDINGS), where, stream.tell())
    return found or list(_second_opinion([data], where, limits, sizes))


def scan_legacy(path: Path, where: str, limits: LoadLimits) -> list[ScanFinding]:
    """Findings of a file by torch before 1.6: five pickles, then raw storages."""
    pickles: list[bytes] = []
    with open(path, "rb") as stream:
        for number in range(_LEGACY_PICKLES):
            start = stream.tell()
            walk = walk_pickle(stream, max_objections=MAX_FINDINGS)
            found = _objections(walk, where, start)
            if not found and number == 0 and walk.facts.first_integer != LEGACY_MAGIC:
                found = [ScanFinding("format-unsupported", where, "a pickle that torch.save did not write", start)]
            if found:
                return found
            end = stream.tell()
            stream.seek(start)
            pickles.append(stream.read(end - start))
    return list(_second_opinion(pickles, where, limits))


def scan_torch_pickle(archive: zipfile.ZipFile, member: str, where: str, limits: LoadLimits) -> list[ScanFinding]:
    """Findings of the one pickle of a zip-format ``torch.save`` file."""
    inside = f"{where}!/{member}"
    if archive.getinfo(member).file_size > MAX_PICKLE_BYTES:
        return [ScanFinding("too-large", inside, f"a pickle of more than {MAX_PICKLE_BYTES} bytes")]
    folder = member.removesuffix("data.pkl") + "data/"
    sizes = {
        entry.filename.removeprefix(folder): entry.file_size
        for entry in archive.infolist()
        if entry.filename.startswith(folder)
    }
    return scan_one_pickle(archive.read(member), inside, limits, sizes)


def scan_bare_pickle(path: Path, where: str) -> list[ScanFinding]:
    """Findings of a plain pickle; never none, because no reader here vouches for one."""
    found: list[ScanFinding] = []
    with open(path, "rb") as stream:
        for number in itertools.count():
            start = stream.tell()
            if number >= _MAX_PICKLES or start > MAX_PICKLE_BYTES:
                what = f"more than {_MAX_PICKLES} pickles, or {MAX_PICKLE_BYTES} bytes of them, one behind the other"
                found.append(ScanFinding("too-large", where, what, start))
                break
            walk = walk_pickle(stream, max_objections=MAX_FINDINGS)
            found += _objections(walk, where, start)
            # Several pickles may stand one behind the other, and a reader may read them all.
            if len(found) >= MAX_FINDINGS or walk.damage is not None or not stream.read(1):
                break
            stream.seek(-1, io.SEEK_CUR)
    if not any(finding.rule == "pickle-code" for finding in found):
        found.append(ScanFinding("format-unsupported", where, "a plain pickle that torch.save did not write"))
    return found[:MAX_FINDINGS]


def hidden_pickle(path: Path, where: str) -> list[ScanFinding]:
    """Findings of a file of another format whose bytes are a pickle too."""
    with open(path, "rb") as stream:
        walk = walk_pickle(stream, max_objections=1000)
    if not walk.plausible:
        return []
    return [
        ScanFinding("pickle-hidden", where, f"read as a pickle it asks for {what}", at)
        for at, what in walk.objections[:3]
    ]


def scan_raw(path: Path, where: str) -> list[ScanFinding]:
    """Findings of raw numbers: of no format, as long as they are no pickle and no archive."""
    found = hidden_pickle(path, where)
    with open(path, "rb") as stream:
        starts_as_zip = stream.read(4) == b"PK\x03\x04"
    if starts_as_zip or ends_as_zip(path, path.stat().st_size):
        found.append(ScanFinding("archive-polyglot", where, "an archive where raw numbers were expected"))
    return found


def _objections(walk: PickleWalk, where: str, start: int) -> list[ScanFinding]:
    found = [ScanFinding("pickle-code", where, f"it asks for {what}", start + at) for at, what in walk.objections]
    if walk.damage is not None:
        found.append(ScanFinding("damaged", where, f"no complete pickle: {walk.damage}", start))
    return found


def _second_opinion(
    pickles: list[bytes], where: str, limits: LoadLimits, sizes: Mapping[str, int] | None = None
) -> Iterator[ScanFinding]:
    try:
        opinion = second_opinion(pickles, limits, sizes)
    except SecondOpinionMissing as error:
        yield ScanFinding("scanner-missing", where, str(error))
        return
    for what in opinion.refused:
        yield ScanFinding("pickle-second-opinion", where, f"fickling: {what}")
    for what in opinion.contradictions:
        yield ScanFinding("tensor-lies", where, what)
    for what in opinion.undecided:
        yield ScanFinding("too-slow", where, what)
