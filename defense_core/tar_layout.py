"""A tar file block by block, before tarfile reads it.

tarfile takes extended headers into memory whole and reads what they say of sparse files, some of it in the square of
their length, before a member can be judged. So only headers that say little, and one thing to every reader, reach it.
"""

from __future__ import annotations

import re
from typing import BinaryIO

from defense_core.errors import CorruptArtifact, UnsafeArtifact
from defense_core.files import CHUNK_BYTES

MAX_EXTENDED_BYTES = 1 << 20
_BLOCK = 512
_PAX, _GNU_NAMES, _FILES, _FOLDER = b"xg", b"LK", b"0\x007", b"5"
_MAX_EXTENDED_RUN = 4  # a global header, a long name, a long link and an extended header
_RECORD = re.compile(rb"([1-9][0-9]{0,6}) [^=\n]{1,200}=")
# The first two are how sparse files are told; a size would move every later header. tarfile's search for the third
# takes the square of the length of a run of digits.
_REFUSED_RECORDS = ((b"GNU.sparse", "a sparse file"), (b" size=", "of another size than its header says"))
_DIGITS = re.compile(rb"[0-9]{65}")


def check_tar_layout(stream: BinaryIO, max_entries: int, *, where: str) -> None:
    """Refuse a tar file with more members, other members or longer extended headers than are read, or bytes behind.

    Args:
        stream: the tar file, expanded and seekable.
        max_entries: members that are allowed.

    Raises:
        UnsafeArtifact: links, devices, sparse files, too many members, too much in extended headers, bytes behind
            the end.
        CorruptArtifact: a block that is no header where one is due.
    """
    members, run, extended = 0, 0, 0
    at = 0
    while (block := _block_at(stream, at)).strip(b"\x00"):
        kind, size = block[156:157], _size(block, at, where)
        held = -(-size // _BLOCK) * _BLOCK
        at += _BLOCK + held
        if kind in _PAX + _GNU_NAMES:
            run, extended = run + 1, extended + size
            if run > _MAX_EXTENDED_RUN or extended > MAX_EXTENDED_BYTES:
                got = f"{extended} bytes, {run} of them in front of one entry"
                raise UnsafeArtifact(
                    f"{where} has too much in extended headers",
                    expected=f"at most {MAX_EXTENDED_BYTES} bytes, and {_MAX_EXTENDED_RUN} in front of one entry",
                    got=got,
                    hint="Ask the sender for a plain archive of the bundle",
                )
            if kind in _PAX:
                # With the padding, which tarfile reads as records too.
                _check_records(stream.read(held), size, block, where)
            continue
        members, run = members + 1, 0
        _check_member(block, kind, size, where)
        if members > max_entries:
            raise UnsafeArtifact(f"{where} has too many entries", expected=f"at most {max_entries}", got="more")
    _check_end(stream, at, where)


def _check_end(stream: BinaryIO, at: int, where: str) -> None:
    """Refuse anything but zeros where the members end: some readers look for more behind an end mark."""
    stream.seek(at)
    while piece := stream.read(CHUNK_BYTES):
        if piece.count(0) != len(piece):
            raise UnsafeArtifact(
                f"{where} goes on behind its end",
                expected="zeros up to the end of the file",
                got=f"other bytes behind byte {at}",
                hint="Ask the sender for a plain archive of the bundle",
            )


def _block_at(stream: BinaryIO, at: int) -> bytes:
    """A whole block, or nothing: tarfile ends there too."""
    stream.seek(at)
    block = stream.read(_BLOCK)
    return block if len(block) == _BLOCK else b""


def _size(block: bytes, at: int, where: str) -> int:
    """Bytes of a header's content; plain octal, because other forms are read differently by different readers."""
    checksum, size = _octal(block[148:156]), _octal(block[124:136])
    if checksum is None or size is None or checksum != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise CorruptArtifact(
            f"{where} is damaged",
            expected="a tar header",
            got=f"other bytes, or numbers that are not octal, at byte {at}",
            hint="Fetch the file again and compare its digest",
        )
    return size


def _octal(field: bytes) -> int | None:
    digits = field.partition(b"\x00")[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _check_member(block: bytes, kind: bytes, size: int, where: str) -> None:
    folder = kind == _FOLDER or (kind == b"\x00" and _name(block).endswith("/"))
    if kind not in _FILES + _FOLDER or (folder and size):
        why = "a folder with content" if folder else "a link, device or sparse file"
        raise unsafe_entry(where, _name(block), why)


def _name(block: bytes) -> str:
    return block[:100].partition(b"\x00")[0].decode("utf-8", "backslashreplace")


def _check_records(data: bytes, size: int, block: bytes, where: str) -> None:
    """Refuse records that overlap, do not end where they say, or speak of another layout than the header."""
    for text, why in _REFUSED_RECORDS:
        if text in data:
            raise unsafe_entry(where, _name(block), why)
    if _DIGITS.search(data):
        raise unsafe_entry(where, _name(block), "described by a number of more than 64 digits")
    at = 0
    while at < size:
        found = _RECORD.match(data, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= size or data[end - 1 : end] != b"\n":
            break
        at = end
    if at < size or data[size:].strip(b"\x00"):
        raise CorruptArtifact(
            f"{where} is damaged",
            expected="an extended header of whole records",
            got=f"other bytes at its byte {at}",
            hint="Fetch the file again and compare its digest",
        )


def unsafe_entry(where: str, name: str, why: str) -> UnsafeArtifact:
    """An archive's entry that is not unpacked."""
    return UnsafeArtifact(
        f"entry {name!r} of {where} is {why}",
        expected="plain files with distinct relative names",
        got=why,
        hint="Nothing was unpacked; ask the sender for a plain archive of the bundle",
    )
