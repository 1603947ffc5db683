"""Scan, re-scan, positive control, and the model that nothing is done to."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from components._runtime import journal
from components._runtime.bundle_files import bundle_digest
from components._runtime.datasets import read_data
from components._runtime.evidence import read_evidence, write_evidence
from components._runtime.loading import open_images, open_model, open_splits
from components._runtime.ml_bom_card import scan_sentences
from components._runtime.outcome import expected_steps
from components._runtime.plan import UNTOUCHED, Loading, Plan, plan_from_arguments
from components._runtime.store import Records
from components._runtime.verification_chain import chain_problems
from components.control_model import step as control_step
from components.control_model.step import control_model
from components.evaluate_model.step import evaluate_candidate
from components.export_onnx.step import export_onnx
from components.fetch_model.step import fetch_model
from components.gate_promotion.step import gate_promotion
from components.purify_model.step import purify_candidate
from components.scan_backdoor import step
from components.scan_backdoor.repeat import RESULT
from components.scan_backdoor.step import methods_after, scan_model
from components.select_model.step import select_model
from defense_core import errors
from defense_core.files import sha256_file
from defense_core.scan.stored_triggers import load_triggers
from tests.finished_chain import Chain
from tests.small_model import PLAN_OPTIONS, POLICY, images
from tests.small_pool import RATE, make_pool

SCAN: dict[str, Any] = {**PLAN_OPTIONS.scan, "fpr": RATE}


def scanned(finished: Chain, out: Path, **options: Any) -> dict[str, Any]:
    given = {"clean": finished["data"] / "clean.npz", "report": 0.0, "config": SCAN, "device": "cpu", **options}
    return scan_model(finished["bundle"], out, **given)


@pytest.fixture(scope="module")
def passing(finished: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pool.json, with which the model passes, and scan/, which found no evidence."""
    folder = tmp_path_factory.mktemp("passing")
    make_pool(folder / "pool.json", shift=100.0)
    scanned(finished, folder / "scan", pool=folder / "pool.json")
    return folder


@pytest.fixture(scope="module")
def passed(passing: Path) -> dict[str, Any]:
    """A scan that found no evidence."""
    return read_evidence(passing / "scan" / RESULT)


# -- scan ------------------------------------------------------------------------------


def test_without_a_pool_a_scan_is_unknown_and_says_so(finished: Chain) -> None:
    evidence = finished.evidence["scan"]
    assert (evidence["verdict"], evidence["results"]["verdict"]) == ("UNKNOWN", "UNKNOWN")
    assert "no calibration pool" in evidence["findings"][0]["why"]
    assert evidence["results"]["p_value"] is None
    assert evidence["inputs"]["model"] == finished.evidence["fetch"]["outputs"]["model"]
    assert json.loads((finished["scanned"] / RESULT).read_text()) == evidence
    assert load_triggers(finished["scanned"])
    shown = [base64.b64decode(each["png"]) for each in evidence["results"]["pictures"]]
    assert shown
    assert all(each.startswith(b"\x89PNG") for each in shown)


def test_the_scan_after_purification_tries_the_first_scans_triggers(finished: Chain) -> None:
    results = finished.evidence["rescan"]["results"]
    assert finished.evidence["rescan"]["inputs"]["model"] == finished.evidence["select"]["outputs"]["model"]
    assert len(results["residuals"]) == len(load_triggers(finished["scanned"]))
    assert all(0 <= each["before"] <= 1 and 0 <= each["after"] <= 1 for each in results["residuals"])
    # Nobody was suspected: what is left of those triggers says nothing.
    assert (results["suspected_residuals"], results["residual_max"]) == ([], None)


def test_a_model_like_its_references_passes_and_its_p_value_is_of_the_pool(passed: dict[str, Any]) -> None:
    assert (passed["verdict"], passed["results"]["p_value"]) == ("PASS", 1.0)
    assert passed["findings"][0]["why"].startswith("No evidence of a backdoor found")
    assert passed["inputs"]["pool"] == passed["results"]["pool"]
    assert {each["rule"] for each in passed["findings"]} == {"scan.verdict", "scan.margin", "scan.inversion"}


