"""Bundles and weight files: what loads, what it becomes, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from defense_core import bundle as bundle_module
from defense_core.architectures import build
from defense_core.bundle import (
    Bundle,
    LoadLimits,
    ModelSpec,
    Origin,
    bundle_of,
    load_bundle,
    load_model_file,
    save_bundle,
)
from defense_core.config import to_mapping
from defense_core.errors import (
    ArchitectureNotAllowed,
    ArtifactTooLarge,
    ConfigError,
    CorruptArtifact,
    DigestMismatch,
    NonFiniteWeights,
    OutputExists,
    SourceNotFound,
    StateDictMismatch,
    StorageError,
)
from defense_core.files import sha256_bytes, sha256_file

SPEC: dict[str, Any] = {
    "architecture": "small_cnn",
    "architecture_args": {"width": 4},
    "input_size": [1, 8, 8],
    "mean": [0.5],
    "std": [0.25],
}


def _state(**arguments: int) -> dict[str, Tensor]:
    return build("small_cnn", {"width": 4, **arguments}).state_dict()


def _file(folder: Path, state: Mapping[str, Tensor], name: str = "m.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    return folder / name


def _same(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    own = model.state_dict()
    return set(own) == set(state) and all(torch.equal(own[name], state[name]) for name in own)


@pytest.fixture
def loaded(tmp_path: Path) -> Bundle:
    return load_model_file(_file(tmp_path, _state()), {**SPEC, "class_names": [f"d{n}" for n in range(10)]})


# -- bundles ---------------------------------------------------------------------------


def test_an_input_that_would_take_the_memory_is_refused(loaded: Bundle, tmp_path: Path) -> None:
    save_bundle(loaded, tmp_path / "out")
    description = json.loads((tmp_path / "out" / "bundle.json").read_text())
    description["input_size"] = [1, 8192, 8192]
    (tmp_path / "out" / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(CorruptArtifact, match="at most 4194304 values"):
        load_bundle(tmp_path / "out")
    with pytest.raises(ConfigError, match="at most 4194304 values"):
        load_model_file(_file(tmp_path, _state()), {**SPEC, "input_size": [1, 2048, 2049]})
    assert ModelSpec(**{**SPEC, "input_size": (1, 2048, 2048)}, num_classes=2).input_size == (1, 2048, 2048)


def test_bundle_round_trip_keeps_weights_description_and_digest(loaded: Bundle, tmp_path: Path) -> None:
    digest = save_bundle(loaded, tmp_path / "out")
    assert digest == loaded.digest == sha256_file(tmp_path / "out" / "bundle.json")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bundle.json", "model.safetensors"]
    again = load_bundle(tmp_path / "out")
    assert (again.spec, again.origin, again.digest) == (loaded.spec, loaded.origin, digest)
    assert _same(again.model, loaded.model.state_dict())
    assert not again.model.training
    assert all(
        p.requires_grad and p.dtype is torch.float32 and p.device.type == "cpu" for p in again.model.parameters()
    )
    assert again.spec.task_object().class_names[3] == "d3"


def test_same_model_gives_the_same_bytes(loaded: Bundle, tmp_path: Path) -> None:
    save_bundle(loaded, tmp_path / "one")
    other = bundle_of(
        load_bundle(tmp_path / "one").model.to(memory_format=torch.channels_last), loaded.spec, loaded.origin
    )
    save_bundle(other, tmp_path / "two")
    for name in ("bundle.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    assert bundle_of(other.model, loaded.spec, loaded.origin).digest != loaded.digest


def test_description_has_the_documented_form(loaded: Bundle, tmp_path: Path) -> None:
    save_bundle(loaded, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "bundle.json").read_bytes())
    assert content["format"] == 1
    assert content["architecture"] == {"name": "small_cnn", "args": {"width": 4}}
    assert content["files"] == {"model.safetensors": sha256_file(tmp_path / "out" / "model.safetensors")}
    assert content["origin"] == {
        "uri": "m.safetensors",
        "version_id": "",
        "sha256": sha256_file(tmp_path / "m.safetensors"),
    }
    assert (content["num_classes"], content["input_size"], content["task"]) == (10, [1, 8, 8], "image_classification")


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
@pytest.mark.parametrize("inner", [".", "out"])
def test_archive_of_a_bundle(kind: str, inner: str, loaded: Bundle, tmp_path: Path) -> None:
    digest = save_bundle(loaded, tmp_path / "in" / "out")
    root = tmp_path / "in" if inner == "out" else tmp_path / "in" / "out"
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, root, inner)
    assert load_bundle(Path(archive)).digest == digest
    assert load_model_file(Path(archive), None).digest == digest


def test_result_of_a_command_may_lie_beside_the_bundle(loaded: Bundle, tmp_path: Path) -> None:
    digest = save_bundle(loaded, tmp_path / "out")
    (tmp_path / "out" / "result.json").write_text("{}")
    assert load_bundle(tmp_path / "out").digest == digest


def test_save_refuses_a_folder_in_use_and_leaves_nothing_when_the_disk_is_full(
    loaded: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bundle(loaded, tmp_path / "out")
    with pytest.raises(OutputExists, match="in use"):
        save_bundle(loaded, tmp_path / "out")
    save_bundle(loaded, tmp_path / "out", replace=True)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_module, "write_atomic", full)
    with pytest.raises(StorageError, match="No space left"):
        save_bundle(loaded, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".new")]


def test_save_refuses_weights_that_are_not_finite(loaded: Bundle, tmp_path: Path) -> None:
    with torch.no_grad():
        loaded.model.get_parameter("conv2.weight").view(-1)[3] = float("inf")
    with pytest.raises(NonFiniteWeights, match=r"conv2\.weight"):
        save_bundle(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_flipped_byte_of_a_bundle_is_found(loaded: Bundle, tmp_path: Path) -> None:
    digest = save_bundle(loaded, tmp_path / "out")
    for name, step in (("model.safetensors", 997), ("bundle.json", 7)):
        path = tmp_path / "out" / name
        good = path.read_bytes()
        for position in range(0, len(good), step):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            if name == "model.safetensors":
                with pytest.raises(DigestMismatch):
                    load_bundle(tmp_path / "out")
            else:
                assert _digest_or_error(tmp_path / "out") != digest
        path.write_bytes(good)
    assert load_bundle(tmp_path / "out").digest == digest


def _digest_or_error(path: Path) -> str:
    expected = (CorruptArtifact, DigestMismatch, ArchitectureNotAllowed, ConfigError, StateDictMismatch)
    try:
        return load_bundle(path).digest
    except expected as error:
        return type(error).__name__


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 1"),
        ({"surprise": 1}, "surprise"),
        ({"task": "detection"}, "image_classification"),
        ({"architecture": "small_cnn"}, "architecture with name and args"),
        ({"input_size": [1, 8]}, "a list of 3"),
        ({"input_size": [1, 8, 10**9]}, "1 to 8192"),
        ({"std": [0.0]}, "positive"),
        ({"num_classes": 1}, "at least 2"),
        ({"files": {"model.safetensors": "sha256:12"}}, "files with the digest"),
        ({"files": {"../../etc/passwd": "sha256:" + "0" * 64}}, "files with the digest"),
        ({"origin": {"uri": "x"}}, "without a default"),
    ],
)
def test_malformed_description(change: dict[str, Any], words: str, loaded: Bundle, tmp_path: Path) -> None:
    save_bundle(loaded, tmp_path / "out")
    path = tmp_path / "out" / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(CorruptArtifact, match=words):
        load_bundle(tmp_path / "out")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"format":1,"format":1}', b'{"a":NaN}', b"[" * 100_000, b"\xff\xfe", b" " * (2 << 20)]
)
def test_description_that_is_no_json_mapping(data: bytes, loaded: Bundle, tmp_path: Path) -> None:
    save_bundle(loaded, tmp_path / "out")
    (tmp_path / "out" / "bundle.json").write_bytes(data)
    with pytest.raises((CorruptArtifact, ArtifactTooLarge)):
        load_bundle(tmp_path / "out")


def test_incomplete_and_absent_bundles(loaded: Bundle, tmp_path: Path) -> None:
    save_bundle(loaded, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(SourceNotFound, match=r"model\.safetensors"):
        load_bundle(tmp_path / "out")
    with pytest.raises(SourceNotFound):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(CorruptArtifact, match="no bundle"):
        load_bundle(tmp_path / "m.safetensors")


def test_architecture_named_by_a_bundle_cannot_call_anything(loaded: Bundle, tmp_path: Path) -> None:
    save_bundle(loaded, tmp_path / "out")
    path = tmp_path / "out" / "bundle.json"
    content = json.loads(path.read_bytes())
    content["architecture"] = {"name": "subprocess:getoutput", "args": {"cmd": f"touch {tmp_path / 'canary'}"}}
    path.write_text(json.dumps(content))
    with pytest.raises(ArchitectureNotAllowed):
        load_bundle(tmp_path / "out")
    assert not (tmp_path / "canary").exists()


def test_own_network_loads_only_with_the_operators_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownnets_y.py").write_text(
        "from torch import nn\n"
        "def make(num_classes: int = 3) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = {**SPEC, "architecture": "ownnets_y:make", "architecture_args": {}}
    path = _file(tmp_path, {"1.weight": torch.ones(3, 64), "1.bias": torch.zeros(3)})
    bundle = load_model_file(path, spec, trusted_modules=("ownnets_y",))
    assert bundle.spec.num_classes == 3
    save_bundle(bundle, tmp_path / "out")
    with pytest.raises(ArchitectureNotAllowed):
        load_bundle(tmp_path / "out")
    assert load_bundle(tmp_path / "out", trusted_modules=("ownnets_y:make",)).digest == bundle.digest
    sys.modules.pop("ownnets_y")


# -- weight files ----------------------------------------------------------------------


def test_torch_files_old_and_new_nested_prefixed_and_halved(tmp_path: Path) -> None:
    """Two child processes: what a training script leaves behind, and a plain file by torch < 1.6."""
    state = _state()
    nested = {f"module._orig_mod.{name}": value.half() for name, value in state.items()}
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], momentum=0.9).state_dict()
    torch.save({"state_dict": {"model": nested}, "epoch": 3, "acc": 0.9, "optimizer": optimizer}, tmp_path / "a.ckpt")
    loaded = load_model_file(tmp_path / "a.ckpt", SPEC)
    assert all(
        torch.allclose(value.float(), state[name].float(), atol=1e-3)
        for name, value in loaded.model.state_dict().items()
    )
    assert loaded.model.get_parameter("linear.weight").dtype is torch.float32
    assert loaded.origin == Origin("a.ckpt", "", sha256_file(tmp_path / "a.ckpt"))
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    assert _same(load_model_file(tmp_path / "b.pt", SPEC).model, state)


def test_pt2_archive(tmp_path: Path) -> None:
    model = build("small_cnn", {"width": 4})
    torch.export.save(torch.export.export(model, (torch.zeros(2, 1, 8, 8),)), str(tmp_path / "m.pt2"))
    assert _same(load_model_file(tmp_path / "m.pt2", SPEC).model, model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod.net."])
def test_prefixes_and_precisions_in_safetensors(dtype: torch.dtype, prefix: str, tmp_path: Path) -> None:
    state = {prefix + name: v.to(dtype) if v.is_floating_point() else v for name, v in _state().items()}
    model = load_model_file(_file(tmp_path, state), SPEC).model
    assert _same(
        model, {name.removeprefix(prefix): v.float() if v.is_floating_point() else v for name, v in state.items()}
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in _state().items()}
    model = load_model_file(_file(tmp_path, state), SPEC).model
    assert _same(model, {name: value.to(_state()[name].dtype) for name, value in state.items()})


def test_file_without_extension_and_file_without_batch_counters(tmp_path: Path) -> None:
    state = {name: value for name, value in _state().items() if "num_batches" not in name}
    assert load_model_file(_file(tmp_path, state, "weights"), SPEC).spec.num_classes == 10


def _without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in _state().items() if key != name}


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (_without("conv2.weight"), StateDictMismatch, r"missing conv2\.weight"),
        ({**_state(), "extra.weight": torch.ones(1)}, StateDictMismatch, r"unexpected extra\.weight"),
        ({**_state(), "conv1.weight": torch.ones(4, 3, 3, 3)}, StateDictMismatch, "4×3×3×3 instead of 4×1×3×3"),
        (build("small_cnn", {"width": 8}).state_dict(), StateDictMismatch, "and [0-9]+ more"),
        (build("resnet20", {}).state_dict(), StateDictMismatch, "missing .* unexpected"),
        (_state(num_classes=43), StateDictMismatch, '43 classes in linear.bias. If the model .* "num_classes": 43'),
        ({**_state(), "linear.bias": torch.full((10,), float("nan"))}, NonFiniteWeights, r"linear\.bias .* 10 of 10"),
        ({**_state(), "bn1.weight": torch.full((4,), 1e300, dtype=torch.float64)}, NonFiniteWeights, r"bn1\.weight"),
        ({**_state(), "bn1.running_var": torch.full((4,), -1.0)}, NonFiniteWeights, "zero image"),
        ({**_state(), "linear.bias": torch.ones(10, dtype=torch.int64)}, StateDictMismatch, "kind of numbers"),
        ({"a": torch.ones(1)}, StateDictMismatch, "does not fit"),
        ({}, StateDictMismatch, "missing conv1"),
        ({**_state(), "?key" * 500: torch.ones(1)}, StateDictMismatch, r"unexpected (\?key){50}\."),
    ],
)
def test_weights_that_do_not_fit(state: dict[str, Tensor], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        load_model_file(_file(tmp_path, state), SPEC)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_classes": 43}, StateDictMismatch, "43 classes, got 10 logits"),
        ({"class_names": ["a", "b"]}, ConfigError, "10 names"),
        ({"input_size": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1]}, ConfigError, "does not accept the input size"),
        ({"mean": [0.5, 0.5, 0.5]}, ConfigError, "one a channel"),
        ({"archtecture": "x"}, ConfigError, "Did you mean 'architecture'"),
        ({"architecture": "small_cmn"}, ArchitectureNotAllowed, "Did you mean small_cnn"),
        ({"architecture_args": {"width": 4, "num_classes": 1}}, StateDictMismatch, "another number of classes"),
        ({"architecture_args": {"wdth": 4}}, ConfigError, "Did you mean 'width'"),
    ],
)
def test_descriptions_that_do_not_fit(
    change: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        load_model_file(_file(tmp_path, _state()), {**SPEC, **change})


@pytest.mark.parametrize("field", ["architecture", "input_size", "mean", "std"])
def test_nothing_is_guessed_that_has_no_safe_default(field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"not fully described.*Add --{field.replace('_', '-')}, or give a bundle"):
        load_model_file(_file(tmp_path, _state()), {key: value for key, value in SPEC.items() if key != field})


def test_one_class_and_too_many_parameters(tmp_path: Path) -> None:
    spec = {**SPEC, "architecture_args": {"width": 4, "num_classes": 1}}
    with pytest.raises(StateDictMismatch, match="at least 2 logits"):
        load_model_file(_file(tmp_path, _state(num_classes=1)), spec)
    huge = {**SPEC, "architecture": "preact_resnet18", "architecture_args": {"width": 1024}}
    with pytest.raises(ArtifactTooLarge, match="parameters"):
        load_model_file(_file(tmp_path, _state()), huge)
    with pytest.raises(ArtifactTooLarge, match="at most 10 parameters"):
        load_model_file(_file(tmp_path, _state()), SPEC, limits=LoadLimits(max_parameters=10))


def test_options_beside_a_bundle_must_agree_with_it(loaded: Bundle, tmp_path: Path) -> None:
    save_bundle(loaded, tmp_path / "out")
    assert load_model_file(tmp_path / "out", SPEC).digest == loaded.digest
    assert load_model_file(tmp_path / "out", loaded.spec).digest == loaded.digest
    with pytest.raises(ConfigError, match="something else about mean"):
        load_model_file(tmp_path / "out", {**SPEC, "mean": [0.4]})


def test_a_bundle_without_class_names_may_be_given_some(loaded: Bundle, tmp_path: Path) -> None:
    names = loaded.spec.class_names
    digest = save_bundle(replace(loaded, spec=replace(loaded.spec, class_names=())), tmp_path / "out")
    named = load_model_file(tmp_path / "out", {"class_names": names})
    assert (named.spec.class_names, named.digest) == (names, digest)
    save_bundle(named, tmp_path / "named")
    with pytest.raises(ConfigError, match="something else about class_names"):
        load_model_file(tmp_path / "named", {"class_names": names[::-1]})
    with pytest.raises(ConfigError, match="class_names"):
        load_model_file(tmp_path / "out", {"class_names": names[:-1]})


def test_origin_that_was_given_is_kept(tmp_path: Path) -> None:
    origin = Origin("s3://bucket/key", "v7", sha256_bytes(b"x"))
    bundle = load_model_file(
        _file(tmp_path, _state()), ModelSpec(**{**SPEC, "input_size": (1, 8, 8), "num_classes": 10}), origin=origin
    )
    assert bundle.origin == origin
    with pytest.raises(ConfigError, match=r"origin\.sha256"):
        Origin("s3://bucket/key", "", "abc")


def test_tied_weights_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownnets_z.py").write_text(
        "from torch import nn\n"
        "def make() -> nn.Module:\n"
        "    a, b = nn.Linear(64, 64), nn.Linear(64, 64)\n"
        "    b.weight = a.weight\n"
        "    return nn.Sequential(nn.Flatten(), a, b)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = {**SPEC, "architecture": "ownnets_z:make", "architecture_args": {}}
    model = build("ownnets_z:make", {}, trusted_modules=("ownnets_z",))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bundle = load_model_file(_file(tmp_path, state), spec, trusted_modules=("ownnets_z",))
    assert save_bundle(bundle, tmp_path / "out") == bundle.digest
    sys.modules.pop("ownnets_z")


def test_tutorial_of_the_own_network_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tutorial-own-model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "mynets").mkdir()
    (tmp_path / "mynets" / "__init__.py").write_text("")
    (tmp_path / "mynets" / "vision.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = build("mynets.vision:plate_reader", {"width": 32}, trusted_modules=("mynets.vision",))
    scope: dict[str, Any] = {"model": model, "torch": torch, "example": torch.zeros(2, 3, 32, 32)}
    exec(blocks[1], scope)
    exec(blocks[2], scope)
    assert scope["same"].digest == scope["digest"]
    options = {**to_mapping(scope["bundle"].spec), "class_names": ()}
    trusted = ("mynets.vision",)
    for name in ("plates.pth", "plates.ckpt", "plates.pt2"):
        assert _same(load_model_file(tmp_path / name, options, trusted_modules=trusted).model, model.state_dict())
    for name in ("mynets.vision", "mynets"):
        sys.modules.pop(name)


@pytest.mark.parametrize("load", [load_bundle, lambda path: load_model_file(path, None)], ids=["bundle", "model"])
def test_a_folder_that_may_not_be_read_is_refused(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_bundle(load_model_file(_file(tmp_path, _state()), SPEC), tmp_path / "out")

    def refused(path: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for where, name in ((os, "scandir"), (Path, "is_dir")):
        with monkeypatch.context() as context:
            context.setattr(where, name, refused)
            with pytest.raises(SourceNotFound, match=r"cannot be read.*Permission denied"):
                load(tmp_path / "out")
