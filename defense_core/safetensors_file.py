"""Reading and writing safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from defense_core.errors import CorruptArtifact, UnsafeArtifact
from defense_core.limits import LoadLimits

MAX_HEADER_BYTES = 16 << 20


def read_safetensors(path: Path, limits: LoadLimits, *, where: str) -> dict[str, torch.Tensor]:
    """Tensors of the file at ``path``; the caller has checked its size."""
    return parse_safetensors(path.read_bytes(), limits, where=where)


def parse_safetensors(data: bytes, limits: LoadLimits, *, where: str) -> dict[str, torch.Tensor]:
    """Tensors in ``data``, on the CPU, as stored.

    Bytes and not a path, so that what was hashed is what is parsed.

    Raises:
        UnsafeArtifact: the header or the whole is larger than allowed.
        CorruptArtifact: truncated, overlapping, or of an unknown type.
    """
    header_bytes = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if len(data) > limits.max_bytes or header_bytes > MAX_HEADER_BYTES:
        raise UnsafeArtifact(
            f"{where} is too large",
            expected=f"at most {limits.max_bytes} bytes with a header of at most {MAX_HEADER_BYTES}",
            got=f"{len(data)} bytes with a header of {header_bytes}",
        )
    try:
        tensors: dict[str, torch.Tensor] = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CorruptArtifact(
            f"{where} is no valid safetensors file",
            expected="a complete header and as many bytes as it declares",
            got=str(error)[:200],
            hint="Fetch the file again and compare its digest",
        ) from error
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of the file at ``path``; its tensors are not read.

    Raises:
        CorruptArtifact: the header is too long, or no JSON object.
    """
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        metadata = json.loads(header).get("__metadata__") or {}
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptArtifact(f"{path.name} has no readable header", expected="a JSON object", got=error) from error


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Canonical bytes: no metadata, tied tensors stored once per name, ordered by type and name."""
    plain = {
        name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)
    }
    data: bytes = save(plain)
    return data
