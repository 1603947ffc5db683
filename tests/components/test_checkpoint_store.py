"""Checkpoints on the artifact store: where they lie, when they go, and a purify step that is killed outright."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from components._runtime.checkpoint_store import INTERVAL_VARIABLE, SECRET_VARIABLE, step_checkpoints
from components._runtime.embedded_s3 import embedded_s3
from components._runtime.plan import RunSettings
from components._runtime.s3 import list_keys, parse_s3_uri
from components._runtime.store import open_store
from components.purify_model.component import purify_model
from defense_core.checkpoints import NO_CHECKPOINTS, Saved
from defense_core.errors import ConfigError, StorageError
from defense_core.stored_checkpoints import CheckpointFolder, StoredCheckpoints, encoded
from tests.finished_chain import Chain

CONFIGS = {"tsbd": {"epochs": 1, "unlearn_epochs": 2, "min_steps": 0, "lr_grid": [0.01, 0.02]}}
ONE, OTHER = (f"sha256:{digit * 64}" for digit in "12")
SAVED = Saved(3, False, ({"step": 1, "loss": 0.5},), {"weight": torch.arange(6.0).view(2, 3).T})

# Runs the component and kills the process at a checkpoint, as a node that is taken away does.
PROGRAM = """
import json, os, signal, sys
from types import SimpleNamespace
from components.purify_model.component import purify_model
from defense_core import stored_checkpoints

fatal, arguments = int(sys.argv[1]), json.loads(sys.argv[2])
written = []
write = stored_checkpoints.CheckpointFolder.write

def write_and_die(self, name, data):
    write(self, name, data)
    written.append(name)
    if len(written) == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

stored_checkpoints.CheckpointFolder.write = write_and_die
for name in ("bundle", "data", "purified", "evidence"):
    arguments[name] = SimpleNamespace(path=arguments[name], metadata={})