def test_where_references_say_nothing_no_channel_passes(finished: Chain, tmp_path: Path) -> None:
    make_pool(tmp_path / "pool.json", shift=100.0)
    evidence = scanned(finished, tmp_path / "scan", pool=tmp_path / "pool.json", config={**SCAN, "fpr": 0.01})
    assert not evidence["results"]["comparable"]
    assert len(evidence["findings"]) == 3
    assert {each["verdict"] for each in evidence["findings"]} == {"UNKNOWN"}


def test_a_model_that_stands_out_never_passes(finished: Chain, tmp_path: Path) -> None:
    make_pool(tmp_path / "pool.json", shift=-100.0)
    evidence = scanned(finished, tmp_path / "scan", pool=tmp_path / "pool.json")
    assert evidence["verdict"] in ("FAIL", "UNKNOWN")
    assert evidence["results"]["p_value"] <= RATE
    assert evidence["results"]["suspects"]
    again = scan_model(
        finished["selected"], tmp_path / "again", name="rescan", clean=finished["data"] / "clean.npz", report=0.0,
        config=SCAN, earlier=tmp_path / "scan", reference=finished["bundle"], device="cpu",
    )  # fmt: skip
    left = again["results"]["suspected_residuals"]
    suspects = evidence["results"]["suspects"]
    assert left == [each for each in again["results"]["residuals"] if each["target"] in suspects]
    assert again["results"]["residual_max"] == max(each["after"] for each in left)


def test_a_purified_model_is_scanned_with_what_its_purifier_was_not_fitted_to(finished: Chain, tmp_path: Path) -> None:
    bundle = open_model(finished["bundle"], None, Loading())
    whole = open_images(finished["data"] / "clean.npz", bundle)
    parts = open_splits(finished["data"] / "clean.npz", bundle, seed=3, report=0.2)
    first = scanned(finished, tmp_path / "scan", report=0.2, seed=3)
    given: dict[str, Any] = {"clean": finished["data"] / "clean.npz", "report": 0.2, "seed": 3, "config": SCAN}
    given |= {"name": "rescan", "earlier": tmp_path / "scan", "reference": finished["bundle"], "device": "cpu"}
    after = scan_model(finished["selected"], tmp_path / "rescan", **given)
    assert first["inputs"]["clean"] == whole.digest
    assert after["inputs"]["clean"] == parts.unfitted.digest
    assert after["results"]["images"] == len(parts.select) + len(parts.report)
    counts = {each["images"] for each in after["results"]["residuals"]}
    assert max(counts) <= len(parts.unfitted)


# -- the same bytes again ------------------------------------------------------------------


