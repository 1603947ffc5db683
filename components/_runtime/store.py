"""Where a run's evidence and failure records lie: a folder, or a prefix in S3.

The report runs as an exit handler, which is given no outputs of other tasks, and after a failure
there are none. So each step also puts its record here, under ``<root>/<run>/``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components._runtime.addresses import local_path, split_address
from components._runtime.evidence import BESIDE, FAILED, is_deep, parse_evidence, repeats, require_named
from components._runtime.small_files import read_small
from defense_core.config import canonical_json
from defense_core.errors import (
    EXIT_FAIL,
    EXIT_UNKNOWN,
    EXIT_USAGE,
    AccessDenied,
    Cancelled,
    EvidenceMismatch,
    QuarantineError,
    SourceNotFound,
    StorageError,
    TransferFailed,
)
from defense_core.files import reading, write_atomic

logger = logging.getLogger(__name__)

SETTLED = "settled"
"""In a failure record: a later attempt ended well and left no evidence, since nothing was asked of it."""


class Shelf(Protocol):
    """Small files by name."""

    def put_new(self, name: str, data: bytes) -> bool:
        """Write ``data`` unless ``name`` is there; whether it was written."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write ``data`` over whatever is there."""
        ...

    def get(self, name: str) -> bytes:
        """The content of ``name``.

        Raises:
            FileNotFoundError, SourceNotFound: it is not there.
            EvidenceMismatch: it is no file, or too large.
            AccessDenied: it may not be read, or S3 does not say whether it is there.
        """
        ...

    def names(self) -> list[str]:
        """Every name, sorted."""
        ...


