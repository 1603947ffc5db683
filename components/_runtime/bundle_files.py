"""A bundle as files, for steps that copy it and need no tensors: torch is not imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from components._runtime.small_files import read_small
from defense_core.errors import CorruptArtifact, DigestMismatch
from defense_core.files import sha256_file

DESCRIPTION = "bundle.json"


def bundle_digest(folder: Path) -> str:
    """The bundle's digest, after every file that it lists was hashed again.

    Raises:
        CorruptArtifact: ``bundle.json`` is missing or not readable.
        EvidenceMismatch: it is too large.
        DigestMismatch: a file is not the one that it lists.
    """
    for name, expected in listed_files(folder).items():
        got = sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if got != expected:
            raise DigestMismatch(
                f"{folder / name} is not the bundle's", expected=expected, got=got, hint="Run the step again"
            )
    return sha256_file(folder / DESCRIPTION)


def copy_bundle(source: Path, destination: Path) -> None:
    """Copy a bundle's own files, and nothing else, into the existing folder ``destination``."""
    for name in (DESCRIPTION, *listed_files(source)):
        shutil.copyfile(source / name, destination / name)


def listed_files(folder: Path) -> dict[str, str]:
    """Digest by name of the files that ``bundle.json`` lists. Raises CorruptArtifact, EvidenceMismatch."""
    path = Path(folder) / DESCRIPTION
    try:
        description: Any = json.loads(read_small(path).decode("utf-8"))
        files = {str(name): str(digest) for name, digest in description["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptArtifact(f"{path} is not readable", expected="a bundle's description", got=error) from error
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise CorruptArtifact(f"{path} names a file elsewhere", expected="plain file names", got=", ".join(outside))
    return files
