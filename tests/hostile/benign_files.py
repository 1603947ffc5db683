# ruff: noqa: E501 - tables, one row a file
"""The zoo: files as training scripts, exporters and this project write them. None may be blocked."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
import torchvision
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.bundle import load_model_file, save_bundle

Benign = Callable[[Path], Path]
SPEC: dict[str, Any] = {
    "architecture": "small_cnn",
    "architecture_args": {"width": 4},
    "input_size": [1, 8, 8],
    "mean": [0.5],
    "std": [0.5],
}
_TORCHVISION = ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5")
_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
           torch.bool, torch.complex64, torch.float8_e4m3fn)  # fmt: skip


def _small() -> nn.Module:
    return build("small_cnn", {"width": 4})


def _saved(make: Callable[[], Any], name: str, *, legacy: bool = False, protocol: int = 2) -> Benign:
    def write(folder: Path) -> Path:
        torch.save(make(), folder / name, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
        return folder / name

    return write


def _vision(name: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: getattr(torchvision.models, name)(num_classes=10).state_dict()


def _checkpoint() -> dict[str, Any]:
    model = _small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 5])
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "epoch": 7,
        "best": 0.93,
        "classes": ["a", "b"],
    }


def _views() -> dict[str, Tensor]:
    base = torch.arange(240.0)
    return {
        "slice": base[10:50],
        "transposed": base.view(12, 20).t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
        "expanded": torch.ones(1, 4).expand(8, 4),
    }


def _tied() -> dict[str, Tensor]:
    weight = torch.ones(8, 8)
    return {"encoder.weight": weight, "decoder.weight": weight}


def _safe(tensors: Callable[[], dict[str, Tensor]], metadata: dict[str, str] | None = None) -> Benign:
    def write(folder: Path) -> Path:
        save_file({name: value.contiguous() for name, value in tensors().items()}, folder / "m.safetensors", metadata)
        return folder / "m.safetensors"

    return write


def _typed(dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"a": torch.ones(5, 3).to(dtype), "b": torch.zeros(7).to(dtype)}


def _exported(model: Callable[[], nn.Module], size: tuple[int, ...], *, dynamic: bool = False) -> Benign:
    def write(folder: Path) -> Path:
        shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
        program = torch.export.export(model().eval(), (torch.zeros(2, *size),), dynamic_shapes=shapes)
        torch.export.save(program, str(folder / "m.pt2"))
        return folder / "m.pt2"

    return write


def _bundle(folder: Path) -> Path:
    save_file(_small().state_dict(), folder / "weights.safetensors")
    save_bundle(load_model_file(folder / "weights.safetensors", SPEC), folder / "bundle")
    (folder / "weights.safetensors").unlink()
    return folder / "bundle"


def _packed(kind: str) -> Benign:
    return lambda folder: Path(shutil.make_archive(str(folder / "packed"), kind, _bundle(folder)))


def _gnu_tar(folder: Path) -> Path:
    path = folder / "packed.tar"
    bundle = _bundle(folder)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(bundle, arcname="model")
    return path


def _repository(folder: Path) -> Path:
    out = folder / "repository"
    out.mkdir()
    save_file(_small().state_dict(), out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"width": 4}))
    (out / "README.md").write_text("# Model\n\nIt classifies digits. Accuracy: 99 %.\n")
    (out / "labels.txt").write_text("cat\ndog\n")
    return out


def _onnx(nodes: list[Any], tensors: Sequence[Any] = (), **more: Any) -> Benign:
    def write(folder: Path) -> Path:
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
        graph = helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
        onnx.save(helper.make_model(graph, producer_name="by hand", **more), str(folder / "m.onnx"))
        return folder / "m.onnx"

    return write


def _tensor(name: str, array: numpy.ndarray[Any, Any]) -> Any:
    return onnx.numpy_helper.from_array(array, name)


def _if_node() -> Any:
    def branch(name: str) -> Any:
        constant = helper.make_node("Constant", [], [name], value=_tensor("v", numpy.ones((1, 4), numpy.float32)))
        return helper.make_graph([constant], name, [], [helper.make_tensor_value_info(name, 1, [1, 4])])

    return helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b"))


def _function() -> Any:
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_function("own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets)


def _torch_onnx(folder: Path) -> Path:
    path = folder / "m.onnx"
    torch.onnx.export(
        _small().eval(), (torch.zeros(2, 1, 8, 8),), str(path), dynamo=True, external_data=False, verbose=False
    )
    return path


def _npy(array: numpy.ndarray[Any, Any]) -> Benign:
    def write(folder: Path) -> Path:
        numpy.save(folder / "a.npy", array, allow_pickle=False)
        return folder / "a.npy"

    return write


def _npz(compressed: bool) -> Benign:
    def write(folder: Path) -> Path:
        save = numpy.savez_compressed if compressed else numpy.savez
        save(folder / "a.npz", images=numpy.zeros((9, 3, 8, 8), numpy.uint8), labels=numpy.arange(9))
        return folder / "a.npz"

    return write


def _in_memory(folder: Path) -> Path:
    buffer = io.BytesIO()
    torch.save(_small().state_dict(), buffer)
    (folder / "weights").write_bytes(buffer.getvalue())
    return folder / "weights"


BENIGN: dict[str, Benign] = {
    **{f"torchvision {name} {form}": _saved(_vision(name), f"m.{end}", legacy=legacy)
       for name in _TORCHVISION for form, end, legacy in (("zip", "pth", False), ("legacy", "pt", True))},
    **{f"torchvision {name} safetensors": _safe(_vision(name)) for name in _TORCHVISION},
    "torch state dict of parameters": _saved(lambda: dict(_small().named_parameters()), "m.pth"),
    "torch checkpoint": _saved(_checkpoint, "m.ckpt"),
    "torch checkpoint, legacy": _saved(_checkpoint, "m.bin", legacy=True),
    "torch views and scalars": _saved(_views, "m.pt"),
    "torch views and scalars, legacy": _saved(_views, "m.pt", legacy=True),
    "torch tied weights": _saved(_tied, "m.pt"),
    "torch without ending": _in_memory,
    "torch in protocol 3": _saved(_tied, "m.pt", protocol=3),
    **{f"torch {str(dtype)[6:]}": _saved(_typed(dtype), "m.pt") for dtype in _DTYPES},
    **{f"safetensors {str(dtype)[6:]}": _safe(_typed(dtype)) for dtype in _DTYPES},
    "safetensors with metadata": _safe(_typed(torch.float32), {"format": "pt", "note": "trained on digits"}),
    "safetensors with an empty tensor": _safe(lambda: {"a": torch.zeros(0, 3), "b": torch.ones(2)}),
    "safetensors scalar": _safe(lambda: {"a": torch.tensor(1.0)}),
    "pt2 small": _exported(_small, (1, 8, 8)),
    "pt2 dynamic batch": _exported(_small, (1, 8, 8), dynamic=True),
    "pt2 linear": _exported(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8)),
    "onnx by torch": _torch_onnx,
    "onnx relu": _onnx([helper.make_node("Relu", ["x"], ["y"])]),
    "onnx with weights": _onnx([helper.make_node("Mul", ["x", "w"], ["y"])], [_tensor("w", numpy.ones((1, 4), numpy.float32))]),
    "onnx with branches": _onnx([_if_node()], [_tensor("c", numpy.array(True))]),
    "onnx with a function": _onnx([helper.make_node("Twice", ["x"], ["y"], domain="own")], functions=[_function()],
                                  opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]),
    "onnx machine learning domain": _onnx([helper.make_node("Binarizer", ["x"], ["y"], domain="ai.onnx.ml")]),
    **{f"onnx {name} weights": _onnx([helper.make_node("Relu", ["x"], ["y"])], [_tensor("w", numpy.ones((3, 5), name))])
       for name in ("float16", "float64", "int8", "int64", "bool", "complex64")},
    "bundle": _bundle,
    "bundle in tar": _packed("tar"),
    "bundle in tar.gz": _packed("gztar"),
    "bundle in tar.bz2": _packed("bztar"),
    "bundle in tar.xz": _packed("xztar"),
    "bundle in zip": _packed("zip"),
    "bundle in a GNU tar": _gnu_tar,
    "repository folder": _repository,
    "npy images": _npy(numpy.zeros((4, 3, 8, 8), numpy.uint8)),
    "npy fortran order": _npy(numpy.asfortranarray(numpy.ones((5, 7)))),
    "npy scalar": _npy(numpy.array(1.5)),
    "npy text": _npy(numpy.array(["cat", "dog"])),
    "npz": _npz(False),
    "npz compressed": _npz(True),
}  # fmt: skip
"""How to write each benign file into a folder, by name."""
