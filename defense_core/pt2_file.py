"""Weights out of a ``torch.export`` archive (``.pt2``). Its graph is never read, let alone run.

Layout as written by torch 2.9 and later: ``NAME/archive_format`` = ``pt2``,
``NAME/data/weights/MODEL_weights_config.json`` maps parameter names to ``weight_N`` records of raw bytes
with dtype, sizes, strides and offset. Pickled weights (tensor subclasses, older versions) are refused.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from defense_core.errors import CorruptArtifact, UnsafeArtifact
from defense_core.limits import LoadLimits

_CONFIG = "_weights_config.json"
_MAX_CONFIG_BYTES = 16 << 20
_STRIDED = 7
# torch/_export/serde/schema.py, class ScalarType
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


def read_pt2(archive: zipfile.ZipFile, root: str, limits: LoadLimits, *, path: Path) -> dict[str, torch.Tensor]:
    """Tensors by parameter name from a zip that was already checked.

    Raises:
        UnsafeArtifact: weights that are stored as pickles, or that claim more than ``max_bytes``.
        CorruptArtifact: no or several weight tables, or records that do not fit their description.
    """
    folder = f"{root}data/weights/"
    names = set(archive.namelist())
    tables = [name for name in names if name.startswith(folder) and name.endswith(_CONFIG)]
    if len(tables) != 1:
        pickled = any(name.startswith(folder) and name.endswith(".pt") for name in names)
        kind = UnsafeArtifact if pickled else CorruptArtifact
        raise kind(
            f"{path.name} has no single table of weights",
            expected=f"one {folder}*{_CONFIG}",
            got="pickled weights" if pickled else f"{len(tables)} tables",
            hint="Export the model again with torch 2.9 or later, or save its state dict as safetensors",
        )
    tensors: dict[str, torch.Tensor] = {}
    total = 0
    table = _table(archive, tables[0], path)
    # Each record is read once, however many weights name it, and dropped behind the last of them.
    uses = Counter(str(entry.get("path_name")) for entry in table.values())
    records: dict[str, bytearray] = {}
    for name, entry in table.items():
        if entry.get("use_pickle") is not False:
            raise UnsafeArtifact(
                f"weight {name} of {path.name} is a pickle",
                expected="raw bytes",
                got="use_pickle",
                hint="Export a model of plain tensors, without tensor subclasses",
            )
        try:
            record = folder + entry["path_name"]
            if record in names and record not in records:
                records[record] = bytearray(archive.read(record))
            tensor = _tensor(records.get(record), entry["tensor_meta"])
            uses[entry["path_name"]] -= 1
            if not uses[entry["path_name"]]:
                records.pop(record, None)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(path, f"weight {name}: {type(error).__name__} {error}") from error
        total += tensor.numel() * tensor.element_size()
        if total > limits.max_bytes:
            raise UnsafeArtifact(f"weights of {path.name} are too large", expected=f"at most {limits.max_bytes} bytes")
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors


def _table(archive: zipfile.ZipFile, name: str, path: Path) -> dict[str, Mapping[str, Any]]:
    if archive.getinfo(name).file_size > _MAX_CONFIG_BYTES:
        raise UnsafeArtifact(
            f"table of weights of {path.name} is too large", expected=f"at most {_MAX_CONFIG_BYTES} bytes"
        )
    try:
        table = json.loads(archive.read(name))["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"table of weights: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise _damaged(path, "table of weights is no mapping of mappings")
    return table


def _tensor(data: bytearray | None, meta: Mapping[str, Any]) -> torch.Tensor:
    if data is None:
        raise ValueError("its record is missing")
    dtype = _DTYPES[meta["dtype"]]
    if meta["layout"] != _STRIDED:
        raise ValueError("it is not dense")
    sizes = [_size(item) for item in meta["sizes"]]
    strides = [_size(item) for item in meta["strides"]]
    if len(sizes) > 16 or len(strides) != len(sizes):
        raise ValueError("sizes and strides do not fit")
    if math.prod(sizes) == 0:
        return torch.zeros(sizes, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype)
    # as_strided checks that every element lies inside the record.
    return torch.as_strided(flat, sizes, strides, _size(meta["storage_offset"]))


def _size(item: Any) -> int:
    value = item["as_int"]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
        raise ValueError(f"size {value!r}")
    return value


def _damaged(path: Path, what: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"{path.name} is damaged", expected="a torch.export archive", got=what[:200], hint="Export the model again"
    )
