"""A promote run: what it is asked, and the release of the former run that it goes on from."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from components._runtime.approval_texts import ApprovalTexts
from components._runtime.decided_files import release_of
from components._runtime.decision_files import DecisionFolder, replay_decision
from components._runtime.model_signature import SIGNATURE
from components._runtime.release import EVIDENCE_FOLDER, check_release
from components._runtime.signing_keys import PUBLIC_KEY_VARIABLE, TrustedSigner
from components._runtime.sources import acquire
from components._runtime.verification import verify_release
from defense_core.config import require, to_mapping
from defense_core.errors import ConfigError, EvidenceMismatch
from defense_core.files import write_atomic
from defense_core.progress import Progress
from defense_core.verdict import Verdict


@dataclass(frozen=True)
class Resumption:
    """What a promote run is asked.

    Attributes:
        release: of the former run: ``models:/name/3``, ``models:/name@alias``, ``file://`` or a folder.
        given: approvals, and whose count.
        public_key: PEM, of whoever signed the former release; empty for one that promotion's own trusted signer
            signed, or, where there is no such signer, for one without signature. Where there is such a signer it must
            have signed too: a request narrows whom the operator trusts, and never widens it.
    """

    release: str
    given: ApprovalTexts = field(default_factory=ApprovalTexts)
    public_key: str = ""

    def __post_init__(self) -> None:
        require(bool(self.release), "release", "models:/name/3 or a folder", repr(self.release))

    def arguments(self) -> dict[str, str]:
        """The request as arguments of the pipeline ``promote``."""
        texts = {name: json.dumps(value, sort_keys=True) for name, value in to_mapping(self.given).items()}
        return {"release": self.release, "public_key": self.public_key, **texts}


def acquire_release(uri: str, folder: Path, *, max_bytes: int, progress: Progress) -> Path:
    """Copy the former release that ``uri`` names into the existing, empty ``folder``; where it lies.

    Raises:
        SourceNotFound, ArtifactTooLarge, UnsafeArtifact, RegistryUnavailable, StorageError: see each.
        ConfigError: an address of another kind.
    """
    if uri.startswith("models:"):
        from components._runtime.journal import open_connection
        from components._runtime.registered_files import resolve_model_uri

        return resolve_model_uri(open_connection(create=False), uri, folder / "version", max_bytes=max_bytes).path
    if "://" in uri and not uri.startswith("file://"):
        raise ConfigError("address of a release is not usable", expected="models:/name/3 or a folder", got=uri[:120])
    found = acquire(uri, folder, max_bytes=max_bytes, progress=progress).path
    require(found.is_dir(), "release", "a folder that the sign step wrote", uri)
    return found


def check_former(folder: Path, request: Resumption, trusted: TrustedSigner | None = None) -> DecisionFolder:
    """Make the former decision again, and check every file; a signed release must hold for the key that is named.

    Args:
        trusted: whose signature promotion lets pass; the release must hold for it whatever key the request names.
            Where there is one, this run signs, so a release of anybody else would come out of it signed: it is refused.

    Raises:
        EvidenceMissing, EvidenceMismatch, DigestMismatch: it is not whole, or not signed by whom you trust.
        ConfigError: a signature is there, or demanded by the policy, and no key is named.
    """
    replayed = replay_decision(folder / EVIDENCE_FOLDER)
    check_release(release_of(folder, replayed))
    if request.public_key:
        with tempfile.TemporaryDirectory(prefix="quarantine-key-") as scratch:
            public = Path(scratch) / "public.pem"
            write_atomic(public, request.public_key.encode())
            _verify(folder, request, TrustedSigner(public_key=public))
    if trusted is not None:
        _verify(folder, request, trusted)
    named = bool(request.public_key) or trusted is not None
    if not named and (replayed.requires_signature or (folder / SIGNATURE).is_file()):
        raise ConfigError(
            "nobody was named whose signature on the former release would count",
            expected="a public key",
            got="none",
            hint=f"Give --public-key FILE, or set {PUBLIC_KEY_VARIABLE}; there is no default",
        )
    return replayed


def _verify(folder: Path, request: Resumption, trusted: TrustedSigner) -> None:
    verified = verify_release(folder, trusted, approvers=request.given.keys())
    if verified.verdict is not Verdict.PASS:
        raise EvidenceMismatch(
            "the former release does not verify",
            expected="a whole release, signed by whom you trust",
            got="; ".join(each.why for each in verified.differences[:5]),
            hint="Nothing was decided; see `quarantine verify`",
        )
