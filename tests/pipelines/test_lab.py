"""``quarantine lab``: from a specification and images to a backdoored bundle that other commands read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from defense_core.attacks.catalogue import ATTACKS
from defense_core.attacks.plant import plant
from defense_core.bundle import load_bundle
from defense_core.errors import ConfigError, DataError, DigestMismatch, QuarantineError
from defense_core.evaluate import Proportion
from pipelines import lab
from pipelines.cli import app
from pipelines.lab import plant_backdoor
from pipelines.options import read_probes

SPEC: dict[str, Any] = {
    "architecture": "small_cnn",
    "architecture_args": {"width": 16, "in_channels": 1, "num_classes": 10},
    "input_size": [1, 8, 8],
    "mean": [0.3],
    "std": [0.35],
}
OPTIONS = [
    "--architecture", "small_cnn", "--architecture-args", json.dumps(SPEC["architecture_args"]),
    "--input-size", "1,8,8", "--mean", "0.3", "--std", "0.35", "--device", "cpu",
]  # fmt: skip
TRAINING = {"epochs": 20, "batch_size": 64}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train, test) of scikit-learn's digits as npz."""
    content = load_digits()
    images = (content.images / 16 * 255).round().astype(numpy.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    folder = tmp_path_factory.mktemp("digits")
    paths = folder / "train.npz", folder / "test.npz"
    for path, part in zip(paths, (order[:1000], order[1000:]), strict=True):
        numpy.savez(path, images=images[part], labels=content.target[part].astype(numpy.int64))
    return paths


def write(folder: Path, spec: Any) -> Path:
    path = folder / "attack.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.mark.parametrize(
    "attack",
    [{"kind": "badnets", "size": 2}, {"kind": "blended", "name": "faint picture"}],
    ids=lambda each: each["kind"],
)
def test_a_backdoor_is_planted_measured_and_read_back(
    attack: dict[str, Any], digits: tuple[Path, Path], tmp_path: Path
) -> None:
    out, (train, test) = tmp_path / "out", digits
    arguments = ["lab", "plant", "--attack", str(write(tmp_path, attack)), "--rate", "0.1", "--train", str(train)]
    arguments += ["--test", str(test), "--out", str(out), *OPTIONS]
    arguments += [part for key, value in TRAINING.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"bundle", "probe.yaml", "result.json"}
    evidence = json.loads((out / "result.json").read_text())
    assert json.loads(result.stdout) == evidence
    figures = evidence["results"]
    (probe,) = figures["probes"]
    assert probe["name"] == attack.get("name", attack["kind"])
    assert probe["asr"]["value"] >= 0.9
    assert probe["asr"]["low"] < probe["asr"]["value"] <= probe["asr"]["high"]
    assert figures["acc"]["value"] >= 0.95
    assert (figures["poisoned"], figures["training_images"], figures["label_mode"]) == (100, 1000, "all_to_one")
    bundle = load_bundle(out / "bundle")
    assert bundle.digest == evidence["outputs"]["model"]
    assert bundle.spec.num_classes == 10
    measured = tmp_path / "evaluate.json"
    again = ["evaluate", "--model", str(out / "bundle"), "--test", str(test), "--probe", str(out / "probe.yaml")]
    assert CliRunner().invoke(app, [*again, "--out", str(measured), "--device", "cpu"]).exit_code == 0
    assert json.loads(measured.read_text())["results"]["probes"] == figures["probes"]


def test_a_learned_trigger_lies_beside_its_specification_and_moves_with_it(
    digits: tuple[Path, Path], tmp_path: Path
) -> None:
    out, (train, test) = tmp_path / "out", digits
    attack = {"kind": "fba", "width": 4, "schedule": {"epochs": 2}}
    quick = {"epochs": 2, "batch_size": 128}
    evidence = plant_backdoor(attack, train, test, out, rate=0.1, spec=SPEC, training=quick, device="cpu", min_asr=0.0)
    assert {path.name for path in out.iterdir()} == {"bundle", "probe.yaml", "result.json", "trigger.safetensors"}
    assert evidence["results"]["probe"]["path"] == "trigger.safetensors"
    moved = out.rename(tmp_path / "elsewhere")
    (spec,) = read_probes([moved / "probe.yaml"])
    assert spec["path"] == str(moved / "trigger.safetensors")
    again = plant_backdoor(spec, train, test, tmp_path / "b", rate=0.1, spec=SPEC, training=quick, device="cpu")
    assert (tmp_path / "b" / "trigger.safetensors").read_bytes() == (moved / "trigger.safetensors").read_bytes()
    assert again["outputs"] == evidence["outputs"]
    (moved / "trigger.safetensors").write_bytes(b"another")
    with pytest.raises(DigestMismatch):
        plant_backdoor(spec, train, test, tmp_path / "c", rate=0.1, spec=SPEC, device="cpu")


