"""What a verification finds, and its first check: exactly the files that were signed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from components._runtime.decision_files import DecisionFolder
from components._runtime.evidence import POLICY
from components._runtime.model_signature import SIGNATURE, SignedFiles, digests, measure, verify_folder
from components._runtime.registered_files import manifest_differences
from components._runtime.release import EVIDENCE_FOLDER
from components._runtime.signing_keys import TrustedSigner, load_public_key
from components._runtime.verification_chain import Statements
from defense_core.errors import (
    ArtifactError,
    ConfigError,
    EvidenceMismatch,
    EvidenceMissing,
    PolicyError,
    QuarantineError,
    SourceError,
    StorageError,
)
from defense_core.files import sha256_file, walk
from defense_core.verdict import Finding, Verdict

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

_DAMAGE = (EvidenceMismatch, EvidenceMissing, ArtifactError, SourceError, PolicyError, ConfigError)
"""What a damaged folder makes the parts raise; anything else says that the check could not be made."""


@dataclass(frozen=True)
class FileFinding(Finding):
    """A finding about one file.

    Attributes:
        file: its name below the folder, or the tag; empty where it holds for all.
    """

    file: str = ""


@dataclass
class Check:
    """The findings of one verification, as they are made, and what the later checks build on."""

    folder: Path
    trusted: TrustedSigner
    findings: list[FileFinding] = field(default_factory=list)
    hashed: dict[str, str] = field(default_factory=dict)
    signed: SignedFiles | None = None
    replayed: DecisionFolder | None = None
    statements: Statements | None = None
    whole: bool = True
    bytes: int = 0

    @property
    def signers_key(self) -> SSlibKey | None:
        """The key of the statements; ``None`` where only a certificate in ``model.sig`` would have said it."""
        if self.signed is not None:
            return self.signed.key
        return load_public_key(self.trusted.public_key) if self.trusted.public_key is not None else None

    def hold(self, rule: str, bound: str, why: str, value: object = None) -> None:
        """Record that a check holds."""
        self.findings.append(FileFinding(rule, Verdict.PASS, value, bound, why))

    def differ(self, rule: str, file: str, *, expected: object, got: object, why: str = "") -> None:
        """Record a difference in ``file``."""
        sentence = why or f"{file}: expected {expected}, got {got}."
        self.findings.append(FileFinding(rule, Verdict.FAIL, str(got), str(expected), _shown(sentence), _shown(file)))

    @contextmanager
    def part(self, rule: str, bound: str, why: str, file: str) -> Iterator[None]:
        """One check: what it raises becomes a finding about ``file``; PASS if it added none itself."""
        before = len(self.findings)
        try:
            yield
        except _DAMAGE as error:
            named = self._named(error, file)
            self.differ(rule, named, expected=error.expected or bound, got=error.got or "nothing", why=str(error))
        except RecursionError:
            self.differ(rule, file, expected=bound, got="JSON that is nested too deeply")
        if len(self.findings) == before:
            self.hold(rule, bound, why)

    def _named(self, error: QuarantineError, file: str) -> str:
        """The file that the error speaks of, where it names one; ``file`` otherwise."""
        if isinstance(error, PolicyError):
            return f"{EVIDENCE_FOLDER}/{POLICY}"
        named = re.search(re.escape(f"{self.folder}/") + r"(\S+\.json)", error.what)
        return named[1] if named else file


def check_files(check: Check) -> None:
    """Hash every file once, check the model signature, and compare. ``check.whole`` says whether to read on.

    Raises:
        StorageError: a file or folder cannot be read; what lies in it might be anything.
    """
    try:
        plain, odd = _listing(check.folder)
        present = [path for path in plain if path.relative_to(check.folder).as_posix() != SIGNATURE]
        check.bytes = sum(path.stat().st_size for path in plain)
        measured = measure(check.folder, present)
    except OSError as error:
        raise StorageError(
            f"{check.folder} cannot be read", expected="readable files", got=error, hint="Correct the permissions"
        ) from error
    check.whole = not odd
    for name, kind in odd.items():
        check.differ("verify.files", name, expected="plain files only", got=kind)
    check.hashed = digests(measured)
    with check.part("verify.signature", "signed by whom you trust", "The model signature holds.", SIGNATURE):
        if SIGNATURE in odd:
            raise EvidenceMismatch(f"{SIGNATURE} is no plain file", expected="a signature", got=odd[SIGNATURE])
        check.signed = verify_folder(check.folder, measured, check.trusted)
    if (check.folder / SIGNATURE) in plain:
        check.hashed[SIGNATURE] = sha256_file(check.folder / SIGNATURE)
    if check.signed is None:
        check.findings.append(
            FileFinding(
                "verify.files",
                Verdict.UNKNOWN,
                None,
                "the files that were signed",
                f"Without a good {SIGNATURE} nobody can say which files belong here.",
                SIGNATURE,
            )
        )
        return
    expected = {**check.signed.files, SIGNATURE: check.hashed[SIGNATURE]}
    for clause in manifest_differences(expected, check.hashed):
        name, _, kind = clause.rpartition(" ")
        promised, got = expected.get(name, "no such file"), check.hashed.get(name, "no such file")
        check.differ("verify.files", name, expected=promised, got=got, why=_file_sentence(name, kind, promised, got))
    if not any(finding.rule == "verify.files" for finding in check.findings):
        check.hold("verify.files", "exactly the files that were signed", f"All {len(expected)} files are as signed.")


def _file_sentence(name: str, kind: str, promised: str, got: str) -> str:
    return {
        "missing": f"{name} is missing: it was signed with {promised}.",
        "unexpected": f"{name} is unexpected: nobody signed it ({got}).",
        "changed": f"{name} was changed: signed was {promised}, here is {got}.",
    }[kind]


def _listing(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Plain files, and by name what must not be there: links, devices, empty folders.

    Raises:
        OSError: a folder cannot be listed.
    """
    plain: list[Path] = []
    odd: dict[str, str] = {}
    for parent, folders, files in walk(folder):
        here = Path(parent)
        for name in (*folders, *files):
            path = here / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                odd[path.relative_to(folder).as_posix()] = "a link or device"
        plain.extend(here / name for name in files if (here / name).relative_to(folder).as_posix() not in odd)
        if not folders and not files and here != folder:
            odd[here.relative_to(folder).as_posix()] = "an empty folder"
    return sorted(plain), odd


def _shown(text: str) -> str:
    """``text`` as UTF-8 can hold it: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()
