"""The step that averages what the purifiers of a run left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components._runtime.plan import Plan
from components.evaluate_model.step import evaluate_candidate
from components.fetch_model.step import check_plan
from components.purify_model import step as purify_step
from components.purify_model.step import purify_candidate, purify_model
from components.select_model.step import select_model, with_evidence
from defense_core.errors import ConfigError, EvidenceMismatch, MethodDiverged
from tests.finished_chain import Chain

MEMBERS = ("nft", "tsbd")
ASKED = (*MEMBERS, "soup", "fine_tuning")
CONFIGS: dict[str, Any] = {"nft": {"epochs": 1}, "tsbd": {"epochs": 1, "unlearn_epochs": 1}}

Mix = Callable[..., "dict[str, Any] | None"]


@pytest.fixture(scope="module")
def left(finished: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What two members left of the fetched model, by name."""
    root = tmp_path_factory.mktemp("left")
    for method in MEMBERS:
        purify_candidate(
            finished["bundle"], finished["data"] / "clean.npz", root / method,
            method=method, config=CONFIGS[method], report=0.0, device="cpu",
        )  # fmt: skip
    return {method: root / method for method in MEMBERS}


@pytest.fixture
def mix(finished: Chain, left: dict[str, Path], tmp_path: Path) -> Mix:
    """Mixes into ``tmp_path / "soup"``, with changes to the call."""

    def call(**changes: Any) -> dict[str, Any] | None:
        options: dict[str, Any] = {
            "config": {"max_drop": 1.0}, "made": list(left.values()), "methods": ASKED, "report": 0.0, "device": "cpu"
        }  # fmt: skip
        clean = finished["data"] / "clean.npz"
        return purify_candidate(finished["bundle"], clean, tmp_path / "soup", method="soup", **{**options, **changes})

    return call


def evidence_of(folder: Path) -> dict[str, Any]:
    evidence: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return evidence


def changed(left: dict[str, Path], folder: Path, **sections: dict[str, Any]) -> list[Path]:
    """Copies of what the members left; the evidence of the first says something else."""
    copies = []
    for method, path in left.items():
        copy = folder / method
        copy.mkdir(parents=True)
        for file in path.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        copies.append(copy)
    evidence = evidence_of(copies[0])
    for section, values in sections.items():
        evidence[section] |= values
    (copies[0] / "result.json").write_text(json.dumps(evidence))
    return copies


def test_the_mean_is_what_soup_makes_by_itself(
    mix: Mix, left: dict[str, Path], finished: Chain, tmp_path: Path
) -> None:
    mixed = mix()
    assert mixed is not None
    assert mixed["name"] == "purify.soup"
    assert mixed["inputs"]["members"] == {name: evidence_of(path)["outputs"]["model"] for name, path in left.items()}
    assert mixed["results"]["facts"]["averaged"] == list(MEMBERS)
    assert mixed["results"]["facts"]["failed"] == {}
    alone = purify_model(
        finished["bundle"], finished["data"] / "clean.npz", tmp_path / "alone",
        method="soup", config=mixed["results"]["config"], report=0.0, device="cpu",
    )  # fmt: skip
    assert alone["outputs"] == mixed["outputs"]
    assert alone["results"]["select"] == mixed["results"]["select"]
    assert "members" not in alone["inputs"]


def test_the_mean_is_a_candidate_like_the_others(mix: Mix, left: dict[str, Path], tmp_path: Path) -> None:
    mixed = mix()
    assert mixed is not None
    chosen = select_model([*left.values(), tmp_path / "soup"], tmp_path / "chosen", order=ASKED)
    assert [row["method"] for row in chosen["results"]["candidates"]] == ["nft", "tsbd", "soup"]
    assert [row["averaged"] for row in chosen["results"]["candidates"]] == [0, 0, 2]
    assert chosen["inputs"]["candidates"]["soup"] == mixed["outputs"]["model"]


@pytest.mark.parametrize("methods", [("nft", "tsbd", "fine_tuning"), ()])
def test_where_no_mean_is_asked_for_nothing_is_left(
    methods: tuple[str, ...], mix: Mix, left: dict[str, Path], finished: Chain, tmp_path: Path
) -> None:
    assert mix(methods=methods) is None
    assert [path.name for path in (tmp_path / "soup").iterdir()] == ["result.json"]
    assert evaluate_candidate(tmp_path / "soup", name="soup", reference=finished["bundle"], **finished.images) is None
    assert with_evidence([*left.values(), tmp_path / "soup"]) == list(left.values())


def test_an_untouched_model_is_not_mixed(mix: Mix, finished: Chain, tmp_path: Path) -> None:
    purify_candidate(
        finished["bundle"], finished["data"] / "clean.npz", tmp_path / "untouched", method="untouched", report=0.0
    )
    assert mix(made=[tmp_path / "untouched"]) is None