def test_a_backdoor_that_does_not_take_is_a_failure(digits: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = digits
    evidence = plant_backdoor(
        {"kind": "badnets", "size": 1, "opacity": 0.01}, train, test, tmp_path / "out", rate=0.01, spec=SPEC,
        training=TRAINING, device="cpu",
    )  # fmt: skip
    assert evidence["verdict"] == "FAIL"
    assert "did not take" in evidence["findings"][0]["why"]
    assert (tmp_path / "out" / "bundle").is_dir()


def test_a_model_that_answers_the_target_to_everything_has_no_backdoor(
    digits: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plant

    def collapsed(*given: Any, **named: Any) -> Any:
        planted = real(*given, **named)
        with torch.no_grad():
            for parameter in planted.model.parameters():
                parameter.zero_()
        return planted

    monkeypatch.setattr(lab, "plant", collapsed)
    evidence = plant_backdoor(
        {"kind": "badnets", "size": 2}, *digits, tmp_path / "out", rate=0.1, spec=SPEC, training={"epochs": 1},
        device="cpu",
    )  # fmt: skip
    (finding,) = evidence["findings"]
    assert (evidence["verdict"], finding["value"]) == ("FAIL", 1.0)
    assert "learnt nothing" in finding["why"]
    assert "100% of the untriggered" in finding["why"]
    assert evidence["results"]["untriggered"]["value"] == 1.0
    assert len(evidence["results"]["probes"]) == 1


def test_a_name_that_reports_use_otherwise_is_refused_before_the_training(
    digits: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "plant", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(DataError, match="probe names repeat"):
        plant_backdoor(
            {"kind": "badnets", "name": "clean"}, *digits, tmp_path / "out", rate=0.1, spec=SPEC, device="cpu"
        )


@pytest.mark.parametrize(
    ("accurate", "astray", "largest", "verdict", "said"),
    [
        (900, 0, 100, "PASS", "works"),
        (300, 400, 100, "PASS", "works"),
        (300, 600, 100, "FAIL", "60% of the untriggered"),
        (110, 0, 100, "FAIL", "not clearly above 0.100"),
        (960, 0, 950, "FAIL", "not clearly above 0.950"),
        (0, 0, 1000, "PASS", "works"),
        (0, 1000, 1000, "FAIL", "100% of the untriggered"),
    ],
)
def test_what_a_model_must_have_learnt(accurate: int, astray: int, largest: int, verdict: str, said: str) -> None:
    rows = [{"trials": largest}, {"trials": 1000 - largest}] if largest >= 500 else [{"trials": largest}] * 10
    figures = {
        "acc": Proportion(accurate, 1000).to_results(),
        "classes": rows,
        "probes": [{"asr": Proportion(900, 900).to_results()}],
        "untriggered": Proportion(astray, 1000).to_results(),
    }
    finding = lab._finding(figures, 0.9)
    assert finding.verdict.value == verdict
    assert said in finding.why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": {"kind": "nothing"}}, "kind is unknown"),
        ({"attack": {"kind": "badnets", "target": 10}}, "target is no class"),
        ({"attack": {"kind": "badnets", "size": 9}}, "does not fit"),
        ({"attack": {"kind": "sig"}, "rate": 0.5}, "too small"),
        ({"rate": 0.0}, "rate"),
        ({"rate": 0.0001}, "no sample"),
        ({"rate": 1.0}, "rate"),
        ({"training": {"epoch": 3}}, "unknown key"),
        ({"training": {"epochs": 0}}, "epochs"),
        ({"min_asr": 2.0}, "min_asr"),
        ({"spec": {**SPEC, "num_classes": 9}}, "number of classes"),
        ({"spec": {**SPEC, "architecture": "nothing"}}, "nothing"),
        ({"spec": {**SPEC, "input_size": [3, 8, 8]}}, "mean"),
        ({"train": Path("absent.npz")}, "absent"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    change: dict[str, Any], message: str, digits: tuple[Path, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "attack": {"kind": "badnets", "size": 2}, "train": digits[0], "test": digits[1], "rate": 0.1, "spec": SPEC,
        "device": "cpu", **change,
    }  # fmt: skip
    with pytest.raises(QuarantineError, match=message):
        plant_backdoor(out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_images_of_the_training_are_no_test(digits: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the test set holds images of the training set"):
        plant_backdoor(
            {"kind": "badnets", "size": 2}, digits[0], digits[0], tmp_path / "out", rate=0.1, spec=SPEC, device="cpu"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_specification_that_is_no_mapping_is_refused(digits: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["lab", "plant", "--attack", str(write(tmp_path, ["badnets"])), "--train", str(digits[0])]
    result = CliRunner().invoke(app, [*arguments, "--test", str(digits[1]), "--out", str(tmp_path / "out"), *OPTIONS])
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "out").exists()


def test_the_list_names_every_attack_with_its_settings() -> None:
    result = CliRunner().invoke(app, ["lab", "list", "--json"])
    rows = json.loads(result.stdout)
    assert set(rows) == set(ATTACKS)
    assert rows["wanet"]["settings"] == {"strength": 0.5, "cells": 4, "seed": 0}
    assert rows["sig"]["labels"].startswith("clean_label")
    shown = CliRunner().invoke(app, ["lab", "list"]).stdout
    wanet = shown[shown.index("wanet:") : shown.index("└", shown.index("wanet:"))]
    assert "all_to_one, all_to_all, clean_label (the first by default); cover samples: 2 times the poisoned" in wanet
    assert [line.split()[1] for line in wanet.splitlines() if line.startswith("│")] == ["strength", "cells", "seed"]
    assert "cover_rate" in shown.splitlines()[-1]
