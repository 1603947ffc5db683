"""Small releases for registry tests: a bundle, an ONNX file and evidence, made in a moment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.release import Identity, Parts, Release, stage
from defense_core.config import canonical_json
from defense_core.files import sha256_bytes, sha256_file


def digest_of(text: str) -> str:
    """A well-formed digest that stands for ``text``."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


IDENTITY = Identity(source=digest_of("source"), config=digest_of("config"), policy=digest_of("policy"))


def make_parts(folder: Path, *, weights: bytes = b"weights", onnx: bytes = b"onnx", note: str = "") -> Parts:
    """Arbitrary bytes for weights and ONNX; ``note`` changes the evidence only."""
    bundle = folder / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "model.safetensors").write_bytes(weights)
    description = {"format": 1, "input_size": [3, 2, 2], "files": {"model.safetensors": sha256_bytes(weights)}}
    (bundle / "bundle.json").write_bytes(canonical_json(description))
    evidence = folder / "evidence"
    evidence.mkdir()
    (evidence / "fetch.json").write_text(json.dumps({"schema": 1, "step": "fetch", "name": "fetch", "note": note}))
    (evidence / "evaluate.tsbd.json").write_text(json.dumps({"schema": 1, "step": "evaluate"}))
    (folder / "exported.onnx").write_bytes(onnx)
    return Parts(folder / "exported.onnx", bundle, evidence)


def make_release(folder: Path, **changes: Any) -> Release:
    """An unsigned release of :func:`make_parts`."""
    parts = make_parts(folder / "parts", **changes)
    (folder / "release").mkdir()
    stage(parts, folder / "release")
    return Release(
        folder / "release",
        onnx_digest=sha256_file(parts.onnx_path),
        bundle_digest=sha256_file(parts.bundle_dir / "bundle.json"),
    )


def make_onnx() -> bytes:
    """A real ONNX model: flattens N×3×2×2 to N×12, any batch size."""
    from onnx import TensorProto, checker, helper

    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["logits"], axis=1)],
        "flatten",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 12])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model)
    return bytes(model.SerializeToString())


class Kill(BaseException):
    """Ends a step as ``kill -9`` would: no handler for Exception sees it."""


class Interposed:
    """A client whose every call is announced: ``hook(number, name, "before" | "after")``."""

    def __init__(self, client: Any, hook: Callable[[int, str, str], None]) -> None:
        self._client = client
        self._hook = hook
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            number = len(self.calls)
            self._hook(number, name, "before")
            try:
                return method(*args, **kwargs)
            finally:
                self._hook(number, name, "after")

        return call


def interposed(connection: MlflowConnection, hook: Callable[[int, str, str], None]) -> MlflowConnection:
    """``connection`` with every client call announced to ``hook``."""
    return MlflowConnection(connection.settings, Interposed(connection.client, hook))
