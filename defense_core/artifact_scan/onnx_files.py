"""ONNX files, read as protocol-buffer fields without the onnx package: nothing is built from them.

Field numbers are those of onnx.proto (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto,
FunctionProto, TrainingInfoProto, SparseTensorProto).
"""

from __future__ import annotations

import itertools
import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from defense_core.artifact_scan.findings import MAX_FINDINGS, ScanFinding
from defense_core.artifact_scan.onnx_operators import STANDARD_DOMAINS, STANDARD_OPERATORS

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 32
_MAX_FIELDS = 2_000_000
_MAX_TOP_FIELDS = 100_000
_MAX_DIMENSIONS = 1000
_MAX_TEXT_BYTES = 500
# Names of operators, functions and their domains.
_NAMES = (("node", 4), ("node", 7), ("function", 1), ("function", 10))
# Which fields of a message hold which other message.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 9: "opset"},
    "training": {1: "graph", 2: "graph"},
}
# onnx.proto, enum DataType: bits of one element.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
         17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8}  # fmt: skip


class _Malformed(ValueError):
    """The bytes are no protocol buffer of this shape."""


class _TooMany(ValueError):
    """More fields than are read."""


def looks_like_onnx(path: Path) -> bool:
    """Whether the file is, from its first byte to its last, a model with an IR version, a graph and operator sets."""
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:1] != b"\x08" and data[:1] not in (b"\x12", b"\x3a", b"\x42"):
                return False
            numbers = set()
            for count, (number, _, _, _) in enumerate(_fields(data, 0, len(data))):
                numbers.add(number)
                # No model has so many; the rest is not read, and the format stays unknown.
                if count >= _MAX_TOP_FIELDS or number > 100:
                    return False
    except (_Malformed, ValueError, OSError):
        return False
    return {1, 7, 8} <= numbers


def scan_onnx(path: Path, where: str, max_bytes: int) -> list[ScanFinding]:
    """Findings of an ONNX model: external data, operators beyond the standard, tensors that lie."""
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, where, max_bytes)
        try:
            reader.message(0, len(data), "model", 0)
        except _Malformed as error:
            reader.found.append(ScanFinding("damaged", where, f"no complete ONNX model: {error}"))
        except _TooMany as error:
            reader.found.append(ScanFinding("too-large", where, str(error)))
    if not reader.operators:
        reader.found.append(ScanFinding("damaged", where, "a graph without any operator"))
    foreign = (
        (domain, name)
        for domain, name in sorted(reader.operators - reader.functions)
        if not (domain in STANDARD_DOMAINS and name in STANDARD_OPERATORS)
    )
    for domain, name in itertools.islice(foreign, MAX_FINDINGS):
        called = f"{domain or 'ai.onnx'}.{name}"
        reader.found.append(ScanFinding("onnx-custom-operator", where, f"it needs the operator {called}"))
    return reader.found[:MAX_FINDINGS]


