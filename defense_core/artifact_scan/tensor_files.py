"""Files of raw tensors, judged by their headers alone: safetensors, numpy, and HDF5 of Keras."""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from defense_core.artifact_scan.findings import ScanFinding
from defense_core.safetensors_file import MAX_HEADER_BYTES

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MAX_NPY_HEADER_BYTES = 10_000  # numpy's own default, numpy/lib/_format_impl.py
_NPY_HEADER = re.compile(
    r"\{'descr': '(?P<kind>[<>|=]?[biufcSUV?])(?P<width>\d{0,4})', 'fortran_order': (?:True|False), "
    r"'shape': \((?P<shape>[\d, ]{0,200})\), \}\s*"
)
_LAMBDA = re.compile(rb'"class_name"\s*:\s*"(?:[^"]{0,100}>)?Lambda"|"__lambda__"|"__typed_lambda__"')


class _Lies(ValueError):
    """The header describes tensors that contradict each other or the file."""


def scan_safetensors(path: Path, size: int, where: str) -> list[ScanFinding]:
    """Findings of a safetensors file: a header that is no table of adjacent tensors filling the file."""
    with open(path, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size - 8, MAX_HEADER_BYTES):
            text = f"a header of {length} bytes in a file of {size}, where {MAX_HEADER_BYTES} are allowed"
            return [ScanFinding("tensor-lies", where, text, 0)]
        header = stream.read(length)
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse_constant)
        held, claimed = size - 8 - length, _total_bytes(table)
    except _Lies as error:
        return [ScanFinding("tensor-lies", where, str(error), 8)]
    except (ValueError, RecursionError) as error:
        return [ScanFinding("damaged", where, f"the header is not readable: {str(error)[:100]}", 8)]
    if claimed != held:
        rule = "damaged" if claimed > held else "tensor-lies"
        return [ScanFinding(rule, where, f"its tensors fill {claimed} bytes of {held}", 8 + length)]
    return []


def _total_bytes(table: Any) -> int:
    metadata = table.pop("__metadata__", {}) if isinstance(table, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("it is no table, or its metadata is no mapping of texts")
    at = 0
    for start, stop, name in sorted(_extent(name, row) for name, row in table.items()):
        if start != at:
            raise _Lies(f"tensor {name!r} starts at {start} where {at} is next")
        at = stop
    return at


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise _Lies(f"the header has {name!r} twice")
        mapping[name] = value
    return mapping


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _extent(name: str, row: Any) -> tuple[int, int, str]:
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise _Lies(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Lies(f"tensor {name!r} has the type {dtype!r}")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if len(numbers) > 66 or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise _Lies(f"tensor {name!r} has the shape {str(shape)[:40]} and the offsets {str(offsets)[:60]}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise _Lies(f"tensor {name!r} claims {bits // 8} bytes and lies in {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1], name


def scan_npy_file(path: Path, where: str) -> list[ScanFinding]:
    """Findings of a ``.npy`` file."""
    with open(path, "rb") as stream:
        return scan_npy(stream, path.stat().st_size, where)


def scan_npy(stream: BinaryIO, size: int, where: str) -> list[ScanFinding]:
    """Findings of a ``.npy`` file or member of ``size`` bytes: objects, or another length than it declares."""
    start = stream.read(12)
    wide = len(start) == 12 and start[6] in (2, 3)
    if len(start) < 12 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        return [ScanFinding("damaged", where, "no numpy file of a known version", 0)]
    length = struct.unpack("<I", start[8:12])[0] if wide else struct.unpack("<H", start[8:10])[0]
    if length > _MAX_NPY_HEADER_BYTES:
        return [ScanFinding("tensor-lies", where, f"a header of {length} bytes", 8)]
    raw = stream.read(length) if wide else start[10:] + stream.read(length - 2)
    header = raw.decode("latin-1")
    found = _NPY_HEADER.fullmatch(header)
    if found is None:
        described = header.partition("'fortran_order'")[0]
        objects = re.search(r"['\"][<>|=]?O\d*['\"]", described)
        rule, text = (
            ("numpy-objects", "its elements are Python objects")
            if objects
            else ("format-unsupported", "its elements are no plain numbers")
        )
        return [ScanFinding(rule, where, text, 10)]
    shape = [int(number) for number in found["shape"].replace(" ", "").split(",") if number]
    width = int(found["width"] or 1) * (4 if found["kind"][-1] == "U" else 1)
    needed = math.prod(shape) * width
    held = size - (12 if wide else 10) - length
    if needed != held:
        return [ScanFinding("tensor-lies", where, f"{held} bytes where shape and type need {needed}", 10 + length)]
    return []


def scan_hdf5(path: Path, where: str) -> list[ScanFinding]:
    """Findings of an HDF5 file; never none, because its graph of objects is not read."""
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _LAMBDA.search(data)
    if found is not None:
        return [ScanFinding("keras-lambda", where, "a Keras model with a Lambda layer", found.start())]
    return [ScanFinding("format-unsupported", where, "HDF5 is recognised and not read")]


def scan_keras_config(config: bytes, where: str) -> list[ScanFinding]:
    """Findings of the ``config.json`` of a Keras archive; never none, because its layers are not rebuilt."""
    found = _LAMBDA.search(config)
    if found is not None:
        return [ScanFinding("keras-lambda", where, "a Lambda layer", found.start())]
    modules = sorted({m.decode() for m in re.findall(rb'"module"\s*:\s*"([\w.]{1,100})"', config)})
    foreign = [module for module in modules if module.split(".")[0] not in ("keras", "builtins")]
    if foreign:
        return [ScanFinding("keras-lambda", where, "objects of " + ", ".join(foreign[:5]))]
    return [ScanFinding("format-unsupported", where, "Keras archives are recognised and not read")]
