"""The command line: happy paths, exit codes, sentences, JSON, and nothing left at --out after a failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
import yaml
from typer.main import get_command

import pipelines
from components._runtime.evidence import write_evidence
from components.evaluate_model.step import evaluate_candidate
from components.export_onnx.step import export_onnx
from components.fetch_model.step import fetch_model
from components.purify_model.step import purify_candidate
from components.select_model.step import select_model
from defense_core import __version__
from defense_core.bundle import load_bundle
from defense_core.purify import METHODS
from pipelines import cli, panels
from pipelines.console import print_comparison
from tests.pipelines.commands import Answer, Call
from tests.small_model import DENYING, PLAN_OPTIONS, POLICY, learnt, make_inputs

ROOT = Path(pipelines.__file__).parent.parent
COMMANDS = ("purify", "evaluate", "export", "gate", "run", "demo", "compile", "methods", "report", "fleet")
QUICK = ("--set", "epochs=1", "--set", "min_steps=0", "--set", "unlearn_epochs=1", "--set", "lr=1e-3", "--set", "n=0.1")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors, clean.npz, test.npz, and a probe."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    safetensors.torch.save_file(learnt(PLAN_OPTIONS.network()).state_dict(), folder / "model.safetensors")
    (folder / "probe.yaml").write_text("{name: corner, kind: badnets, target: 0, size: 2}\n")
    return folder


@pytest.fixture(scope="session")
def purified(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that purify made."""
    out = tmp_path_factory.mktemp("purified") / "out"
    config = {"epochs": 1, "min_steps": 0, "unlearn_epochs": 1, "lr": 1e-3, "n": 0.1}
    purify_candidate(
        inputs / "model.safetensors",
        inputs / "clean.npz",
        out,
        method="tsbd",
        spec=PLAN_OPTIONS.spec,
        config=config,
        device="cpu",
    )
    return out


def model_options(inputs: Path) -> list[str]:
    return [
        *("--model", str(inputs / "model.safetensors"), "--architecture", "small_cnn"),
        *("--architecture-args", '{"width": 4, "in_channels": 1, "num_classes": 4}'),
        *("--input-size", "1,8,8", "--mean", "0.5", "--std", "0.5"),
    ]


def purify_words(inputs: Path, out: Path, *more: str, method: str = "tsbd") -> list[str]:
    clean = str(inputs / "clean.npz")
    return ["purify", *model_options(inputs), "--clean", clean, "--method", method, "--out", str(out), *more]


def with_option(words: list[str], option: str, value: str) -> list[str]:
    """The command with another value for ``option``, or with the option added."""
    if option not in words:
        return [*words, option, value]
    position = words.index(option) + 1
    return [*words[:position], value, *words[position + 1 :]]


# -- help --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, quarantine: Call) -> None:
    answer = quarantine(command, "--help")
    assert answer.code == 0
    assert "Usage" in answer.out
    assert f" {command} " in answer.out


def test_help_lists_every_command_and_the_exit_codes(quarantine: Call) -> None:
    answer = quarantine("--help")
    assert answer.code == 0
    for command in COMMANDS:
        assert f" {command} " in answer.out
    assert "0 pass, 1 fail, 2 unknown" in answer.out


def test_every_command_stands_under_a_heading(quarantine: Call) -> None:
    text = quarantine("--help").out
    headings = (panels.WHOLE, panels.STEP, panels.CLUSTER, panels.EVIDENCE)
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "─ Commands ─" not in text


def test_version(quarantine: Call) -> None:
    assert quarantine("--version") == Answer(0, f"{__version__}\n", "")


def test_methods_are_listed(quarantine: Call) -> None:
    answer = quarantine("methods", "--json")
    assert answer.code == 0
    assert answer.json.keys() == METHODS.keys()
    assert answer.json["tsbd"]["config"]["m"] == 0.7
    listed = quarantine("methods").out
    assert all(f"{name}: " in listed for name in METHODS)


def test_every_command_that_ends_prints_json_when_asked_to() -> None:
    def without(command: Any, words: tuple[str, ...]) -> Iterator[str]:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                yield from without(below, (*words, name))
        elif "--json" not in {option for parameter in command.params for option in parameter.opts}:
            yield " ".join(words)

    # These two run until they are stopped, and log JSON lines.
    assert set(without(get_command(cli.app), ())) == {"hooks serve", "hooks work"}


