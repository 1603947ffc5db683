"""``quarantine scan``, ``calibrate`` and ``control``: exit codes, sentences, and bad input that never passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import safetensors.torch
import yaml

from defense_core.architectures import build
from defense_core.scan.pool import load_pool
from tests.pipelines.commands import Call
from tests.small_model import PLAN_OPTIONS, images, learnt, make_inputs
from tests.small_pool import RATE, make_pool


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors, clean.npz, quick settings of the detectors, and a pool that the model passes with."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    (folder / "quick.yaml").write_text(yaml.safe_dump(PLAN_OPTIONS.scan["settings"]))
    make_pool(folder / "pool.json", shift=100.0)
    return folder


NETWORK = ("--architecture", "small_cnn", "--input-size", "1,8,8", "--mean", "0.5", "--std", "0.5")
ARGUMENTS = ("--architecture-args", json.dumps(PLAN_OPTIONS.spec["architecture_args"]))


def words(inputs: Path, out: Path, **changes: object) -> list[object]:
    """A scan with ``changes`` to its options."""
    options: dict[str, object] = {
        "model": inputs / "model.safetensors",
        "clean": inputs / "clean.npz",
        "config": inputs / "quick.yaml",
        "device": "cpu",
        "out": out,
        **changes,
    }
    named = [
        word for name, value in options.items() if value is not None for word in (f"--{name.replace('_', '-')}", value)
    ]
    return ["scan", *NETWORK, *ARGUMENTS, *named]


def test_a_scan_writes_verdict_pictures_and_triggers(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    answer = quarantine(*words(inputs, tmp_path / "scan", pool=inputs / "pool.json", fpr=RATE))
    assert answer.code == 0, answer
    assert "No evidence of a backdoor found" in " ".join(answer.out.split())
    evidence = json.loads((tmp_path / "scan" / "scan.json").read_text())
    assert (evidence["verdict"], evidence["results"]["p_value"], evidence["results"]["fpr"]) == ("PASS", 1.0, RATE)
    for each in evidence["results"]["detectors"]:
        assert each.keys() >= {"name", "statistic", "p_value", "targets", "why"}
    assert list((tmp_path / "scan" / "pictures").glob("*.png"))
    assert (tmp_path / "scan" / "triggers.safetensors").is_file()


def test_no_seed_changes_a_scan(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    first, second = (
        quarantine(*words(inputs, tmp_path / str(seed), pool=inputs / "pool.json", fpr=RATE, seed=seed), "--json")
        for seed in (0, 7)
    )
    assert first.code == second.code == 0
    assert first.json["results"] == second.json["results"]
    assert "pictures" not in first.json["results"]


def test_without_a_pool_the_exit_code_is_2(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    answer = quarantine(*words(inputs, tmp_path / "scan"))
    assert answer.code == 2
    assert "quarantine calibrate makes one" in " ".join(answer.out.split())
    assert json.loads((tmp_path / "scan" / "scan.json").read_text())["verdict"] == "UNKNOWN"


def test_no_time_is_unknown(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    answer = quarantine(*words(inputs, tmp_path / "scan", pool=inputs / "pool.json", fpr=RATE, budget_s=1e-6), "--json")
    assert answer.code == 2
    assert "time ran out" in answer.json["findings"][0]["why"]


def test_no_images_say_less(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    answer = quarantine(*words(inputs, tmp_path / "scan", clean=None, pool=inputs / "pool.json", fpr=RATE), "--json")
    assert answer.code == 0
    assert {each["name"] for each in answer.json["results"]["channels"]} == {"margin"}
    assert any("takes 100 clean images" in each for each in answer.json["results"]["coverage"])


BAD = [
    ({"model": "absent.pt"}, 3, "absent.pt"),
    ({"clean": "absent.npz"}, 3, "absent.npz is not there"),
    ({"pool": "absent.json"}, 3, "no calibration pool"),
    ({"config": "absent.yaml"}, 3, "absent.yaml cannot be read"),
    ({"set": "marginn.steps=1"}, 3, "Did you mean 'margin'?"),
    ({"set": "margin.steps=0"}, 3, "expected"),
    ({"fpr": "0"}, 3, "fpr is out of range"),
    ({"fpr": "1"}, 3, "fpr is out of range"),
    ({"budget_s": "-1"}, 3, "budget_s is out of range"),
    ({"input_size": "3,8,8"}, 3, "expected"),
    ({"input_size": "1,8"}, 3, "expected"),
    ({"class_names": "a,b"}, 3, "expected 4 names"),
    ({"architecture_args": '{"width": 4, "in_channels": 1, "num_classes": 7}'}, 3, "expected"),
    ({"device": "tpu"}, 3, "device is unknown"),
    ({"seed": "-1"}, 3, "--seed"),
    ({"max_bytes": "10"}, 3, "at most 10 bytes"),
]


@pytest.mark.parametrize(("changes", "code", "said"), BAD, ids=lambda value: str(value)[:30])
def test_bad_options_are_a_sentence_and_leave_nothing(
    changes: dict[str, object], code: int, said: str, inputs: Path, tmp_path: Path, monkeypatch: Any, quarantine: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = quarantine(*words(inputs, tmp_path / "out", **changes))
    assert answer.code == code, answer
    assert said in " ".join(answer.err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_pool_of_another_kind_is_refused(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    text = (inputs / "pool.json").read_text()
    (tmp_path / "pool.json").write_text(text.replace('"small_cnn"', '"preact_resnet18"'))
    answer = quarantine(*words(inputs, tmp_path / "out", pool=tmp_path / "pool.json"))
    assert answer.code == 3
    assert "is a pool of other models" in " ".join(answer.err.split())
    assert not (tmp_path / "out").exists()


def test_a_damaged_pool_is_refused(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    (tmp_path / "pool.json").write_bytes((inputs / "pool.json").read_bytes()[:-40])
    answer = quarantine(*words(inputs, tmp_path / "out", pool=tmp_path / "pool.json"))
    assert answer.code == 3
    assert "is no calibration pool" in " ".join(answer.err.split())


def one_class(path: Path) -> None:
    pixels, labels = images(80, seed=3)
    numpy.savez(path, images=pixels[labels == 0], labels=labels[labels == 0])


def other_shape(path: Path) -> None:
    numpy.savez(path, images=numpy.zeros((40, 3, 16, 16), numpy.uint8), labels=numpy.arange(40) % 4)


@pytest.mark.parametrize(("write", "code"), [(one_class, 2), (other_shape, 3)])
def test_images_that_do_not_fit_never_pass(
    write: Callable[[Path], None], code: int, inputs: Path, tmp_path: Path, quarantine: Call
) -> None:
    write(tmp_path / "clean.npz")
    answer = quarantine(*words(inputs, tmp_path / "out", clean=tmp_path / "clean.npz"))
    assert answer.code == code, answer


def test_weights_that_are_no_numbers_are_refused(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    state = PLAN_OPTIONS.network().state_dict()
    state["linear.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    answer = quarantine(*words(inputs, tmp_path / "out", model=tmp_path / "model.safetensors"))
    assert answer.code == 3
    assert "NaN" in answer.err


@pytest.mark.parametrize("command", ["scan", "calibrate", "control"])
def test_help(command: str, quarantine: Call) -> None:
    answer = quarantine(command, "--help")
    assert answer.code == 0
    assert "Usage" in answer.out


# -- calibrate -----------------------------------------------------------------------------


def calibrate(inputs: Path, out: Path, *more: object) -> list[object]:
    quick = ("--clean", inputs / "clean.npz", "--config", inputs / "quick.yaml", "--device", "cpu", "--out", out)
    return ["calibrate", *NETWORK, *ARGUMENTS, *quick, *more]


def test_calibrate_takes_models_that_are_known_to_be_clean(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    references: list[object] = []
    for number in range(4):
        state = learnt(PLAN_OPTIONS.network(), number).state_dict()
        safetensors.torch.save_file(state, tmp_path / f"{number}.safetensors")
        references += ["--reference", tmp_path / f"{number}.safetensors"]
    answer = quarantine(*calibrate(inputs, tmp_path / "pool.json", *references), "--json")
    assert answer.code == 0, answer
    pool = load_pool(tmp_path / "pool.json")
    assert (len(pool.references), pool.stratum.architecture, pool.stratum.num_classes) == (4, "small_cnn", 4)
    told = {"references": 4, "architecture": "small_cnn", "num_classes": 4, "digest": pool.digest}
    assert answer.json == {"pool": str(tmp_path / "pool.json"), **told}
    assert "4 references: a scan at a false positive rate of 0.05 needs 59" in " ".join(answer.err.split())
    assert not (tmp_path / "pool.json.partial").exists()
    twice = quarantine(
        *calibrate(inputs, tmp_path / "twice.json", *references, "--reference", tmp_path / "0.safetensors")
    )
    assert twice.code == 3
    assert "each model once" in twice.err
    assert not (tmp_path / "twice.json").exists()
    # Four references cannot tell a rate of 0.05, and the scan says so.
    scanned = quarantine(*words(inputs, tmp_path / "scan", pool=tmp_path / "pool.json"), "--json")
    assert scanned.code == 2
    assert "4 references cannot tell a rate of 0.05" in scanned.json["findings"][0]["why"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "nothing to calibrate with"),
        (("--train", "clean.npz", "--reference", "m.pt"), "nothing to calibrate with"),
        (("--train", "absent.npz"), "absent.npz is not there"),
        (("--reference", "absent.pt"), "absent.pt"),
        (("--train", "absent.npz", "--set", "epohcs=1"), "Did you mean 'epochs'?"),
        (("--train", "clean.npz", "--references", "0"), "references is out of range: expected 1 or more, got 0"),
        (("--train", "clean.npz", "--references", "-3"), "references is out of range"),
    ],
)
def test_calibrate_refuses_bad_options(
    more: tuple[object, ...], said: str, inputs: Path, tmp_path: Path, monkeypatch: Any, quarantine: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = quarantine(*calibrate(inputs, tmp_path / "pool.json", *more))
    assert answer.code == 3, answer
    assert said in " ".join(answer.err.split())
    assert not (tmp_path / "pool.json").exists()


OWN_NETWORK = """
from torch import nn

