"""The ML-BOM: valid against the published schema, the same bytes for the same evidence, and true to it."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from components._runtime.ml_bom import (
    IMAGE_SBOM,
    IMAGE_SBOM_DIGEST,
    IMAGE_SBOM_URI,
    ImageSbom,
    ml_bom,
    write_ml_bom,
)
from components._runtime.release import ML_BOM
from defense_core.errors import ConfigError, EvidenceMissing
from tests.unit.report_records import sha, whole_run

VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)
SBOM = "sha256:" + "5" * 64


def valid(data: bytes) -> dict[str, Any]:
    problem = VALIDATOR.validate_str(data.decode())
    assert problem is None, problem
    document: dict[str, Any] = json.loads(data)
    return document


@pytest.fixture
def evidence() -> dict[str, dict[str, Any]]:
    whole = whole_run()
    whole["fetch"]["inputs"] |= {"clean": sha("clean"), "test": sha("test"), "policy": sha("policy")}
    whole["purify.tsbd"]["inputs"] |= {"clean": sha("splits"), "config": sha("config")}
    whole["purify.tsbd"]["results"] |= {"config": {"epochs": 3, "lr_grid": [0.1, 0.2]}, "summary": "zero and repair"}
    whole["evaluate.tsbd"]["results"] |= {"acc_drop": 0.01, "class_acc_drop_max": 0.05, "asr_max": {"value": 0.02}}
    return whole


def test_it_names_the_model_what_it_came_from_and_what_was_measured(evidence: dict[str, dict[str, Any]]) -> None:
    model = valid(ml_bom(evidence))["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert "sha256:" + model["hashes"][0]["content"] == evidence["select"]["outputs"]["model"]
    (source,) = model["pedigree"]["ancestors"]
    assert "sha256:" + source["hashes"][0]["content"] == evidence["fetch"]["inputs"]["source"]
    measured = evidence["evaluate.tsbd"]["results"]
    first, *others = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert float(first["value"]) == pytest.approx(measured["acc"]["value"], abs=1e-5)
    assert float(first["confidenceInterval"]["lowerBound"]) == pytest.approx(measured["acc"]["low"], abs=1e-5)
    (asr,) = [each for each in others if each["type"] == "attack success rate"]
    assert float(asr["value"]) == pytest.approx(measured["probes"][0]["asr"]["value"], abs=1e-5)
    before = source["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]
    assert float(before["value"]) == pytest.approx(evidence["evaluate.before"]["results"]["acc"]["value"], abs=1e-5)


def test_it_names_data_by_digest_method_risk_and_decision(evidence: dict[str, dict[str, Any]]) -> None:
    document = valid(ml_bom(evidence))
    model = document["metadata"]["component"]
    card = model["modelCard"]
    digests = {each["contents"]["properties"][0]["value"] for each in card["modelParameters"]["datasets"]}
    assert {evidence["fetch"]["inputs"]["clean"], evidence["fetch"]["inputs"]["test"]} <= digests
    done = {each["name"]: each["value"] for each in card["properties"]}
    assert done["quarantine:method"] == "tsbd"
    assert json.loads(done["quarantine:method_config"]) == evidence["purify.tsbd"]["results"]["config"]
    assert any("cannot prove that none is left" in each for each in card["considerations"]["technicalLimitations"])
    assert any("control" in each for each in card["considerations"]["performanceTradeoffs"])
    assert {"name": "quarantine:decision", "value": "allow"} in model["properties"]
    (onnx,) = document["components"]
    assert "sha256:" + onnx["hashes"][0]["content"] == evidence["export"]["outputs"]["onnx"]


def test_same_evidence_same_bytes_other_evidence_other_serial(evidence: dict[str, dict[str, Any]]) -> None:
    first = ml_bom(evidence)
    assert ml_bom(dict(reversed(evidence.items()))) == first
    changed = copy.deepcopy(evidence)
    changed["evaluate.tsbd"]["results"]["acc"]["value"] = 0.125
    assert json.loads(ml_bom(changed))["serialNumber"] != json.loads(first)["serialNumber"]


def test_every_prefix_of_a_run_from_fetch_on_has_one(evidence: dict[str, dict[str, Any]]) -> None:
    names = list(evidence)
    for length in range(1, len(names) + 1):
        document = valid(ml_bom({name: evidence[name] for name in names[:length]}))
        card = document["metadata"]["component"]["modelCard"]
        assert card["considerations"]["technicalLimitations"]
        if length == 1:
            assert card["quantitativeAnalysis"]["performanceMetrics"] == []


def test_without_a_fetched_model_there_is_none(evidence: dict[str, dict[str, Any]]) -> None:
    del evidence["fetch"]
    with pytest.raises(EvidenceMissing, match="no ML-BOM"):
        ml_bom(evidence)


@pytest.mark.parametrize("junk", [None, "x\u202ey", {"a": None}])
def test_values_of_the_wrong_type_leave_a_valid_document(junk: Any, evidence: dict[str, dict[str, Any]]) -> None:
    for name, each in evidence.items():
        for part in ("inputs", "outputs", "results", "environment"):
            damaged = {**evidence, name: {**each, part: junk}}
            if (name, part) != ("fetch", "inputs"):
                valid(ml_bom(damaged))


@pytest.mark.parametrize("started", ["yesterday", "2026-11-21", "9999-99-99T00:00:00+00:00"])
def test_what_is_no_time_is_left_out(started: str, evidence: dict[str, dict[str, Any]]) -> None:
    late = {**evidence["fetch"], "environment": {"started": started}}
    assert "timestamp" not in valid(ml_bom({"fetch": late}))["metadata"]


def test_the_images_sbom_is_linked_where_its_digest_is_known(evidence: dict[str, Any], tmp_path: Path) -> None:
    environment = {IMAGE_SBOM_DIGEST: SBOM, IMAGE_SBOM_URI: "oci://images/quarantine.cdx.json"}
    path = write_ml_bom(tmp_path, evidence, environment=environment)
    assert path == tmp_path / ML_BOM
    (reference,) = valid(path.read_bytes())["externalReferences"]
    assert reference["type"] == "bom"
    assert reference["url"] == environment[IMAGE_SBOM_URI]
    assert reference["hashes"] == [{"alg": "SHA-256", "content": "5" * 64}]
    write_ml_bom(tmp_path, evidence, environment={})
    assert "externalReferences" not in valid(path.read_bytes())


def test_a_malformed_digest_of_the_sbom_is_refused() -> None:
    with pytest.raises(ConfigError, match=IMAGE_SBOM_DIGEST):
        ImageSbom.from_environment({IMAGE_SBOM_DIGEST: "sha256:abc"})


def test_inside_an_image_its_own_sbom_is_linked_by_digest_and_path(evidence: dict[str, Any], tmp_path: Path) -> None:
    inside = tmp_path / "image.cdx.json"
    inside.write_bytes(b"{}")
    path = write_ml_bom(tmp_path, evidence, environment={IMAGE_SBOM: str(inside)})
    (reference,) = valid(path.read_bytes())["externalReferences"]
    assert reference["url"] == inside.as_uri()
    assert reference["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(b"{}").hexdigest()}]
    # What the operator says comes first: a registry's digest may stand for the same file elsewhere.
    said = ImageSbom.from_environment({IMAGE_SBOM: str(inside), IMAGE_SBOM_DIGEST: SBOM})
    assert said is not None
    assert said.digest == SBOM


def test_an_sbom_that_is_named_and_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ImageSbom.from_environment({IMAGE_SBOM: str(tmp_path / "gone.json")})
