"""ONNX export: plain, single-file, deterministic, and the same answers as the network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.attacks.probe import probe_from_spec
from defense_core.config import canonical_json
from defense_core.data import CleanSet
from defense_core.errors import (
    Cancelled,
    ConfigError,
    DataError,
    ExportError,
    NonFiniteOutputs,
    NonFiniteWeights,
    StorageError,
)
from defense_core.export import Exported, export_onnx
from defense_core.parity import ParityBounds, _batches, _spread, check_parity, parity_steps
from defense_core.plain_onnx import checked_bytes, cleaned, plain_onnx_problems
from defense_core.progress import NullProgress
from defense_core.task import ImageClassification
from defense_core.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]


def task_of(size: tuple[int, int, int]) -> ImageClassification:
    names = tuple(f"class {label}" for label in range(10))
    return ImageClassification(size, 10, (0.45,) * size[0], (0.25,) * size[0], class_names=names)


def images_of(size: tuple[int, int, int], count: int = 9) -> CleanSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *size), dtype=torch.uint8, generator=generator)
    return CleanSet(images, torch.arange(count) % 10, 10)


def trained(name: str, **arguments: object) -> nn.Module:
    """A network whose BatchNorm statistics are not the trivial ones."""
    torch.manual_seed(0)
    model = build(name, arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


BOUNDS = ParityBounds(batch_sizes=(1, 2, 5))
DIGITS = (1, 8, 8)


def export(model: nn.Module, path: Path, size: tuple[int, int, int] = DIGITS, **options: object) -> Exported:
    settings: dict[str, object] = {
        "task": task_of(size),
        "input_size": size,
        "clean": images_of(size),
        "bounds": BOUNDS,
    }
    return export_onnx(model, path, **(settings | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Exported]:
    model = trained("small_cnn", width=4)
    probe = probe_from_spec({"name": "patch", "kind": "badnets", "size": 2}, num_classes=10)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    return model, export(model, path, probes=[probe], bundle_digest="sha256:abc")


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("preact_resnet18", {"width": 4, "num_classes": 10}, (3, 32, 32)),
        ("vit_tiny", {"dim": 24, "depth": 2, "heads": 2}, (3, 32, 32)),
        ("torchvision.resnet18", {"num_classes": 10}, (3, 32, 32)),
        ("squeezenet1_1", {"num_classes": 10}, (3, 64, 64)),
    ],
)
def test_architectures_export_and_agree(
    name: str, arguments: dict[str, object], size: tuple[int, int, int], tmp_path: Path
) -> None:
    if name == "torchvision.resnet18":
        import torchvision

        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=10).eval()
    else:
        model = trained(name, **arguments)
    exported = export(model, tmp_path / "model.onnx", size)
    assert exported.verdict is Verdict.PASS
    row = exported.parity[0]
    assert row.max_abs_diff is not None
    assert row.max_abs_diff <= row.bound_abs / 3
    assert row.argmax_agreement == 1.0


def test_results_are_what_evidence_records(digits: tuple[nn.Module, Exported]) -> None:
    _, exported = digits
    data = exported.path.read_bytes()
    results = json.loads(canonical_json(exported.to_results()))
    assert results["sha256"] == "sha256:" + hashlib.sha256(data).hexdigest()
    assert results["bytes"] == len(data)
    assert results["opset"] == 18
    assert results["dynamic_batch"] is True
    assert [row["name"] for row in results["parity"]] == ["clean", "patch"]
    assert {"max_abs_diff", "argmax_agreement", "images", "bound_abs", "bound_agreement"} <= set(results["parity"][0])
    assert results["parity"][0]["images"] == 9
    assert {finding.rule for finding in exported.findings} == {
        "parity.runs",
        "parity.clean.max_abs_diff",
        "parity.clean.argmax_agreement",
        "parity.patch.max_abs_diff",
        "parity.patch.argmax_agreement",
    }


def test_file_takes_pixels_at_any_batch_size(digits: tuple[nn.Module, Exported]) -> None:
    model, exported = digits
    session = onnxruntime.InferenceSession(exported.path.read_bytes(), providers=["CPUExecutionProvider"])
    for count in (1, 2, 3, 130):
        images = images_of(DIGITS, count).images
        (got,) = session.run(["logits"], {"image": images.numpy().astype(numpy.float32) / 255})
        with torch.inference_mode():
            wanted = model(task_of(DIGITS).inputs(images)).numpy()
        assert got.dtype == numpy.float32
        numpy.testing.assert_allclose(got, wanted, atol=1e-5)


def test_metadata_tell_how_to_use_the_file(digits: tuple[nn.Module, Exported]) -> None:
    proto = onnx.load(digits[1].path)
    facts = {item.key: item.value for item in proto.metadata_props}
    assert facts["quarantine.bundle"] == "sha256:abc"
    assert json.loads(facts["quarantine.class_names"])[3] == "class 3"
    assert json.loads(facts["quarantine.input"])["shape"] == ["N", 1, 8, 8]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 10


def test_nothing_of_the_exporting_machine_is_in_the_file(digits: tuple[nn.Module, Exported]) -> None:
    data = digits[1].path.read_bytes()
    host = os.uname().nodename
    # A short name may stand among the weights by chance.
    hosts = [host] if len(host) >= 8 else []
    for secret in (str(ROOT), sys.prefix, "site-packages", ".py", "line ", "defense_core", *hosts):
        assert secret.encode() not in data, secret


def test_file_is_plain_onnx(digits: tuple[nn.Module, Exported]) -> None:
    proto = onnx.load(digits[1].path, load_external_data=False)
    assert list(plain_onnx_problems(proto)) == []
    assert digits[1].path.parent.joinpath("model.onnx.data").exists() is False
    assert digits[1].operators == tuple(sorted({node.op_type for node in proto.graph.node}))


def test_same_network_gives_same_bytes_in_another_process(digits: tuple[nn.Module, Exported], tmp_path: Path) -> None:
    model, exported = digits
    torch.save(model.state_dict(), tmp_path / "state.pt")
    script = (
        "import sys, torch; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/unit']; import test_export as t\n"
        "model = t.build('small_cnn', {'width': 4})\n"
        "model.load_state_dict(torch.load(sys.argv[2], weights_only=True))\n"
        "print(t.export(model, t.Path(sys.argv[3]), bundle_digest='sha256:abc').sha256)"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path / "state.pt"), str(tmp_path / "again.onnx")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == exported.sha256 + "\n"  # nothing else on standard output either


def test_model_is_left_alone(tmp_path: Path) -> None:
    model = trained("small_cnn", width=4).train()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)  # type: ignore[union-attr]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export(model, tmp_path / "model.onnx")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.conv1.weight.grad is not None  # type: ignore[union-attr]


def tampered(path: Path, change: Callable[[numpy.ndarray], numpy.ndarray]) -> bytes:
    """The file with all weight matrices and filters changed."""
    proto = onnx.load(path)
    for weight in proto.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) > 1 and ".weight" in weight.name:
            weight.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(weight)), weight.name))
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda weight: weight * 1.01, "parity.clean.max_abs_diff"),
        (lambda weight: -weight, "parity.clean.argmax_agreement"),
        (lambda weight: weight.astype(numpy.float16).astype(numpy.float32), "parity.patch.max_abs_diff"),
        (lambda weight: weight * numpy.float32("nan"), "parity.clean.max_abs_diff"),
    ],
    ids=["scaled", "negated", "half", "nan"],
)
def test_tampered_weights_fail_parity(
    digits: tuple[nn.Module, Exported], change: Callable[[numpy.ndarray], numpy.ndarray], rule: str
) -> None:
    model, exported = digits
    probe = probe_from_spec({"name": "patch", "kind": "badnets", "size": 2}, num_classes=10)
    check = check_parity(
        tampered(exported.path, change),
        model,
        task=task_of(DIGITS),
        clean=images_of(DIGITS),
        probes=[probe],
        bounds=BOUNDS,
        phase=NullProgress().phase("parity"),
    )
    failed = {finding.rule for finding in check.findings if finding.verdict is Verdict.FAIL}
    assert rule in failed
    canonical_json(check.rows)  # NaN never reaches evidence


class TwoFaces(nn.Module):
    """Answers otherwise while it is being exported."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.linear(inputs.flatten(1))
        return -logits if torch.compiler.is_exporting() else logits