def make(width: int = 4) -> nn.Module:
    convolution, norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(width * 4, 4))
"""
OWN = ("--architecture", "{name}:make", "--input-size", "1,8,8", "--mean", "0.5", "--std", "0.5")


def own_network(folder: Path, name: str, monkeypatch: Any) -> list[object]:
    """Options of a network that the module ``name`` in ``folder`` builds; it counts its classes itself."""
    (folder / f"{name}.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("QUARANTINE_TRUSTED_MODULES", raising=False)
    return [word.format(name=name) for word in OWN]


@pytest.mark.parametrize("trusts", ["option", "environment"])
def test_calibrate_trains_a_network_of_the_user_s_own(
    trusts: str, inputs: Path, tmp_path: Path, monkeypatch: Any, quarantine: Call
) -> None:
    name = f"calibrated_{trusts}"
    network = own_network(tmp_path, name, monkeypatch)
    quick = ("--clean", inputs / "clean.npz", "--config", inputs / "quick.yaml", "--device", "cpu")
    trained = ("--train", inputs / "test.npz", "--references", "2", "--set", "epochs=12", "--set", "batch_size=16")
    words = ["calibrate", *network, *quick, *trained, "--out", tmp_path / "pool.json"]
    refused = quarantine(*words)
    assert refused.code == 3
    assert "is not in a trusted module" in " ".join(refused.err.split())
    if trusts == "environment":
        monkeypatch.setenv("QUARANTINE_TRUSTED_MODULES", name)
    else:
        words += ["--trusted-module", name]
    assert quarantine(*words).code == 0
    pool = load_pool(tmp_path / "pool.json")
    assert (len(pool.references), pool.stratum.architecture, pool.stratum.num_classes) == (2, f"{name}:make", 4)


def test_calibrate_reads_references_of_the_user_s_own_network(
    inputs: Path, tmp_path: Path, monkeypatch: Any, quarantine: Call
) -> None:
    network = own_network(tmp_path, "calibrated_given", monkeypatch)
    model = learnt(build("calibrated_given:make", {}, trusted_modules=("calibrated_given",)))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    quick = ("--clean", inputs / "clean.npz", "--config", inputs / "quick.yaml", "--device", "cpu")
    words = ["calibrate", *network, *quick, "--reference", tmp_path / "m.safetensors", "--out", tmp_path / "pool.json"]
    assert quarantine(*words).code == 3
    answer = quarantine(*words, "--trusted-module", "calibrated_given")
    assert answer.code == 0, answer
    assert len(load_pool(tmp_path / "pool.json").references) == 1


@pytest.mark.parametrize(("count", "warned"), [(1, True), (58, True), (59, False), (60, False)])
def test_calibrate_warns_where_a_scan_at_the_usual_rate_could_not_decide(
    count: int, warned: bool, inputs: Path, tmp_path: Path, quarantine: Call
) -> None:
    answer = quarantine(*calibrate(inputs, tmp_path / "pool.json", "--train", "absent.npz", "--references", count))
    assert answer.code == 3
    assert ("needs 59" in answer.err) == warned


# -- control -----------------------------------------------------------------------------


def control(inputs: Path, out: Path, *more: object) -> list[object]:
    given = ("--model", inputs / "model.safetensors", "--clean", inputs / "clean.npz", "--device", "cpu", "--out", out)
    return ["control", *NETWORK, *ARGUMENTS, *given, *more]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--set", "method=prayer"), "expected one of"),
        (("--set", "rate=2"), "rate is out of range"),
        (("--set", "ratte=0.1"), "Did you mean 'rate'?"),
        (("--clean", "absent.npz"), "absent.npz is not there"),
        (("--model", "absent.pt"), "absent.pt"),
        (("--pool", "absent.json"), "no calibration pool"),
    ],
)
def test_control_refuses_bad_options(
    more: tuple[object, ...], said: str, inputs: Path, tmp_path: Path, monkeypatch: Any, quarantine: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = quarantine(*control(inputs, tmp_path / "control.json", *more))
    assert answer.code == 3, answer
    assert said in " ".join(answer.err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [calibrate, control])
def test_where_the_result_is_to_lie_is_looked_at_before_the_work(
    command: Any, inputs: Path, tmp_path: Path, quarantine: Call
) -> None:
    for out in (tmp_path, tmp_path / "."):
        answer = quarantine(*command(inputs, out))
        assert answer.code == 3, answer
        assert "is a folder" in " ".join(answer.err.split())
    (tmp_path / "file").write_text("")
    answer = quarantine(*command(inputs, tmp_path / "file" / "result.json"))
    assert answer.code == 2
    assert "cannot write" in answer.err


def test_a_control_is_kept_where_the_option_says(
    inputs: Path, tmp_path: Path, monkeypatch: Any, quarantine: Call
) -> None:
    from components.control_model import step

    found = SimpleNamespace(p_value=0.01, fpr=0.05, comparable=True)
    said: dict[str, Any] = {"sentence": lambda: "Found", "to_results": dict}
    planted = SimpleNamespace(planted=True, decided=True, detected=True, scan=found, **said)
    monkeypatch.setattr(step, "positive_control", lambda *_, **__: planted)
    words = control(inputs, tmp_path / "control.json", "--controls", tmp_path / "kept")
    assert "kept since" not in quarantine(*words).out
    again = quarantine(*words)
    assert again.code == 0
    assert "Found (kept since" in " ".join(again.out.split())


# -- what a run is told --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scan-set", "fpr"), "--scan-set is malformed"),
        (("--scan-set", "=1"), "--scan-set is malformed"),
        (("--scan-set", "fpr={a: 1, a: 2}"), "repeated key a"),
    ],
)
def test_run_refuses_bad_settings_of_the_scan(
    words: tuple[str, str], said: str, inputs: Path, tmp_path: Path, quarantine: Call
) -> None:
    given = ("--model", inputs / "model.safetensors", "--clean", inputs / "clean.npz", "--out", tmp_path / "out")
    answer = quarantine("run", *NETWORK, *ARGUMENTS, *given, *words)
    assert answer.code == 3, answer
    assert said in " ".join(answer.err.split())
