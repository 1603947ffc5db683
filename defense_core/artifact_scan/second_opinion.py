"""A second opinion of pickles that passed the opcode check: fickling's, and what their tensors claim.

Both are asked in a child process of limited time and memory.
"""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from defense_core.errors import QuarantineError
from defense_core.limits import LoadLimits
from defense_core.pickles import DTYPES

_WORKER = Path(__file__).with_name("scan_worker.py")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
_MAX_MEMORY_BYTES = 2 << 30
# What fickling's allow-list for machine learning does not know and files of plain tensors hold. Kept apart
# from this project's own list on purpose: whoever lengthens that one does not lengthen this one.
_ALSO_PLAIN = (
    *(f"torch.{name}" for name in sorted(DTYPES)),
    "torch.storage.UntypedStorage",
    "torch.storage.TypedStorage",
    "torch._utils._rebuild_tensor_v3",
    "torch.nn.parameter.Parameter",
    "collections.Counter",  # milestones of a learning-rate schedule
    "builtins.set",
    "__builtin__.set",
)


@dataclass(frozen=True)
class Opinion:
    """What the child process says.

    Attributes:
        refused: what fickling's allow-list and its searches for known attacks object to.
        contradictions: tensors outside their storages, or larger than allowed.
        undecided: why it could not finish.
        missing: why there is none.
        storages: elements and bytes of an element of each storage, where they were asked for in order.
    """

    refused: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()
    missing: str = ""
    storages: tuple[tuple[int, int], ...] = ()


class SecondOpinionMissing(QuarantineError):
    """fickling is not installed."""


def fickling_version() -> str:
    """The installed version. Raises SecondOpinionMissing."""
    try:
        return metadata.version("fickling")
    except metadata.PackageNotFoundError as error:
        raise SecondOpinionMissing(
            "fickling is not installed", expected="fickling", got="no such package", hint="pip install fickling"
        ) from error


def second_opinion(
    pickles: Sequence[bytes], limits: LoadLimits, sizes: Mapping[str, int] | None = None, *, in_order: bool = False
) -> Opinion:
    """The opinion of all ``pickles``, each one complete, of one file.

    Args:
        sizes: bytes of each storage's record by key; ``None`` where records are not named.
        in_order: the last pickle names the storages of the one before it, in the order in which they follow.

    Raises:
        SecondOpinionMissing: there is none to ask.
    """
    fickling_version()
    specs = [importlib.util.find_spec(name) for name in ("fickling", "typing_extensions")]
    sites = sorted({str(_site(Path(spec.origin))) for spec in specs if spec is not None and spec.origin})
    settings = {"allow": _ALSO_PLAIN, "sites": sites, "sizes": sizes, "max_bytes": limits.max_bytes}
    settings["in_order"] = in_order
    cpu_s = str(math.ceil(limits.timeout_s) + 1)
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(_WORKER), str(_MAX_MEMORY_BYTES), cpu_s]
    try:
        child = subprocess.run(
            command,
            input=b"".join(struct.pack("<Q", len(data)) + data for data in (json.dumps(settings).encode(), *pickles)),
            env=_ENVIRONMENT,
            capture_output=True,
            timeout=limits.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Opinion(undecided=(f"no second opinion within {limits.timeout_s:g} s",))
    if child.returncode != 0:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        why = f": {lines[-1][:120]}" if lines else ""
        return Opinion(undecided=(f"the second opinion ended with status {child.returncode}{why}",))
    answer = json.loads(child.stdout)
    refused, contradictions, undecided = (tuple(answer[name]) for name in ("refused", "contradictions", "undecided"))
    storages = tuple((elements, item_bytes) for elements, item_bytes in answer["storages"])
    return Opinion(refused, contradictions, undecided, storages=storages)


def _site(origin: Path) -> Path:
    return origin.parents[1] if origin.name == "__init__.py" else origin.parent
