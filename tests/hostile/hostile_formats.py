# ruff: noqa: E501 - tables, one row a file
"""Hostile files of the tensor and graph formats: lying headers, hidden code, data from elsewhere."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch

from tests.hostile.hostile_archives import Maker, payload, torch_zip, written, zipped


def _st(header: object, body: bytes = b"", size: int | None = None) -> Maker:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return written("model.safetensors", lambda c: struct.pack("<Q", len(text) if size is None else size) + text + body)


def _row(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _node(op: str, domain: str = "", **attributes: bytes) -> bytes:
    body = _field(4, op.encode()) + (_field(7, domain.encode()) if domain else b"")
    return body + b"".join(_field(5, _field(1, name.encode()) + _field(6, graph)) for name, graph in attributes.items())


def _field(number: int, data: bytes | int) -> bytes:
    if isinstance(data, int):
        return _varint(number << 3) + _varint(data)
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def onnx_bytes(nodes: list[bytes], tensors: Sequence[bytes] = (), extra: bytes = b"") -> bytes:
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"g") + b"".join(_field(5, t) for t in tensors)
    return _field(1, 8) + _field(7, graph) + _field(8, _field(2, 17)) + extra


def _external(location: str) -> bytes:
    entry = _field(1, b"location") + _field(2, location.encode())
    return _field(1, 4) + _field(2, 1) + _field(8, b"w") + _field(13, entry) + _field(14, 1)


def _onnx(nodes: list[bytes], tensors: Sequence[bytes] = (), name: str = "model.onnx", extra: bytes = b"") -> Maker:
    return written(name, lambda c: onnx_bytes(nodes, tensors, extra))


def _nested_graphs(depth: int) -> bytes:
    node = _node("Identity")
    for _ in range(depth):
        node = _node("If", then_branch=_field(1, node))
    return node


def _pt2(
    change: Callable[[str, bytes, str], bytes | None], extra: Callable[[str], dict[str, bytes]] = lambda c: {}
) -> Maker:
    def make(folder: Path, canary: str) -> Path:
        path = folder / "model.pt2"
        weights = (
            b'{"config": {"w": {"path_name": "weight_0", "use_pickle": false, "is_param": true, "tensor_meta": null}}}'
        )
        members = {
            "m/archive_format": b"pt2",
            "m/archive_version": b"0",
            "m/models/model.json": b"{}",
            "m/data/weights/weight_0": bytes(16),
            "m/data/weights/model_weights_config.json": weights,
        }
        changed = {name: change(name, data, canary) for name, data in members.items()}
        path.write_bytes(zipped({**{n: d for n, d in changed.items() if d is not None}, **extra(canary)}))
        return path

    return make


def _same(name: str, data: bytes, canary: str) -> bytes:
    return data


def _scripted(folder: Path, canary: str) -> Path:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(folder / "model.pt"))
    return folder / "model.pt"


class _Object:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({self.canary!r}, 'w').close()",)


def _npy(canary: str) -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.array([_Object(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _npz(canary: str) -> bytes:
    buffer = io.BytesIO()
    numpy.savez(buffer, images=numpy.zeros(3), labels=numpy.array([_Object(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _npy_header(header: str, body: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def _lambda_config(canary: str) -> bytes:
    return json.dumps({"class_name": "Functional", "config": {"layers": [{"class_name": "Lambda", "config": {"function": {
        "class_name": "__lambda__", "config": {"code": "4wEAAAAAAAAA", "defaults": None}}}}]}}).encode()  # fmt: skip


def _stride_bomb(folder: Path, canary: str) -> Path:
    torch.save({"conv1.weight": torch.zeros(1).expand(1 << 40)}, folder / "model.pt")
    return folder / "model.pt"


def _whole_module(folder: Path, canary: str) -> Path:
    torch.save(torch.nn.Linear(2, 2), folder / "model.pt")
    return folder / "model.pt"


def _legacy(canary: str, second: bytes) -> bytes:
    head = b"".join(pickle.dumps(item, protocol=2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + second + pickle.dumps([], protocol=2)


FORMATS: dict[str, tuple[str, Maker]] = {
    "safetensors header of 2 GiB": ("safetensors", _st({}, size=1 << 31)),
    "safetensors header of 2^63": ("safetensors", _st({"a": _row()}, bytes(8), size=1 << 63)),
    "safetensors header beyond the file": ("safetensors", _st({"a": _row()}, b"", size=1 << 20)),
    "safetensors overlapping": ("safetensors", _st({"a": _row(), "b": _row()}, bytes(8))),
    "safetensors overlapping partly": ("safetensors", _st({"a": _row(), "b": _row(offsets=(4, 12))}, bytes(12))),
    "safetensors gap": ("safetensors", _st({"a": _row(), "b": _row(offsets=(16, 24))}, bytes(24))),
    "safetensors bytes behind": ("safetensors", _st({"a": _row()}, bytes(100))),
    "safetensors huge offset": ("safetensors", _st({"a": _row(offsets=(0, 1 << 60))}, bytes(8))),
    "safetensors negative offset": ("safetensors", _st({"a": _row(offsets=(-8, 0))}, bytes(8))),
    "safetensors reversed offsets": ("safetensors", _st({"a": _row(offsets=(8, 0))}, bytes(8))),
    "safetensors float offsets": ("safetensors", _st({"a": _row(offsets=(0.0, 8.0))}, bytes(8))),
    "safetensors overflowing shape": ("safetensors", _st({"a": _row(shape=(1 << 62, 4))}, bytes(8))),
    "safetensors negative shape": ("safetensors", _st({"a": _row(shape=(-2, -1))}, bytes(8))),
    "safetensors boolean shape": ("safetensors", _st({"a": _row(shape=(True, 2))}, bytes(8))),
    "safetensors dtype lies": ("safetensors", _st({"a": _row(dtype="F64")}, bytes(8))),
    "safetensors unknown dtype": ("safetensors", _st({"a": _row(dtype="PY")}, bytes(8))),
    "safetensors dtype is a list": ("safetensors", _st({"a": _row(dtype=["F32"])}, bytes(8))),
    "safetensors header not UTF-8": ("safetensors", _st(b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))),
    "safetensors header no JSON": ("safetensors", _st(b'{"a":')),
    "safetensors deeply nested": ("safetensors", _st(b'{"a":' + b"[" * 100_000)),
    "safetensors duplicate key": (
        "safetensors", _st(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))),
    "safetensors NaN in the header": ("safetensors", _st(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8))),
    "safetensors metadata of objects": ("safetensors", _st({"__metadata__": {"a": {"b": 1}}, "a": _row()}, bytes(8))),
    "safetensors extra fields": ("safetensors", _st({"a": {**_row(), "code": "x"}}, bytes(8))),
    "safetensors truncated": ("safetensors", _st({"a": _row(shape=(200,), offsets=(0, 800))}, bytes(300))),
    "torch stride bomb": ("torch files", _stride_bomb),
    "torchscript": ("torch files", _scripted),
    "torch file with code": ("torch files", written("model.pt", lambda c: torch_zip(pickle.dumps({}, protocol=2), {"m/code/__torch__.py": b"x"}))),
    "torch file with two data.pkl": (
        "torch files", written("model.pt", lambda c: zipped({"a/data.pkl": pickle.dumps({}, protocol=2), "b/data.pkl": payload(c)}))),
    "torch file with hidden pickle": ("torch files", written("model.pt", lambda c: torch_zip(pickle.dumps({}, protocol=2), {"m/extra.pkl": payload(c)}))),
    "whole pickled module": ("torch files", _whole_module),
    "legacy torch with payload": ("torch files", written("model.pth", lambda c: _legacy(c, payload(c)))),
    "legacy torch tar": ("torch files", written("model.pth", lambda c: b"ustar" + payload(c))),
    "pt2 hidden pickle in sample inputs": ("pt2", _pt2(_same, lambda c: {"m/data/sample_inputs/model.pt": torch_zip(payload(c))})),
    "pt2 bare pickle in sample inputs": ("pt2", _pt2(_same, lambda c: {"m/data/sample_inputs/model.pt": payload(c)})),
    "pt2 custom object": ("pt2", _pt2(_same, lambda c: {"m/data/constants/custom_obj_0": payload(c)})),
    "pt2 pickle as a weight": ("pt2", _pt2(lambda n, d, c: payload(c) if n.endswith("weight_0") else d)),
    "pt2 torch file as a weight": ("pt2", _pt2(lambda n, d, c: torch_zip(payload(c)) if n.endswith("weight_0") else d)),
    "pt2 weights declared as pickles": ("pt2", _pt2(lambda n, d, c: d.replace(b"false", b"true"))),
    "pt2 pickle as the graph": ("pt2", _pt2(lambda n, d, c: payload(c) if n.endswith("model.json") else d)),
    "pt2 compiled library": ("pt2", _pt2(_same, lambda c: {"m/data/aotinductor/model/x.so": b"\x7fELF"})),
    "pt2 source code": ("pt2", _pt2(_same, lambda c: {"m/data/aotinductor/model/x.cpp": b"int main;"})),
    "pt2 extra pickle": ("pt2", _pt2(_same, lambda c: {"m/extra/notes": payload(c)})),
    "onnx external data upwards": ("onnx", _onnx([_node("Relu")], [_external("../../../etc/passwd")])),
    "onnx external data upwards inside": ("onnx", _onnx([_node("Relu")], [_external("data/../../secret")])),
    "onnx external data absolute": ("onnx", _onnx([_node("Relu")], [_external("/etc/passwd")])),
    "onnx external data windows": ("onnx", _onnx([_node("Relu")], [_external("C:\\secret")])),
    "onnx external data url": ("onnx", _onnx([_node("Relu")], [_external("file:///etc/passwd")])),
    "onnx external data bidi": ("onnx", _onnx([_node("Relu")], [_external("data\u202enib")])),
    "onnx external data beside": ("onnx", _onnx([_node("Relu")], [_external("weights.bin")])),
    "onnx external data in an attribute": (
        "onnx", _onnx([_field(4, b"Constant") + _field(5, _field(1, b"value") + _field(5, _external("../x")))])),
    "onnx external data in a subgraph": ("onnx", _onnx([_node("If", then_branch=_field(5, _external("../x")))])),
    "onnx external data in a function": (
        "onnx", _onnx([_node("Relu")], extra=_field(25, _field(1, b"f") + _field(7, _field(4, b"Constant") + _field(5, _field(5, _external("/x"))))))),
    "onnx external data in training info": ("onnx", _onnx([_node("Relu")], extra=_field(20, _field(1, _field(5, _external("/x")))))),
    "onnx external data, sparse": ("onnx", written("model.onnx", lambda c: _field(1, 8) + _field(7, _field(15, _field(1, _external("/x")))) + _field(8, _field(2, 17)))),
    "onnx custom domain": ("onnx", _onnx([_node("Anything", "evil.ops")])),
    "onnx custom domain in a subgraph": ("onnx", _onnx([_node("If", then_branch=_field(1, _node("PyOp", "ai.onnx.contrib")))])),
    "onnx unknown operator": ("onnx", _onnx([_node("PythonOp")])),
    "onnx aten fallback": ("onnx", _onnx([_node("ATen", "org.pytorch.aten")])),
    "onnx contrib operator": ("onnx", _onnx([_node("FusedConv", "com.microsoft")])),
    "onnx tensor of 2^60": ("onnx", _onnx([_node("Relu")], [_field(1, 1 << 60) + _field(2, 1) + _field(9, bytes(4))])),
    "onnx tensor size lies": ("onnx", _onnx([_node("Relu")], [_field(1, 400) + _field(2, 1) + _field(9, bytes(4))])),
    "onnx negative dimension": ("onnx", _onnx([_node("Relu")], [_field(1, (1 << 64) - 2) + _field(2, 1) + _field(9, bytes(4))])),
    "onnx deeply nested": ("onnx", _onnx([_nested_graphs(200)])),
    "onnx truncated": ("onnx", written("model.onnx", lambda c: onnx_bytes([_node("Relu")] * 40)[:-50])),
    "onnx bytes behind": ("onnx", written("model.onnx", lambda c: onnx_bytes([_node("Relu")]) + payload(c))),
    "onnx without operators": ("onnx", _onnx([])),
    "onnx named bin": ("onnx", _onnx([_node("Anything", "evil.ops")], name="model.bin")),
    "keras lambda": ("keras", written("model.keras", lambda c: zipped({"config.json": _lambda_config(c), "metadata.json": b"{}", "model.weights.h5": b"x"}))),
    "keras foreign module": (
        "keras", written("model.keras", lambda c: zipped({"config.json": b'{"module": "builtins_evil.os", "class_name": "x"}', "metadata.json": b"{}"}))),
    "keras without lambda": ("keras", written("model.keras", lambda c: zipped({"config.json": b'{"module": "keras"}', "metadata.json": b"{}"}))),
    "hdf5 lambda": ("keras", written("model.h5", lambda c: b"\x89HDF\r\n\x1a\n" + bytes(500) + _lambda_config(c))),
    "hdf5": ("keras", written("model.h5", lambda c: b"\x89HDF\r\n\x1a\n" + bytes(500))),
    "npy of objects": ("numpy", written("data.npy", _npy)),
    "npz of objects": ("numpy", written("data.npz", _npz)),
    "npy of objects in a structure": (
        "numpy", written("data.npy", lambda c: _npy_header("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }\n", payload(c)))),
    "npy header that calls": (
        "numpy", written("data.npy", lambda c: _npy_header(f"{{'descr': open({c!r},'w'), 'fortran_order': False, 'shape': (), }}\n", b""))),
    "npy header deeply nested": ("numpy", written("data.npy", lambda c: _npy_header("(" * 60_000, b""))),
    "npy shape lies": (
        "numpy", written("data.npy", lambda c: _npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }\n", bytes(4)))),
    "npy with a payload behind": (
        "numpy", written("data.npy", lambda c: _npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n", bytes(4) + payload(c)))),
    "npz with a pickle member": ("numpy", written("data.npz", lambda c: zipped({"a.npy": payload(c)}))),
    "joblib": ("numpy", written("model.joblib", payload)),
    "empty file": ("no format", written("model.pt", lambda c: b"")),
    "one byte": ("no format", written("model.pt", lambda c: b"\x80")),
    "one letter": ("no format", written("model.safetensors", lambda c: b".")),
    "zeros": ("no format", written("model.bin", lambda c: bytes(600))),
    "random bytes": ("no format", written("model.pt", lambda c: bytes((n * 7919) % 251 for n in range(5000)))),
    "gguf": ("no format", written("model.gguf", lambda c: b"GGUF" + bytes(200))),
    "json broken": ("no format", written("config.json", lambda c: b'{"a": \x00')),
}  # fmt: skip
