"""Small files that made the scan work for minutes: each is judged in seconds, and none is clean."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from defense_core.limits import LoadLimits
from defense_core.pt2_file import read_pt2
from tests.hostile.cost import quickly, rules, scanned
from tests.hostile.hostile_archives import zipped
from tests.hostile.hostile_formats import _field, _node, onnx_bytes


def test_a_safetensors_header_with_a_name_twice(tmp_path: Path) -> None:
    header = "{" + ",".join(f'"{number}":1' for number in [*range(80_000), 79_999]) + "}"
    scan = scanned(tmp_path / "m.safetensors", struct.pack("<Q", len(header)) + header.encode())
    assert "twice" in scan.findings[0].message
    assert rules(scan) == {"tensor-lies"}


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"\x08\x00" * (10 << 20), "format-unknown"),
        (onnx_bytes([_node("Identity")], [b"\x10\x01" * (10 << 20)]), "too-large"),
        (onnx_bytes([_field(1, b"") * (5 << 20)]), "too-large"),
        (onnx_bytes([_node("Identity")], [_field(1, b"\x7f" * (10 << 20)) + b"\x10\x01"]), "too-large"),
        (onnx_bytes([_node("Identity")], [b"\x08\x7f" * (1 << 20) + b"\x10\x01"]), "too-large"),
        (onnx_bytes([_node(f"Own{number}") for number in range(100_000)]), "onnx-custom-operator"),
    ],
    ids=["fields of the model", "fields of a tensor", "fields of a node", "packed shape", "shape", "operators"],
)
def test_onnx_models_of_many_small_things(data: bytes, rule: str, tmp_path: Path) -> None:
    assert scanned(tmp_path / "m.onnx", data).findings[0].rule == rule


@pytest.mark.parametrize(
    "data", [b"\x80\x02N." * (2 << 20), b"\x80\x02" + b"N0" * 500_000 + b"N." + b"\x80\x02" + b"N0" * 500_000 + b"N."]
)
def test_pickles_one_behind_the_other(data: bytes, tmp_path: Path) -> None:
    assert rules(scanned(tmp_path / "m.pkl", data)) <= {"too-large", "format-unsupported", "pickle-code"}


def test_a_text_of_many_pickles(tmp_path: Path) -> None:
    assert rules(scanned(tmp_path / "m.txt", b"N." * (2 << 20))) == {"format-unsupported", "too-large"}


# -- torch.export ----------------------------------------------------------------------


def test_many_weights_in_one_record_are_read_once(tmp_path: Path) -> None:
    record_bytes = 20 << 20
    sizes, strides = [{"as_int": 2}], [{"as_int": 1}]
    meta = {"dtype": 7, "layout": 7, "sizes": sizes, "strides": strides, "storage_offset": {"as_int": 5}}
    row = {"path_name": "weight_0", "use_pickle": False, "tensor_meta": meta}
    table = json.dumps({"config": {f"w{number}": row for number in range(2000)}}).encode()
    values = torch.arange(record_bytes // 4, dtype=torch.float32).numpy().tobytes()
    path = tmp_path / "m.pt2"
    path.write_bytes(zipped({"m/data/weights/weight_0": values, "m/data/weights/m_weights_config.json": table}))
    with quickly(), zipfile.ZipFile(path) as archive:
        tensors = read_pt2(archive, "m/", LoadLimits(), path=path)
    assert len(tensors) == 2000
    assert all(tensor.tolist() == [5, 6] for tensor in tensors.values())
