"""The licence of a model: declared, found, brought together; and where it then stands."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from components._runtime.licences import licence_of
from components._runtime.ml_bom import ml_bom
from components._runtime.plan import Plan, plan_from_arguments
from components._runtime.sources import acquire
from components._runtime.spdx import spdx
from components._runtime.statements import LICENSED_FETCH_PREDICATE, step_statements
from components.fetch_model.step import fetch_model
from components.gate_promotion.step import gate_promotion
from defense_core.errors import ConfigError
from defense_core.files import sha256_bytes
from defense_core.progress import NullProgress
from defense_core.report import build_report
from tests.finished_chain import Chain
from tests.small_model import PLAN_OPTIONS, POLICY

FRONT = "---\ntags: [vision]\nlicense: {}\n---\n# A model\nlicense: GPL-3.0-only\n"
TAG = "Some model\n\nSPDX-License-Identifier: {}\n\nLong text.\n"


def weights(folder: Path, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "model.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, metadata)
    return path


def found(path: Path, declared: str = "") -> Any:
    folder = path.parent / "copy"
    folder.mkdir(exist_ok=True)
    acquired = acquire(str(path), folder, max_bytes=1 << 20, progress=NullProgress())
    return licence_of(declared, acquired.path, acquired.companions)


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("MIT", "MIT"),
        ("apache-2.0", "Apache-2.0"),
        ("Apache-2.0 OR mit", "Apache-2.0 OR MIT"),
        ("Apache-2.0 WITH LLVM-exception", "Apache-2.0 WITH LLVM-exception"),
        ("llama2", None),
        ("other", None),
        ("", None),
        ("(" * 200, None),
        ("MIT OR", None),
        ("MIT/Apache", None),
        (" AND MIT", None),
        ("\0", None),
    ],
)
def test_spdx_expressions_are_recognised(text: str, expression: str | None) -> None:
    assert spdx(text) == expression


@pytest.mark.parametrize("key", ["license", "licence"])
def test_a_safetensors_file_says_it(key: str, tmp_path: Path) -> None:
    licence = found(weights(tmp_path, {key: "apache-2.0", "format": "pt"}))
    assert (licence.licence, licence.why) == ("Apache-2.0", "")
    assert [claim.where for claim in licence.claims] == ["safetensors metadata"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("LICENSE", TAG.format("MIT")),
        ("LICENSE.txt", "/* SPDX-License-Identifier: MIT */\n"),
        ("LICENCE", "# SPDX-License-Identifier: mit\r\n"),
        ("README.md", FRONT.format("mit")),
        ("README.md", FRONT.format('"MIT"')),
    ],
)
def test_a_file_beside_the_model_says_it(name: str, content: str, tmp_path: Path) -> None:
    path = weights(tmp_path)
    (tmp_path / name).write_bytes(content.encode())
    licence = found(path)
    assert licence.licence == "MIT"
    assert [(claim.where, claim.sha256) for claim in licence.claims] == [(name, sha256_bytes(content.encode()))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("LICENSE", "MIT License\n\nPermission is hereby granted"),
        ("README.md", "# A model\nlicense: mit\n"),
        ("a.md", FRONT),
    ],
)
def test_prose_and_other_files_say_nothing(name: str, content: str, tmp_path: Path) -> None:
    path = weights(tmp_path)
    (tmp_path / name).write_text(content)
    licence = found(path)
    assert (licence.licence, licence.why, licence.claims) == (None, "nothing states a licence", ())


def test_a_file_that_may_not_be_read_leaves_the_licence_unknown(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").mkdir()  # cannot be opened, whoever runs the tests
    licence = licence_of("MIT", tmp_path / "none", [tmp_path / "LICENSE"])
    assert licence.licence is None
    assert licence.why == "LICENSE cannot be read: Is a directory"
    assert [claim.licence for claim in licence.claims] == ["MIT", None]


def test_a_link_beside_the_model_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(TAG.format("MIT"))
    path = weights(tmp_path)
    (tmp_path / "LICENSE").symlink_to(tmp_path / "elsewhere")
    assert found(path).claims == ()


def test_what_agrees_is_known_however_it_is_written(tmp_path: Path) -> None:
    path = weights(tmp_path, {"license": "MIT"})
    (tmp_path / "README.md").write_text(FRONT.format("mit"))
    licence = found(path, "mit")
    assert licence.licence == "MIT"
    assert [claim.where for claim in licence.claims] == ["the operator", "safetensors metadata", "README.md"]


@pytest.mark.parametrize(
    ("declared", "front", "why"),
    [
        ("Apache-2.0", "mit", "the operator says Apache-2.0; README.md says MIT"),
        ("MIT", "llama2", "README.md says 'llama2', which is no SPDX expression"),
        ("", "llama2", "README.md says 'llama2', which is no SPDX expression"),
        ("", "[mit, apache-2.0]", "README.md says MIT; README.md says Apache-2.0"),
        ("MIT", "{mit", "README.md says 'unreadable front matter', which is no SPDX expression"),
    ],
)
def test_what_disagrees_is_unknown_with_the_reason(declared: str, front: str, why: str, tmp_path: Path) -> None:
    path = weights(tmp_path)
    (tmp_path / "README.md").write_text(FRONT.format(front))
    licence = found(path, declared)
    assert (licence.licence, licence.why) == (None, why)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [" + ", ".join([f"*{before}"] * 9) + "]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "front",
    [
        LAUGHS + "license: *i",
        "a: &a mit\nlicense: *a",
        "license: {a: mit}",
        "license: [[mit]]",
        "license: 3",
        "license: !!timestamp mit",
        "license: " + "[" * 15_000,
        "a: [" * 4_000,
        "tags: " + "x" * (16 << 10) + "\nlicense: mit",
    ],
    ids=["laughs", "alias", "mapping", "nested", "number", "tagged", "brackets", "flow", "long"],
)
def test_front_matter_that_is_more_than_texts_is_not_read(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    started = time.monotonic()
    licence = licence_of("", tmp_path / "none", [tmp_path / "README.md"])
    assert licence.why == "README.md says 'unreadable front matter', which is no SPDX expression"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("front", ["license:", "license: null", "- license: mit", "tags: [vision]", ""])
def test_front_matter_that_states_nothing(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert licence_of("", tmp_path / "none", [tmp_path / "README.md"]).why == "nothing states a licence"


def test_blanks_behind_a_tag_cost_no_time(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("SPDX-License-Identifier:" + " " * 5_000 + "*x\n" + TAG.format("MIT \t */ "))
    started = time.monotonic()
    assert licence_of("", tmp_path / "none", [tmp_path / "LICENSE"]).licence == "MIT"
    assert time.monotonic() - started < 5


def test_a_declaration_that_is_no_expression_ends_the_run_before_it_begins(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="no SPDX expression"):
        replace(plan, licence="llama2")
    assert plan_from_arguments(replace(plan, licence="MIT").arguments()).licence == "MIT"


# -- where it stands -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def licensed(plan: Plan, finished: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Evidence of a run whose model states its licence, and whose operator does too."""
    root = tmp_path_factory.mktemp("licensed")
    path = root / "model.safetensors"
    safetensors.torch.save_file(PLAN_OPTIONS.network().state_dict(), path, {"license": "apache-2.0"})
    asked = replace(plan, model=str(path), licence="Apache-2.0")
    fetch = fetch_model(asked, root / "bundle", root / "data")
    return {**finished.evidence, "fetch": {**finished.evidence["fetch"], "results": fetch["results"]}}


