"""The whole corpus, and what is done with each file: scanned, loaded where that is refused, canary looked for."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from defense_core.artifact_scan import scan_artifact
from defense_core.bundle import load_model_file
from defense_core.errors import QuarantineError
from defense_core.limits import LoadLimits
from tests.hostile.benign_files import BENIGN, SPEC
from tests.hostile.hostile_archives import ARCHIVES, Maker, torch_zip, written
from tests.hostile.hostile_formats import FORMATS
from tests.hostile.hostile_pickles import PICKLES, Payload

SCAN_LIMITS = LoadLimits(max_bytes=8 << 20, timeout_s=2)
LOAD_LIMITS = LoadLimits(max_bytes=8 << 20, timeout_s=4)
BENIGN_LIMITS = LoadLimits(max_bytes=64 << 20, timeout_s=60)


@dataclass(frozen=True)
class HostileFile:
    """How to make a file that means harm.

    Attributes:
        name: unique.
        label: its class, for tables.
        make: writes it into a folder so that its payload, if run, creates the canary; its path.
    """

    name: str
    label: str
    make: Maker


@dataclass(frozen=True)
class Judged:
    """What happened to one file.

    Attributes:
        verdict: ``clean``, ``dangerous`` or ``inconclusive``.
        rules: of the scan's findings.
        payload_ran: the canary was there afterwards.
        crashed: the error that was not a typed one; empty if there was none.
        loaded: the model loader accepted the file.
    """

    name: str
    label: str
    verdict: str
    rules: tuple[str, ...]
    payload_ran: bool
    crashed: str
    loaded: bool


def _in_torch_zip(payload: Payload) -> Maker:
    return written("model.pt", lambda canary: torch_zip(payload(canary)))


def _in_legacy(payload: Payload) -> Maker:
    head = b"".join(pickle.dumps(item, protocol=2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return written("model.pth", lambda canary: head + payload(canary) + pickle.dumps([], protocol=2))


def hostile_files() -> Iterator[HostileFile]:
    """Every hostile file: each pickle bare, in a torch.save file, and the opcodes in an old one too."""
    for name, (label, payload, _) in PICKLES.items():
        yield HostileFile(f"{name} in model.pt", label, _in_torch_zip(payload))
        if label != "gadget names":
            yield HostileFile(f"{name} in model.pkl", label, written("model.pkl", payload))
        if label == "pickle opcodes":
            yield HostileFile(f"{name} in old model.pth", label, _in_legacy(payload))
    for name, (label, make) in {**ARCHIVES, **FORMATS}.items():
        yield HostileFile(name, label, make)


def judge_hostile(file: HostileFile, folder: Path, limits: LoadLimits = SCAN_LIMITS) -> Judged:
    """Make the file in the empty ``folder``, scan it, try to load it, and look for the canary."""
    canary = folder / "canary"
    inside = folder / "file"
    inside.mkdir(parents=True)
    path = file.make(inside, str(canary))
    verdict, crashed, loaded = "crashed", "", False
    rules: tuple[str, ...] = ()
    try:
        scan = scan_artifact(path, limits)
        verdict, rules = scan.state.value, tuple(finding.rule for finding in scan.findings)
        load_model_file(path, SPEC, limits=LOAD_LIMITS)
        loaded = True
    except QuarantineError:
        # Refused, as it should be.
        loaded = False
    except Exception as error:  # noqa: BLE001 - what is counted here is exactly the errors nobody thought of
        crashed = f"{type(error).__name__}: {error}"[:200]
    return Judged(file.name, file.label, verdict, rules, canary.exists(), crashed, loaded)


def judge_benign(name: str, folder: Path) -> Judged:
    """Make the benign file ``name`` in the existing ``folder`` and scan it."""
    path = BENIGN[name](folder)
    try:
        scan = scan_artifact(path, BENIGN_LIMITS)
    except Exception as error:  # noqa: BLE001 - as above
        return Judged(name, "benign", "crashed", (), False, f"{type(error).__name__}: {error}"[:200], False)
    return Judged(name, "benign", scan.state.value, tuple(f.rule for f in scan.findings), False, "", False)
