"""What an ONNX file may hold that this project writes: standard operators, weights inside, no notes of the exporter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import onnx
import torch

from defense_core.errors import ExportError

STANDARD_DOMAINS = ("", "ai.onnx")


def cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the exporter's notes: stack traces, paths, code lines, documentation strings.

    They name folders of the exporting machine and differ from one machine to the next.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    _drop_notes(plain)
    plain.producer_name = "pytorch"
    plain.producer_version = torch.__version__.split("+")[0]
    for graph in _graphs(plain.graph):
        _drop_notes(graph)
        graph.name = "network"
        for item in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            _drop_notes(item)
    return plain


def _drop_notes(item: Any) -> None:
    item.ClearField("doc_string")
    item.ClearField("metadata_props")


def plain_onnx_problems(proto: onnx.ModelProto) -> Iterator[str]:
    """Everything that makes ``proto`` more than standard operators with weights inside (empty: plain)."""
    for opset in proto.opset_import:
        if opset.domain not in STANDARD_DOMAINS:
            yield f"operator set {opset.domain!r}"
    for function in proto.functions:
        yield f"function {function.domain}::{function.name}"
    if proto.training_info:
        yield "a training graph"
    for graph in _graphs(proto.graph):
        yield from _problems_of_graph(graph)
    for kind, values, name in (("input", proto.graph.input, "image"), ("output", proto.graph.output, "logits")):
        names = [value.name for value in values]
        if names != [name]:
            yield f"{kind}s {names} instead of {name}"


def _problems_of_graph(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        if node.domain not in STANDARD_DOMAINS:
            yield f"operator {node.domain}::{node.op_type}"
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            yield f"weight {tensor.name} in another file"
        elif tensor.data_type == onnx.TensorProto.FLOAT and not _finite(tensor):
            yield f"weight {tensor.name} with NaN or Inf"
    if graph.sparse_initializer:
        yield "sparse weights"


def _finite(tensor: onnx.TensorProto) -> bool:
    return bool(numpy.isfinite(onnx.numpy_helper.to_array(tensor)).all())


def checked_bytes(proto: onnx.ModelProto) -> bytes:
    """``proto`` as the bytes of a file, the same for the same graph.

    Raises:
        ExportError: it is not plain, or onnx.checker refuses it.
    """
    problems = list(plain_onnx_problems(proto))
    if problems:
        raise ExportError(
            "the exported graph is not plain ONNX",
            expected="standard operators, one file",
            got="; ".join(problems[:10]),
        )
    data: bytes = proto.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "the exported graph is not valid",
            expected="a graph that onnx.checker accepts",
            got=str(error).strip()[:300],
        ) from error
    return data


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """``graph`` and every graph inside its operators."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _graphs(inner)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The operators of ``graph`` and of every graph inside them."""
    for each in _graphs(graph):
        yield from each.node
