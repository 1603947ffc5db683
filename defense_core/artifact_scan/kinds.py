"""The format of a file, from its content; a file name is never believed."""

from __future__ import annotations

import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from defense_core.archives import common_root
from defense_core.errors import UnsafeArtifact
from defense_core.limits import LoadLimits
from defense_core.zip_layout import require_few_entries

SAFETENSORS, TORCH_ZIP, TORCH_LEGACY, PT2 = "safetensors", "torch zip", "torch legacy", "pt2"
ONNX, NPY, NPZ, JSON, TEXT = "onnx", "npy", "npz", "json", "text"
PICKLE, TAR, COMPRESSED, ZIP = "pickle", "tar", "compressed", "zip"
KERAS, HDF5, TORCHSCRIPT, PROGRAM = "keras", "hdf5", "torchscript", "program"
OTHER, UNKNOWN, EMPTY, SPECIAL = "other", "unknown", "empty", "special"

HEAD_BYTES = 4096
MAX_TEXT_BYTES = 16 << 20
_ZIP_TAIL_BYTES = (1 << 16) + 22  # of the longest comment, as zipfile reads it, and the record in front
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")
_PROGRAMS = (
    b"\x7fELF", b"MZ", b"#!", b"\xcf\xfa\xed\xfe", b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xca\xfe\xba\xbe",
    b"\x00asm",
)  # fmt: skip
_OTHERS = {
    b"GIF8": "GIF image", b"\x89PNG": "PNG image", b"\xff\xd8\xff": "JPEG image", b"%PDF": "PDF document",
    b"7z\xbc\xaf\x27\x1c": "7z archive", b"Rar!": "RAR archive", b"\x28\xb5\x2f\xfd": "zstd stream",
    b"\x04\x22\x4d\x18": "lz4 stream", b"GGUF": "GGUF model", b"PAR1": "parquet table", b"SQLite format 3": "database",
}  # fmt: skip
_ENDINGS: dict[str, tuple[str, ...]] = {
    ".safetensors": (SAFETENSORS,),
    ".pt2": (PT2,),
    ".onnx": (ONNX,),
    ".npy": (NPY,),
    ".npz": (NPZ,),
    ".json": (JSON,),
    ".zip": (ZIP, NPZ, KERAS),
    ".tar": (TAR,),
    ".keras": (KERAS,),
    ".h5": (HDF5,),
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), (TORCH_ZIP, TORCH_LEGACY, TORCHSCRIPT)),
    **dict.fromkeys((".txt", ".md", ".yaml", ".yml", ".csv"), (TEXT, JSON)),
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz"), (COMPRESSED,)),
    **dict.fromkeys((".pkl", ".pickle", ".joblib"), (PICKLE, TORCH_LEGACY, COMPRESSED)),
}
_CARRIES_CODE = (PICKLE, TORCH_ZIP, TORCH_LEGACY, TORCHSCRIPT, PROGRAM, KERAS, ZIP, TAR, COMPRESSED)
_SCRIPT_ENDINGS = (".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1", ".js", ".jar")


@dataclass(frozen=True)
class Kind:
    """A format.

    Attributes:
        name: one of this module's constants.
        note: more exactly, for people.
    """

    name: str
    note: str = ""


def kind_of(path: Path, max_entries: int = LoadLimits.max_entries) -> Kind:
    """What the bytes of the regular file at ``path`` are; a zip file of more entries is only called one."""
    with open(path, "rb") as stream:
        head = stream.read(HEAD_BYTES)
    found = next((name for name, fits in _TESTS if fits(head)), None)
    if found == ZIP:
        return Kind(_zip_kind(path, max_entries))
    if found is not None:
        return Kind(found)
    named = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), "")
    return Kind(OTHER, named) if named else Kind(_text_kind(path))


def name_objection(name: str, kind: Kind) -> str | None:
    """The rule that a file name breaks: ``name-lies``, ``name-differs``, ``executable`` or ``None``."""
    ending = Path(name).suffix.lower()
    if ending in _SCRIPT_ENDINGS:
        return "executable"
    claimed = _ENDINGS.get(ending)
    if claimed is None or kind.name in (*claimed, EMPTY, UNKNOWN):
        return None
    return "name-lies" if kind.name in _CARRIES_CODE else "name-differs"


