"""Make ``tests/formats/v1``: a signed release as this version of the program writes it, kept for ever.

``python -m tests.formats.make_v1`` was run once. The private key existed in a temporary folder only. Later
versions verify the folder as it is; a changed format gets a folder of its own beside it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from components._runtime.signing_keys import TrustedSigner, generate_key_pair
from components._runtime.verification import verify_release
from defense_core.verdict import Verdict
from tests.finished_chain import make_chain, make_release
from tests.small_model import make_inputs

HERE = Path(__file__).resolve().parent / "v1"
PUBLIC_KEY, RELEASE, EXPECTED = "signing.pub", "release", "expected.json"


def rule(name: str, evidence: str, value: str, **rest: Any) -> dict[str, Any]:
    """One rule of the golden policy."""
    return {"id": name, "evidence": evidence, "value": value, "severity": "block", "why": "It is kept.", **rest}


POLICY: dict[str, Any] = {
    "schema": 1,
    "name": "golden",
    "description": "A rule of every kind.",
    "promote": True,
    "require": {"signatures": ["model", "attestations"], "max_evidence_age_days": 30, "min_clean_images": 50},
    "rules": [
        rule("at-least", "evaluate.selected", "acc.low", min=0.0),
        rule("at-most", "evaluate.selected", "probes[*].asr.high", max=1.0),
        rule("equals", "export", "dynamic_batch", equals=True),
        rule("one-of", "select", "method", one_of=["tsbd", "fine_tuning"]),
        rule("warns", "evaluate.selected", "acc.low", min=1.1, severity="warn"),
        rule("rests", "scan", "state", equals="clean", when_absent="skip"),
    ],
}


def main() -> int:
    """Exit code 0, or 1 where the folder is there already or does not verify."""
    if HERE.exists():
        print(f"{HERE} exists and stays as it is", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        work = Path(scratch)
        pair = generate_key_pair(work / "keys")
        chain = make_chain(make_inputs(work / "inputs", policy=POLICY), work / "chain")
        make_release(chain, work / RELEASE, pair.private)
        found = verify_release(work / RELEASE, TrustedSigner(public_key=pair.public))
        if found.verdict is not Verdict.PASS or found.decision != "allow":
            print(found.decision, found.differences, file=sys.stderr)
            return 1
        HERE.mkdir()
        shutil.copytree(work / RELEASE, HERE / RELEASE)
        shutil.copyfile(pair.public, HERE / PUBLIC_KEY)
        expected = {"decision": found.decision, "policy": found.policy, "signer": found.signer, "files": found.files}
        (HERE / EXPECTED).write_text(json.dumps(expected, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
