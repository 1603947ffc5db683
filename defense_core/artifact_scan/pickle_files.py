"""Pickles in files: the opcode check first, then fickling and the tensors' claims; clean only where all agree."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from defense_core.artifact_scan.findings import MAX_FINDINGS, ScanFinding
from defense_core.artifact_scan.kinds import ends_as_zip
from defense_core.artifact_scan.second_opinion import Opinion, SecondOpinionMissing, second_opinion
from defense_core.limits import LoadLimits
from defense_core.pickle_opcodes import MAX_PICKLE_BYTES
from defense_core.pickles import LEGACY_MAGIC, PickleFacts, PickleWalk, walk_pickle

_LEGACY_PICKLES = 5
_COUNT_BYTES = 8  # in front of each storage of an old file: how many elements it has
_MAX_PICKLES = 1000
_UNREAD = PickleWalk(PickleFacts((), None), (), (), damage=None, complete=False, called=False, too_large=True)


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
    return found or _judged(_asked([data], limits, sizes), where)


def scan_legacy(path: Path, where: str, limits: LoadLimits) -> list[ScanFinding]:
    """Findings of a file by torch before 1.6: five pickles, then raw storages up to the file's last byte."""
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
        opinion = _asked(pickles, limits, in_order=True)
        found = _judged(opinion, where)
        return found or _storages(stream, opinion.storages, where)


def _storages(stream: BinaryIO, storages: Sequence[tuple[int, int]], where: str) -> list[ScanFinding]:
    """Findings of what follows the pickles: each storage's count and elements, and nothing behind the last."""
    at = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    for number, (elements, item_bytes) in enumerate(storages):
        stream.seek(at)
        head = stream.read(_COUNT_BYTES)
        end = at + _COUNT_BYTES + elements * item_bytes
        if len(head) == _COUNT_BYTES and int.from_bytes(head, "little", signed=True) != elements:
            return [ScanFinding("tensor-lies", where, f"storage {number} is not of {elements} elements", at)]
        if end > size:
            return [ScanFinding("damaged", where, f"the file ends inside storage {number}", size)]
        at = end
    if at == size:
        return []
    stream.seek(at)
    found = [ScanFinding("pickle-hidden", where, f"{size - at} bytes follow the last storage", at)]
    return found + _hidden(walk_pickle(stream, to_end=True), where, at)


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
            if len(found) >= MAX_FINDINGS or not walk.complete or not stream.read(1):
                break
            stream.seek(-1, io.SEEK_CUR)
    if not any(finding.rule == "pickle-code" for finding in found):
        found.append(ScanFinding("format-unsupported", where, "a plain pickle that torch.save did not write"))
    return found[:MAX_FINDINGS]


def hidden_pickle(path: Path, where: str) -> list[ScanFinding]:
    """Findings of a file of another format whose bytes are a pickle too."""
    found: list[ScanFinding] = []
    with open(path, "rb") as stream:
        for start, walk in _one_behind_the_other(stream):
            found += _hidden(walk, where, start)
    return found[:MAX_FINDINGS]


def scan_text(path: Path, where: str) -> list[ScanFinding]:
    """Findings of a text, beside those of :func:`hidden_pickle`.

    Most texts break off at their first letters; one that is a pickle of protocol 0 to its end does not.
    """
    with open(path, "rb") as stream:
        *_, (_, last) = _one_behind_the_other(stream)
    return [ScanFinding("format-unsupported", where, "a text that is a pickle too")] if last.damage is None else []


def _one_behind_the_other(stream: BinaryIO) -> Iterator[tuple[int, PickleWalk]]:
    """Where each pickle starts, and what it is made of; the last is incomplete, the file's end or one too many."""
    for number in itertools.count():
        start = stream.tell()
        if number >= _MAX_PICKLES or start > MAX_PICKLE_BYTES:
            yield start, _UNREAD
            return
        walk = walk_pickle(stream, to_end=True)
        yield start, walk
        if not walk.complete or not stream.read(1):
            return
        stream.seek(-1, io.SEEK_CUR)


def _hidden(walk: PickleWalk, where: str, start: int) -> list[ScanFinding]:
    if walk.names_code:
        return [
            ScanFinding("pickle-hidden", where, f"read as a pickle it asks for {what}", start + at)
            for at, what in walk.imports
        ]
    if walk.damage is None and not walk.complete:
        return [ScanFinding("too-large", where, "read as a pickle it is too long to be looked at whole", start)]
    return []


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
    if walk.too_large:
        found.append(ScanFinding("too-large", where, f"a pickle of more than {MAX_PICKLE_BYTES} bytes", start))
    if walk.damage is not None:
        found.append(ScanFinding("damaged", where, f"no complete pickle: {walk.damage}", start))
    return found


def _asked(
    pickles: Sequence[bytes], limits: LoadLimits, sizes: Mapping[str, int] | None = None, *, in_order: bool = False
) -> Opinion:
    try:
        return second_opinion(pickles, limits, sizes, in_order=in_order)
    except SecondOpinionMissing as error:
        return Opinion(missing=str(error))


def _judged(opinion: Opinion, where: str) -> list[ScanFinding]:
    return [
        *([ScanFinding("scanner-missing", where, opinion.missing)] if opinion.missing else []),
        *(ScanFinding("pickle-second-opinion", where, f"fickling: {what}") for what in opinion.refused),
        *(ScanFinding("tensor-lies", where, what) for what in opinion.contradictions),
        *(ScanFinding("too-slow", where, what) for what in opinion.undecided),
    ]
