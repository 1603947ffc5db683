"""A zip file byte by byte: entries, table of contents and end, with nothing between, before or behind.

Readers disagree about zip files that are not laid out like this: some go by the headers in front of the
entries, some by the table at the end, and some search for signatures. What one reader checks, another
would then not read.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from defense_core.errors import UnsafeArtifact

_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_DESCRIPTOR = b"PK\x07\x08"
_HAS_DESCRIPTOR = 0x8
_UTF8 = 0x800
_ENTRY = struct.Struct("<4s24x3H12x")
_MAX_COMMENT_BYTES = (1 << 16) - 1
MAX_ENTRY_BYTES = 1024
"""Name, extra fields and comment of one entry; archives of models need some 100."""


def require_few_entries(path: Path, max_entries: int) -> None:
    """Refuse a zip file of more entries, or longer ones, than are read, before zipfile reads them all.

    The number in the end record is not believed: the table itself is walked, for every end record that a version of
    zipfile may go by. What is no zip file is left to zipfile to say.

    Raises:
        UnsafeArtifact: more than ``max_entries``, or one of more than :data:`MAX_ENTRY_BYTES`.
    """
    with open(path, "rb") as stream:
        for start, end in _tables(stream):
            _walk_table(stream, start, end, max_entries, path.name)


def _tables(stream: BinaryIO) -> list[tuple[int, int]]:
    """From where to where a table of contents may lie."""
    length = stream.seek(0, 2)
    tail_at = max(0, length - _END.size - _MAX_COMMENT_BYTES - 1)
    stream.seek(tail_at)
    tail = stream.read()
    # As zipfile does: the last bytes if they are an end record without comment, else the last that looks like one.
    at = len(tail) - _END.size
    if at < 0 or tail[at : at + 4] != b"PK\x05\x06" or tail[-2:] != b"\x00\x00":
        at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + _END.size:
        return []
    end_at = tail_at + at
    tables = [(end_at - _END.unpack_from(tail, at)[5], end_at)]
    stream.seek(max(0, end_at - _LOCATOR.size))
    locator = stream.read(_LOCATOR.size)
    if len(locator) == _LOCATOR.size and locator[:4] == b"PK\x06\x07":
        for end64_at in {_LOCATOR.unpack(locator)[2], end_at - _LOCATOR.size - _END64.size}:
            if 0 <= end64_at <= length - _END64.size:
                stream.seek(end64_at)
                head = _END64.unpack(stream.read(_END64.size))
                tables += [(end64_at - head[8], end64_at)] if head[0] == b"PK\x06\x06" else []
    return [(start, end) for start, end in tables if start >= 0]


def _walk_table(stream: BinaryIO, start: int, end: int, max_entries: int, where: str) -> None:
    count = 0
    while start < end:
        stream.seek(start)
        head = stream.read(_ENTRY.size)
        if len(head) != _ENTRY.size or head[:4] != b"PK\x01\x02":
            # zipfile stops here too.
            return
        count += 1
        held = sum(_ENTRY.unpack(head)[1:])
        if count > max_entries or held > MAX_ENTRY_BYTES:
            raise UnsafeArtifact(
                f"{where} has too many entries, or too long ones",
                expected=f"at most {max_entries}, of at most {MAX_ENTRY_BYTES} bytes each",
                got=f"one of {held} bytes" if held > MAX_ENTRY_BYTES else "more",
                hint="Ask the sender for a plain archive of the model",
            )
        start += _ENTRY.size + held


def check_layout(stream: BinaryIO, entries: list[zipfile.ZipInfo], directory_at: int, *, where: str) -> None:
    """Refuse a zip file whose headers contradict its table, or that holds bytes which no entry owns.

    Args:
        stream: the file, seekable.
        entries: the table of contents.
        directory_at: offset of the table in the file, bytes.

    Raises:
        UnsafeArtifact: as said.
    """
    expected = 0
    for entry in sorted(entries, key=lambda each: each.header_offset):
        if entry.header_offset != expected:
            kind = "entries that overlap" if entry.header_offset < expected else "bytes between its entries"
            raise _lies(where, f"{kind}, at {min(expected, entry.header_offset)}")
        expected = _entry_end(stream, entry, where)
    if expected != directory_at:
        raise _lies(where, f"{directory_at - expected} bytes before its table of contents")
    _check_end(stream, directory_at, len(entries), where)


def _entry_end(stream: BinaryIO, entry: zipfile.ZipInfo, where: str) -> int:
    stream.seek(entry.header_offset)
    head = stream.read(_LOCAL.size)
    if len(head) != _LOCAL.size or head[:4] != b"PK\x03\x04":
        raise _lies(where, f"no header at {entry.header_offset}")
    _, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = _LOCAL.unpack(head)
    name = stream.read(name_bytes)
    extra = stream.read(extra_bytes)
    decoded = name.decode("utf-8" if flags & _UTF8 else "cp437", errors="replace")
    if decoded != entry.orig_filename:
        raise _lies(where, f"the name {decoded!r} in front of {entry.orig_filename!r}")
    if method != entry.compress_type or (flags ^ entry.flag_bits) & ~_HAS_DESCRIPTOR & 0x0FFF:
        raise _lies(where, f"another compression or flag in front of {entry.orig_filename!r} than in its table")
    packed, size = _sizes64(extra, packed, size)
    stated = (crc, packed, size)
    real = (entry.CRC, entry.compress_size, entry.file_size)
    # Where a descriptor follows, a writer may leave the header's fields at zero.
    if stated != real and not (flags & _HAS_DESCRIPTOR and all(a in (0, b) for a, b in zip(stated, real, strict=True))):
        raise _lies(where, f"sizes or checksum in front of {entry.orig_filename!r} that differ from its table")
    end: int = entry.header_offset + _LOCAL.size + name_bytes + extra_bytes + entry.compress_size
    return end + (_descriptor_bytes(stream, end, entry, where) if flags & _HAS_DESCRIPTOR else 0)


def _sizes64(extra: bytes, packed: int, size: int) -> tuple[int, int]:
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1 and length >= 16 and at + 20 <= len(extra):
            size64, packed64 = struct.unpack_from("<QQ", extra, at + 4)
            return (
                packed64 if packed == 0xFFFFFFFF else packed,
                size64 if size == 0xFFFFFFFF else size,
            )
        at += 4 + length
    return packed, size


def _descriptor_bytes(stream: BinaryIO, at: int, entry: zipfile.ZipInfo, where: str) -> int:
    stream.seek(at)
    data = stream.read(24)
    for sizes in ("<3I", "<I2Q"):
        fields = struct.pack(sizes, entry.CRC, *_within(sizes, entry))
        for mark in (_DESCRIPTOR, b""):
            if data.startswith(mark + fields):
                return len(mark + fields)
    raise _lies(where, f"a descriptor behind {entry.orig_filename!r} that differs from the table")


def _within(sizes: str, entry: zipfile.ZipInfo) -> tuple[int, int]:
    mask = 0xFFFFFFFF if sizes == "<3I" else 0xFFFFFFFFFFFFFFFF
    return entry.compress_size & mask, entry.file_size & mask


def _check_end(stream: BinaryIO, directory_at: int, count: int, where: str) -> None:
    stream.seek(0, 2)
    length = stream.tell()
    stream.seek(max(directory_at, length - _END.size))
    tail = stream.read(_END.size)
    if len(tail) != _END.size or tail[:4] != b"PK\x05\x06":
        raise _lies(where, "bytes behind its end")
    _, _, _, _, entries, size, offset, comment = _END.unpack(tail)
    end_at = length - _END.size
    stream.seek(max(directory_at, end_at - _LOCATOR.size))
    locator = stream.read(min(_LOCATOR.size, end_at - directory_at))
    if locator[:4] == b"PK\x06\x07" and len(locator) == _LOCATOR.size:
        end_at = _LOCATOR.unpack(locator)[2]
        stream.seek(end_at)
        head = stream.read(_END64.size)
        if (
            len(head) != _END64.size
            or head[:4] != b"PK\x06\x06"
            or end_at + _END64.size + _LOCATOR.size != (length - _END.size)
        ):
            raise _lies(where, "a second end record that is not where it should be")
        *_, entries64, size64, offset64 = _END64.unpack(head)
        entries = entries64 if entries == 0xFFFF else entries
        size, offset = (size64 if size == 0xFFFFFFFF else size), (offset64 if offset == 0xFFFFFFFF else offset)
        if (entries64, size64, offset64) != (entries, size, offset):
            raise _lies(where, "two end records that differ")
    if comment or (entries, offset, offset + size) != (count, directory_at, end_at):
        raise _lies(where, "an end record that does not fit its table of contents")


def _lies(where: str, got: str) -> UnsafeArtifact:
    return UnsafeArtifact(
        f"{where} is a zip file that contradicts itself",
        expected="one table of contents that agrees with every entry, and nothing else",
        got=got,
        hint="Such a file shows different content to different readers; ask for one that was written by torch.save "
        "or an ordinary zip program",
    )
