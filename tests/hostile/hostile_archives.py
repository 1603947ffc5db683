# ruff: noqa: E501 - tables, one row a file
"""Hostile archives: nested, lying, escaping, exploding, and files that are two formats at once."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from tests.hostile.hostile_pickles import OPCODES

Maker = Callable[[Path, str], Path]


def payload(canary: str) -> bytes:
    return OPCODES["reduce"][0](canary)


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_zip(pickled: bytes, extra: dict[str, bytes] | None = None) -> bytes:
    return zipped({"m/data.pkl": pickled, "m/version": b"3\n", **(extra or {})})


def good_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(64.0)}, buffer)
    return buffer.getvalue()


def written(name: str, content: Callable[[str], bytes]) -> Maker:
    def make(folder: Path, canary: str) -> Path:
        path = folder / name
        path.write_bytes(content(canary))
        return path

    return make


def _tarred(*members: tuple[tarfile.TarInfo, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _patched(data: bytes, signature: bytes, offset: int, value: bytes, last: bool = False) -> bytes:
    at = (data.rindex(signature) if last else data.index(signature)) + offset
    return data[:at] + value + data[at + len(value) :]


def _renamed_locally(canary: str) -> bytes:
    """The table says data.pkl, the header in front of the payload another name."""
    data = torch_zip(pickle.dumps({}, protocol=2), {"m/data/99": payload(canary)})
    return data.replace(b"m/data/99", b"m/data.pkl"[:9], 1)


def _two_tables(canary: str) -> bytes:
    """A harmless archive, then a second one whose table a searching reader finds."""
    return torch_zip(pickle.dumps({}, protocol=2)) + torch_zip(payload(canary))


def _duplicate(canary: str) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("m/data.pkl", payload(canary))
        archive.writestr("m/version", "3\n")
    return buffer.getvalue()


def _overlapping(canary: str) -> bytes:
    """Two table rows for the bytes of one entry (a quine-like bomb when there are many)."""
    data = zipped({"a/model.pt": payload(canary), "a/other.pt": payload(canary)})
    second = data.index(b"PK\x03\x04", 4)
    table = data.rindex(b"PK\x01\x02")
    return data[: table + 42] + struct.pack("<I", 0) + data[table + 46 :] if second else data


def _descriptor(canary: str, lie: bool) -> bytes:
    class Unseekable(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += data
            return len(data)

    sink = Unseekable()
    with zipfile.ZipFile(sink, "w") as archive:  # type: ignore[arg-type]
        archive.writestr("m/data.pkl", payload(canary))
        archive.writestr("m/version", "3\n")
    data = bytes(sink.data)
    return _patched(data, b"PK\x07\x08", 8, struct.pack("<I", 5)) if lie else data


def _gap(canary: str) -> bytes:
    """A payload between two entries, where only a reader that follows the local headers finds it."""
    data = zipped({"m/data.pkl": pickle.dumps({}, protocol=2), "m/version": b"3\n"})
    at = data.index(b"PK\x03\x04", 4)
    hidden = payload(canary)
    moved = bytearray(data[:at] + hidden + data[at:])
    table = [moved.index(b"PK\x01\x02"), moved.rindex(b"PK\x01\x02")]
    moved[table[1] + 42 : table[1] + 46] = struct.pack("<I", at + len(hidden))
    end = moved.rindex(b"PK\x05\x06")
    moved[end + 16 : end + 20] = struct.pack("<I", table[0])
    return bytes(moved)


def _link_in_zip(canary: str) -> bytes:
    info = zipfile.ZipInfo("bundle/model.safetensors")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, canary)
    return buffer.getvalue()


def _nested(canary: str, depth: int) -> bytes:
    data = torch_zip(payload(canary))
    for level in range(depth):
        data = zipped({f"level{level}.zip" if level else "model.pt": data})
    return data


def _bomb(_: str) -> bytes:
    return zipped({"model.safetensors": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)


def _safetensors(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def _st_zip(canary: str) -> bytes:
    body = torch_zip(payload(canary))
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(body), len(body))
    return _safetensors(header, body)


def _st_pickle(canary: str) -> bytes:
    """A safetensors file that is a pickle too: the length of its header is the opcode for a string.

    Further strings, with printable lengths, swallow the rest of the header; the tensor is the payload.
    """
    body = payload(canary)[2:]
    lead = b'{"__metadata__":{"k":"'
    tail = b'"},"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(body), len(body))
    swallowed = 3 + len(lead)
    length = ord("X") | swallowed << 8
    left = length - len(lead)
    chunks = b""
    while left - len(chunks) > 256:
        chunks += b"U~" + b"-" * 126
    rest = left - len(chunks) - 4
    # Two more strings; as characters of JSON their lengths must be no quote and no backslash.
    last = next(n for n in range(len(tail), 127) if n != 92 and 35 <= rest - n <= 126 and rest - n != 92)
    chunks += b"U" + bytes([rest - last]) + b"-" * (rest - last) + b"U" + bytes([last]) + tail.rjust(last, b"-")
    return struct.pack("<Q", length) + lead + chunks + body


def _gif_pickle(canary: str) -> bytes:
    """``GIF89a`` is the opcode for a float of eight bytes; then a payload, then a picture's trailer."""
    return b"GIF89a\x01\x00\x01" + b"0" + payload(canary)[2:] + b"\x00;"