@dataclass
class _Reader:
    """What has been read of one model so far."""

    data: mmap.mmap
    where: str
    max_bytes: int
    operators: set[tuple[str, str]] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    found: list[ScanFinding] = field(default_factory=list)
    fields: int = 0

    def message(self, at: int, end: int, kind: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise _Malformed(f"messages nested more than {_MAX_DEPTH} deep")
        if kind == "tensor":
            self.tensor(at, end)
            return
        texts: dict[int, str] = {}
        for number, wire, start, stop in self.counted(at, end):
            inner = _MESSAGES.get(kind, {}).get(number)
            if inner is not None and wire != _BYTES:
                raise _Malformed(f"field {number} of a {kind} has another type")
            if inner is not None:
                self.message(start, stop, inner, depth + 1)
            elif wire == _BYTES and (kind, number) in _NAMES:
                texts[number] = self.text(start, stop)
        if kind == "node":
            self.operators.add((texts.get(7, ""), texts.get(4, "")))
        elif kind == "function":
            self.functions.add((texts.get(10, ""), texts.get(1, "")))

    def counted(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """The fields from ``at`` to ``end``, as long as the whole model has not too many."""
        for each in _fields(self.data, at, end):
            self.fields += 1
            if self.fields > _MAX_FIELDS:
                raise _TooMany(f"more than {_MAX_FIELDS} fields")
            yield each

    def tensor(self, at: int, end: int) -> None:
        dims: list[int] = []
        external: dict[str, str] = {}
        numbers: dict[int, int] = {}
        name, raw_bytes = "", None
        for number, wire, start, stop in self.counted(at, end):
            if wire == _VARINT:
                dims += [_signed(start)] if number == 1 else []
                numbers[number] = start
            elif (wire, number) == (_BYTES, 1):
                dims += [_signed(value) for value in _packed(self.data, start, stop)]
            elif (wire, number) == (_BYTES, 8):
                name = self.text(start, stop)
            elif (wire, number) == (_BYTES, 9):
                raw_bytes = stop - start
            elif (wire, number) == (_BYTES, 13):
                external.update([_entry(self, start, stop)])
            if len(dims) > _MAX_DIMENSIONS:
                # Their product alone would take the square of their number.
                raise _TooMany(f"a tensor of more than {_MAX_DIMENSIONS} dimensions")
        if len(self.found) > MAX_FINDINGS:
            return
        if numbers.get(14) or external:
            self.found.append(_external(external.get("location", ""), name, self.where))
        elif problem := _contradiction(dims, numbers.get(2, 0), raw_bytes, self.max_bytes):
            self.found.append(ScanFinding("tensor-lies", self.where, f"tensor {name!r} {problem}"))

    def text(self, start: int, stop: int) -> str:
        return self.data[start : min(stop, start + _MAX_TEXT_BYTES)].decode("utf-8", errors="replace")


def _contradiction(dims: list[int], kind: int, raw_bytes: int | None, max_bytes: int) -> str:
    elements = math.prod(dims) if all(size >= 0 for size in dims) else -1
    needed = math.ceil(elements * _BITS.get(kind, 8) / 8) if elements < 1 << 60 else max_bytes + 1
    if elements < 0 or needed > max_bytes:
        return f"claims the shape {dims[:8]}"
    if raw_bytes is not None and (kind not in _BITS or raw_bytes != needed):
        return f"holds {raw_bytes} bytes where shape and type need {needed}"
    return ""


def _external(location: str, name: str, where: str) -> ScanFinding:
    escapes = not location or location.startswith(("/", "\\", "~")) or ":" in location or "\\" in location
    if escapes or ".." in location.split("/") or not location.isprintable():
        return ScanFinding("onnx-external-path", where, f"tensor {name!r} is read from {location!r}")
    return ScanFinding("onnx-external-data", where, f"tensor {name!r} is read from the file {location!r}")


def _entry(reader: _Reader, at: int, end: int) -> tuple[str, str]:
    texts = {1: "", 2: ""}
    for number, wire, start, stop in reader.counted(at, end):
        if number in texts and wire == _BYTES:
            texts[number] = reader.text(start, stop)
    return re.sub(r"\s", "", texts[1]).lower(), texts[2]


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, start, stop) of each field; for a varint the value stands in place of the start."""
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at, end)
            yield number, wire, value, at
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, end)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise _Malformed(f"wire type {wire} at byte {at}")
        if number == 0 or at + size > end:
            raise _Malformed(f"field {number} of {size} bytes at byte {at} does not fit")
        yield number, wire, at, at + size
        at += size


def _packed(data: mmap.mmap, at: int, end: int) -> list[int]:
    values: list[int] = []
    while at < end and len(values) <= _MAX_DIMENSIONS:
        value, at = _varint(data, at, end)
        values.append(value)
    return values


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    if at < end and data[at] < 0x80:
        # Nearly all of them.
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _Malformed(f"it ends inside a number, at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise _Malformed(f"a number of more than ten bytes at byte {at}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
