"""Members of torch's archives that say one short thing: versions, byte order, identifiers. They hold nothing else."""

from __future__ import annotations

import re
import zipfile

from defense_core.errors import UnsafeArtifact

_MAX_BYTES = 64
_VERSION = re.compile(rb"[0-9]{1,4}(\.[0-9]{1,4})?\n?")
_BYTE_ORDER = re.compile(rb"little|big")
_IDENTIFIER = re.compile(rb"[0-9a-f]{1,64}")  # 40 decimal digits by torch, a digest by other writers
TORCH_PLAIN = {
    "version": _VERSION,
    ".data/version": _VERSION,
    "byteorder": _BYTE_ORDER,
    ".data/serialization_id": _IDENTIFIER,
    ".format_version": _VERSION,
    ".storage_alignment": re.compile(rb"[0-9]{1,12}"),
}
"""What each plain member of a ``torch.save`` file may be, by its name in the archive's folder."""
PT2_PLAIN = {
    **{name: TORCH_PLAIN[name] for name in ("version", ".data/version", "byteorder", ".data/serialization_id")},
    "archive_format": re.compile(rb"pt2"),
    "archive_version": _VERSION,
}
"""The same of a ``torch.export`` archive."""


def check_plain_members(
    archive: zipfile.ZipFile, root: str, plain: dict[str, re.Pattern[bytes]], *, where: str
) -> None:
    """Refuse a plain member that is anything but what torch writes there.

    Args:
        root: the folder of all members, with its slash.
        plain: :data:`TORCH_PLAIN` or :data:`PT2_PLAIN`.

    Raises:
        UnsafeArtifact: another value, or a long one.
    """
    for entry in archive.infolist():
        pattern = plain.get(entry.filename.removeprefix(root))
        if pattern is None:
            continue
        value = archive.read(entry) if entry.file_size <= _MAX_BYTES else None
        if value is None or not pattern.fullmatch(value):
            raise UnsafeArtifact(
                f"{entry.filename!r} of {where} is not what torch writes there",
                expected=f"a short text that matches {pattern.pattern.decode()!r}",
                got=f"{entry.file_size} bytes" if value is None else repr(value),
                hint="Have the weights re-saved from a trusted machine",
            )
