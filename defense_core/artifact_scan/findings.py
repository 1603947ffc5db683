"""What a scan of files says: three states, rules with identifiers, findings with places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from defense_core.errors import EXIT_FAIL, EXIT_PASS, EXIT_UNKNOWN, visible

MAX_FINDINGS = 20
"""Findings that are kept of one file; a hostile pickle can name thousands of functions."""
_MAX_MESSAGE = 300


class State(StrEnum):
    """What may be said of a file. There is no truthiness: compare with ``is State.CLEAN``."""

    CLEAN = "clean"
    DANGEROUS = "dangerous"
    INCONCLUSIVE = "inconclusive"

    def __bool__(self) -> bool:
        raise TypeError("a State has three values; compare it with `is State.CLEAN`")

    @property
    def exit_code(self) -> int:
        """0 clean, 1 dangerous, 2 inconclusive."""
        return {State.CLEAN: EXIT_PASS, State.DANGEROUS: EXIT_FAIL, State.INCONCLUSIVE: EXIT_UNKNOWN}[self]


def worst(states: Iterable[State]) -> State:
    """Dangerous if any is; else inconclusive if any is, or if there are none; else clean."""
    seen = list(states)
    if State.DANGEROUS in seen:
        return State.DANGEROUS
    if not seen or any(state is not State.CLEAN for state in seen):
        return State.INCONCLUSIVE
    return State.CLEAN


@dataclass(frozen=True)
class Rule:
    """One reason why a file is not clean.

    Attributes:
        state: what the file becomes.
        summary: what was found, for a list of rules.
        advice: what to do about it.
    """

    state: State
    summary: str
    advice: str


_RESAVE = "Have the weights re-saved from a trusted machine: model.state_dict() as safetensors."
_AGAIN = "Fetch the file again and compare its digest; a damaged file is never loaded."
_PLAIN = "Ask the sender for the plain file, or for a plain archive of it."
_DANGEROUS = {
    "pickle-code": ("A pickle names code, or an opcode that may run it", _RESAVE),
    "pickle-second-opinion": ("fickling's allow-list refuses what this project's own list accepts", _RESAVE),
    "pickle-hidden": ("Bytes follow the end of a pickle, or a file of another format is a pickle too", _RESAVE),
    "archive-unsafe": ("An archive that escapes its folder, explodes, lies or holds links", _PLAIN),
    "archive-polyglot": ("A file that is also an archive", _PLAIN),
    "torchscript-code": ("TorchScript: the file brings a program", _RESAVE),
    "pt2-code": ("A torch.export archive brings compiled code or pickled weights", _RESAVE),
    "keras-lambda": ("A Keras file with a Lambda layer, which is marshalled Python code", _RESAVE),
    "numpy-objects": ("A numpy file of Python objects, which are stored as a pickle", "Save plain numbers."),
    "onnx-external-path": (
        "ONNX external data outside the model's folder",
        "Export to one file without external data.",
    ),
    "onnx-custom-operator": (
        "An ONNX operator that needs a library of its own",
        "Export with standard operators only.",
    ),
    "tensor-lies": ("Sizes, types or offsets of tensors contradict each other", _AGAIN),
    "executable": ("A program, a script or a library lies where a model was expected", "Remove it."),
    "file-special": ("A link, pipe or device instead of a file", "Copy the file that it stands for."),
    "file-name": ("A file name that shows other characters than it has", "Rename the file after finding its origin."),
    "name-lies": ("The content is a pickle or an archive, the name says otherwise", "Find out where it comes from."),
}
_INCONCLUSIVE = {
    "damaged": ("The file is truncated or damaged, so its rest was not read", _AGAIN),
    "format-unknown": ("No format that this scan understands", _RESAVE),
    "format-unsupported": ("A format that this scan recognises and cannot vouch for", _RESAVE),
    "name-differs": ("The name's ending belongs to another format", "Rename the file after finding its origin."),
    "too-large": ("Larger than the limit, so it was not read", "Raise max_bytes if such a size is expected."),
    "too-deep": ("Archives in archives, deeper than the scan follows", _PLAIN),
    "too-slow": ("The scan ran out of time or memory", "Raise the time limit if the file's origin is trusted."),
    "onnx-external-data": ("ONNX weights in other files, which are not part of this one", "Export to one file."),
    "scanner-missing": ("fickling is not installed, so there is no second opinion", "Install fickling."),
    "unreadable": ("The file cannot be read", "Check its permissions."),
}
RULES: Mapping[str, Rule] = {
    **{name: Rule(State.DANGEROUS, *texts) for name, texts in _DANGEROUS.items()},
    **{name: Rule(State.INCONCLUSIVE, *texts) for name, texts in _INCONCLUSIVE.items()},
}


@dataclass(frozen=True)
class ScanFinding:
    """One rule that fired.

    Attributes:
        rule: key of :data:`RULES`.
        where: the file relative to what was scanned; ``file!/member`` inside an archive.
        message: what exactly, one sentence.
        offset: byte in that file or member; ``None`` where it has no single place.
    """

    rule: str
    where: str
    message: str
    offset: int | None = None

    def __post_init__(self) -> None:
        # What a stranger wrote is quoted in terminals, logs and pages: no control or bidi characters.
        for name in ("where", "message"):
            object.__setattr__(self, name, visible(getattr(self, name)[:_MAX_MESSAGE]))

    @property
    def state(self) -> State:
        """What this finding makes of the file."""
        return RULES[self.rule].state

    @property
    def advice(self) -> str:
        """What to do about it."""
        return RULES[self.rule].advice

    def to_mapping(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "rule": self.rule,
            "state": self.state.value,
            "where": self.where,
            "message": self.message,
            "offset": self.offset,
        }


@dataclass(frozen=True)
class FileScan:
    """What is said of one file.

    Attributes:
        path: relative to what was scanned, with invisible characters as escapes.
        kind: format, from the content.
        bytes: size; 0 for what is no file.
        sha256: ``"sha256:<hex>"``; empty where it could not be read.
        findings: why it is not clean; empty if it is.
    """

    path: str
    kind: str
    bytes: int
    sha256: str
    findings: tuple[ScanFinding, ...]

    def __post_init__(self) -> None:
        # As in findings; a name that is no valid UTF-8 could not be written as JSON either.
        object.__setattr__(self, "path", visible(self.path))

    @property
    def state(self) -> State:
        """Clean exactly if there is no finding."""
        return worst(finding.state for finding in self.findings) if self.findings else State.CLEAN


@dataclass(frozen=True)
class ArtifactScan:
    """What is said of a file or folder.

    Attributes:
        files: one entry a file, ordered by path.
        scanners: version by name of what judged.
    """

    files: tuple[FileScan, ...]
    scanners: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """The worst of all files; a folder without any file is inconclusive."""
        return worst(file.state for file in self.files)

    @property
    def findings(self) -> tuple[ScanFinding, ...]:
        """Of all files, dangerous ones first."""
        every = [finding for file in self.files for finding in file.findings]
        return tuple(sorted(every, key=lambda finding: finding.state is not State.DANGEROUS))

    def to_mapping(self, *, max_files: int | None = None) -> dict[str, Any]:
        """JSON-ready; with ``max_files`` the clean rest of a long list is only counted."""
        listed = sorted(self.files, key=lambda file: file.state is State.CLEAN)[:max_files]
        return {
            "verdict": self.state.value,
            "scanners": dict(self.scanners),
            "files": len(self.files),
            "bytes": sum(file.bytes for file in self.files),
            "listed": [
                {"path": f.path, "kind": f.kind, "bytes": f.bytes, "sha256": f.sha256, "state": f.state.value}
                for f in listed
            ],
            "findings": [finding.to_mapping() for finding in self.findings[: MAX_FINDINGS * 5]],
        }
