"""Approvals and the keys of approvers as text, which is what a pipeline's parameters are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from components._runtime.approvals import SignedApproval, open_approval, require_distinct
from components._runtime.plan import parse_json
from components._runtime.signing_keys import parse_public_key
from defense_core.config import from_mapping

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey


@dataclass(frozen=True)
class ApprovalTexts:
    """Approvals that were not looked at yet.

    Attributes:
        approvals: the content of the signed files.
        approvers: whose approvals count: public key, PEM, by name.
    """

    approvals: tuple[str, ...] = ()
    approvers: Mapping[str, str] = field(default_factory=dict)

    def signed(self) -> list[SignedApproval]:
        """The approvals, signatures checked.

        Raises:
            ConfigError: an approver's key is not usable, or has two names.
            EvidenceMismatch: an approval is signed by none of the approvers, or in the name of another.
        """
        keys = self.keys()
        return [open_approval(text.encode(), keys, f"approval {index}") for index, text in enumerate(self.approvals)]

    def keys(self) -> dict[str, SSlibKey]:
        """Public keys of the approvers by name. Raises ConfigError: one is not usable, or has two names."""
        keys = {name: parse_public_key(text.encode(), f"of {name}") for name, text in self.approvers.items()}
        require_distinct(keys)
        return keys


def parse_approvals(approvals: str, approvers: str) -> ApprovalTexts:
    """From the parameters ``approvals``, a JSON list, and ``approvers``, a JSON mapping. Raises ConfigError."""
    given = {"approvals": parse_json(approvals, "approvals"), "approvers": parse_json(approvers, "approvers")}
    return from_mapping(ApprovalTexts, given)
