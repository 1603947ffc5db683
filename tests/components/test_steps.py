"""Each step as a plain function: what it writes, and what bad input gets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch

from components._runtime.bundle_files import bundle_digest
from components._runtime.datasets import read_data
from components._runtime.decision_files import replay_decision
from components._runtime.evidence import read_evidence, read_folder
from components._runtime.plan import Loading, Plan, plan_from_arguments, run_settings
from components.evaluate_model.step import evaluate_candidate, evaluate_model
from components.export_onnx.step import export_onnx
from components.fetch_model.step import fetch_model
from components.gate_promotion.step import decide_given, gate_promotion
from components.purify_model import step as purify_step
from components.purify_model.step import purify_candidate, purify_model
from components.select_model.step import select_model
from defense_core import errors, files
from defense_core.bundle import load_model_file, save_bundle
from defense_core.limits import LoadLimits
from defense_core.parity import ParityBounds
from tests.finished_chain import Chain
from tests.small_model import PLAN_OPTIONS, POLICY, images, save_images

# -- fetch -----------------------------------------------------------------------------


def test_fetch_pins_everything_by_digest(finished: Chain) -> None:
    evidence = finished.evidence["fetch"]
    assert evidence["verdict"] == "PASS"
    assert evidence["outputs"]["model"] == bundle_digest(finished["bundle"])
    description = json.loads((finished["bundle"] / "bundle.json").read_text())
    assert description["origin"]["sha256"] == evidence["inputs"]["source"]
    assert set(evidence["inputs"]) == {"source", "clean", "test", "pool", "config", "policy"}
    data = read_data(finished["data"])
    assert data.test is not None
    assert data.report_share(0.2) == 0.0
    assert [probe["kind"] for probe in data.probes] == ["badnets"]


def test_fetching_again_gives_the_same_bytes(finished: Chain, tmp_path: Path) -> None:
    again = fetch_model(finished.plan, tmp_path / "bundle", tmp_path / "data")
    assert again["inputs"] == finished.evidence["fetch"]["inputs"]
    assert again["outputs"] == finished.evidence["fetch"]["outputs"]
    assert (tmp_path / "data" / "clean.npz").read_bytes() == (finished["data"] / "clean.npz").read_bytes()


def test_a_bundle_is_fetched_without_a_spec(finished: Chain, tmp_path: Path) -> None:
    plan = replace(finished.plan, model=str(finished["selected"]), spec={})
    evidence = fetch_model(plan, tmp_path / "bundle", tmp_path / "data")
    assert evidence["inputs"]["source"] == finished.evidence["select"]["outputs"]["model"]


def test_the_identity_is_of_content_not_of_places(finished: Chain, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.npz"
    moved.write_bytes(Path(finished.plan.clean).read_bytes())
    same = fetch_model(replace(finished.plan, clean=str(moved)), tmp_path / "b", tmp_path / "d")
    assert same["results"]["identity"] == finished.evidence["fetch"]["results"]["identity"]
    other = fetch_model(replace(finished.plan, seed=1), tmp_path / "b2", tmp_path / "d2")
    assert other["results"]["identity"] != same["results"]["identity"]


def test_a_bundle_that_cannot_be_put_in_its_place_leaves_no_data(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = files._publish

    def full(folder: Path, path: Path, *, replace: bool) -> None:
        if path.name == "bundle":
            raise OSError(28, "No space left on device")
        publish(folder, path, replace=replace)

    monkeypatch.setattr(files, "_publish", full)
    with pytest.raises(errors.StorageError):
        fetch_model(plan, tmp_path / "bundle", tmp_path / "data")
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text", ["[" * 200_000, "7"])
def test_run_data_of_another_shape(text: str, tmp_path: Path) -> None:
    (tmp_path / "probes.json").write_text(text)
    with pytest.raises(errors.DataError, match="no run data"):
        read_data(tmp_path)


def damaged_model(kind: str, state: dict[str, torch.Tensor], path: Path) -> None:
    if kind == "nan":
        state["linear.weight"][0, 0] = float("nan")
    elif kind == "key missing":
        del state["linear.bias"]
    elif kind == "extra key":
        state["extra"] = torch.zeros(1)
    elif kind == "other shape":
        state["conv1.weight"] = torch.zeros(4, 3, 3, 3)
    data = safetensors.torch.save(state)
    if kind == "truncated":
        data = data[:-100]
    elif kind == "no weights at all":
        data = b"\x00" * 64
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("nan", errors.NonFiniteWeights),
        ("key missing", errors.StateDictMismatch),
        ("extra key", errors.StateDictMismatch),
        ("other shape", errors.StateDictMismatch),
        ("truncated", errors.CorruptArtifact),
        ("no weights at all", errors.CorruptArtifact),
    ],
)
def test_fetch_refuses_a_damaged_model(
    kind: str, error: type[Exception], plan: Plan, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    damaged_model(kind, state, tmp_path / "model.safetensors")
    with pytest.raises(error):
        fetch_model(replace(plan, model=str(tmp_path / "model.safetensors")), tmp_path / "bundle", tmp_path / "data")
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "data").exists()


def test_fetch_refuses_other_bytes_than_promised(plan: Plan, tmp_path: Path) -> None:
    promised = "sha256:" + "0" * 64
    with pytest.raises(errors.DigestMismatch, match="promised"):
        fetch_model(replace(plan, loading=Loading(sha256=promised)), tmp_path / "bundle", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "/nowhere/model.safetensors"}, errors.SourceNotFound),
        ({"model": "ftp://host/model"}, errors.ConfigError),
        ({"loading": Loading(limits=LoadLimits(max_bytes=100))}, errors.ArtifactTooLarge),
        ({"spec": {**PLAN_OPTIONS.spec, "num_classes": 7}}, errors.StateDictMismatch),
        ({"spec": {**PLAN_OPTIONS.spec, "architecture": "unheard_of"}}, errors.ArchitectureNotAllowed),
        ({"methods": ("tsdb",), "configs": {}}, errors.ConfigError),
        ({"configs": {"tsbd": {"epoch": 1}}}, errors.ConfigError),
        ({"policy": {**POLICY, "rule": []}}, errors.PolicyError),
        ({"probes": ({"kind": "badnets", "target": 9},)}, errors.ConfigError),
        ({"probes": ({"kind": "badnets", "size": 50},)}, errors.ConfigError),
    ],
)
def test_fetch_refuses_a_bad_plan(change: dict[str, Any], error: type[Exception], plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(error):
        fetch_model(replace(plan, **change), tmp_path / "bundle", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_fetch_refuses_a_test_set_that_holds_clean_images(plan: Plan, tmp_path: Path) -> None:
    (pixels, labels), (others, truths) = images(80, seed=1), images(60, seed=2)
    numpy.savez(
        tmp_path / "mixed.npz",
        images=numpy.concatenate([others, pixels[:1]]),
        labels=numpy.concatenate([truths, labels[:1]]),
    )
    for test, shared in ((plan.clean, "80 of 80"), (str(tmp_path / "mixed.npz"), "1 of 61")):
        with pytest.raises(errors.DataError, match=f"test set holds images of the clean set.*{shared}"):
            fetch_model(replace(plan, test=test), tmp_path / "bundle", tmp_path / "data")
        assert not (tmp_path / "bundle").exists()
        assert not (tmp_path / "data").exists()


def bad_images(kind: str, path: Path) -> None:
    pixels, labels = images(40, seed=3)
    if kind == "empty":
        pixels, labels = pixels[:0], labels[:0]
    elif kind == "class absent":
        pixels, labels = pixels[labels != 2], labels[labels != 2]
    elif kind == "label out of range":
        labels[0] = 4
    elif kind == "three channels":
        pixels = numpy.repeat(pixels, 3, axis=1)
    numpy.savez(path, images=pixels, labels=labels)
    if kind == "not images":
        path.write_bytes(b"not an archive")


@pytest.mark.parametrize("kind", ["empty", "class absent", "label out of range", "three channels", "not images"])
def test_fetch_refuses_bad_images(kind: str, plan: Plan, tmp_path: Path) -> None:
    bad_images(kind, tmp_path / "clean.npz")
    with pytest.raises(errors.DataError):
        fetch_model(replace(plan, clean=str(tmp_path / "clean.npz")), tmp_path / "bundle", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["clean.npz"]


# -- plan and run parameters -----------------------------------------------------------


def test_a_plan_survives_the_way_through_pipeline_arguments(plan: Plan) -> None:
    assert plan_from_arguments(plan.arguments()) == plan_from_arguments(json.loads(json.dumps(plan.arguments())))
    assert plan_from_arguments(plan.arguments()).identity(
        source="sha256:" + "1" * 64, clean="c", test=None, policy="sha256:" + "2" * 64
    ) == plan.identity(source="sha256:" + "1" * 64, clean="c", test=None, policy="sha256:" + "2" * 64)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        ("policy", "[" * 200_000),
        ("policy", "{"),
        ("loading", '{"max_byte": 1}'),
        ("configs", '{"nft": {}}'),
        ("probes", "7"),
    ],
)
def test_a_malformed_argument_is_a_config_error(parameter: str, text: str, plan: Plan) -> None:
    with pytest.raises(errors.ConfigError):
        plan_from_arguments({**plan.arguments(), parameter: text})


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 101])
def test_a_run_name_is_a_file_name(name: str) -> None:
    with pytest.raises(errors.ConfigError, match="run name"):
        run_settings(json.dumps({"evidence": "/tmp/e", "model_name": "m", "name": name}))


@pytest.mark.parametrize("change", [{"model_name": "a/b"}, {"alias": "latest"}, {"alias": "v1"}, {"allias": "x"}])
def test_unusable_registry_names_are_refused_at_once(change: dict[str, str]) -> None:
    with pytest.raises(errors.ConfigError):
        run_settings(json.dumps({"evidence": "/tmp/e", "model_name": "m", "name": "run", **change}))


def test_a_run_without_a_name_takes_the_executions() -> None:
    assert run_settings('{"evidence": "/tmp/e", "model_name": "m"}', "job-7").name == "job-7"


# -- purify ----------------------------------------------------------------------------


def test_purify_writes_a_bundle_with_its_result(finished: Chain) -> None:
    evidence = read_evidence(finished["tsbd"] / "result.json")
    assert evidence == finished.evidence["purify.tsbd"]
    assert evidence["inputs"]["model"] == bundle_digest(finished["bundle"])
    assert evidence["outputs"]["model"] == bundle_digest(finished["tsbd"]) != evidence["inputs"]["model"]
    assert evidence["results"]["config"]["epochs"] == 1
    phases = {row["phase"].split()[0] for row in evidence["results"]["history"]}
    assert phases == {"unlearn", "repair"}
    assert not evidence["results"]["control"]
    assert finished.evidence["purify.fine_tuning"]["results"]["control"]


def test_purify_gives_the_same_bytes_again(finished: Chain, tmp_path: Path) -> None:
    again = purify_model(
        finished["bundle"],
        finished["data"] / "clean.npz",
        tmp_path / "out",
        method="tsbd",
        config=finished.plan.configs["tsbd"],
        report=0.0,
    )
    assert again["outputs"] == finished.evidence["purify.tsbd"]["outputs"]


def test_purify_takes_a_bare_state_dict_with_a_spec(plan: Plan, tmp_path: Path) -> None:
    evidence = purify_model(
        Path(plan.model), Path(plan.clean), tmp_path / "out", method="fine_tuning", config={"epochs": 0}, spec=plan.spec
    )
    assert evidence["inputs"]["source"].startswith("sha256:")
    assert bundle_digest(tmp_path / "out") == evidence["outputs"]["model"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "tsdb"}, errors.ConfigError),
        ({"method": "tsbd", "config": {"nn": 1}}, errors.ConfigError),
        ({"method": "tsbd", "config": {"n": 2.0}}, errors.ConfigError),
        ({"method": "tsbd", "device": "tpu"}, errors.ConfigError),
    ],
)
def test_purify_refuses_bad_options(
    options: dict[str, Any], error: type[Exception], finished: Chain, tmp_path: Path
) -> None:
    with pytest.raises(error):
        purify_model(finished["bundle"], finished["data"] / "clean.npz", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def diverging(*_: Any, **__: Any) -> None:
    raise errors.MethodDiverged("loss became NaN", got="nan at step 3")


def test_divergence_leaves_nothing(finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purify_step, "purify", diverging)
    with pytest.raises(errors.MethodDiverged):
        purify_model(finished["bundle"], finished["data"] / "clean.npz", tmp_path / "out", method="tsbd")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_candidate_is_unknown_and_not_selected(
    finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purify_step, "purify", diverging)
    clean = finished["data"] / "clean.npz"
    evidence = purify_candidate(finished["bundle"], clean, tmp_path / "tsbd", method="tsbd", report=0.0)
    assert evidence["verdict"] == "UNKNOWN"
    assert evidence["outputs"] == {}
    assert "loss became NaN" in evidence["findings"][0]["why"]
    measured = evaluate_candidate(tmp_path / "tsbd", name="tsbd", reference=finished["bundle"], **finished.images)
    assert measured["verdict"] == "UNKNOWN"
    assert "loss became NaN" in measured["findings"][0]["why"]
    with pytest.raises(errors.EvidenceMissing, match=r"tsbd: loss became NaN.*fine_tuning: the control"):
        select_model([tmp_path / "tsbd", finished["fine_tuning"]], tmp_path / "selected")
    assert not (tmp_path / "selected").exists()


def test_a_method_that_does_not_fit_the_network_ends_no_run(
    finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: Any, **__: Any) -> None:
        raise errors.MethodNotApplicable("NGF needs a linear classifier", expected="nn.Linear", got="Conv2d")

    monkeypatch.setattr(purify_step, "purify", refusing)
    clean = finished["data"] / "clean.npz"
    evidence = purify_candidate(finished["bundle"], clean, tmp_path / "ngf", method="ngf", report=0.0)
    assert (evidence["verdict"], evidence["outputs"]) == ("UNKNOWN", {})
    assert evidence["findings"][0]["rule"] == "purify.not_applicable"
    with pytest.raises(errors.EvidenceMissing, match=r"ngf: NGF needs a linear classifier"):
        select_model([tmp_path / "ngf", finished["fine_tuning"]], tmp_path / "selected")
    with pytest.raises(errors.ConfigError, match="linear classifier"):
        purify_model(finished["bundle"], clean, tmp_path / "alone", method="ngf", report=0.0)
    assert not (tmp_path / "alone").exists()


def test_a_full_disk_leaves_nothing(finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(bundle: Any, folder: Path) -> str:
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device", str(folder / "model.safetensors"))

    monkeypatch.setattr(purify_step, "save_bundle", full)
    with pytest.raises(errors.StorageError, match="No space left"):
        purify_model(
            finished["bundle"],
            finished["data"] / "clean.npz",
            tmp_path / "out",
            method="fine_tuning",
            config={"epochs": 0},
        )
    assert list(tmp_path.iterdir()) == []


# -- evaluate --------------------------------------------------------------------------


def test_evaluate_compares_with_the_fetched_model(finished: Chain) -> None:
    before, after = finished.evidence["evaluate.before"], finished.evidence["evaluate.tsbd"]
    assert before["results"]["acc_before"] is None
    assert after["inputs"]["reference"] == before["inputs"]["model"] == bundle_digest(finished["bundle"])
    assert after["results"]["acc_before"] == before["results"]["acc"]
    assert after["results"]["images"] == 60
    assert after["results"]["probes"][0]["asr"]["trials"] == 45
    assert after["results"]["split"] == "test"


def test_without_a_test_set_the_report_split_is_quoted(finished: Chain) -> None:
    evidence = evaluate_model(finished["bundle"], name="before", clean=finished["data"] / "clean.npz", device="cpu")
    assert evidence["results"]["split"] == "report"
    assert evidence["results"]["images"] == 16


def with_copies(path: Path, count: int, copies: int, *, seed: int) -> Path:
    """So many different images, and the first of them again."""
    pixels, labels = images(count, seed=seed)
    pixels, labels = (numpy.concatenate([each, each[:copies]]) for each in (pixels, labels))
    numpy.savez(path, images=pixels, labels=labels)
    return path


def test_copies_are_counted_once(finished: Chain, tmp_path: Path) -> None:
    clean = with_copies(tmp_path / "clean.npz", 40, 12, seed=7)
    test = with_copies(tmp_path / "test.npz", 24, 9, seed=8)
    plan = replace(finished.plan, clean=str(clean), test=str(test))
    fetched = fetch_model(plan, tmp_path / "bundle", tmp_path / "data")["results"]
    assert (fetched["clean_images"], fetched["clean_class_counts"], fetched["test_images"]) == (40, [10] * 4, 24)
    with numpy.load(tmp_path / "data" / "clean.npz") as given:
        assert len(given["images"]) == 52  # nothing is taken out of what methods are given
    for place, quoted in (({"test": test}, 24), ({"clean": clean}, 8)):
        measured = evaluate_model(finished["bundle"], name="before", device="cpu", **place)["results"]
        assert (measured["images"], measured["acc"]["trials"]) == (quoted, quoted)


def test_a_probe_without_an_eligible_image_is_unknown(finished: Chain, tmp_path: Path) -> None:
    pixels, labels = images(40, seed=5)
    numpy.savez(tmp_path / "test.npz", images=pixels[labels == 0], labels=labels[labels == 0])
    evidence = evaluate_model(
        finished["bundle"], name="before", test=tmp_path / "test.npz", probes=finished.plan.probes, device="cpu"
    )
    assert evidence["verdict"] == "UNKNOWN"
    assert evidence["results"]["probes"][0]["asr"]["value"] is None


@pytest.mark.parametrize("name", ["before", "tsbd"])
def test_labels_that_are_not_the_models_measure_no_drop(name: str, finished: Chain, tmp_path: Path) -> None:
    """It answers nearly none of them as labelled, before and after: that accuracy was held says nothing."""
    pixels, labels = images(60, seed=5)
    numpy.savez(tmp_path / "test.npz", images=pixels, labels=(labels + 1) % 4)
    reference = finished["bundle"] if name == "tsbd" else None
    evidence = evaluate_model(
        finished["bundle"], name=name, test=tmp_path / "test.npz", reference=reference, device="cpu"
    )
    assert evidence["verdict"] == ("UNKNOWN" if reference else "PASS")
    said = [each["why"] for each in evidence["findings"]]
    assert [each.endswith("do images and labels belong to this model?") for each in said] == (
        [True] if reference else []
    )


def test_a_probe_is_tried_on_images_of_every_class(finished: Chain, tmp_path: Path) -> None:
    """The first images of a sorted set are of the class that the probe leads to, and it leaves them as they are."""
    pixels, labels = images(120, seed=5)
    order = labels.argsort(kind="stable")
    numpy.savez(tmp_path / "clean.npz", images=pixels[order], labels=labels[order])
    assert set(labels[order][:16].tolist()) == {0}
    probe = {"name": "wide", "kind": "badnets", "target": 0, "size": 99}
    plan = replace(finished.plan, clean=str(tmp_path / "clean.npz"), probes=(probe,))
    with pytest.raises(errors.ConfigError, match="patch"):
        fetch_model(plan, tmp_path / "bundle", tmp_path / "data")


@pytest.mark.parametrize("name", ["v1.2", "selected", "", "a/b", "größe"])
def test_evaluate_gives_no_name_that_the_gate_would_call_damaged(name: str, finished: Chain) -> None:
    with pytest.raises(errors.ConfigError, match="name is malformed"):
        evaluate_model(finished["bundle"], name=name, clean=finished.images["clean"], device="cpu")


def test_evaluate_needs_images(finished: Chain) -> None:
    with pytest.raises(errors.ConfigError, match="nothing to evaluate on"):
        evaluate_model(finished["bundle"], name="before", device="cpu")


@pytest.mark.parametrize(("field", "value"), [("mean", [0.1]), ("std", [0.9]), ("input_size", [1, 16, 16])])
def test_a_reference_of_another_interface_is_refused(
    field: str, value: list[float], finished: Chain, tmp_path: Path
) -> None:
    spec = {**PLAN_OPTIONS.spec, field: value}
    other = save_bundle(load_model_file(Path(finished.plan.model), spec), tmp_path / "other")
    assert other != finished.evidence["fetch"]["outputs"]["model"]
    with pytest.raises(errors.ConfigError, match=f"the reference has another {field} than the model") as caught:
        evaluate_model(
            finished["tsbd"], name="tsbd", reference=tmp_path / "other", test=finished.images["test"], device="cpu"
        )
    assert caught.value.exit_code == errors.EXIT_USAGE


def test_figures_are_quoted_on_no_image_that_was_fitted_on(finished: Chain, tmp_path: Path) -> None:
    clean, out = finished["data"] / "clean.npz", tmp_path / "out"
    purify_model(
        finished["bundle"], clean, out, method="fine_tuning", config={"epochs": 1}, seed=3, report=0.1, device="cpu"
    )
    measured: dict[str, Any] = {"name": "fine_tuning", "clean": clean, "device": "cpu"}
    found = evaluate_model(out, seed=3, report=0.1, **measured)
    assert found["results"]["images"] == 8
    for options in ({"seed": 3}, {"report": 0.1}, {"seed": 4, "report": 0.1}):
        with pytest.raises(errors.ConfigError, match="may be fitted on") as caught:
            evaluate_model(out, **options, **measured)
        assert caught.value.expected == "the split of purify.fine_tuning: --seed 3 --report 0.1"
        assert "--test" in str(caught.value.hint)
    assert evaluate_model(out, name="x", test=finished.images["test"], device="cpu")["results"]["images"] == 60
    save_images(tmp_path / "other.npz", 80, seed=9)
    with pytest.raises(errors.ConfigError, match="The clean set is another"):
        evaluate_model(out, seed=3, report=0.1, **{**measured, "clean": tmp_path / "other.npz"})


def test_evidence_without_the_cut_still_guards_it(finished: Chain, tmp_path: Path) -> None:
    """Results of earlier versions name no cut, but its digest."""
    shutil.copytree(finished["fine_tuning"], tmp_path / "out")
    path = tmp_path / "out" / "result.json"
    measured: dict[str, Any] = {"name": "x", "clean": finished.images["clean"], "device": "cpu"}
    with pytest.raises(errors.ConfigError, match="left nothing of its clean set"):
        evaluate_model(tmp_path / "out", **measured)
    evidence = json.loads(path.read_text())
    del evidence["results"]["parts"]
    path.write_text(json.dumps(evidence))
    with pytest.raises(errors.ConfigError, match="the --seed and --report that it was given"):
        evaluate_model(tmp_path / "out", **measured)
    evidence["outputs"]["model"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(evidence))
    assert evaluate_model(tmp_path / "out", **measured)["results"]["images"] == 16


@pytest.mark.parametrize("report", [0.0, 1.0])
def test_no_share_to_quote_on_is_refused(report: float, finished: Chain) -> None:
    with pytest.raises(errors.ConfigError, match="report"):
        evaluate_model(finished["bundle"], name="x", clean=finished.images["clean"], report=report, device="cpu")


# -- select ----------------------------------------------------------------------------


def test_select_copies_the_chosen_bundle_and_nothing_else(finished: Chain) -> None:
    evidence = finished.evidence["select"]
    assert evidence["results"]["method"] == "tsbd"
    assert evidence["outputs"]["model"] == finished.evidence["purify.tsbd"]["outputs"]["model"]
    assert sorted(path.name for path in finished["selected"].iterdir()) == ["bundle.json", "model.safetensors"]
    rows = {row["method"]: row for row in evidence["results"]["candidates"]}
    assert rows["fine_tuning"]["accuracy"] is not None
    assert rows["fine_tuning"]["why"] == "the control is shown for comparison only"


def test_select_sees_no_attack_figure(finished: Chain) -> None:
    text = json.dumps([finished.evidence["select"], finished.evidence["purify.tsbd"]])
    assert "asr" not in text
    assert "badnets" not in text


def test_two_candidates_are_compared_by_what_they_leave(chain: Chain, tmp_path: Path) -> None:
    # The control, declared a method, is a candidate too.
    result = chain["fine_tuning"] / "result.json"
    evidence = json.loads(result.read_text())
    evidence["results"]["control"] = False
    evidence["results"]["select"] |= {"reached_before": [1.0] * 4, "reached": [0.0] * 4}
    result.write_text(json.dumps(evidence))
    results = select_model([chain["tsbd"], chain["fine_tuning"]], tmp_path / "out")["results"]
    suspect = results["suspected_class"]
    signals = [each["results"]["select"] for each in (chain.evidence["purify.tsbd"], evidence)]
    assert signals[0]["targets"] == [0, 1, 2, 3]
    assert [row["residual"] for row in results["candidates"]] == [each["reached"][suspect] for each in signals]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("order", [("tsbd", "nft"), ("nft", "tsbd")])
def test_among_equals_the_operators_order_decides_and_not_that_of_the_folders(
    order: tuple[str, str], turned: bool, chain: Chain, tmp_path: Path
) -> None:
    shutil.copytree(chain["tsbd"], chain["nft"])
    evidence = json.loads((chain["nft"] / "result.json").read_text())
    evidence["results"]["method"] = "nft"
    (chain["nft"] / "result.json").write_text(json.dumps(evidence))
    folders = [chain["tsbd"], chain["nft"]]
    results = select_model(folders[::-1] if turned else folders, tmp_path / "out", order=order)["results"]
    assert results["method"] == order[0]
    assert tuple(row["method"] for row in results["candidates"]) == order


def test_select_refuses_another_runs_candidate(chain: Chain, tmp_path: Path) -> None:
    result = chain["fine_tuning"] / "result.json"
    evidence = json.loads(result.read_text())
    evidence["inputs"]["source"] = "sha256:" + "0" * 64
    result.write_text(json.dumps(evidence))
    with pytest.raises(errors.EvidenceMismatch, match="different models"):
        select_model([chain["tsbd"], chain["fine_tuning"]], tmp_path / "out")


def test_select_refuses_changed_weights(chain: Chain, tmp_path: Path) -> None:
    weights = chain["tsbd"] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(errors.DigestMismatch):
        select_model([chain["tsbd"]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- export ----------------------------------------------------------------------------


def test_export_answers_like_the_bundle(finished: Chain) -> None:
    evidence = finished.evidence["export"]
    assert evidence["verdict"] == "PASS"
    assert {row["name"] for row in evidence["results"]["parity"]} == {"clean", "badnets"}
    assert evidence["outputs"]["onnx"] == evidence["results"]["sha256"]
    assert evidence["inputs"]["model"] == finished.evidence["select"]["outputs"]["model"]
    assert sorted(path.name for path in finished["onnx"].iterdir()) == ["model.onnx", "result.json"]


def test_a_failed_parity_is_fail_and_the_file_stays(finished: Chain, tmp_path: Path) -> None:
    bounds = ParityBounds(relative=1e-12, floor=0.0)
    evidence = export_onnx(finished["selected"], tmp_path / "onnx", test=finished["data"] / "test.npz", bounds=bounds)
    assert evidence["verdict"] == "FAIL"
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    judged = gate_promotion({**finished.evidence, "export": evidence}, POLICY)
    assert judged["results"]["outcome"] == "deny"


def test_export_of_a_damaged_bundle_leaves_nothing(chain: Chain, tmp_path: Path) -> None:
    (chain["selected"] / "model.safetensors").write_bytes(b"")
    with pytest.raises(errors.DigestMismatch):
        export_onnx(chain["selected"], tmp_path / "onnx", test=chain["data"] / "test.npz")
    assert not (tmp_path / "onnx").exists()


# -- gate ------------------------------------------------------------------------------


def test_the_decision_folder_replays(finished: Chain) -> None:
    replayed = replay_decision(finished["decision"])
    assert replayed.decision.outcome == "allow"
    assert replayed.evidence.keys() == finished.evidence.keys() | {"gate"}
    assert (
        gate_promotion(read_folder(finished["decision"]), POLICY, at="2027-01-01T00:00:00Z")["results"]
        == gate_promotion(finished.evidence, POLICY, at="2027-01-01T00:00:00Z")["results"]
    )


@pytest.mark.parametrize("name", ["fetch", "select", "export", "evaluate.tsbd", "purify.tsbd"])
def test_missing_evidence_is_unknown(name: str, finished: Chain) -> None:
    rest = {key: value for key, value in finished.evidence.items() if key != name}
    assert gate_promotion(rest, POLICY)["results"]["outcome"] == "unknown"


def test_evidence_of_another_model_is_denied(finished: Chain) -> None:
    other = json.loads(json.dumps(finished.evidence["evaluate.tsbd"]))
    other["inputs"]["model"] = "sha256:" + "0" * 64
    assert gate_promotion({**finished.evidence, "evaluate.tsbd": other}, POLICY)["results"]["outcome"] == "deny"


def test_a_malformed_policy_writes_nothing(finished: Chain, tmp_path: Path) -> None:
    with pytest.raises(errors.PolicyError):
        gate_promotion(finished.evidence, {**POLICY, "prommote": True}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_edited_decision_is_refused(chain: Chain) -> None:
    path = chain["decision"] / "decision.json"
    path.write_text(path.read_text().replace('"outcome":"allow"', '"outcome":"observe"'))
    with pytest.raises(errors.EvidenceMismatch, match="not what its policy and evidence give"):
        replay_decision(chain["decision"])


def test_evidence_under_another_name_is_refused(chain: Chain) -> None:
    (chain["decision"] / "fetch.json").rename(chain["decision"] / "scan.json")
    with pytest.raises(errors.EvidenceMismatch, match="evidence of scan"):
        read_folder(chain["decision"])


def test_a_folder_without_evidence_is_missing(tmp_path: Path) -> None:
    with pytest.raises(errors.EvidenceMissing):
        read_folder(tmp_path)


# -- weight of the imports -------------------------------------------------------------


def test_two_files_of_the_same_evidence_are_refused(finished: Chain, tmp_path: Path) -> None:
    files = []
    for number, name in enumerate(("fetch", "evaluate.tsbd", "fetch")):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(finished.evidence[name]))
    with pytest.raises(errors.EvidenceMismatch, match="two files of evidence fetch"):
        decide_given(files, json.dumps(POLICY), tmp_path / "decision", former=None, approvals=())
    assert not (tmp_path / "decision").exists()


@pytest.mark.parametrize("name", ["select_model", "gate_promotion", "promote_model", "report"])
def test_steps_without_tensors_do_not_import_torch(name: str) -> None:
    code = f"import sys, components.{name}.step; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_images_are_readable_by_the_next_step(finished: Chain, tmp_path: Path) -> None:
    save_images(tmp_path / "again.npz", 80, seed=1)
    with numpy.load(finished["data"] / "clean.npz") as stored, numpy.load(tmp_path / "again.npz") as given:
        assert numpy.array_equal(stored["images"], given["images"])
        assert numpy.array_equal(stored["labels"], given["labels"])
