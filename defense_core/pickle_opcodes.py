"""Opcodes of a pickle, read as the unpickler reads them; nothing is run, and nothing large is kept.

``pickletools`` is stricter than the unpickler: it reads ``I0x1`` and ``p0\\0`` as damage, and behind what
it takes for damage the unpickler runs on.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from defense_core.errors import UnsafeArtifact

MAX_PICKLE_BYTES = 16 << 20
_KEPT_BYTES = 1 << 20  # longer arguments are read over: nothing here depends on what they say
# A superset of what the unpickler takes for a number, which reads base prefixes and ends at a zero byte.
_WHOLE = re.compile(rb"\s*[+-]?(?:0[xX](?:_?[0-9a-fA-F])+|0[oO](?:_?[0-7])+|0[bB](?:_?[01])+|[0-9](?:_?[0-9])*)L?\s*")
_WHOLE_BEGINS = re.compile(rb"\s*[+-]?[0-9a-fA-FxXoO_]*L?\s*")
_COUNTS = {
    **dict.fromkeys(("SHORT_BINSTRING", "SHORT_BINBYTES", "SHORT_BINUNICODE", "LONG1"), "<B"),
    **dict.fromkeys(("BINSTRING", "LONG4"), "<i"),
    **dict.fromkeys(("BINBYTES", "BINUNICODE"), "<I"),
    **dict.fromkeys(("BINBYTES8", "BINUNICODE8", "BYTEARRAY8"), "<Q"),
}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class Opcode(NamedTuple):
    """One opcode.

    Attributes:
        name: as in ``pickletools``.
        argument: a number, a text or bytes; ``None`` without one, or where it was too large to keep.
        position: in bytes from the pickle's start.
        needs_stack: whether it takes something from the stack.
    """

    name: str
    argument: object
    position: int
    needs_stack: bool


class TooLarge(UnsafeArtifact):
    """The opcodes and what is kept of their arguments are more than a pickle may have."""


def opcodes(stream: BinaryIO) -> Iterator[Opcode]:
    """The opcodes from where ``stream`` stands up to STOP, behind which it is left.

    Raises:
        TooLarge: more than :data:`MAX_PICKLE_BYTES`, long arguments not counted.
        ValueError, IndexError, EOFError, OverflowError, struct.error: no unpickler gets beyond what was read.
    """
    reader = _Reader(stream)
    while True:
        position = reader.position
        code = reader.read(1)
        known = _OPCODES.get(code)
        if known is None:
            raise ValueError(
                f"at position {position}, opcode {code!r} unknown" if code else "pickle exhausted before seeing STOP"
            )
        yield Opcode(known.name, reader.argument(known), position, bool(known.stack_before))
        if known.name == "STOP":
            return


class _Reader:
    """A stream of at most :data:`MAX_PICKLE_BYTES`: a length that is claimed is never allocated before it is there."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, MAX_PICKLE_BYTES
        self.position = 0

    def read(self, size: int) -> bytes:
        self._require(size)
        return self._count(self._stream.read(size))

    def readline(self) -> bytes:
        """Whole, for the readers of ``pickletools``."""
        line, cut = self._line()
        if cut:
            raise ValueError("a line is too long")
        return line + b"\n"

    def argument(self, opcode: pickletools.OpcodeInfo) -> object:
        if opcode.arg is None:
            return None
        if opcode.name in _COUNTS:
            return self._counted(opcode)
        if opcode.arg.n != pickletools.UP_TO_NEWLINE:
            return opcode.arg.reader(self)  # type: ignore[arg-type]
        if opcode.name in ("GLOBAL", "INST"):
            module, name = (self.readline()[:-1].decode("utf-8") for _ in range(2))
            return f"{module} {name}"
        return self._text(opcode.name)

    def _counted(self, opcode: pickletools.OpcodeInfo) -> object:
        form = _COUNTS[opcode.name]
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        if size < 0:
            raise ValueError(f"{opcode.name} claims {size} bytes")
        if size > _KEPT_BYTES:
            self._over(size)
            return None
        data = self.read(size)
        if len(data) != size:
            raise ValueError(f"expected {size} bytes in a {opcode.name}, but only {len(data)} remain")
        if "UNICODE" in opcode.name:
            return data.decode("utf-8", "surrogatepass")
        return int.from_bytes(data, "little", signed=True) if "LONG" in opcode.name else data

    def _text(self, opcode: str) -> object:
        line, cut = self._line()
        if opcode in ("INT", "LONG", "GET", "PUT"):
            text, zero, _ = line.partition(b"\0")
            form = _WHOLE_BEGINS if cut and not zero else _WHOLE
            if not form.fullmatch(text) and not (zero and not text):
                raise ValueError(f"{opcode} of no number")
        elif opcode == "FLOAT" and not cut:
            float(line.partition(b"\0")[0])
        elif opcode == "STRING" and not (line[:1] in (b"'", b'"') and (cut or line[-1:] == line[:1])):
            raise ValueError("STRING without quotes")
        elif opcode == "PERSID":
            line.decode("ascii")
        elif opcode == "UNICODE" and not cut:
            line.decode("raw-unicode-escape")
        while cut:
            _, cut = self._line()
        return line[:80].decode("latin-1")

    def _line(self) -> tuple[bytes, bool]:
        """What of a line is kept, without its end, and whether more of it follows."""
        line = self._stream.readline(_KEPT_BYTES)
        self.position += len(line)
        if line.endswith(b"\n"):
            if len(line) < _KEPT_BYTES:
                self._require(len(line))
                self._left -= len(line)
            return line[:-1], False
        if len(line) < _KEPT_BYTES:
            raise ValueError("no newline found where a line was expected")
        return line, True

    def _over(self, size: int) -> None:
        while size:
            piece = self._stream.read(min(size, _KEPT_BYTES))
            if not piece:
                raise ValueError(f"an opcode claims {size} bytes more than there are")
            size -= len(piece)
            self.position += len(piece)

    def _require(self, size: int) -> None:
        if size > self._left:
            raise TooLarge("a pickle is too large", expected=f"at most {MAX_PICKLE_BYTES} bytes", got="more")

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        self.position += len(data)
        return data
