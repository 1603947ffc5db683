"""Strangers' files: payloads never run, bombs never unpack, damage never surfaces as a raw exception."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

from defense_core.architectures import build
from defense_core.bundle import load_bundle, load_model_file, save_bundle
from defense_core.errors import (
    AccessDenied,
    ArtifactError,
    ArtifactTooLarge,
    CorruptArtifact,
    LoadTimeout,
    QuarantineError,
    SourceNotFound,
    StateDictMismatch,
    StorageError,
    UnsafeArtifact,
)
from defense_core.isolation import read_isolated
from defense_core.limits import LoadLimits
from defense_core.untrusted import check_static, read_weights

LIMITS = LoadLimits(max_bytes=8 << 20, timeout_s=60)
SPEC = {
    "architecture": "small_cnn",
    "architecture_args": {"width": 4},
    "input_size": [1, 8, 8],
    "mean": [0.5],
    "std": [0.5],
}


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _call(module: str, name: str, *arguments: str) -> bytes:
    """Protocol 2: GLOBAL, arguments, REDUCE."""
    body = b"(" + b"".join(_text(argument) for argument in arguments) + b"t"
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + body + b"R."


class _Reduced:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def _nested(command: str) -> bytes:
    return pickle.dumps(_Reduced(command), protocol=2)


def _storage_tuple(inner: bytes) -> bytes:
    return b"(" + _text("storage") + inner + _text("0") + _text("cpu") + b"K\x01t"


# Each takes the shell command that would create the canary, and gives a pickle that runs it when unpickled
# (by Python's own unpickler, or by one that also knows the codes or persistent ids it relies on).
PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "reduce of a class": lambda c: pickle.dumps(_Reduced(c), protocol=2),
    "reduce, protocol 0": lambda c: pickle.dumps(_Reduced(c), protocol=0),
    "reduce, protocol 5": lambda c: pickle.dumps(_Reduced(c), protocol=5),
    "os.system": lambda c: _call("os", "system", c),
    "posix.system": lambda c: _call("posix", "system", c),
    "nt.system": lambda c: _call("nt", "system", c),
    "builtins.eval": lambda c: _call("builtins", "eval", f"__import__('os').system({c!r})"),
    "builtins.exec": lambda c: _call("builtins", "exec", f"import os; os.system({c!r})"),
    "__builtin__.eval": lambda c: _call("__builtin__", "eval", f"__import__('os').system({c!r})"),
    "subprocess.Popen": lambda c: (
        b"\x80\x02csubprocess\nPopen\n((lX" + struct.pack("<I", len(c)) + c.encode() + b"atR."
    ),
    "runpy": lambda c: _call("runpy", "_run_code", c),
    "pickle.loads": lambda c: _call("pickle", "loads", _nested(c).decode("latin1")),
    "torch.load nested": lambda c: _call("torch.serialization", "load", c),
    "torch storage bytes": lambda c: _call("torch.storage", "_load_from_bytes", c),
    "torch.hub.load": lambda c: _call("torch.hub", "load", c),
    "numpy.load": lambda c: _call("numpy", "load", c),
    "importlib": lambda c: _call("importlib", "import_module", "antigravity"),
    "operator.attrgetter": lambda c: _call("operator", "attrgetter", "system"),
    "getattr chain": lambda c: _call("builtins", "getattr", "os", "system"),
    "ctypes": lambda c: _call("ctypes", "CDLL", "libc.so.6"),
    "dotted name behind an allowed module": lambda c: _call("torch", "os.system", c),
    "allowed function of another module": lambda c: _call("collections", "namedtuple", c),
    "BUILD with __setstate__": lambda c: b"\x80\x02cfunctools\npartial\n)\x81}" + _text("f") + _text(c) + b"sb.",
    "INST": lambda c: b"(S'" + c.encode() + b"'\niposix\nsystem\n.",
    "OBJ": lambda c: b"\x80\x02(cposix\nsystem\n" + _text(c) + b"o.",
    "NEWOBJ_EX": lambda c: b"\x80\x04csubprocess\nPopen\n(" + _text(c) + b"t}\x92.",
    "STACK_GLOBAL": lambda c: b"\x80\x04" + _text("posix") + _text("system") + b"\x93(" + _text(c) + b"tR.",
    "STACK_GLOBAL by memo": lambda c: (
        b"\x80\x04" + _text("posix") + b"\x940" + _text("system") + b"\x940h\x00h\x01\x93(" + _text(c) + b"tR."
    ),
    "extension registry": lambda c: b"\x80\x02\x82\x01(" + _text(c) + b"tR.",
    "extension registry, 4 bytes": lambda c: b"\x80\x02\x84\x01\x00\x00\x00(" + _text(c) + b"tR.",
    "text persistent id": lambda c: b"\x80\x02P" + c.encode() + b"\n.",
    "call inside a persistent id": lambda c: b"\x80\x02" + _storage_tuple(_call("posix", "system", c)[2:-1]) + b"Q.",
    "payload behind an allowed call": lambda c: (
        b"\x80\x02ccollections\nOrderedDict\n)R0" + _call("posix", "system", c)[2:]
    ),
}
RUNS_IN_PLAIN_PICKLE = ["reduce of a class", "builtins.eval", "INST", "OBJ", "STACK_GLOBAL by memo"]


def _torch_zip(path: Path, data_pkl: bytes, extra: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data_pkl)
        archive.writestr("m/version", "3\n")
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return path


def _state() -> dict[str, torch.Tensor]:
    return build("small_cnn", {"width": 4}).state_dict()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good file of every format."""
    folder = tmp_path_factory.mktemp("good")
    torch.save(_state(), folder / "zip.pth")
    torch.save(_state(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(_state(), folder / "plain.safetensors")
    exported = torch.export.export(build("small_cnn", {"width": 4}), (torch.zeros(2, 1, 8, 8),))
    torch.export.save(exported, str(folder / "graph.pt2"))
    save_bundle(load_model_file(folder / "plain.safetensors", SPEC), folder / "bundle")
    with tarfile.open(folder / "bundle.tar.gz", "w:gz") as archive:
        archive.add(folder / "bundle", arcname=".")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("style", RUNS_IN_PLAIN_PICKLE)
def test_control_the_payloads_are_real(style: str, tmp_path: Path) -> None:
    """Python's own unpickler runs them; otherwise the tests below would prove nothing."""
    canary = tmp_path / "canary"
    pickle.loads(PAYLOADS[style](f"touch {canary}"))
    assert canary.exists()


@pytest.mark.parametrize("style", PAYLOADS)
def test_payload_does_not_run(style: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = PAYLOADS[style](f"touch {canary}")
    bare = tmp_path / "bare.pt"
    bare.write_bytes(payload)
    modern = _torch_zip(tmp_path / "modern.pth", payload)
    behind_magic = tmp_path / "old.bin"
    head = b"".join(pickle.dumps(item, protocol=2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    behind_magic.write_bytes(head + payload + pickle.dumps([], protocol=2))
    for path in (bare, modern, behind_magic):
        with pytest.raises(UnsafeArtifact, match="asks for"):
            load_model_file(path, SPEC, limits=LIMITS)
    assert not canary.exists()


def test_isolated_reader_refuses_a_payload_even_without_the_static_check(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = _torch_zip(tmp_path / "evil.pth", PAYLOADS["posix.system"](f"touch {canary}"))
    with pytest.raises(UnsafeArtifact, match="isolated reader"):
        read_isolated(path, LIMITS)
    assert not canary.exists()


def test_second_pickle_behind_the_first_is_refused(tmp_path: Path) -> None:
    harmless = pickle.dumps({}, protocol=2)
    path = _torch_zip(tmp_path / "two.pth", harmless + PAYLOADS["posix.system"]("true"))
    with pytest.raises(UnsafeArtifact, match="bytes follow the pickle"):
        check_static(path, LIMITS)


@pytest.mark.parametrize(
    "entry", ["m/code/__torch__.py", "m/constants.pkl", "m/data/../../x", "m/data/0.py", "other/data.pkl", "/m/data/1"]
)
def test_torch_file_with_an_unknown_entry(entry: str, tmp_path: Path) -> None:
    path = _torch_zip(tmp_path / "x.pth", pickle.dumps({}, protocol=2), {entry: b"x"})
    with pytest.raises((UnsafeArtifact, CorruptArtifact)):
        check_static(path, LIMITS)


def test_tensor_that_claims_more_than_it_has(tmp_path: Path) -> None:
    """Stride 0: four bytes that say they are 4 TB."""
    path = tmp_path / "bomb.pth"
    torch.save({"conv1.weight": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(UnsafeArtifact, match="more than 8388608 bytes"):
        read_weights(path, LIMITS)


def test_reader_that_is_too_slow_is_stopped(good: dict[str, Path]) -> None:
    with pytest.raises(LoadTimeout, match=r"at most 0\.1 s"):
        read_isolated(good["zip.pth"], LoadLimits(timeout_s=0.1))


def test_checkpoint_without_a_state_dict(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "net": {"a": torch.ones(1)}}, tmp_path / "two.pth")
    with pytest.raises(StateDictMismatch, match="more than one state dict: model, net"):
        read_weights(tmp_path / "two.pth", LIMITS)


def test_legacy_file_cut_in_its_storages(good: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(good["legacy.pt"].read_bytes()[:-40])
    with pytest.raises(CorruptArtifact, match="damaged"):
        read_weights(path, LIMITS)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pt", "plain.safetensors", "graph.pt2", "bundle.tar.gz"])
def test_torn_or_flipped_files_give_typed_errors(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    """Truncations and bit flips; formats with checksums must notice every one of them in the weights."""
    data = good[name].read_bytes()
    source = random.Random(7)
    path = tmp_path / name
    refused = 0
    for turn in range(150):
        if turn % 3 == 0:
            path.write_bytes(data[: source.randrange(len(data))])
        else:
            damaged = bytearray(data)
            damaged[source.randrange(len(data))] ^= 1 << source.randrange(8)
            path.write_bytes(bytes(damaged))
        try:
            if name.endswith(".tar.gz"):
                load_bundle(path, limits=LIMITS)
            elif name.endswith((".pth", ".pt")):
                check_static(path, LIMITS)
            else:
                load_model_file(path, SPEC, limits=LIMITS)
        except QuarantineError:
            refused += 1
    # Every truncation at least; the old format has no table of contents, so its end is the child's to miss.
    assert refused >= (10 if name == "legacy.pt" else 50)


def test_flipped_weight_in_a_torch_file_is_found_by_its_checksum(good: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(good["zip.pth"].read_bytes())
    with zipfile.ZipFile(good["zip.pth"]) as archive:
        record = next(item for item in archive.infolist() if "/data/0" in item.filename)
    data[record.header_offset + 30 + len(record.filename) + 40 + record.file_size // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(bytes(data))
    with pytest.raises(CorruptArtifact):
        check_static(tmp_path / "flipped.pth", LIMITS)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("plain.safetensors", "x.pt"), ("zip.pth", "x.safetensors"), ("zip.pth", "x.pt2"), ("graph.pt2", "x.pth"),
        ("legacy.pt", "x.zip"), ("bundle.tar.gz", "x.bin"),
    ],
)  # fmt: skip
def test_name_that_claims_another_format(source: str, name: str, good: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(good[source].read_bytes())
    with pytest.raises(CorruptArtifact, match="not what its name says"):
        check_static(tmp_path / name, LIMITS)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80", b"\x93NUMPY", b"\x00" * 600, b"hi"]
)
def test_files_of_no_known_format(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(data)
    with pytest.raises(CorruptArtifact):
        load_model_file(tmp_path / "model", SPEC, limits=LIMITS)


def test_pipe_directory_missing_and_oversized_files(tmp_path: Path, good: dict[str, Path]) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UnsafeArtifact, match="no regular file"):
        load_model_file(tmp_path / "pipe.pt", SPEC, limits=LIMITS)
    with pytest.raises(SourceNotFound):
        load_model_file(tmp_path / "nothing.pt", SPEC, limits=LIMITS)
    with pytest.raises(ArtifactTooLarge, match="at most 100 bytes"):
        load_model_file(good["zip.pth"], SPEC, limits=LoadLimits(max_bytes=100))


# -- safetensors and pt2 ---------------------------------------------------------------


def _safetensors(header: object, body: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


@pytest.mark.parametrize(
    "data",
    [
        _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 60]}}, b"12345678"),
        _safetensors({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}}, b"12345678"),
        _safetensors({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, b"12345678"),
        _safetensors({"a": {"dtype": "PY", "shape": [2], "data_offsets": [0, 8]}}, b"12345678"),
        _safetensors(b'{"a":'),
        _safetensors({}, size=1 << 31),
        _safetensors(b"{" * 100_000),
    ],
)
def test_safetensors_that_lie(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises((CorruptArtifact, UnsafeArtifact)):
        read_weights(tmp_path / "x.safetensors", LIMITS)


def _pt2(path: Path, source: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = change(item.filename, old.read(item))
            if data is not None:
                new.writestr(item.filename, data)
    return path


def test_pt2_graph_and_other_pickles_are_never_read(good: dict[str, Path], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = PAYLOADS["posix.system"](f"touch {canary}")

    def poison(name: str, data: bytes) -> bytes:
        return payload if name.endswith((".pt", "models/model.json", "constants_config.json")) else data

    bundle = load_model_file(_pt2(tmp_path / "x.pt2", good["graph.pt2"], poison), SPEC, limits=LIMITS)
    assert torch.equal(bundle.model.state_dict()["conv1.weight"], _state()["conv1.weight"])
    assert not canary.exists()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b'"use_pickle": false', b'"use_pickle": true', UnsafeArtifact),
        (b'"dtype": 7', b'"dtype": 99', CorruptArtifact),
        (b'"layout": 7', b'"layout": 1', CorruptArtifact),
        (b'"storage_offset": {"as_int": 0}', b'"storage_offset": {"as_int": 4096}', CorruptArtifact),
        (b'"as_int": 3', b'"as_int": 300000', CorruptArtifact),
        (b'"as_int": 3', b'"as_int": -3', CorruptArtifact),
        (b'"weight_0"', b'"../constants/weight_0"', CorruptArtifact),
    ],
)
def test_pt2_with_a_lying_table(
    old: bytes, new: bytes, error: type[ArtifactError], good: dict[str, Path], tmp_path: Path
) -> None:
    def change(name: str, data: bytes) -> bytes:
        return data.replace(old, new) if name.endswith("_weights_config.json") else data

    with pytest.raises(error):
        read_weights(_pt2(tmp_path / "x.pt2", good["graph.pt2"], change), LIMITS)


# -- archives --------------------------------------------------------------------------


def _tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "member",
    [
        _member("../evil"), _member("/etc/evil"), _member("a/../../evil"), _member("a\\..\\evil"), _member("C:evil"),
        _member("bundle.json", tarfile.SYMTYPE, "/etc/passwd"), _member("bundle.json", tarfile.LNKTYPE, "/etc/passwd"),
        _member("bundle.json", tarfile.CHRTYPE), _member("bundle.json", tarfile.FIFOTYPE), _member("evil\u202etxt"),
    ],
)  # fmt: skip
def test_tar_that_escapes_or_links(member: tarfile.TarInfo, tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar", [(member, b"")])
    with pytest.raises(UnsafeArtifact, match="Nothing was unpacked"):
        load_bundle(path, limits=LIMITS)


def test_archives_with_repeated_or_too_many_names(tmp_path: Path) -> None:
    twice = _tar(tmp_path / "twice.tar", [(_member("bundle.json"), b"1"), (_member("./Bundle.json"), b"2")])
    with pytest.raises(UnsafeArtifact, match="occurs twice"):
        load_bundle(twice, limits=LIMITS)
    many = _tar(tmp_path / "many.tar", [(_member(f"f{n}"), b"") for n in range(50)])
    with pytest.raises(UnsafeArtifact, match="too many entries"):
        load_bundle(many, limits=LIMITS)


def test_tar_bombs(tmp_path: Path) -> None:
    packed = tmp_path / "bomb.tar.gz"
    with gzip.open(packed, "wb", compresslevel=1) as stream:
        info = _member("model.safetensors")
        info.size = 64 << 20
        stream.write(info.tobuf())
        for _ in range(64):
            stream.write(bytes(1 << 20))
    with pytest.raises(UnsafeArtifact, match="unpacks to too much"):
        load_bundle(packed, limits=LIMITS)
    declared = tmp_path / "declared.tar"
    info = _member("model.safetensors")
    info.size = 1 << 40
    declared.write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises((UnsafeArtifact, CorruptArtifact)):
        load_bundle(declared, limits=LIMITS)


def test_zip_bombs_by_ratio_and_by_declared_size(tmp_path: Path) -> None:
    for name, limits in (("ratio.zip", LoadLimits()), ("declared.zip", LIMITS)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model.safetensors", bytes(32 << 20))
        with pytest.raises(UnsafeArtifact, match="zip bomb"):
            load_bundle(tmp_path / name, limits=limits)
    with zipfile.ZipFile(tmp_path / "sum.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(12):
            archive.writestr(f"f{number}", bytes(1 << 20))
    with pytest.raises(UnsafeArtifact, match="declares too much content"):
        load_bundle(tmp_path / "sum.zip", limits=LIMITS)
    compressed = tmp_path / "compressed.pth"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(UnsafeArtifact, match="zip bomb"):
        check_static(compressed, LIMITS)


def test_zip_with_link_comment_prefix_or_lying_size(tmp_path: Path, good: dict[str, Path]) -> None:
    link = zipfile.ZipInfo("bundle.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UnsafeArtifact, match="a link or device"):
        load_bundle(tmp_path / "link.zip", limits=LIMITS)
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.writestr("../evil", "x")
    with pytest.raises(UnsafeArtifact, match="leave the folder"):
        load_bundle(tmp_path / "up.zip", limits=LIMITS)
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("bundle.json", "{}")
    (tmp_path / "two.zip").write_bytes(b"PK\x03\x04 something else" + plain.getvalue())
    with pytest.raises(UnsafeArtifact, match="more than one"):
        load_bundle(tmp_path / "two.zip", limits=LIMITS)
    lying = bytearray(plain.getvalue())
    at = lying.rindex(b"PK\x01\x02") + 24
    lying[at : at + 4] = struct.pack("<I", 5000)
    (tmp_path / "lying.zip").write_bytes(bytes(lying))
    with pytest.raises(UnsafeArtifact, match="contradicts itself"):
        load_bundle(tmp_path / "lying.zip", limits=LIMITS)


def test_bundle_folder_with_links_or_strangers(tmp_path: Path, good: dict[str, Path]) -> None:
    for name in ("bundle.json", "model.safetensors"):
        (tmp_path / name).write_bytes((good["bundle"] / name).read_bytes())
    load_bundle(tmp_path, limits=LIMITS)
    (tmp_path / "payload.py").write_text("x")
    with pytest.raises(UnsafeArtifact, match=r"payload\.py"):
        load_bundle(tmp_path, limits=LIMITS)
    (tmp_path / "payload.py").unlink()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(good["bundle"] / "model.safetensors")
    with pytest.raises(UnsafeArtifact, match="symbolic link"):
        load_bundle(tmp_path, limits=LIMITS)


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, AccessDenied), (errno.EIO, StorageError)])
def test_a_file_that_cannot_be_read_is_a_typed_error(
    number: int, kind: type[QuarantineError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This account may be root, whom nothing is denied."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    monkeypatch.setattr("defense_core.untrusted.open", refused, raising=False)
    with pytest.raises(kind, match="cannot be read"):
        check_static(path, LoadLimits())
