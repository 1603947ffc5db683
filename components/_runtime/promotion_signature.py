"""What promotion asks of signatures: that whom it trusts signed this release, and signed it for where it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from components._runtime import verification_approvals
from components._runtime.model_signature import SIGNATURE
from components._runtime.release import ATTESTATIONS
from components._runtime.signing_keys import CHAIN_VARIABLE, PUBLIC_KEY_VARIABLE, TrustedSigner
from components._runtime.verification import signed_destination, verify_release
from components._runtime.verification_files import Check, FileFinding
from defense_core.errors import ConfigError, EvidenceMismatch, EvidenceMissing

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

RULE = "verify.destination"


@dataclass(frozen=True)
class SignatureCheck:
    """Whose signatures count, and whether there must be one.

    The policy alone cannot say whether there must be one: it lies in the release that is checked, and who writes a
    release could bring one that asks for nothing. So where somebody is trusted, only what they signed passes.

    Attributes:
        trusted: whose signature counts, and is then demanded; ``None``: nobody was named, and none is checked.
        demanded: whether the policy demands signatures.
        approvers: whose approvals count: public key by name.
    """

    trusted: TrustedSigner | None = None
    demanded: bool = False
    approvers: Mapping[str, SSlibKey] = field(default_factory=dict)

    def of_release(self, folder: Path, *, name: str, alias: str) -> bool | None:
        """Check what is about to be registered as ``name`` and given ``alias``.

        Returns:
            True: everything that ``quarantine verify`` checks holds, and it was signed for this name and alias.
            ``None``: a signature is there, and nobody was named whose would count. False: there is none, and
            neither somebody who is trusted nor the policy demands one.

        Raises:
            EvidenceMissing: somebody is trusted or the policy demands a signature, and there is none.
            ConfigError: the policy demands one and nobody was named, or the trusted key is not usable.
            EvidenceMismatch: something does not hold. A bad signature is refused under every policy.
        """
        return self._checked(folder, {"model name": name, "alias": alias}, lambda finding: True)

    def of_version(self, folder: Path, *, name: str) -> bool | None:
        """Check the files of a version of ``name``, which an earlier run may have registered; as :meth:`of_release`.

        Its alias and approvers are those of that run, so neither is asked for: what was signed says that they held.
        """
        return self._checked(folder, {"model name": name}, lambda finding: finding.rule != verification_approvals.RULE)

    def _checked(
        self, folder: Path, destination: Mapping[str, str], counts: Callable[[FileFinding], bool]
    ) -> bool | None:
        self._require_both(folder)
        if not any(os.path.lexists(folder / name) for name in (SIGNATURE, ATTESTATIONS)):
            return False
        if self.trusted is None:
            return None
        verified = verify_release(
            folder,
            self.trusted,
            approvers=self.approvers,
            further=lambda check: _check_destination(check, destination),
        )
        different = [finding for finding in verified.differences if counts(finding)]
        if different:
            raise EvidenceMismatch(
                "the release does not verify",
                expected="a whole release, signed by whom promotion trusts, for "
                + ", ".join(f"the {what} {value}" for what, value in destination.items()),
                got="; ".join(each.why for each in different[:5]),
                hint="Nothing was registered; `quarantine verify` names every difference",
            )
        return True

    def _require_both(self, folder: Path) -> None:
        """Refuse what is unsigned where it may not be, and what must be signed where nobody's signature counts."""
        if not (folder / SIGNATURE).is_file() and (self.demanded or self.trusted is not None):
            why = "the policy demands a signature" if self.demanded else "promotion was told whose signature counts"
            raise EvidenceMissing(
                f"{why} and the release has none",
                expected=SIGNATURE,
                got="an unsigned release",
                hint="Give the sign step its key and run again; nothing was registered",
            )
        if self.demanded and self.trusted is None:
            raise ConfigError(
                "the policy demands a signature, and nobody was named whose signature would count",
                expected=f"{PUBLIC_KEY_VARIABLE} to name a public key, or {CHAIN_VARIABLE} a certificate chain",
                got="neither",
                hint=f"Set {PUBLIC_KEY_VARIABLE} for the promote step and run again; nothing was registered",
            )


def _check_destination(check: Check, wanted: Mapping[str, str]) -> None:
    """Compare what the release statement says that this was signed for with where it goes."""
    stated = signed_destination(check)
    said = "It was signed for where it goes."
    with check.part(RULE, ", ".join(wanted.values()), said, ATTESTATIONS):
        for what, value in wanted.items():
            got = stated.get(what.replace(" ", "_"), "none")
            if got != value:
                why = f"It was signed for the {what} {got}, and goes to {value}."
                check.differ(RULE, ATTESTATIONS, expected=value, got=got, why=why)