@dataclass(frozen=True)
class Records:
    """What a run left so far.

    Attributes:
        evidence: evidence mappings by name.
        failures: by name, steps that failed and did not succeed in a later attempt:
            ``{"name", "step", "error", "what", "expected", "got", "hint", "exit_code", "message"}``. One of which a
            later attempt found that nothing was asked (:meth:`EvidenceStore.settle`) is not among them.
        damaged: names of files that could not be read, with the reason.
    """

    evidence: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    failures: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvidenceStore:
    """The records of one run."""

    shelf: Shelf

    def put(self, evidence: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add a step's evidence. A retried step whose inputs, outputs and verdict are the same keeps the first.

        Returns:
            What the first attempt left, where ``evidence`` repeats it; else ``evidence``: no figure that a step did not
            measure is handed on, whoever wrote it there.

        Raises:
            EvidenceMismatch: there is other evidence of this name; evidence never changes.
        """
        name = str(evidence["name"])
        data = canonical_json(evidence) + b"\n"
        if self.shelf.put_new(f"{name}.json", data):
            return evidence
        present = _named_evidence(self.shelf.get(f"{name}.json"), name)
        differing = [key for key in ("inputs", "outputs", "verdict") if present.get(key) != evidence.get(key)]
        if differing:
            raise EvidenceMismatch(
                f"evidence {name} of this run is there already and differs",
                expected="the same " + ", ".join(differing),
                got="others",
                hint="Start a new run; a run's evidence never changes",
            )
        if repeats(present, _named_evidence(data, name)):
            return present
        logger.warning("%s: an earlier attempt left other results in the store, which keeps them", name)
        return evidence

    def earlier(self, name: str) -> dict[str, Any] | None:
        """The evidence that an earlier attempt of the step ``name`` left; ``None``: there is none to be seen.

        Raises:
            EvidenceMismatch: it is damaged, or calls itself otherwise.
        """
        try:
            data = self.shelf.get(f"{name}.json")
        except (FileNotFoundError, SourceNotFound, AccessDenied):
            # S3 denies what is not there to accounts that may not list. What is there is still never written over.
            return None
        return _named_evidence(data, name)

    def put_failure(self, name: str, failure: Mapping[str, Any]) -> None:
        """Record why the step ``name`` failed; the latest attempt counts."""
        self.shelf.put(f"{name}{FAILED}", canonical_json(failure) + b"\n")

    def settle(self, name: str) -> None:
        """Say that the step ``name``, of which an earlier attempt may have failed, ended well without evidence."""
        file = f"{name}{FAILED}"
        try:
            failure = _parse_failure(self.shelf.get(file), file)
        except (FileNotFoundError, SourceNotFound):
            return
        except (AccessDenied, EvidenceMismatch):
            # S3 denies what is not there to accounts that may not list. What was damaged is of a failed attempt too.
            failure = {"name": name, "message": "an earlier attempt may have failed"}
        self.put_failure(name, {**failure, SETTLED: True})

    def records(self) -> Records:
        """Everything that is there; a file that cannot be read is named, not hidden.

        Raises:
            AccessDenied, StorageError, TransferFailed: the store does not say what lies there.
        """
        evidence: dict[str, dict[str, Any]] = {}
        failures: dict[str, dict[str, Any]] = {}
        damaged: dict[str, str] = {}
        for file in self.shelf.names():
            if not file.endswith(".json") or file in BESIDE:
                continue
            try:
                data = self.shelf.get(file)
                if file.endswith(FAILED):
                    failures[file.removesuffix(FAILED)] = _parse_failure(data, file)
                else:
                    evidence[file.removesuffix(".json")] = _named_evidence(data, file.removesuffix(".json"))
            except (AccessDenied, Cancelled, StorageError, TransferFailed):
                raise  # of the store, not of what lies there
            except QuarantineError as error:
                damaged[file] = str(error)
        open_failures = {
            name: failure
            for name, failure in failures.items()
            if name not in evidence and failure.get(SETTLED) is not True
        }
        return Records(evidence, open_failures, damaged)


def open_store(root: str, run: str) -> EvidenceStore:
    """The records of the run called ``run`` under ``root``: a path, ``file://…`` or ``s3://bucket/prefix``.

    Raises:
        ConfigError: the address is not usable.
    """
    if split_address(root).scheme == "s3":
        return EvidenceStore(_s3_shelf(root, run))
    return EvidenceStore(_FolderShelf(local_path(root) / run))


@dataclass(frozen=True)
class _FolderShelf:
    folder: Path

    def put_new(self, name: str, data: bytes) -> bool:
        # The content is written beside its place and linked there: link() refuses an existing name.
        draft = self.folder / f".{name}.{os.getpid()}"
        write_atomic(draft, data)
        try:
            os.link(draft, self.folder / name)
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(f"cannot write {self.folder / name}", got=os.strerror(error.errno or 0)) from error
        finally:
            draft.unlink(missing_ok=True)
        return True

    def put(self, name: str, data: bytes) -> None:
        write_atomic(self.folder / name, data)

    def get(self, name: str) -> bytes:
        path = self.folder / name
        try:
            return read_small(path)
        except FileNotFoundError:
            raise
        except OSError:
            with reading(path, EvidenceMismatch, "a file", denied=AccessDenied):
                raise

    def names(self) -> list[str]:
        with reading(self.folder, EvidenceMismatch, "a readable folder", denied=AccessDenied):
            found = self.folder.iterdir() if self.folder.is_dir() else ()
            files = [path for path in found if path.is_file()]
        return sorted(path.name for path in files if not path.name.startswith("."))


def _s3_shelf(root: str, run: str) -> Shelf:
    # boto3 is imported only where records lie in S3.
    from components._runtime.s3_shelf import S3Shelf

    return S3Shelf.open(root, run)


def _named_evidence(data: bytes, name: str) -> dict[str, Any]:
    """The evidence in ``<name>.json``, which must call itself so."""
    evidence = parse_evidence(data, f"{name}.json")
    require_named(evidence, name, f"{name}.json")
    return evidence


def _parse_failure(data: bytes, file: str) -> dict[str, Any]:
    import json

    try:
        mapping = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EvidenceMismatch(f"failure record {file} is damaged", expected="JSON", got=error) from error
    if not isinstance(mapping, dict) or "message" not in mapping or is_deep(mapping):
        raise EvidenceMismatch(
            f"failure record {file} is damaged", expected="a flat object with a message", got=str(mapping)[:80]
        )
    code = mapping.get("exit_code", EXIT_UNKNOWN)
    if isinstance(code, bool) or code not in (EXIT_FAIL, EXIT_UNKNOWN, EXIT_USAGE):
        raise EvidenceMismatch(
            f"failure record {file} is damaged", expected="an exit code of 1, 2 or 3", got=repr(code)[:80]
        )
    return mapping
