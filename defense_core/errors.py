"""Typed errors. Every message says what was expected, what was got, and what to do next.

Exit codes (the same for the command line and for pipeline steps):

====  ==========================================================================
code  meaning
====  ==========================================================================
0     pass
1     fail (a check was made, and it failed)
2     unknown (the question cannot be decided: service down, diverged, interrupted)
3     usage or bad input
====  ==========================================================================
"""

from __future__ import annotations

from typing import ClassVar

EXIT_PASS = 0
EXIT_FAIL = 1
EXIT_UNKNOWN = 2
EXIT_USAGE = 3


def visible(text: str) -> str:
    r"""``text`` on one line, control and bidi characters as escapes such as ``\u001b``.

    What a stranger wrote, the name of a tensor say, is quoted in terminals and logs: it must not steer the one nor
    write lines of the other.
    """
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


class QuarantineError(Exception):
    """Base of every error that this project raises on purpose. Its texts are :func:`visible`.

    Args:
        what: the fact, as a short clause (``"clean set /data/x.npz has no labels"``).
        expected: what would have been accepted.
        got: what was found instead.
        hint: what to do next, as a sentence.
    """

    exit_code: ClassVar[int] = EXIT_USAGE

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = visible(str(what))
        self.expected = None if expected is None else visible(str(expected))
        self.got = None if got is None else visible(str(got))
        self.hint = None if hint is None else visible(hint)
        super().__init__(self.what)

    def __str__(self) -> str:
        facts = []
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if self.got is not None:
            facts.append(f"got {self.got}")
        text = self.what.rstrip(".")
        if facts:
            text += ": " + ", ".join(facts)
        text += "."
        if self.hint:
            text += " " + (self.hint if self.hint.endswith(("?", "!")) else self.hint.rstrip(".") + ".")
        return text

    def to_mapping(self) -> dict[str, object]:
        """The error as JSON-ready facts, for ``--json`` and for failure records."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "expected": self.expected,
            "got": self.got,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


class ConfigError(QuarantineError):
    """A configuration value is unknown, of the wrong type or out of range."""


class MethodNotApplicable(ConfigError):
    """A purification method finds nothing to work on in a network of this kind."""


class PolicyError(QuarantineError):
    """A policy file is malformed (unknown key, bad bound, missing field)."""


# -- where bytes come from -------------------------------------------------------------


class SourceError(QuarantineError):
    """The model's source cannot be used."""


class SourceNotFound(SourceError):
    """Bucket, key, version, registry entry or path does not exist."""


class AccessDenied(SourceError):
    """The source refuses these credentials."""


class ArtifactTooLarge(SourceError):
    """The object is larger than the operator's limit."""


class DigestMismatch(SourceError):
    """The bytes are not the bytes that were promised."""


class TransferFailed(SourceError):
    """The transfer kept failing after every permitted retry."""

    exit_code = EXIT_UNKNOWN


# -- what the bytes are ----------------------------------------------------------------


class ArtifactError(QuarantineError):
    """The artifact cannot be turned into a model."""


class UnsafeArtifact(ArtifactError):
    """Loading the artifact would run code, escape a folder or exhaust memory."""


class CorruptArtifact(ArtifactError):
    """The artifact is truncated, damaged or of an unknown format."""


class ScanInconclusive(ArtifactError):
    """The static scan could not finish, and what it could not judge is not loaded."""

    exit_code = EXIT_UNKNOWN


class LoadTimeout(ArtifactError):
    """Reading the artifact took longer than the operator's limit."""


class ArchitectureNotAllowed(ArtifactError):
    """The architecture is not on the allow-list, or its module is not trusted."""


class StateDictMismatch(ArtifactError):
    """Parameter names or shapes are not those of the architecture."""


class NonFiniteWeights(ArtifactError):
    """Weights hold NaN or Inf."""


class DataError(QuarantineError):
    """A clean set or test set is unusable."""


# -- what happens on the way -----------------------------------------------------------


class MethodDiverged(QuarantineError):
    """A loss or weight became NaN or Inf; no model is returned."""

    exit_code = EXIT_UNKNOWN


class NonFiniteOutputs(MethodDiverged):
    """A model answers NaN or Inf; no figure is derived from such answers."""


class Cancelled(QuarantineError):
    """The operator asked to stop."""

    exit_code = EXIT_UNKNOWN


class StorageError(QuarantineError):
    """A file could not be written (disk full, permission)."""

    exit_code = EXIT_UNKNOWN


class OutputExists(QuarantineError):
    """What is to be written is there already; it is left as it is."""


class ExportError(QuarantineError):
    """The model could not be exported to ONNX."""

    exit_code = EXIT_FAIL


class EvidenceMissing(QuarantineError):
    """A decision needs evidence that is not there."""

    exit_code = EXIT_UNKNOWN


class EvidenceMismatch(QuarantineError):
    """Evidence is damaged or speaks of another model."""


class RegistryUnavailable(QuarantineError):
    """The model registry does not answer."""

    exit_code = EXIT_UNKNOWN


class RegistryConflict(QuarantineError):
    """The registry holds something that contradicts what is to be written."""

    exit_code = EXIT_FAIL