def finding(evidence: dict[str, Any], *licences: str) -> dict[str, Any]:
    gate = gate_promotion(evidence, {**POLICY, "require": {"licences": list(licences)}})
    (found,) = [each for each in gate["results"]["findings"] if each["rule"] == "require.licences"]
    return dict(found)


def test_the_policy_judges_it(licensed: dict[str, Any], finished: Chain) -> None:
    assert licensed["fetch"]["results"]["licence"] == "Apache-2.0"
    assert finding(licensed, "MIT", "Apache-2.0")["verdict"] == "PASS"
    assert finding(licensed, "MIT")["verdict"] == "FAIL"
    unknown = finding(finished.evidence, "MIT")
    assert unknown["verdict"] == "UNKNOWN"
    assert "licence is not known: nothing states a licence" in unknown["why"]


def test_a_disagreement_stands_in_the_decision(licensed: dict[str, Any]) -> None:
    results = {**licensed["fetch"]["results"], "licence": None, "licence_why": "a says MIT; b says Apache-2.0"}
    unknown = finding({**licensed, "fetch": {**licensed["fetch"], "results": results}}, "MIT")
    assert unknown["verdict"] == "UNKNOWN"
    assert "a says MIT; b says Apache-2.0" in unknown["why"]


def test_statement_bom_and_report_say_it(licensed: dict[str, Any]) -> None:
    (first, *_) = step_statements(licensed, dict.fromkeys(licensed, "sha256:" + "0" * 64))
    statement = json.loads(first.payload)
    assert statement["predicateType"] == LICENSED_FETCH_PREDICATE
    assert statement["predicate"]["licence"] == "Apache-2.0"
    model = json.loads(ml_bom(licensed))["metadata"]["component"]
    expected = [{"expression": "Apache-2.0", "acknowledgement": "declared"}]
    assert model["licenses"] == expected
    assert model["pedigree"]["ancestors"][0]["licenses"] == expected
    facts = {fact.label: fact.value for fact in build_report(licensed).came_in}
    assert facts["Licence"] == "Apache-2.0"


def test_evidence_of_earlier_releases_gives_the_statement_of_the_first_version(finished: Chain) -> None:
    results = {key: value for key, value in finished.evidence["fetch"]["results"].items() if "licence" not in key}
    old = {"fetch": {**finished.evidence["fetch"], "results": results}}
    (first,) = step_statements(old, {"fetch": "sha256:" + "0" * 64})
    statement = json.loads(first.payload)
    assert statement["predicateType"] == "urn:model-quarantine:fetch:v1"
    assert "licence" not in statement["predicate"]
