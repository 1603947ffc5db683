"""Compressed files, expanded in pieces and under a limit, up to the last byte of the file.

The readers of the standard library end where the stream ends, and never look at what follows it.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from defense_core.errors import UnsafeArtifact
from defense_core.files import CHUNK_BYTES

# Little, because what is left of a piece is copied at each stream's end.
_PACKED_BYTES = 1 << 16
_MAGIC_BYTES = 6
_GZIP = 31  # how zlib calls streams with gzip's header and checksum
_XZ_MEMORY_BYTES = 256 << 20  # of a dictionary that the file chooses; packers at their most need 65 MiB
_MAX_STREAMS = 20_000  # packers that work in parallel end a stream every 900 kB


def free(count: int) -> None:
    """What is expanded costs nothing."""


def expand(path: Path, sink: BinaryIO, max_bytes: int, *, bare_zlib: bool, spend: Callable[[int], None] = free) -> None:
    """Write to ``sink`` what the file at ``path`` holds.

    Args:
        bare_zlib: a file that starts like no packer's is a zlib stream; otherwise it is not compressed.
        spend: called with the size of each piece before it is written; may raise.

    Raises:
        UnsafeArtifact: more than ``max_bytes``, or bytes behind the end of the stream.
        zlib.error, lzma.LZMAError, EOFError, OSError: damage.
    """
    with open(path, "rb") as raw:
        head = raw.read(_MAGIC_BYTES)
        raw.seek(0)
        bare = _zlib if bare_zlib else _as_it_is
        expanded = next((read for magic, read in _READERS.items() if head.startswith(magic)), bare)
        left = max_bytes
        for piece in expanded(raw, path.name):
            left -= len(piece)
            if left < 0:
                raise UnsafeArtifact(
                    f"{path.name} unpacks to too much",
                    expected=f"at most {max_bytes} bytes",
                    got="more",
                    hint="Raise max_bytes if the archive is known to be good",
                )
            spend(len(piece))
            sink.write(piece)


def _as_it_is(raw: BinaryIO, where: str) -> Iterator[bytes]:
    while piece := raw.read(CHUNK_BYTES):
        yield piece


def _gzip(raw: BinaryIO, where: str) -> Iterator[bytes]:
    packed = raw.read(_PACKED_BYTES)
    for _ in range(_MAX_STREAMS):
        engine = zlib.decompressobj(wbits=_GZIP)
        while not engine.eof:
            piece = engine.decompress(packed, CHUNK_BYTES)
            packed = engine.unconsumed_tail
            if piece:
                yield piece
            elif not packed and not engine.eof:
                packed = raw.read(_PACKED_BYTES)
                if not packed:
                    raise EOFError("the stream ends before its end mark")
        packed = engine.unused_data
        # The format's readers pass over zeros behind a stream.
        while not (packed := packed.lstrip(b"\x00")):
            packed = raw.read(_PACKED_BYTES)
            if not packed:
                return
        packed = packed if len(packed) >= _MAGIC_BYTES else packed + raw.read(_PACKED_BYTES)
        if not packed.startswith(b"\x1f\x8b"):
            raise zlib.error("what follows the stream is no further one")
    raise _more(raw, packed, where)


def _bzip2(raw: BinaryIO, where: str) -> Iterator[bytes]:
    left = raw.read(_PACKED_BYTES)
    for _ in range(_MAX_STREAMS):
        left = yield from _stream(raw, left, bz2.BZ2Decompressor())
        if not left:
            return
        if not left.startswith(b"BZh"):
            break
    raise _more(raw, left, where)


def _xz(raw: BinaryIO, where: str) -> Iterator[bytes]:
    left = raw.read(_PACKED_BYTES)
    for _ in range(_MAX_STREAMS):
        left = yield from _stream(raw, left, lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY_BYTES))
        # The format allows zeros behind a stream, four at a time.
        zeros = 0
        while left.startswith(b"\x00"):
            behind = left.lstrip(b"\x00")
            zeros += len(left) - len(behind)
            left = behind if len(behind) >= _MAGIC_BYTES else behind + raw.read(_PACKED_BYTES)
        if not left and zeros % 4 == 0:
            return
        if zeros % 4 or not left.startswith(b"\xfd7zXZ\x00"):
            break
    raise _more(raw, left, where)


def _zlib(raw: BinaryIO, where: str) -> Iterator[bytes]:
    engine = zlib.decompressobj()
    while not engine.eof:
        packed = engine.unconsumed_tail or raw.read(_PACKED_BYTES)
        piece = engine.decompress(packed, CHUNK_BYTES)
        if piece:
            yield piece
        elif not packed:
            raise EOFError("the stream ends before its end mark")
    # There is no such thing as a second one: most readers never see it, and some join it to the first.
    if left := engine.unused_data or raw.read(1):
        raise _more(raw, left, where)


def _stream(raw: BinaryIO, packed: bytes, engine: Any) -> Generator[bytes, None, bytes]:
    """Expand one stream; the generator's value is what follows it, enough to tell what that is."""
    while not engine.eof:
        piece = engine.decompress(packed, CHUNK_BYTES)
        packed = b""
        if piece:
            yield piece
        if engine.needs_input and not engine.eof:
            packed = raw.read(_PACKED_BYTES)
            if not packed:
                raise EOFError("the stream ends before its end mark")
    left: bytes = engine.unused_data
    return left if len(left) >= _MAGIC_BYTES else left + raw.read(_PACKED_BYTES)


def _more(raw: BinaryIO, left: bytes, where: str) -> UnsafeArtifact:
    end = raw.seek(0, io.SEEK_END)
    return UnsafeArtifact(
        f"{where} is more than one compressed stream",
        expected="nothing behind the stream's end",
        got=f"a file of {end} bytes that goes on with {left[:8].hex(' ')}",
        hint="Ask the sender for the plain file",
    )


_READERS: dict[bytes, Callable[[BinaryIO, str], Iterator[bytes]]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\xfd7zXZ\x00": _xz,
}
