"""A finished run, as folders and evidence; and the release that comes of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime.plan import Plan
from components._runtime.signing_keys import load_signing_key
from components._runtime.statements import Destination
from components.evaluate_model.step import evaluate_candidate
from components.export_onnx.step import export_onnx
from components.fetch_model.step import fetch_model
from components.gate_promotion.step import gate_promotion
from components.purify_model.step import purify_candidate
from components.scan_backdoor.step import scan_model
from components.select_model.step import select_model
from components.sign_evidence.step import sign_evidence
from defense_core.config import canonical_json
from defense_core.files import sha256_file
from defense_core.policy import parse_policy

DESTINATION = Destination("digits", "champion")


@dataclass(frozen=True)
class Chain:
    """Folders by what they hold, and evidence by name."""

    plan: Plan
    root: Path
    evidence: dict[str, dict[str, Any]]

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    @property
    def images(self) -> dict[str, Any]:
        return {"clean": self["data"] / "clean.npz", "test": self["data"] / "test.npz", "device": "cpu"}


def make_chain(plan: Plan, root: Path) -> Chain:
    """Every step up to the gate, in folders below ``root``."""
    chain = Chain(plan, root, {})
    made = [fetch_model(plan, chain["bundle"], chain["data"])]
    measured: dict[str, Any] = {**chain.images, "probes": plan.probes}
    made.append(evaluate_candidate(chain["bundle"], name="before", **measured))
    searched: dict[str, Any] = {"clean": chain.images["clean"], "report": 0.0, "config": plan.scan, "device": "cpu"}
    made.append(scan_model(chain["bundle"], chain["scanned"], name="scan", **searched))
    for method in plan.methods:
        made.append(
            purify_candidate(
                chain["bundle"],
                chain["data"] / "clean.npz",
                chain[method],
                method=method,
                config=plan.configs[method],
                report=0.0,
            )
        )
        made.append(evaluate_candidate(chain[method], name=method, reference=chain["bundle"], **measured))
    made.append(select_model([chain[method] for method in plan.methods], chain["selected"], order=plan.methods))
    searched |= {"earlier": chain["scanned"], "reference": chain["bundle"]}
    made.append(scan_model(chain["selected"], chain["rescanned"], name="rescan", **searched))
    made.append(export_onnx(chain["selected"], chain["onnx"], **{k: v for k, v in measured.items() if k != "device"}))
    chain.evidence.update({each["name"]: each for each in made})
    gate_promotion(chain.evidence, plan.policy, chain["decision"])
    return chain


def make_release(
    chain: Chain,
    out: Path,
    key: Path | None,
    *,
    certificate: Path | None = None,
    destination: Destination = DESTINATION,
) -> dict[str, Any]:
    """The release of ``chain`` in the new folder ``out``, signed with the private key at ``key``."""
    signing = load_signing_key(key, certificate) if key is not None else None
    return sign_evidence(chain["selected"], chain["onnx"], chain["decision"], out, destination=destination, key=signing)


def decide_again(chain: Chain, policy: dict[str, Any]) -> None:
    """Put a decision by ``policy`` in the place of the chain's own."""
    evidence = json.loads(json.dumps(chain.evidence))
    evidence["fetch"]["inputs"]["policy"] = parse_policy(policy).digest
    shutil.rmtree(chain["decision"])
    gate_promotion(evidence, policy, chain["decision"])


def another_model(chain: Chain, root: Path) -> Chain:
    """A copy in the new folder ``root`` whose model differs: its classes have names."""
    shutil.copytree(chain.root, root)
    path = root / "selected" / "bundle.json"
    description = json.loads(path.read_text("utf-8"))
    description["class_names"] = [f"class {index}" for index in range(description["num_classes"])]
    path.write_bytes(canonical_json(description))
    old = chain.evidence["select"]["outputs"]["model"]
    other = Chain(chain.plan, root, json.loads(json.dumps(chain.evidence).replace(old, sha256_file(path))))
    decide_again(other, dict(chain.plan.policy))
    return other