def test_the_readme_names_every_command() -> None:
    command: Any = get_command(cli.app)
    page = (ROOT / "README.md").read_text("utf-8")
    rows = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `quarantine "))
    assert set(command.commands) | {"--version"} <= set(re.findall(r"[-a-z]+", rows))


def test_compile_writes_the_pipeline(tmp_path: Path, quarantine: Call) -> None:
    answer = quarantine("compile", "--out", tmp_path)
    assert answer.code == 0
    written = [Path(line) for line in answer.out.splitlines()]
    assert [path.name for path in written] == ["quarantine.yaml", "promote.yaml"]
    assert all(path.read_text().startswith("# PIPELINE DEFINITION") for path in written)
    told = quarantine("compile", "--out", tmp_path, "--json")
    assert told.json == {"written": [str(path) for path in written], "removed": []}
    (tmp_path / "admission.yaml").write_text("of an earlier compilation with node pools")
    assert f"removed {tmp_path / 'admission.yaml'}" in quarantine("compile", "--out", tmp_path).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["promote.yaml", "quarantine.yaml"]


def test_compile_writes_what_node_pools_need(tmp_path: Path, quarantine: Call) -> None:
    answer = quarantine("compile", "--out", tmp_path / "out", "--node-pools", "eks")
    assert answer.code == 0
    assert [Path(line).name for line in answer.out.splitlines()] == [
        "quarantine.yaml",
        "promote.yaml",
        "admission.yaml",
    ]
    assert "nvidia.com/gpu" in (tmp_path / "out" / "quarantine.yaml").read_text()
    (tmp_path / "pools.yaml").write_text("format: 1\nsteps: {purify_model: {memory: 8Gi}}\n")
    refused = quarantine("compile", "--out", tmp_path / "other", "--node-pools", tmp_path / "pools.yaml")
    assert refused.code == 3
    assert "memory_limit" in refused.err
    assert not (tmp_path / "other").exists()


# -- happy paths -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tsbd", "fine_tuning"])
def test_purify(method: str, inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    out = tmp_path / "new" / "out"
    quick = QUICK if method == "tsbd" else ("--set", "epochs=1", "--set", "lr=1e-3")
    answer = quarantine(*purify_words(inputs, out, *quick, "--json", "--seed", "3", method=method))
    assert answer.code == 0
    assert sorted(path.name for path in out.iterdir()) == ["bundle.json", "model.safetensors", "result.json"]
    assert answer.json == json.loads((out / "result.json").read_bytes())
    assert answer.json["name"] == f"purify.{method}"
    assert answer.json["results"]["config"]["lr"] == 1e-3
    assert answer.json["environment"]["seed"] == 3
    bundle = load_bundle(out)
    assert bundle.digest == answer.json["outputs"]["model"]
    assert bundle.model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_purify_again_gives_the_same_model(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    for name in ("one", "two"):
        answer = quarantine(*purify_words(inputs, tmp_path / name, *QUICK))
        assert answer.code == 0
        assert f"purified model in {tmp_path / name}" in answer.out
    one, two = (tmp_path / name for name in ("one", "two"))
    for file in ("bundle.json", "model.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_settings_go_on_top_of_the_config_file(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    (tmp_path / "config.yaml").write_text("epochs: 1\nlr: 5e-3\nweight_decay: 0\n")
    words = purify_words(inputs, tmp_path / "out", "--config", str(tmp_path / "config.yaml"), method="fine_tuning")
    answer = quarantine(*words, "--set", "lr=1e-3", "--json")
    config = answer.json["results"]["config"]
    assert (config["epochs"], config["lr"], config["weight_decay"]) == (1, 1e-3, 0.0)


def test_purify_a_bundle_describes_itself(purified: Path, inputs: Path, tmp_path: Path, quarantine: Any) -> None:
    words = ["purify", "--model", purified, "--clean", inputs / "clean.npz", "--method", "fine_tuning"]
    assert quarantine(*words, "--set", "epochs=1", "--set", "lr=1e-3", "--out", tmp_path / "out").code == 0


def test_evaluate(purified: Path, inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    words = ["evaluate", "--model", purified, "--test", inputs / "test.npz", "--probe", inputs / "probe.yaml"]
    answer = quarantine(*words, "--name", "tsbd", "--reference", purified, "--out", tmp_path / "e.json", "--json")
    assert answer.code == 0
    assert answer.json == json.loads((tmp_path / "e.json").read_bytes())
    assert answer.json["name"] == "evaluate.tsbd"
    assert answer.json["results"]["probes"][0]["name"] == "corner"
    assert answer.json["results"]["acc_drop"] == 0.0
    shown = quarantine(*words, "--out", tmp_path / "again.json")
    assert shown.code == 0
    assert "corner" in shown.out
    # A measurement judges nothing, and one model is neither before nor after.
    assert f"measured: {tmp_path / 'again.json'}" in shown.out
    assert "Measured (95 % intervals)" in shown.out
    assert not any(word in shown.out for word in ("PASS", "Before, after", "role", "selected"))


def test_evaluate_what_cannot_be_measured_is_unknown(
    purified: Path, inputs: Path, tmp_path: Path, quarantine: Call
) -> None:
    content = numpy.load(inputs / "test.npz")
    only_target = content["labels"] == 0
    numpy.savez(tmp_path / "zero.npz", images=content["images"][only_target], labels=content["labels"][only_target])
    answer = quarantine(
        *("evaluate", "--model", purified, "--test", tmp_path / "zero.npz", "--probe", inputs / "probe.yaml"),
        *("--out", tmp_path / "e.json"),
    )
    assert answer.code == 2
    assert "UNKNOWN" in answer.out


def test_export(purified: Path, inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    answer = quarantine("export", "--model", purified, "--test", inputs / "test.npz", "--out", tmp_path / "o", "--json")
    assert answer.code == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["model.onnx", "result.json"]
    assert answer.json["results"]["parity"][0]["argmax_agreement"] == 1.0


def test_several_models_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    names = ("before", "tsbd", "fine_tuning")
    print_comparison(
        {f"evaluate.{name}": {"results": {"acc": figure, "probes": []}} for name in names}, selected="tsbd"
    )
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Before, after and control", "role", "tsbd *", "control"))
    print_comparison({}, selected=None)
    assert capsys.readouterr().out == ""


# -- gate --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evidence of a whole run, one file a step."""
    root = tmp_path_factory.mktemp("run")
    plan = make_inputs(root / "inputs")
    images = {"clean": root / "data" / "clean.npz", "test": root / "data" / "test.npz"}
    config = {"epochs": 1, "min_steps": 0, "unlearn_epochs": 1, "lr": 1e-3, "n": 0.1}
    made = [
        fetch_model(plan, root / "bundle", root / "data"),
        evaluate_candidate(root / "bundle", name="before", device="cpu", **images),
        purify_candidate(root / "bundle", images["clean"], root / "tsbd", method="tsbd", config=config, report=0.0),
        evaluate_candidate(root / "tsbd", name="tsbd", reference=root / "bundle", device="cpu", **images),
        select_model([root / "tsbd"], root / "selected", order=("tsbd",)),
        export_onnx(root / "selected", root / "onnx", **images),
    ]
    for each in made:
        write_evidence(root / "evidence" / f"{each['name']}.json", each)
    return root / "evidence"


def policy_file(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(("policy", "code", "outcome"), [(POLICY, 0, "allow"), (DENYING, 1, "deny")])
def test_gate(policy: Any, code: int, outcome: str, evidence: Path, tmp_path: Path, quarantine: Call) -> None:
    words = ["gate", "--policy", policy_file(tmp_path / "p.yaml", policy), "--evidence", evidence]
    answer = quarantine(*words, "--json", "--out", tmp_path / "decision")
    assert answer.code == code, answer
    assert answer.json["results"]["outcome"] == outcome
    assert (tmp_path / "decision" / "decision.json").is_file()
    shown = quarantine(*words)
    assert shown.code == code
    assert outcome in shown.out
    assert policy["rules"][0]["why"].split()[0] in shown.out


def test_gate_decides_the_same_every_time(evidence: Path, tmp_path: Path, quarantine: Call) -> None:
    policy = policy_file(tmp_path / "p.yaml", POLICY)
    for name in ("one", "two"):
        words = ["gate", "--policy", policy, "--evidence", evidence, "--at", "2027-01-01T00:00:00Z"]
        quarantine(*words, "--out", tmp_path / name)
    assert (tmp_path / "one" / "decision.json").read_bytes() == (tmp_path / "two" / "decision.json").read_bytes()


def test_gate_without_evidence_is_unknown(tmp_path: Path, quarantine: Call) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        answer = quarantine(
            "gate", "--policy", "strict", "--evidence", tmp_path / folder, "--out", tmp_path / "out", "--json"
        )
        assert answer.code == answer.json["exit_code"] == 2
        assert answer.json["error"] == "EvidenceMissing"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**POLICY, "promot": True}, "promot"),
        ({**POLICY, "rules": [{**POLICY["rules"][0], "minimum": 0}]}, "minimum"),
        ({**POLICY, "schema": 99}, "schema"),
        ([], "a mapping with text keys"),
    ],
)
def test_gate_refuses_a_malformed_policy(
    content: Any, words: str, evidence: Path, tmp_path: Path, quarantine: Call
) -> None:
    policy = policy_file(tmp_path / "p.yaml", content)
    answer = quarantine("gate", "--policy", policy, "--evidence", evidence, "--out", tmp_path / "out")
    assert answer.code == 3
    assert words in answer.err
    assert not (tmp_path / "out").exists()


def test_gate_refuses_a_policy_with_a_repeated_key(evidence: Path, tmp_path: Path, quarantine: Any) -> None:
    text = yaml.safe_dump(POLICY) + "\npromote: false\n"
    (tmp_path / "p.yaml").write_text(text)
    answer = quarantine("gate", "--policy", tmp_path / "p.yaml", "--evidence", evidence)
    assert answer.code == 3
    assert "repeated key promote" in answer.err


def test_gate_refuses_damaged_evidence(evidence: Path, tmp_path: Path, quarantine: Call) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "fetch.json").write_text("{")
    answer = quarantine("gate", "--policy", "strict", "--evidence", tmp_path / "e")
    assert answer.code == 3
    assert "damaged" in answer.err


# -- bad input ---------------------------------------------------------------------------

# option, value, the exit code, and words of the sentence
BAD_OPTIONS = [
    ("--method", "prayer", "expected one of", "got 'prayer'"),
    ("--set", "epohcs=1", "unknown key 'tsbd.epohcs'", "Did you mean 'epochs'?"),
    ("--set", "epochs", "--set is malformed: expected KEY=VALUE", "got 'epochs'"),
    ("--set", "epochs=-1", "epochs is out of range: expected 0 or more", "got -1"),
    ("--set", "epochs=many", "tsbd.epochs has the wrong type or value: expected int", "got 'many'"),
    ("--set", "n={a: 1, a: 2}", "repeated key a", "--set n"),
    ("--config", "absent.yaml", "absent.yaml cannot be read: expected a YAML file", "No such file"),
    ("--model", "absent.pt", "absent.pt", "expected"),
    ("--clean", "absent.npz", "absent.npz is not there", "expected"),
    ("--architecture", "small_cn", "allow-list", "Did you mean small_cnn"),
    ("--architecture", "os:system", "expected", "os"),
    ("--architecture-args", "[4]", "--architecture-args is malformed: expected a JSON mapping", "got"),
    ("--architecture-args", '{"width": 4, "in_channels": 1, "num_classes": 7}', "expected", "7"),
    ("--architecture-args", '{"widht": 4}', "widht", "expected"),
    ("--input-size", "1x8x8", "--input-size is malformed: expected whole numbers", "got '1x8x8'"),
    ("--input-size", "3,8,8", "expected", "got"),
    ("--mean", "0.5,0.5", "mean", "expected 1 values"),
    ("--std", "0", "std", "expected positive"),
    ("--class-names", "a,b", "class_names", "expected 4 names"),
    ("--augment", "rotate", "augment", "expected one of 'none', 'crop', 'crop_flip'"),
    ("--device", "tpu", "device is unknown: expected auto, cpu or cuda", "got 'tpu'"),
    ("--report", "1.5", "select + report is out of range: expected fractions below 1", "got"),
    ("--max-bytes", "10", "expected at most 10 bytes", "got"),
    ("--max-bytes", "0", "max_bytes is out of range: expected a positive number", "got 0"),
    ("--load-timeout-s", "-1", "timeout_s is out of range", "got -1"),
    ("--seed", "99999999999999999999", "--seed", "less than or equal to 9223372036854775807"),
    ("--seed", "-1", "--seed", "greater than or equal to 0"),
    ("--seed", "one", "--seed", "integer"),
    ("--trusted-module", "torch", "trust", "expected"),
]


@pytest.mark.parametrize(("option", "value", "first", "second"), BAD_OPTIONS, ids=lambda value: str(value)[:24])
def test_bad_options_are_a_sentence_and_leave_nothing(
    option: str,
    value: str,
    first: str,
    second: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quarantine: Call,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = with_option(purify_words(inputs, tmp_path / "out", "--device", "cpu"), option, value)
    answer = quarantine(*words)
    assert answer.code == 3, answer
    for expected in (first, second):
        assert expected in answer.err
    assert answer.out == ""
    assert list(tmp_path.iterdir()) == []
    as_json = quarantine(*words, "--json")
    assert as_json.code == as_json.json["exit_code"] == 3
    assert as_json.json["what"]


@pytest.mark.parametrize(
    "words",
    [[], ["nonsense"], ["purify"], ["purify", "--nonsense"], ["gate", "--policy"], ["purify", "surplus"], ["lab?"]],
)
def test_wrong_usage_is_told_with_exit_code_3(words: list[str], quarantine: Call) -> None:
    answer = quarantine(*words)
    assert answer.code == 3
    assert "Usage" in answer.err + answer.out or "Error" in answer.err
    if words:
        as_json = quarantine(*words, "--json")
        assert (as_json.code, as_json.json["exit_code"]) == (3, 3)


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_nothing_to_look_at(command: str, purified: Path, tmp_path: Path, quarantine: Call) -> None:
    answer = quarantine(command, "--model", purified, "--out", tmp_path / "out")
    assert answer.code == 3
    assert "expected a test set or a clean set, got neither" in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "export"])
@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ("{kind: badnets, sise: 2}", "Did you mean 'size'?"),
        ("{kind: badnets, target: 9}", "expected 0..3, got 9"),
        ("{kind: badnets, size: 2, size: 3}", "repeated key size"),
        ("{size: 2}", "a mapping with a key kind"),
        ("badnets", "a probe, or a list of probes"),
        ("{kind: badnets, size: 9}", "does not fit"),
    ],
)
def test_bad_probes(
    command: str, probe: str, words: str, purified: Path, inputs: Path, tmp_path: Path, quarantine: Any
) -> None:
    (tmp_path / "probe.yaml").write_text(probe)
    answer = quarantine(
        *(command, "--model", purified, "--test", inputs / "test.npz", "--probe", tmp_path / "probe.yaml"),
        *("--out", tmp_path / "out"),
    )
    assert answer.code == 3
    assert words in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["probe.yaml"]


def test_a_folder_in_use_is_left_as_it_is(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    answer = quarantine(*purify_words(inputs, tmp_path / "out", *QUICK))
    assert answer.code == 3
    assert "is in use: expected a new or empty folder" in answer.err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_divergence_is_unknown_and_leaves_nothing(inputs: Path, tmp_path: Path, quarantine: Any) -> None:
    words = purify_words(inputs, tmp_path / "out", "--set", "lr=1e38", "--set", "epochs=1", method="fine_tuning")
    answer = quarantine(*words, "--json")
    assert answer.code == answer.json["exit_code"] == 2
    assert answer.json["error"] == "MethodDiverged"
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite(inputs: Path, tmp_path: Path, quarantine: Call) -> None:
    state = PLAN_OPTIONS.network().state_dict()
    state["linear.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    words = with_option(purify_words(inputs, tmp_path / "out"), "--model", str(tmp_path / "model.safetensors"))
    answer = quarantine(*words)
    assert answer.code == 3
    assert "NaN" in answer.err
    assert not (tmp_path / "out").exists()


def test_errors_with_markup_are_shown_as_they_are(inputs: Path, tmp_path: Path, quarantine: Any) -> None:
    answer = quarantine(*with_option(purify_words(inputs, tmp_path / "out"), "--method", "[red]x[/red]"))
    assert answer.code == 3
    assert "got '[red]x[/red]'" in answer.err


# -- a process of its own ------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "MLFLOW_DISABLE_TELEMETRY": "true"}


def test_a_real_process_ends_with_the_exit_code(inputs: Path, tmp_path: Path) -> None:
    words = purify_words(inputs, tmp_path / "out", "--set", "epohcs=1")
    command = [sys.executable, "-m", "pipelines.cli", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown key 'tsbd.epohcs'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_purify_leaves_nothing(number: signal.Signals, inputs: Path, tmp_path: Path) -> None:
    settings = ("--set", "epochs=1000000", "--set", "lr=1e-3", "--set", "n=0.1", "--set", "unlearn_epochs=1")
    # As from a terminal, also where the tests themselves run under nohup.
    begin = (
        "import runpy, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "runpy.run_module('pipelines.cli', run_name='__main__')"
    )
    command = [sys.executable, "-c", begin, *purify_words(inputs, tmp_path / "out", *settings)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "choose n" in line:  # stage 2, which takes for ever, is next
                break
        assert list(tmp_path.iterdir()), "the folder is being made"
        time.sleep(0.5)
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 2
    assert f"stopped by {number.name}" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
