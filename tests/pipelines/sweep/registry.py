"""A registry to sweep: versions as strangers register them, and versions that were really decided and promoted."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from components._runtime import registry_tags as tag
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.plan import identity_of
from components._runtime.promotion import promote
from components._runtime.release import Parts, Release, stage
from components._runtime.tracking import open_run
from components.gate_promotion.step import gate_promotion
from defense_core.files import sha256_bytes, sha256_file
from defense_core.policy import Policy, parse_policy
from defense_core.policy_time import parse_time
from defense_core.verdict import Verdict
from tests.unit.report_records import sha, whole_run

DAY_S = 86400.0
DECIDED = "2026-11-21T02:00:00+00:00"
NOW_S = 1795226400.0 + 3600
"""An hour after ``DECIDED``."""

_serial = itertools.count()


def policy_mapping(floor: float = 0.5, *, max_age_days: float | None = None) -> dict[str, Any]:
    rule = {"id": "acc", "evidence": "evaluate.selected", "value": "acc.value", "min": floor}
    require = {} if max_age_days is None else {"require": {"max_evidence_age_days": max_age_days}}
    return {
        "schema": 1,
        "name": f"floor-{floor}",
        "promote": True,
        "rules": [{**rule, "severity": "block", "why": "So many images at least."}],
        **require,
    }


def policy(floor: float = 0.5, **changes: Any) -> Policy:
    return parse_policy(policy_mapping(floor, **changes))


def incoming(connection: MlflowConnection, name: str, count: int = 1, *, source: str = "") -> list[str]:
    """So many versions as a training job registers them; their numbers."""
    client = connection.client
    if not [each for each in client.search_registered_models() if each.name == name]:
        client.create_registered_model(name)
    sources = [source or f"s3://incoming/{name}/{n}" for n in range(count)]
    return [str(client.create_model_version(name, source=each).version) for each in sources]


def decided(
    connection: MlflowConnection,
    scratch: Path,
    name: str,
    *,
    origin: str = "s3://incoming/digits.pt",
    by: dict[str, Any] | None = None,
    at: str = DECIDED,
    alias: str = "champion",
    content: str = "",
) -> str:
    """A release with real evidence, decided by a policy and promoted; its number.

    Args:
        content: what its bytes are made of; by default ``origin``.
    """
    folder = scratch / f"release-{next(_serial)}"
    mapping = by or policy_mapping()
    (folder / "bundle").mkdir(parents=True)
    content = content or origin
    weights = f"weights of {content}".encode()
    (folder / "bundle" / "model.safetensors").write_bytes(weights)
    description = {"input_size": [1, 8, 8], "files": {"model.safetensors": sha256_bytes(weights)}}
    (folder / "bundle" / "bundle.json").write_text(json.dumps(description))
    (folder / "model.onnx").write_bytes(b"onnx of " + weights)
    onnx, bundle = sha256_file(folder / "model.onnx"), sha256_file(folder / "bundle" / "bundle.json")
    evidence = {name: each for name, each in whole_run().items() if name not in ("gate", "promote")}
    told = json.dumps(evidence).replace(sha("onnx"), onnx).replace(sha("purified"), bundle)
    evidence = json.loads(told.replace(sha("source"), sha(content)))
    for each in evidence.values():
        each["environment"]["started"] = at
    evidence["fetch"]["results"]["uri"] = origin
    evidence["fetch"]["inputs"] |= {"config": sha("config"), "policy": parse_policy(mapping).digest}
    gate = gate_promotion(evidence, mapping, folder / "decided", at=at)
    (folder / "release").mkdir()
    stage(Parts(folder / "model.onnx", folder / "bundle", folder / "decided"), folder / "release")
    age = parse_policy(mapping).require.max_evidence_age_days
    done = promote(
        connection,
        Release(folder / "release", onnx_digest=onnx, bundle_digest=bundle),
        name=name,
        run=open_run(connection, folder.name, name="run"),
        identity=identity_of(evidence["fetch"]),
        verdict=Verdict(gate["verdict"]),
        policy=mapping["name"],
        alias=alias,
        renews_before=None if age is None else parse_time(at, "at") - timedelta(days=age),
    )
    return done.version


def forget_new_tags(connection: MlflowConnection, name: str, version: str) -> None:
    """The version as an earlier release registered it."""
    for key in tag.SINCE_SWEEP:
        connection.client.delete_model_version_tag(name, version, key)