def test_network_that_exports_as_another_fails_and_is_described(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exported = export(TwoFaces().eval(), tmp_path / "model.onnx")
    assert exported.verdict is Verdict.FAIL
    assert exported.path.exists()
    assert exported.parity[0].argmax_agreement < 0.5


class Rowwise(nn.Module):
    """Fixes the batch size of the exported graph only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        count = 2 if torch.compiler.is_exporting() else inputs.shape[0]
        logits: Tensor = self.linear(inputs.reshape(count, 64))
        return logits


def test_fixed_batch_size_fails(tmp_path: Path) -> None:
    exported = export(Rowwise().eval(), tmp_path / "model.onnx")
    assert exported.verdict is Verdict.FAIL
    assert exported.dynamic_batch is False
    assert exported.findings[0].rule == "parity.runs"
    assert "batch of 1" in exported.findings[0].why
    assert exported.to_results()["parity"] == []


class Branch(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)[:, :10]
        return flat if inputs.sum() > 0 else -flat


class OneLogit(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1)[:, :1]


class Pairs(nn.Module):
    """Takes batches of two only; the exporter, which shows it one, does not notice."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(2, -1, 64)[:, 0, :10]


class Alone(nn.Module):
    """Stumbles over its own code at a batch of one; the exporter does not notice."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.error = error

    def forward(self, inputs: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export() and len(inputs) == 1:
            raise self.error("of its own")
        logits: Tensor = self.linear(inputs.flatten(1)[:, :64])
        return logits


class Silent(nn.Module):
    """Refuses to be exported, without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise ValueError
        logits: Tensor = self.linear(inputs.flatten(1)[:, :64])
        return logits


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Branch(), "cannot be exported"),
        (OneLogit(), "not one logit a class"),
        (Pairs(), "does not take a batch of 1"),
        (Alone(TypeError), "does not take a batch of 1"),
        (Alone(IndexError), "does not take a batch of 1"),
        (Silent(), "got ValueError"),
    ],
    ids=["data-dependent branch", "wrong output", "batch of two only", "type", "index", "no message"],
)
def test_what_cannot_be_exported_is_a_typed_error(model: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words):
        export(model.eval(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_too_large_a_network_is_refused_before_any_work(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9_000_000), nn.Linear(9_000_000, 10))
    with pytest.raises(ExportError, match="too large for one ONNX file"):
        export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    model = trained("small_cnn", width=4)
    with torch.no_grad():
        model.linear.bias[0] = float("nan")  # type: ignore[index,union-attr,operator]
    with pytest.raises(NonFiniteWeights, match="NaN or Inf"):
        export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class Overflowing(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.exp(inputs.flatten(1)[:, :10] * 1e6)


def test_non_finite_answers_are_no_export(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteOutputs, match="NaN or Inf"):
        export(Overflowing().eval(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_images_must_fit(tmp_path: Path) -> None:
    model = trained("small_cnn", width=4)
    with pytest.raises(DataError, match="do not fit"):
        export(model, tmp_path / "model.onnx", clean=images_of((3, 8, 8)))
    with pytest.raises(DataError, match="nothing to compare on"):
        export(model, tmp_path / "model.onnx", clean=images_of(DIGITS, 0))
    probes = [probe_from_spec({"name": "clean", "kind": "badnets"}, num_classes=10)]
    with pytest.raises(DataError, match="probe names repeat"):
        export(model, tmp_path / "model.onnx", probes=probes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("side", "sizes"), [(8, (1, 2, 64)), (224, (1, 2, 10)), (1024, (1, 2, 2))])
def test_large_images_are_compared_few_at_a_time(side: int, sizes: tuple[int, ...]) -> None:
    assert ParityBounds().fitting(torch.empty(0, 3, side, side)).batch_sizes == sizes


def test_one_image_is_enough(tmp_path: Path) -> None:
    exported = export(trained("small_cnn", width=4), tmp_path / "model.onnx", clean=images_of(DIGITS, 1))
    assert exported.verdict is Verdict.PASS
    assert exported.parity[0].images == 1


@pytest.mark.parametrize(
    ("images", "sizes"), [(1, [1, 2, 5]), (3, [1, 2, 5]), (5, [1, 2, 5]), (6, [1, 2, 5, 1]), (11, [1, 2, 5, 5, 1])]
)
def test_every_batch_size_is_run_and_every_image_counts_once(images: int, sizes: list[int]) -> None:
    batches = list(_batches(images_of(DIGITS, images).images, BOUNDS.batch_sizes))
    assert [len(batch) for batch, _ in batches] == sizes
    assert sum(counted for _, counted in batches) == images
    assert len(batches) == parity_steps(images, 0, BOUNDS)


@pytest.mark.parametrize("settings", [{"relative": 0.0}, {"agreement": 1.5}, {"batch_sizes": (4,)}, {"max_images": 0}])
def test_bounds_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        ParityBounds(**settings)  # type: ignore[arg-type]


def test_opset_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="opset"):
        export(trained("small_cnn", width=4), tmp_path / "model.onnx", opset=9)


def test_stop_request_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        export(trained("small_cnn", width=4), tmp_path / "model.onnx", progress=NullProgress(stop=lambda: True))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        export(trained("small_cnn", width=4), tmp_path / "file" / "model.onnx")


def test_everything_beyond_plain_onnx_is_named() -> None:
    node = onnx.helper.make_node("Secret", ["image"], ["logits"], domain="evil", doc_string="File /home/someone")
    value = onnx.helper.make_tensor_value_info
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [float("nan")])
    outside = onnx.TensorProto(name="x", data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.append(onnx.StringStringEntryProto(key="location", value="../../etc/passwd"))
    graph = onnx.helper.make_graph(
        [node], "g", [value("image", 1, [1]), value("second", 1, [1])], [value("logits", 1, [1])], [weight, outside]
    )
    function = onnx.helper.make_function("mine", "f", ["a"], ["b"], [onnx.helper.make_node("Relu", ["a"], ["b"])], [])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("evil", 1)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function])
    problems = " | ".join(plain_onnx_problems(proto))
    for words in ("set 'evil'", "mine::f", "evil::Secret", "x in another file", "w with NaN", "['image', 'second']"):
        assert words in problems
    assert b"someone" not in cleaned(proto).SerializeToString()


def graph_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """``image`` to ``logits`` by ``nodes``, with a condition ``yes`` that is true."""
    value = onnx.helper.make_tensor_value_info
    yes = onnx.helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True])
    graph = onnx.helper.make_graph(list(nodes), "g", [value("image", 1, [2])], [value("logits", 1, [2])], [yes])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def branch(operator: str, domain: str = "") -> onnx.NodeProto:
    """An operator that stands in both branches of a condition."""
    body = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["image"], ["inner"], domain=domain)], "b", [],
        [onnx.helper.make_tensor_value_info("inner", 1, [2])],
    )  # fmt: skip
    return onnx.helper.make_node("If", ["yes"], ["logits"], then_branch=body, else_branch=body)