def _tar_safetensors(canary: str) -> bytes:
    """A tar header whose member name begins like a safetensors length."""
    info = _member("model.pt")
    data = payload(canary)
    info.size = len(data)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[0:8] = struct.pack("<Q", 600)
    block[8:9] = b"{"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block) + data.ljust(1024, b"\x00") + bytes(1024)


def _tar_of(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Maker:
    return written("model.tar", lambda c: _tarred((_member(name, kind, link), b"")))


def _special(name: str, make: Callable[[Path], None]) -> Maker:
    def build(folder: Path, canary: str) -> Path:
        (folder / name).mkdir()
        make(folder / name)
        return folder / name

    return build


def _alone(name: str, make: Callable[[Path], None]) -> Maker:
    def build(folder: Path, canary: str) -> Path:
        make(folder / name)
        return folder / name

    return build


def _named_inside(name: str) -> Maker:
    return written("model.zip", lambda c: zipped({name: payload(c)}))


_TAR_MEMBERS: dict[str, tuple[str, bytes, str]] = {
    "a symbolic link": ("model.safetensors", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": ("model.safetensors", tarfile.LNKTYPE, "../../etc/passwd"),
    "a device": ("model.safetensors", tarfile.CHRTYPE, ""),
    "a pipe": ("model.safetensors", tarfile.FIFOTYPE, ""),
    "an absolute path": ("/etc/cron.d/evil", tarfile.REGTYPE, ""),
    "a path upwards": ("../../evil", tarfile.REGTYPE, ""),
}
ARCHIVES: dict[str, tuple[str, Maker]] = {
    "torch file in a zip": ("nested archives", written("model.zip", lambda c: _nested(c, 1))),
    "zip in a zip": ("nested archives", written("model.zip", lambda c: _nested(c, 2))),
    "five zips deep": ("nested archives", written("model.zip", lambda c: _nested(c, 5))),
    "pickle in a tar": ("nested archives", written("model.tar", lambda c: _tarred((_member("model.pt"), payload(c))))),
    "pickle in a tar.gz": ("nested archives", written("model.tar.gz", lambda c: _tarred((_member("model.pt"), payload(c)), mode="w:gz"))),
    "pickle in gzip": ("nested archives", written("model.pt.gz", lambda c: gzip.compress(payload(c)))),
    "pickle in bzip2": ("nested archives", written("model.bz2", lambda c: bz2.compress(payload(c)))),
    "pickle in xz": ("nested archives", written("model.xz", lambda c: lzma.compress(payload(c)))),
    "pickle in zlib (joblib)": ("nested archives", written("model.joblib", lambda c: zlib.compress(payload(c)))),
    "compressed torch file": (
        "nested archives", written("model.pt", lambda c: zipped({"m/data.pkl": payload(c), "m/version": b"3"}, zipfile.ZIP_DEFLATED))),
    "pickle named safetensors": ("wrong names", written("model.safetensors", payload)),
    "pickle named onnx": ("wrong names", written("model.onnx", payload)),
    "pickle named json": ("wrong names", written("config.json", payload)),
    "pickle named png": ("wrong names", written("preview.png", payload)),
    **{
        f"{name} named model.bin": ("polyglots", written("model.bin", OPCODES[name][0]))
        for name in ("integer-of-base-16", "number-that-ends-at-a-zero-byte", "integer-of-5000-digits")
    },
    "text pickle of base 16 named README.md": ("wrong names", written("README.md", OPCODES["integer-of-base-16"][0])),
    "text pickle named README.md": ("wrong names", written("README.md", OPCODES["text-only-opcodes"][0])),
    "torch file named safetensors": ("wrong names", written("model.safetensors", lambda c: torch_zip(payload(c)))),
    "good torch file named safetensors": ("wrong names", written("model.safetensors", lambda c: good_torch())),
    "zip named pt2": ("wrong names", written("model.pt2", lambda c: zipped({"model.pt": payload(c)}))),
    "python file": ("wrong names", written("modeling_net.py", lambda c: f"open({c!r},'w')".encode())),
    "script without ending": ("wrong names", written("model", lambda c: f"#!/bin/sh\ntouch {c}\n".encode())),
    "program named bin": ("wrong names", written("pytorch_model.bin", lambda c: b"\x7fELF\x02\x01\x01" + bytes(100))),
    "zip bomb": ("zip bombs", written("model.zip", _bomb)),
    "nested zip bomb": ("zip bombs", written("model.zip", lambda c: zipped({"inner.zip": _bomb(c)}))),
    "gzip bomb": ("zip bombs", written("model.tar.gz", lambda c: gzip.compress(bytes(96 << 20), 1))),
    "zlib bomb": ("zip bombs", written("model.z", lambda c: zlib.compress(bytes(96 << 20), 1))),
    "xz bomb": ("zip bombs", written("model.xz", lambda c: lzma.compress(bytes(48 << 20), preset=0))),
    "overlapping entries": ("zip layout", written("model.zip", _overlapping)),
    "100,000 entries": ("zip bombs", written("model.zip", lambda c: zipped({f"d/{n}": b"" for n in range(30_000)}))),
    "duplicate names": ("zip layout", written("model.pt", _duplicate)),
    "names that differ in case": ("zip layout", written("model.zip", lambda c: zipped({"Model.pt": b"1", "model.pt": payload(c)}))),
    "local header names another file": ("zip layout", written("model.pt", _renamed_locally)),
    "local header lies about its size": (
        "zip layout", written("model.pt", lambda c: _patched(torch_zip(payload(c)), b"PK\x03\x04", 18, struct.pack("<I", 7)))),
    "local header lies about compression": (
        "zip layout", written("model.pt", lambda c: _patched(torch_zip(payload(c)), b"PK\x03\x04", 8, struct.pack("<H", 8)))),
    "table lies about its size": (
        "zip layout", written("model.pt", lambda c: _patched(torch_zip(payload(c)), b"PK\x01\x02", 24, struct.pack("<I", 9)))),
    "table lies about a checksum": (
        "zip layout", written("model.pt", lambda c: _patched(torch_zip(pickle.dumps({}, protocol=2)), b"PK\x01\x02", 16, b"abcd"))),
    "wrong checksum everywhere": (
        "zip layout",
        written("model.pt", lambda c: _patched(_patched(torch_zip(pickle.dumps({}, protocol=2)), b"PK\x01\x02", 16, b"abcd"), b"PK\x03\x04", 14, b"abcd"))),
    "payload between entries": ("zip layout", written("model.pt", _gap)),
    "two archives in one file": ("zip layout", written("model.pt", _two_tables)),
    "archive with a prefix": ("zip layout", written("model.pt", lambda c: payload(c) + torch_zip(pickle.dumps({}, protocol=2)))),
    "archive with a tail": ("zip layout", written("model.pt", lambda c: good_torch() + payload(c))),
    "archive with a comment": (
        "zip layout",
        written("model.pt", lambda c: _patched(torch_zip(pickle.dumps({}, protocol=2)), b"PK\x05\x06", 20, struct.pack("<H", 20)) + payload(c)[:20])),
    "data descriptor": ("zip layout", written("model.pt", lambda c: _descriptor(c, False))),
    "data descriptor that lies": ("zip layout", written("model.pt", lambda c: _descriptor(c, True))),
    "encrypted flag": ("zip layout", written("model.pt", lambda c: _patched(torch_zip(payload(c)), b"PK\x01\x02", 8, b"\x01\x00"))),
    "truncated archive": ("zip layout", written("model.pt", lambda c: torch_zip(payload(c))[:-30])),
    "only an end record": ("zip layout", written("model.zip", lambda c: b"PK\x05\x06" + bytes(18))),
    "link in a zip": ("paths and links", written("model.zip", _link_in_zip)),
    "absolute path": ("paths and links", _named_inside("/tmp/evil.pt")),
    "path upwards": ("paths and links", _named_inside("../../evil.pt")),
    "path upwards with backslashes": ("paths and links", _named_inside("..\\..\\evil.pt")),
    "drive letter": ("paths and links", _named_inside("C:/evil.pt")),
    "bidi name": ("paths and links", _named_inside("model\u202etp.exe")),
    "zero-width name": ("paths and links", _named_inside("mo\u200bdel.pt")),
    "name with a NUL": ("paths and links", written("model.zip", lambda c: zipped({"model.ptX.txt": payload(c)}).replace(b"ptX.txt", b"pt\x00.txt"))),
    "very deep path": ("paths and links", _named_inside("/".join("abcdefghijkl") + "/model.pt")),
    **{
        f"tar with {label}": ("paths and links", _tar_of(*member))
        for label, member in _TAR_MEMBERS.items()
    },
    "link in a folder": ("paths and links", _special("folder", lambda p: (p / "model.safetensors").symlink_to("/etc/passwd"))),
    "linked folder": ("paths and links", _special("folder", lambda p: (p / "inner").symlink_to("/etc"))),
    "dangling link": ("paths and links", _alone("model.pt", lambda p: p.symlink_to("/nowhere/model.pt"))),
    "pipe": ("paths and links", _alone("model.pt", os.mkfifo)),
    "pipe in a folder": ("paths and links", _special("folder", lambda p: os.mkfifo(p / "model.pt"))),
    "device": ("paths and links", _alone("model.pt", lambda p: p.symlink_to("/dev/zero"))),
    "bidi file name": ("paths and links", written("model\u202egpj.safetensors", payload)),
    "safetensors and zip": ("polyglots", written("model.safetensors", _st_zip)),
    "safetensors and pickle": ("polyglots", written("model.safetensors", _st_pickle)),
    "gif and pickle": ("polyglots", written("image.gif", _gif_pickle)),
    "gif and pickle without ending": ("polyglots", written("model", _gif_pickle)),
    "safetensors and tar": ("polyglots", written("model.safetensors", _tar_safetensors)),
    "png and zip": ("polyglots", written("image.png", lambda c: b"\x89PNG\r\n\x1a\n" + bytes(64) + torch_zip(payload(c)))),
    "json and zip": ("polyglots", written("config.json", lambda c: b'{"a": 1}\n' + torch_zip(payload(c)))),
}  # fmt: skip
