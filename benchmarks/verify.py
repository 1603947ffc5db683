"""What checking costs: ``verify.json``.

``python -m benchmarks.verify`` runs the demo once for its evidence, makes signed releases of 1 GiB and more
around it, and measures, each in a process of its own:

- ``verify``: the whole command, interpreter start and imports included, against ``sha256sum`` of the same files;
- ``gate``: imports and one decision;
- ``report``: imports and one page; ``bytes`` is the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import write_results
from components._runtime.decision_files import stated_circumstances
from components._runtime.evidence import read_folder
from components._runtime.signing_keys import KeyPair, load_signing_key
from components._runtime.statements import Destination
from components.gate_promotion.step import gate_promotion
from components.sign_evidence.step import sign_evidence
from defense_core.config import canonical_json
from defense_core.files import sha256_file, write_atomic

GIB = 1 << 30
BLOCK_BYTES = 16 << 20
REPEATS = 3
SIZES = {
    "verify: 1 GiB of weights, 1 GiB of ONNX": (GIB, GIB),
    "verify: 1 GiB of weights, ONNX of 1 MiB": (GIB, 1 << 20),
}
"""Bytes of ``model.safetensors`` and of ``model.onnx``."""
GATE = """
import sys, time
begin = time.perf_counter()
from pathlib import Path
from components._runtime.decision_files import stated_circumstances
from components._runtime.evidence import read_folder
from components.gate_promotion.step import gate_promotion
import json
folder = Path(sys.argv[1])
evidence = read_folder(folder)
at = stated_circumstances((folder / "decision.json").read_bytes(), "decision")["at"]
gate_promotion(evidence, json.loads((folder / "policy.json").read_bytes()), Path(sys.argv[2]), at=at)
print(time.perf_counter() - begin, sum(path.stat().st_size for path in folder.glob("*.json")))
"""
REPORT = """
import sys, time
begin = time.perf_counter()
from components._runtime.store import open_store
from defense_core.report import build_report, render_report
root, _, name = sys.argv[1].rpartition("/")
records = open_store(root, name).records()
page = render_report(build_report(records.evidence, failures=[])).encode()
print(time.perf_counter() - begin, len(page))
"""


def seconds_of(command: Sequence[str]) -> float:
    """Wall time of a command that ends well."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def inner(code: str, *arguments: str) -> tuple[float, int]:
    """What a piece of code in a process of its own says: seconds and bytes."""
    answer = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds, size = answer.stdout.split()
    return float(seconds), int(size)


def large_release(small: Path, work: Path, sizes: tuple[int, int], keys: KeyPair) -> Path:
    """A release like ``small``, whose files have ``sizes`` bytes, and which is consistent and signed."""
    weights, onnx = sizes
    bundle, exported = work / "bundle", work / "onnx"
    fill(bundle / "model.safetensors", weights)
    fill(exported / "model.onnx", onnx)
    description = json.loads((small / "bundle" / "bundle.json").read_bytes())
    description["files"] = {"model.safetensors": sha256_file(bundle / "model.safetensors")}
    write_atomic(bundle / "bundle.json", canonical_json(description))
    evidence = read_folder(small / "evidence")
    del evidence["gate"]
    text = json.dumps(evidence)
    for old, new in (
        (evidence["select"]["outputs"]["model"], sha256_file(bundle / "bundle.json")),
        (evidence["export"]["outputs"]["onnx"], sha256_file(exported / "model.onnx")),
    ):
        text = text.replace(old, new)
    policy = json.loads((small / "evidence" / "policy.json").read_bytes())
    at = stated_circumstances((small / "evidence" / "decision.json").read_bytes(), "decision")["at"]
    gate_promotion(json.loads(text), policy, work / "decision", at=at)
    destination = Destination("digits", "champion")
    key = load_signing_key(keys.private)
    sign_evidence(bundle, exported, work / "decision", work / "release", destination=destination, key=key)
    shutil.rmtree(bundle)
    shutil.rmtree(exported)
    return work / "release"


def fill(path: Path, size: int) -> None:
    """A file of ``size`` bytes that no compression makes smaller than a block."""
    path.parent.mkdir(parents=True)
    block = os.urandom(min(size, BLOCK_BYTES))
    with open(path, "wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)


def measure_verify(what: str, release: Path, keys: KeyPair) -> dict[str, Any]:
    """Medians of alternating runs, so that both see the same load and a warm page cache."""
    files = sorted(str(path) for path in release.rglob("*") if path.is_file())
    verify = [sys.executable, "-m", "pipelines.cli", "verify", str(release), "--public-key", str(keys.public)]
    baseline = ["sha256sum", *files]
    seconds_of(baseline)
    pairs = [(seconds_of(baseline), seconds_of(verify)) for _ in range(REPEATS)]
    size = sum(Path(file).stat().st_size for file in files)
    expected, got = (sorted(column)[REPEATS // 2] for column in zip(*pairs, strict=True))
    return {"what": what, "seconds": round(got, 2), "baseline_seconds": round(expected, 2), "bytes": size}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="output of an earlier `quarantine demo`; default: run it")
    options = parser.parse_args()
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="quarantine-verify-") as folder:
        work = Path(folder)
        demo = options.demo or work / "demo"
        if options.demo is None:
            subprocess.run([sys.executable, "-m", "pipelines.cli", "demo", "--out", str(demo), "--json"], check=True)
        (small,) = demo.glob("artifacts/*/*/sign-evidence/release")
        (evidence,) = (path for path in demo.glob("evidence/*") if path.is_dir())
        keys = KeyPair(demo / "keys" / "signing.key", demo / "keys" / "signing.pub", "")
        rows = []
        for index, (what, sizes) in enumerate(SIZES.items()):
            place = work / str(index)
            rows.append(measure_verify(what, large_release(small, place, sizes, keys), keys))
            shutil.rmtree(place)
        for what, code, arguments in (
            ("gate", GATE, (str(small / "evidence"), str(work / "judged"))),
            ("report", REPORT, (str(evidence),)),
        ):
            seconds, size = inner(code, *arguments)
            rows.append({"what": what, "seconds": round(seconds, 2), "baseline_seconds": None, "bytes": size})
    write_results("verify", rows, command="python -m benchmarks.verify", started=started)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