def is_tar(head: bytes) -> bool:
    """Whether a tar reader would accept the first 512 bytes as a header, with or without ``ustar``."""
    block = head[:512]
    if len(block) < 512 or not any(block):
        return False
    field = block[148:156]
    octal = re.match(rb"[ 0]*([0-7]{1,7})[ \x00]", field)
    stated = int(octal[1], 8) if octal else int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    # Some old programs added up signed bytes, and readers accept that.
    if stated is not None and stated in (_sum(block, "148B8x356B"), _sum(block, "148b8x356b")):
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _sum(block: bytes, form: str) -> int:
    counted: tuple[int, ...] = struct.unpack(form, block)
    return 8 * 32 + sum(counted)


def ends_as_zip(path: Path, size: int) -> bool:
    """Whether a zip reader would accept the end of the file."""
    with open(path, "rb") as stream:
        stream.seek(max(0, size - _ZIP_TAIL_BYTES))
        tail = stream.read()
        start = size - len(tail)
        at = tail.rfind(b"PK\x05\x06")
        while at >= 0:
            if at + 22 <= len(tail) and _is_zip_end(stream, start + at, tail[at : at + 22]):
                return True
            at = tail.rfind(b"PK\x05\x06", 0, at)
    return False


def _is_zip_end(stream: BinaryIO, at: int, record: bytes) -> bool:
    length, offset = struct.unpack_from("<2I", record, 12)
    if record[4:8] == bytes(4) and (offset == 0xFFFFFFFF or offset + length <= at):
        return True
    # zipfile asks neither for the disks nor where the table is said to lie: it looks in front of the record.
    for place, magic in ((at - length, b"PK\x01\x02"), (at - 20, b"PK\x06\x07")):
        stream.seek(max(place, 0))
        if place >= 0 and stream.read(4) == magic:
            return True
    return False


def _zip_kind(path: Path, max_entries: int) -> str:
    try:
        require_few_entries(path, max_entries)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (UnsafeArtifact, zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, EOFError):
        return ZIP
    root = common_root(names) or ""
    inner = [name.removeprefix(root) for name in names]
    if any(name.startswith("code/") or name == "constants.pkl" for name in inner):
        return TORCHSCRIPT
    if "archive_format" in inner:
        return PT2
    if "data.pkl" in inner:
        return TORCH_ZIP
    if names and all(name.endswith(".npy") for name in names):
        return NPZ
    return KERAS if "config.json" in names and {"metadata.json", "model.weights.h5"} & set(names) else ZIP


def _is_zlib(head: bytes) -> bool:
    if len(head) < 8 or head[0] & 0x0F != 8 or head[0] >> 4 > 7 or int.from_bytes(head[:2], "big") % 31:
        return False
    try:
        return bool(zlib.decompressobj().decompress(head, 64))
    except zlib.error:
        return False


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5


def _has_legacy_magic(head: bytes) -> bool:
    return b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head[:24]


def _text_kind(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        return UNKNOWN
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return UNKNOWN
    try:
        if isinstance(json.loads(text), (dict, list)):
            return JSON
    except (ValueError, RecursionError):
        # No JSON; it may be plain text.
        return TEXT if all(c.isprintable() or c in "\n\r\t" for c in text) else UNKNOWN
    return TEXT


# In this order: the first that fits is the format.
_TESTS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    (EMPTY, lambda head: not head),
    (ZIP, lambda head: head[:4] in (b"PK\x03\x04", b"PK\x05\x06")),
    (NPY, lambda head: head[:6] == b"\x93NUMPY"),
    (HDF5, lambda head: head[:8] == b"\x89HDF\r\n\x1a\n"),
    (SAFETENSORS, lambda head: len(head) > 8 and head[8:9] == b"{" and head[4:8] == bytes(4)),
    (COMPRESSED, lambda head: head.startswith(_COMPRESSED) or _is_zlib(head)),
    (TAR, is_tar),
    (TORCH_LEGACY, lambda head: _is_pickle(head) and _has_legacy_magic(head)),
    (PICKLE, _is_pickle),
    (PROGRAM, lambda head: head.startswith(_PROGRAMS)),
)