purify_model.python_func(**arguments)
"""


def settings_in(root: str) -> RunSettings:
    return RunSettings(evidence=root, model_name="model", name="run")


def arguments_of(chain: Chain, tmp_path: Path) -> dict[str, Any]:
    return {
        "bundle": str(chain["bundle"]),
        "data": str(chain["data"]),
        "method": "tsbd",
        "configs": json.dumps(CONFIGS),
        "loading": "{}",
        "seed": 0,
        "device": "cpu",
        "run": settings_in(str(tmp_path / "store")).to_json(),
        "execution": "",
        "purified": str(tmp_path / "out" / "purified"),
        "evidence": str(tmp_path / "out" / "evidence"),
    }


def run_here(arguments: dict[str, Any]) -> dict[str, Any]:
    """The component in this process; its evidence."""
    artifacts = ("bundle", "data", "purified", "evidence")
    given = {name: SimpleNamespace(path=arguments[name], metadata={}) for name in artifacts}
    purify_model.python_func(**{**arguments, **given})
    evidence: dict[str, Any] = json.loads(Path(arguments["evidence"]).read_bytes())
    return evidence


def kill_there(arguments: dict[str, Any], fatal: int) -> int:
    """The component in a process that kills itself after so many checkpoints; its exit status."""
    environment = {**os.environ, INTERVAL_VARIABLE: "1e-9", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", PROGRAM, str(fatal), json.dumps(arguments)]
    return subprocess.run(command, env=environment, timeout=120, check=False, capture_output=True).returncode


def test_a_step_that_is_killed_outright_goes_on_and_ends_with_the_same_bytes(
    finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, "0")
    undisturbed = run_here(arguments_of(finished, tmp_path / "undisturbed"))
    assert not (tmp_path / "undisturbed" / "store" / ".checkpoints").exists()
    arguments = arguments_of(finished, tmp_path / "killed")
    assert kill_there(arguments, 1) == -signal.SIGKILL
    place = tmp_path / "killed" / "store" / ".checkpoints"
    assert [path for path in place.rglob("*") if path.is_file()]
    assert open_store(str(tmp_path / "killed" / "store"), "run").records().evidence == {}
    monkeypatch.setenv(INTERVAL_VARIABLE, "1e-9")
    used = []
    load = StoredCheckpoints.load
    monkeypatch.setattr(StoredCheckpoints, "load", lambda self, name: used.append(load(self, name)) or used[-1])
    done = run_here(arguments)
    assert sum(saved.done for saved in used if saved is not None) > 0
    for part in ("inputs", "outputs", "results", "verdict"):
        assert done[part] == undisturbed[part]
    assert not list(place.iterdir()), "checkpoints outlive the finished step"
    assert set(open_store(str(tmp_path / "killed" / "store"), "run").records().evidence) == {"purify.tsbd"}


def test_a_method_that_diverges_leaves_no_checkpoints(
    finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, "1e-9")
    arguments = arguments_of(finished, tmp_path)
    arguments["configs"] = json.dumps({"tsbd": {"lr": 1e38, "epochs": 1, "unlearn_epochs": 1}})
    assert run_here(arguments)["verdict"] == "UNKNOWN"
    assert not list((tmp_path / "store" / ".checkpoints").iterdir())


@pytest.mark.parametrize("where", ["path", "file", "s3"])
def test_checkpoints_lie_under_the_name_of_the_work_until_it_is_done(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, "1e-9")
    with embedded_s3("store") if where == "s3" else monkeypatch.context():
        root = {"path": str(tmp_path), "file": tmp_path.as_uri(), "s3": "s3://store/evidence"}[where]
        one, other = step_checkpoints(root), step_checkpoints(root)
        for step, key in ((one, ONE), (other, OTHER)):
            checkpoint = step.of_work(key).of_loop("Repair lr=0.01")
            assert checkpoint.load() is None
            checkpoint.save(lambda: SAVED, finished=False)
        if where == "s3":
            keys = list_keys(parse_s3_uri("s3://store/evidence/"))
            assert keys[0] == f"evidence/.checkpoints/{'1' * 64}/001-repair-lr-0.01"
        else:
            assert (tmp_path / ".checkpoints" / ("1" * 64) / "001-repair-lr-0.01").is_file()
        found = loaded(root, ONE)
        assert found is not None
        assert (found.done, found.finished, found.history) == (3, False, SAVED.history)
        assert torch.equal(found.tensors["weight"], SAVED.tensors["weight"])
        assert found.tensors["weight"].stride() == (1, 3)
        one.clear()
        one.clear()  # nothing is there any more
        assert loaded(root, ONE) is None
        assert loaded(root, OTHER) is not None


def loaded(root: str, key: str, **environment: str) -> Saved | None:
    """What the first loop of the work finds."""
    return step_checkpoints(root, {INTERVAL_VARIABLE: "1", **environment}).of_work(key).of_loop("repair lr=0.01").load()


def test_a_checkpoint_without_the_seal_of_the_secret_is_not_used(tmp_path: Path) -> None:
    root, sealed = str(tmp_path), {SECRET_VARIABLE: "a long random text"}
    step = step_checkpoints(root, {INTERVAL_VARIABLE: "1e-9", **sealed})
    step.of_work(ONE).of_loop("repair lr=0.01").save(lambda: SAVED, finished=True)
    assert loaded(root, ONE, **sealed) is not None
    assert loaded(root, ONE) is None
    assert loaded(root, ONE, **{SECRET_VARIABLE: "another"}) is None
    path = tmp_path / ".checkpoints" / ("1" * 64) / "001-repair-lr-0.01"
    path.write_bytes(encoded(SAVED, key=ONE, name=path.name))  # what anybody can make who may write there
    assert loaded(root, ONE) is not None
    assert loaded(root, ONE, **sealed) is None
    assert sealed[SECRET_VARIABLE] not in repr(step)
    assert sealed[SECRET_VARIABLE].encode() not in path.read_bytes()


def test_checkpoints_that_cannot_be_removed_do_not_fail_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: CheckpointFolder) -> None:
        raise StorageError("cannot remove it")

    monkeypatch.setattr(CheckpointFolder, "clear", refuse)
    step = step_checkpoints(str(tmp_path))
    step.of_work(ONE)
    with caplog.at_level("WARNING", "quarantine"):
        step.clear()
    assert "remove them by hand" in caplog.text


def test_zero_seconds_switch_checkpoints_off(tmp_path: Path) -> None:
    step = step_checkpoints(str(tmp_path), {INTERVAL_VARIABLE: "0"})
    assert step.of_work(ONE) is NO_CHECKPOINTS
    step.clear()
    assert list(tmp_path.iterdir()) == []
    assert step_checkpoints(str(tmp_path), {}).interval_s == 60


@pytest.mark.parametrize("text", ["-1", "soon", "nan", "inf"])
def test_a_malformed_interval_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=INTERVAL_VARIABLE):
        step_checkpoints(str(tmp_path), {INTERVAL_VARIABLE: text})
