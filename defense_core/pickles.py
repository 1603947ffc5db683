"""Static check of pickles: every opcode and every global against an allow-list; nothing is run.

The list is narrower than that of ``torch.load(..., weights_only=True)``: what a file of plain tensors
needs, and nothing else. Anything that is not listed is refused, whether or not it is known to be bad.
"""

from __future__ import annotations

import re
import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

import torch

from defense_core.errors import CorruptArtifact, UnsafeArtifact
from defense_core.pickle_opcodes import MAX_PICKLE_BYTES, TooLarge, opcodes

_MAX_OPCODES = 2_000_000
_MAX_IMPORTS = 3
# How damage is reported, depending on where the bytes end or stop making sense.
_DAMAGE = (ValueError, KeyError, IndexError, EOFError, OverflowError, struct.error, AssertionError)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a file by torch < 1.6, torch/serialization.py

# The opcodes that torch's weights-only unpickler implements; all others are refused there too.
_OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINSTRING", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET", "BINPUT",
    "LONG_BINPUT", "GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "BINPERSID",
})  # fmt: skip
_CALLS = frozenset({"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"})
_ARGUMENTS = frozenset({"MARK", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
DTYPES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_STORAGES = frozenset({
    "FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "IntStorage", "ShortStorage",
    "CharStorage", "ByteStorage", "BoolStorage", "ComplexFloatStorage", "ComplexDoubleStorage", "UntypedStorage",
})  # fmt: skip
_GLOBALS = (
    frozenset(("torch", name) for name in DTYPES | _STORAGES | {"Size", "device", "Tensor"})
    | frozenset(("torch.storage", name) for name in _STORAGES | {"TypedStorage"})
    | frozenset(
        ("torch._utils", f"_rebuild_{name}")
        for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
    )
    | frozenset(
        {
            ("torch.nn.parameter", "Parameter"),
            ("collections", "OrderedDict"),
            ("collections", "Counter"),
            ("_codecs", "encode"),  # bytes in protocol 2
            ("builtins", "set"),
            ("__builtin__", "set"),
        }
    )
)


@dataclass(frozen=True)
class PickleFacts:
    """What one pickle is made of: ``module.name`` globals in order, and its first integer."""

    globals: tuple[str, ...]
    first_integer: int | None


@dataclass(frozen=True)
class PickleWalk:
    """One pickle, read opcode by opcode and never run.

    Attributes:
        facts: globals and first integer.
        objections: (offset in bytes from the pickle's start, what it asks for), in order.
        imports: those of the objections, and those behind the last that is kept, that Python could import.
        damage: why it cannot be read to its STOP opcode; ``None`` if nothing was found that says so.
        complete: whether it can, and was.
        called: whether something is called with arguments.
        too_large: whether it is of more than :data:`MAX_PICKLE_BYTES`.
    """

    facts: PickleFacts
    objections: tuple[tuple[int, str], ...]
    imports: tuple[tuple[int, str], ...]
    damage: str | None
    complete: bool
    called: bool
    too_large: bool = False

    @property
    def names_code(self) -> bool:
        """Whether unpickling would import something, as of bytes of another format that happen to be opcodes it is not.

        A pickle that breaks off behind a call has already made it; one that is complete need not call anything,
        because importing a module runs it.
        """
        return bool(self.imports) and (self.complete or self.called)


def walk_pickle(stream: BinaryIO, *, max_objections: int = 1, to_end: bool = False) -> PickleWalk:
    """Read one pickle up to its STOP opcode, noting what is not on the lists.

    Args:
        stream: positioned at the pickle's first byte; afterwards behind its last.
        max_objections: how many are kept, and where to stop looking.
        to_end: look on behind them, for imports.
    """
    found: list[str] = []
    objections: list[tuple[int, str]] = []
    imports: list[tuple[int, str]] = []
    first_integer: int | None = None
    strings = 0
    seen: set[str] = set()
    damage = None
    fails = too_large = False
    try:
        for count, (opcode, argument, position, needs_stack) in enumerate(opcodes(stream)):
            what = _objection(opcode, argument) if count <= _MAX_OPCODES else f"more than {_MAX_OPCODES} opcodes"
            if what is not None and len(objections) < max_objections:
                objections.append((position, what))
            if what is not None and len(imports) < _MAX_IMPORTS and _imports(opcode, argument, strings):
                imports.append((position, what))
            if opcode == "GLOBAL":
                found.append(str(argument).replace(" ", ".", 1))
            # As of much text: no unpickler gets beyond it.
            fails |= count == 0 and needs_stack
            strings += "UNICODE" in opcode or "STRING" in opcode
            seen.add(opcode)
            if first_integer is None and isinstance(argument, int) and opcode in ("LONG1", "BININT", "BININT2"):
                first_integer = argument
            too_large = position > MAX_PICKLE_BYTES
            if count > _MAX_OPCODES or ((too_large or len(objections) >= max_objections) and not to_end):
                break
    except TooLarge:
        too_large = True
    except _DAMAGE as error:
        damage = str(error)[:200] or type(error).__name__
    if fails and damage is None:
        damage = "its first opcode takes something from an empty stack"
    called = bool(seen & _CALLS) and bool(seen & _ARGUMENTS)
    facts = PickleFacts(tuple(found), first_integer)
    complete = damage is None and "STOP" in seen
    return PickleWalk(facts, tuple(objections), tuple(imports), damage, complete, called, too_large)


def _objection(opcode: str, argument: object) -> str | None:
    """What is not on the lists; ``None`` if the opcode and what it names are."""
    if opcode not in _OPCODES:
        # A number of many digits has no decimal text.
        shown = argument if not isinstance(argument, int) or argument.bit_length() <= 64 else hex(argument)
        return f"pickle opcode {opcode}" + (f" {shown!r}"[:80] if argument else "")
    if opcode == "GLOBAL":
        module, _, name = str(argument).partition(" ")
        return None if (module, name) in _GLOBALS else f"{module}.{name}"
    return None


def _imports(opcode: str, argument: object, strings: int) -> bool:
    """Whether Python could import what an opcode names that is not on the lists."""
    if opcode in ("GLOBAL", "INST"):
        module, _, name = str(argument).partition(" ")
        return all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", part) for part in (module, name))
    return opcode == "STACK_GLOBAL" and strings >= 2


def check_pickle(stream: BinaryIO, *, where: str) -> PickleFacts:
    """Read one pickle up to its STOP opcode and refuse what is not on the lists.

    Args:
        stream: positioned at the pickle's first byte; afterwards behind its last.
        where: name of the file or member, for messages.

    Raises:
        UnsafeArtifact: an opcode or a global that is not allowed, or too many opcodes or bytes.
        CorruptArtifact: the bytes are no complete pickle.
    """
    walk = walk_pickle(stream)
    if walk.objections:
        raise _refused(where, walk.objections[0][1])
    if walk.too_large:
        raise UnsafeArtifact(
            f"pickle in {where} is too large", expected=f"at most {MAX_PICKLE_BYTES} bytes", got="more"
        )
    if walk.damage is not None:
        raise CorruptArtifact(
            f"pickle in {where} is damaged",
            expected="a complete pickle",
            got=walk.damage,
            hint="Fetch the file again and compare its digest",
        )
    return walk.facts


def check_torch_zip(archive: zipfile.ZipFile, root: str, *, where: str) -> None:
    """Check ``data.pkl`` of a zip-format ``torch.save`` file."""
    info = archive.getinfo(f"{root}data.pkl")
    if info.file_size > MAX_PICKLE_BYTES:
        raise UnsafeArtifact(
            f"pickle in {where} is too large", expected=f"at most {MAX_PICKLE_BYTES} bytes", got=info.file_size
        )
    with archive.open(info) as stream:
        check_pickle(stream, where=f"{where}:{info.filename}")  # type: ignore[arg-type]
        if stream.read(1):
            raise UnsafeArtifact(
                f"bytes follow the pickle in {where}",
                expected="nothing after STOP",
                got="a second pickle or hidden data",
            )


def check_torch_legacy(stream: BinaryIO, *, where: str) -> None:
    """Check the five pickles at the start of a file by torch < 1.6 (magic, version, system, object, storage keys)."""
    magic = check_pickle(stream, where=where)
    if magic.first_integer != LEGACY_MAGIC:
        raise CorruptArtifact(
            f"{where} is a pickle but was not written by torch.save",
            expected="a file by torch.save, or safetensors",
            got="a plain pickle",
            hint="Save model.state_dict() with safetensors or torch.save",
        )
    for _ in range(4):
        check_pickle(stream, where=where)


def refuse_if_pickle(stream: BinaryIO, *, where: str) -> None:
    """Raise UnsafeArtifact if the bytes start like a pickle that names code, or are one that is not plain.

    For files of no known format: a pickle of protocol 0 or 1 has no mark at its start, and one that
    breaks off behind its payload has already run it.
    """
    walk = walk_pickle(stream, to_end=True)
    if walk.objections and (walk.damage is None or walk.names_code):
        raise _refused(where, (walk.imports or walk.objections)[0][1])
    if walk.too_large and walk.damage is None:
        raise _refused(where, f"a pickle of more than {MAX_PICKLE_BYTES} bytes")


def _refused(where: str, what: str) -> UnsafeArtifact:
    return UnsafeArtifact(
        f"{where} asks for {what}",
        expected="a pickle of plain tensors",
        got="a reference that may run code, so nothing was loaded",
        hint="Have the file re-saved from a trusted machine as model.state_dict() in safetensors; whole pickled "
        "models, numpy scalars and argparse namespaces are refused as well",
    )
