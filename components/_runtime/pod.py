"""What the pod of a step was given, as its variables say it: an accelerator, an identity."""

from __future__ import annotations

import os
from collections.abc import Mapping

from defense_core.errors import ConfigError

ACCELERATOR_VARIABLE = "QUARANTINE_ACCELERATOR"
"""What the node pool gives the step, ``nvidia.com/gpu=1``; not set where it gives none."""
ACCOUNT_VARIABLE = "QUARANTINE_SERVICE_ACCOUNT"
"""The service account that the pod runs as, from the pod itself."""
ASKED_ACCOUNT_VARIABLE = "QUARANTINE_SERVICE_ACCOUNT_ASKED"
"""The service account that the node pools name for the step."""


def accelerator() -> str | None:
    """The accelerator that the pod was given; ``None`` without one."""
    return os.environ.get(ACCELERATOR_VARIABLE) or None


def check_identity(environment: Mapping[str, str] | None = None) -> None:
    """Stop a step that runs as somebody else than its node pools say.

    KFP has one service account for all pods of a run; that of a step is set by an admission policy. Where that
    policy is not installed, the step would go on with other rights than it was meant to have.

    Raises:
        ConfigError: the pod runs as another service account.
    """
    values = os.environ if environment is None else environment
    asked, found = values.get(ASKED_ACCOUNT_VARIABLE, ""), values.get(ACCOUNT_VARIABLE, "")
    if asked and asked != found:
        raise ConfigError(
            "the step runs as another service account than the node pools name",
            expected=asked,
            got=found or "none",
            hint="Apply the admission.yaml that was compiled beside the pipeline; see docs/node-pools.md",
        )