def test_a_soup_that_ran_is_not_mixed_again(mix: Mix, tmp_path: Path, left: dict[str, Path]) -> None:
    ran = changed(left, tmp_path / "ran", results={"method": "soup"})
    (ran[0] / "result.json").write_text(json.dumps({**evidence_of(ran[0]), "name": "purify.soup"}))
    assert mix(made=ran[:1]) is None


def test_a_soup_without_its_members_runs_them(mix: Mix, finished: Chain) -> None:
    alone = mix(made=[finished["fine_tuning"]], config={"members": ["nft"], "configs": {"nft": CONFIGS["nft"]}})
    assert alone is not None
    assert "members" not in alone["inputs"]
    assert alone["results"]["facts"]["averaged"] == ["nft"]


@pytest.mark.parametrize(
    ("sections", "about"),
    [
        ({"inputs": {"source": "sha256:" + "0" * 64}}, "another source"),
        ({"inputs": {"model": "sha256:" + "0" * 64}}, "another model"),
        ({"inputs": {"clean": "sha256:" + "0" * 64}}, "another clean"),
        ({"environment": {"seed": 7}}, "another seed"),
        ({"outputs": {"model": "sha256:" + "0" * 64}}, "nft is not the model of its evidence"),
    ],
)
def test_a_member_of_other_work_is_refused(
    sections: dict[str, Any], about: str, mix: Mix, left: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(EvidenceMismatch, match=about):
        mix(made=changed(left, tmp_path / "other", **sections))
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "purify.fip"},
        {"name": "evaluate.nft", "step": "evaluate"},
        {"name": "gate", "step": "gate"},
        {"results": {}},
    ],
)
def test_what_no_purifier_left_is_refused(
    change: dict[str, Any], mix: Mix, left: dict[str, Path], tmp_path: Path
) -> None:
    folders = changed(left, tmp_path / "other")
    (folders[0] / "result.json").write_text(json.dumps({**evidence_of(folders[0]), **change}))
    with pytest.raises(EvidenceMismatch, match="what another purifier left"):
        mix(made=folders)


def test_a_member_comes_once(mix: Mix, left: dict[str, Path]) -> None:
    with pytest.raises(EvidenceMismatch, match="what another purifier left"):
        mix(made=[*left.values(), left["nft"]])


UNKNOWN = {"verdict": "UNKNOWN", "findings": [{"why": "nft: loss became NaN"}]}


def test_a_member_without_a_model_is_named_and_left_out(mix: Mix, left: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(left, tmp_path / "other")
    (folder[0] / "result.json").write_text(json.dumps({**evidence_of(folder[0]), **UNKNOWN}))
    mixed = mix(made=folder)
    assert mixed is not None
    assert mixed["results"]["facts"]["averaged"] == ["tsbd"]
    assert mixed["results"]["facts"]["failed"] == {"nft": "nft: loss became NaN"}
    assert list(mixed["inputs"]["members"]) == ["tsbd"]


def test_of_no_model_there_is_no_mean(mix: Mix, left: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(left, tmp_path / "other")
    (folder[0] / "result.json").write_text(json.dumps({**evidence_of(folder[0]), **UNKNOWN}))
    mixed = mix(made=folder[:1])
    assert mixed is not None
    assert (mixed["verdict"], mixed["outputs"]) == ("UNKNOWN", {})
    assert "no member of the soup left a model" in mixed["findings"][0]["why"]
    assert mixed["findings"][0]["rule"] == "purify.diverged"


def test_where_no_member_finds_anything_none_diverged(mix: Mix, left: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(left, tmp_path / "other")
    idle = {"verdict": "UNKNOWN", "findings": [{"rule": "purify.not_applicable", "why": "nft: there is no mask"}]}
    (folder[0] / "result.json").write_text(json.dumps({**evidence_of(folder[0]), **idle}))
    mixed = mix(made=folder[:1])
    assert mixed is not None
    assert (mixed["verdict"], mixed["findings"][0]["rule"]) == ("UNKNOWN", "purify.not_applicable")
    assert "there is no mask" in mixed["findings"][0]["why"]


def test_a_plan_gives_a_member_one_configuration(plan: Plan) -> None:
    asked = replace(plan, methods=ASKED, configs={**CONFIGS, "soup": {"configs": {"nft": {"epochs": 2}}}})
    with pytest.raises(ConfigError, match=r"Set nft\.<setting>"):
        check_plan(asked)
    check_plan(replace(asked, configs={**CONFIGS, "soup": {"configs": {"nft": CONFIGS["nft"]}}}))
    check_plan(replace(asked, configs={**CONFIGS, "soup": {"configs": {"fip": {"epochs": 2}}}}))


def test_members_are_not_trained_again(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    def training(*_: Any, **__: Any) -> None:
        raise MethodDiverged("nothing is to be trained here")

    monkeypatch.setattr(purify_step, "purify", training)
    mixed = mix()
    assert mixed is not None
    assert mixed["verdict"] == "PASS"