@pytest.mark.parametrize("node", [onnx.helper.make_node("Relu", ["image"], ["logits"]), branch("Relu")])
def test_the_bytes_of_a_plain_graph_are_given(node: onnx.NodeProto) -> None:
    proto = graph_of(node)
    assert checked_bytes(proto) == proto.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (branch("Secret", "evil"), r"not plain ONNX.*evil::Secret"),
        (onnx.helper.make_node("Relu", ["nowhere"], ["logits"]), "not valid"),
    ],
    ids=["an operator of others in a branch", "an input that nobody gives"],
)
def test_no_bytes_of_a_graph_that_is_not_plain_or_not_valid(node: onnx.NodeProto, why: str) -> None:
    with pytest.raises(ExportError, match=why):
        checked_bytes(graph_of(node))


def test_no_more_images_are_compared_than_asked_for_spread_over_all(digits: tuple[nn.Module, Exported]) -> None:
    model, exported = digits
    seen: set[int] = set()

    class Watched(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.update(((inputs[:, 0, 0, 0] * 0.25 + 0.45) * 255).round().int().tolist())
            answer: Tensor = model(inputs)
            return answer

    flat = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, *DIGITS).contiguous()
    clean = CleanSet(flat, torch.arange(10), 10)
    with NullProgress().phase("parity") as phase:
        found = check_parity(
            exported.path.read_bytes(), Watched().eval(), task=task_of(DIGITS), clean=clean, probes=(),
            bounds=ParityBounds(max_images=4), phase=phase,
        )  # fmt: skip
    assert [row.images for row in found.rows] == [4]
    assert seen == {0, 2, 5, 7}


def test_a_small_set_is_compared_as_a_whole() -> None:
    assert _spread(3, 4).tolist() == [0, 1, 2]
    assert _spread(4, 4).tolist() == [0, 1, 2, 3]