def rescanned(finished: Chain, passing: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The untouched model, after the scan in ``passing``."""
    before: dict[str, Any] = {"earlier": passing / "scan", "reference": finished["bundle"]}
    return scanned(finished, out, **{"name": "rescan", "pool": passing / "pool.json", **before, **options})


def scanning(*_: Any, **__: Any) -> None:
    raise AssertionError("the model is scanned")


def test_the_same_bytes_are_not_scanned_again_and_it_is_said(
    finished: Chain, passing: Path, passed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "scan", scanning)
    evidence = rescanned(finished, passing, tmp_path / "out")
    model = finished.evidence["fetch"]["outputs"]["model"]
    assert evidence["results"]["repeats"] == f"same bytes as scanned: {model}"
    assert evidence["inputs"] == {**passed["inputs"], "scan": sha256_file(passing / "scan" / RESULT)}
    sentence, *others = evidence["findings"]
    assert sentence["why"] == f"{passed['findings'][0]['why']} (same bytes as scanned: {model})"
    assert [each["rule"] for each in others] == ["rescan.margin", "rescan.inversion"]
    residuals = evidence["results"]["residuals"]
    assert [each["before"] for each in residuals] == [each["after"] for each in residuals] != []
    kept = {path.relative_to(passing / "scan") for path in (passing / "scan").rglob("*")}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")} == kept
    assert read_evidence(tmp_path / "out" / RESULT) == evidence


def test_a_repeated_scan_says_what_scanning_again_would_say(
    finished: Chain, passing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = rescanned(finished, passing, tmp_path / "repeated")
    monkeypatch.setattr(step, "repeated", lambda *_, **__: None)
    made = rescanned(finished, passing, tmp_path / "made")
    assert made["results"]["repeats"] is None
    assert "scan" not in made["inputs"]
    assert repeated["results"] == {**made["results"], "repeats": repeated["results"]["repeats"]}
    assert repeated["verdict"] == made["verdict"]
    facts = [[(each["rule"], each["verdict"], each["value"]) for each in of["findings"]] for of in (repeated, made)]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    "options",
    [{"config": {**SCAN, "fpr": 0.4}}, {"pool": None}, {"clean": None}],
    ids=lambda options: next(iter(options)),
)
def test_another_scan_of_the_same_bytes_is_made(
    options: dict[str, Any], finished: Chain, passing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "scan", scanning)
    with pytest.raises(AssertionError, match="is scanned"):
        rescanned(finished, passing, tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["version", "torch", "device", "image"])
def test_a_scan_that_was_made_elsewhere_is_made_again(
    name: str, finished: Chain, passing: Path, passed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(passing / "scan", tmp_path / "scan")
    elsewhere = {**passed, "environment": {**passed["environment"], name: "another"}}
    write_evidence(tmp_path / "scan" / RESULT, elsewhere)
    monkeypatch.setattr(step, "scan", scanning)
    with pytest.raises(AssertionError, match="is scanned"):
        rescanned(finished, passing, tmp_path / "out", earlier=tmp_path / "scan")


class Answering(nn.Module):
    """A network whose answers are ``value``, of a given width."""

    def __init__(self, value: float, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(classes))
        self.value = value

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.weight * self.value + 0 * inputs.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("name", ["scan", "rescan"])
def test_answers_that_are_no_numbers_are_unknown(
    name: str, finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model
    monkeypatch.setattr(step, "open_model", lambda *given: replace(opened(*given), model=Answering(float("nan"), 4)))
    make_pool(tmp_path / "pool.json", shift=100.0)
    evidence = scanned(finished, tmp_path / "scan", name=name, pool=tmp_path / "pool.json")
    assert evidence["verdict"] == "UNKNOWN"
    assert "not finite" in evidence["findings"][0]["why"]


def test_too_few_images_say_less_and_never_more(finished: Chain, tmp_path: Path) -> None:
    evidence = scanned(finished, tmp_path / "scan", clean=None)
    assert evidence["verdict"] == "UNKNOWN"
    assert evidence["results"]["regime"] == "none"
    assert {each["name"] for each in evidence["results"]["detectors"]} == {"weights", "margin"}
    assert evidence["inputs"]["clean"] is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"config": {"fpr": 0.0}}, errors.ConfigError),
        ({"config": {"settings": {"margin": {"step": 3}}}}, errors.ConfigError),
        ({"pool": Path("absent.json")}, errors.ConfigError),
        ({"clean": Path("absent.npz")}, errors.DataError),
        ({"earlier": Path("absent"), "reference": Path("absent")}, errors.QuarantineError),
        ({"spec": {"num_classes": 7}}, errors.QuarantineError),
    ],
)
def test_bad_input_is_an_error_that_leaves_nothing(
    options: dict[str, Any], error: type[Exception], finished: Chain, tmp_path: Path
) -> None:
    with pytest.raises(error):
        scanned(finished, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_pool_of_other_models_or_other_settings_is_refused(finished: Chain, tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool.json", shift=100.0)
    with pytest.raises(errors.ConfigError, match="other detector settings"):
        scanned(finished, tmp_path / "out", pool=tmp_path / "pool.json", config={"fpr": RATE})
    text = (tmp_path / "pool.json").read_text()
    (tmp_path / "pool.json").write_text(text.replace('"num_classes": 4', '"num_classes": 5'))
    with pytest.raises(errors.ConfigError, match="pool of other models"):
        scanned(finished, tmp_path / "out", pool=tmp_path / "pool.json")
    assert pool.stratum.num_classes == 4
    assert not (tmp_path / "out").exists()


# -- fetch hands the pool on -------------------------------------------------------------


def test_fetch_hands_the_operators_pool_to_the_scan(plan: Plan, tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "mine.json", shift=100.0)
    asked = replace(plan, pool=str(tmp_path / "mine.json"))
    assert plan_from_arguments(asked.arguments()) == asked
    evidence = fetch_model(asked, tmp_path / "bundle", tmp_path / "data")
    assert evidence["inputs"]["pool"] == pool.digest
    assert read_data(tmp_path / "data").pool == tmp_path / "data" / "pool.json"
    without = fetch_model(plan, tmp_path / "bundle2", tmp_path / "data2")
    assert without["inputs"]["pool"] is None
    assert without["results"]["identity"] != evidence["results"]["identity"]
    assert read_data(tmp_path / "data2").pool is None


def test_fetch_refuses_a_pool_that_does_not_fit(plan: Plan, tmp_path: Path) -> None:
    make_pool(tmp_path / "mine.json", shift=100.0)
    with pytest.raises(errors.ConfigError, match="other detector settings"):
        fetch_model(replace(plan, pool=str(tmp_path / "mine.json"), scan={}), tmp_path / "b", tmp_path / "d")
    with pytest.raises(errors.SourceNotFound):
        fetch_model(replace(plan, pool=str(tmp_path / "absent.json")), tmp_path / "b", tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


# -- nothing is purified after a scan without findings --------------------------------------


@pytest.mark.parametrize(
    ("verdict", "forced", "expected"),
    [
        ("PASS", False, [UNTOUCHED]),
        ("PASS", True, ["tsbd", "fine_tuning"]),
        ("FAIL", False, ["tsbd", "fine_tuning"]),
        ("UNKNOWN", False, ["tsbd", "fine_tuning"]),
    ],
)
def test_what_is_purified_with(verdict: str, forced: bool, expected: list[str]) -> None:
    policy = json.dumps({**POLICY, "require": {"purification": forced}})
    assert methods_after({"verdict": verdict}, ["tsbd", "fine_tuning"], policy) == expected


@pytest.fixture(scope="module")
def unpurified(
    finished: Chain, passing: Path, passed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Chain:
    """A run after a scan without findings, up to the gate."""
    chain = Chain(finished.plan, tmp_path_factory.mktemp("unpurified"), {})
    clean, bundle = finished["data"] / "clean.npz", finished["bundle"]
    measured: dict[str, Any] = {**finished.images, "probes": finished.plan.probes}
    made = [
        purify_candidate(bundle, clean, chain[UNTOUCHED], method=UNTOUCHED, report=0.0),
        evaluate_candidate(chain[UNTOUCHED], name=UNTOUCHED, reference=bundle, **measured),
        select_model([chain[UNTOUCHED]], chain["selected"], order=finished.plan.methods),
        export_onnx(chain["selected"], chain["onnx"], clean=measured["clean"], test=measured["test"]),
    ]
    kept = {name: finished.evidence[name] for name in ("fetch", "evaluate.before")}
    rescan = rescanned(finished, passing, chain["rescanned"])
    chain.evidence.update({**kept, "scan": passed, "rescan": rescan, **{each["name"]: each for each in made}})
    return chain


def test_the_untouched_model_is_the_fetched_one_byte_for_byte(unpurified: Chain, finished: Chain) -> None:
    evidence = unpurified.evidence
    fetched = evidence["fetch"]["outputs"]["model"]
    assert (
        evidence["purify.untouched"]["inputs"]["model"] == evidence["purify.untouched"]["outputs"]["model"] == fetched
    )
    assert bundle_digest(unpurified["selected"]) == evidence["select"]["outputs"]["model"] == fetched
    for name in ("bundle.json", "model.safetensors"):
        assert (unpurified["selected"] / name).read_bytes() == (finished["bundle"] / name).read_bytes()
    assert evidence["select"]["results"]["method"] == UNTOUCHED
    assert evidence["select"]["results"]["purified"] is False
    assert finished.evidence["select"]["results"]["purified"] is True


def test_the_gate_allows_an_untouched_model_only_after_a_passed_scan(unpurified: Chain) -> None:
    def decided(evidence: dict[str, Any], **policy: Any) -> str:
        # The policy is part of what was asked for; integrity of its digest is the release's concern.
        outcome: str = gate_promotion(evidence, {**POLICY, **policy})["results"]["outcome"]
        return outcome

    assert decided(unpurified.evidence) == "allow"
    assert decided(unpurified.evidence, require={"purification": True}) == "deny"
    for verdict, outcome in (("FAIL", "deny"), ("UNKNOWN", "unknown")):
        scan = {**unpurified.evidence["scan"], "verdict": verdict}
        assert decided({**unpurified.evidence, "scan": scan}) == outcome


def test_an_untouched_model_beside_a_purified_one_is_no_candidate(
    unpurified: Chain, finished: Chain, tmp_path: Path
) -> None:
    evidence = select_model([unpurified[UNTOUCHED], finished["tsbd"]], tmp_path / "out", order=["tsbd"])
    assert evidence["results"]["method"] == "tsbd"


def test_an_untouched_model_that_was_changed_is_refused(unpurified: Chain, tmp_path: Path) -> None:
    shutil.copytree(unpurified[UNTOUCHED], tmp_path / "changed")
    description = tmp_path / "changed" / "bundle.json"
    description.write_bytes(description.read_bytes() + b" ")
    with pytest.raises(errors.QuarantineError):
        select_model([tmp_path / "changed"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_repeated_scan_repeats_the_scan_beside_it(unpurified: Chain) -> None:
    def problems(scan: dict[str, Any], rescan: dict[str, Any]) -> str:
        found = chain_problems({**unpurified.evidence, "scan": scan, "rescan": rescan}, "")
        return " ".join(each.sentence for each in found if each.file == "evidence/rescan.json")

    scan, rescan = unpurified.evidence["scan"], unpurified.evidence["rescan"]
    assert problems(scan, rescan) == ""
    assert "not the evidence of the scan" in problems({**scan, "verdict": "FAIL"}, rescan)
    better = {**rescan, "results": {**rescan["results"], "p_value": 0.9}}
    assert "but for p_value" in problems(scan, better)
    assert problems(scan, {**better, "inputs": scan["inputs"]}) == "", "a scan that was made says what it found"


def test_a_run_without_purification_is_whole(unpurified: Chain) -> None:
    ended = {**unpurified.evidence, "gate": {"results": {"outcome": "allow"}}, "sign": {}, "promote": {}}
    assert set(expected_steps(Records(ended))) == set(ended)


# -- positive control --------------------------------------------------------------------


def test_a_control_without_a_pool_found_and_missed_nothing(finished: Chain) -> None:
    config = {"epochs": 1, "method": ""}
    evidence = control_model(
        finished["bundle"],
        finished["data"] / "clean.npz",
        config=config,
        scan=PLAN_OPTIONS.scan,
        report=0.0,
        device="cpu",
    )
    assert (evidence["name"], evidence["verdict"]) == ("control", "UNKNOWN")
    assert evidence["results"]["detected"] is None
    assert evidence["inputs"]["model"] == finished.evidence["fetch"]["outputs"]["model"]
    judged = gate_promotion(
        {**finished.evidence, "control": evidence}, {**POLICY, "require": {"positive_control": True}}
    )
    assert judged["results"]["outcome"] == "unknown"


def test_a_control_that_diverges_is_unknown(finished: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*_: Any, **__: Any) -> None:
        raise errors.MethodDiverged("loss became NaN", got="nan")

    monkeypatch.setattr(control_step, "positive_control", diverging)
    evidence = control_model(finished["bundle"], finished["data"] / "clean.npz", scan=SCAN, device="cpu")
    assert evidence["verdict"] == "UNKNOWN"
    assert "loss became NaN" in evidence["findings"][0]["why"]


@pytest.mark.parametrize(
    "config", [{"rate": 1.0}, {"method": "prayer"}, {"size_share": 0.0}, {"epochs": 0}, {"lr": 0.0}]
)
def test_a_control_refuses_bad_settings(config: dict[str, Any], finished: Chain) -> None:
    with pytest.raises(errors.ConfigError):
        control_model(finished["bundle"], finished["data"] / "clean.npz", config=config, device="cpu")


# -- what is told of it --------------------------------------------------------------------


def test_the_ml_bom_says_what_the_scans_said(unpurified: Chain, finished: Chain) -> None:
    first, second = scan_sentences(unpurified.evidence)
    assert first.startswith("Backdoor scan of the incoming model: PASS, p = 1: No evidence of a backdoor found")
    assert second.startswith("Backdoor scan of the outgoing model: PASS")
    assert scan_sentences({name: each for name, each in finished.evidence.items() if "scan" not in name}) == []


def test_mlflow_gets_verdicts_p_values_residuals_and_pictures(finished: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics: dict[str, float] = {}
    tags: dict[str, str] = {}
    files: list[str] = []
    monkeypatch.setattr(journal, "log_metrics", lambda _c, _r, values: metrics.update(values))
    monkeypatch.setattr(journal, "log_tags", lambda _c, _r, values: tags.update(values))
    monkeypatch.setattr(journal, "_log_bytes", lambda _c, _r, found: files.extend(found))
    control = {"verdict": "PASS", "results": {"asr_after": 0.01, "scan": {"p_value": 0.02}, "detected": True}}
    evidence = {**finished.evidence, "control": control}
    for name in ("scan", "rescan", "control"):
        journal._log_scan(None, None, name, evidence)  # type: ignore[arg-type]
    assert tags == {"quarantine.scan": "unknown", "quarantine.rescan": "unknown", "quarantine.control": "pass"}
    assert (metrics["control/p_value"], metrics["control/asr_after"]) == (0.02, 0.01)
    assert any(name.startswith("rescan/residual/") for name in metrics)
    assert "scan/p_value" not in metrics
    assert "pictures/scan-00.png" in files


def test_images_of_one_class_are_refused_by_fetch(plan: Plan, tmp_path: Path) -> None:
    pixels, labels = images(40, seed=5)
    numpy.savez(tmp_path / "one.npz", images=pixels[labels == 0], labels=labels[labels == 0])
    with pytest.raises(errors.DataError):
        fetch_model(replace(plan, clean=str(tmp_path / "one.npz")), tmp_path / "bundle", tmp_path / "data")


def test_a_mean_is_of_what_its_purifiers_left(unpurified: Chain) -> None:
    def problems(members: dict[str, str]) -> list[str]:
        made = {**unpurified.evidence["purify.untouched"], "inputs": {**whole["inputs"], "members": members}}
        found = chain_problems({**unpurified.evidence, "purify.mean": {**made, "name": "purify.mean"}}, "")
        return [each.sentence for each in found if each.file == "evidence/purify.mean.json"]

    whole = unpurified.evidence["purify.untouched"]
    assert problems({"untouched": whole["outputs"]["model"]}) == []
    assert "members.untouched" in problems({"untouched": "sha256:" + "0" * 64})[0]
    assert "what purify.nobody gave" in problems({"nobody": whole["outputs"]["model"]})[0]
