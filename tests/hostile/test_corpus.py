"""Every hostile file: no payload runs, nothing crashes, none is judged clean. Every benign file: not blocked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.benign_files import BENIGN
from tests.hostile.corpus import (
    BENIGN_LIMITS,
    LOAD_LIMITS,
    SCAN_LIMITS,
    HostileFile,
    hostile_files,
    judge_benign,
    judge_hostile,
)
from tests.hostile.hostile_archives import ARCHIVES
from tests.hostile.hostile_pickles import PICKLES

HOSTILE = list(hostile_files())
RUNS = [name for name, (_, _, runs) in PICKLES.items() if runs]
# Where code is, "inconclusive" would be too little said.
CODE = ("pickle opcodes", "indirect calls", "gadget names", "polyglots")
# A name that is no ASCII is refused by the unpickler too; an attribute of a mapping calls nothing.
SELF_DEFEATING = ("confusable-module-name", "build-dict-of-class")
# These are made to keep a reader busy; nothing else may go unread because the time was up.
ENDLESS = ("deeply-nested-lists", "exponential-hash")
# Unpickles each file of a folder as a careless reader would, whatever becomes of it.
_CARELESS = """
import contextlib, io, pathlib, pickle, sys
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            pickle.loads(path.read_bytes())
        except Exception:
            continue
"""


def test_the_corpus_is_as_large_and_varied_as_promised() -> None:
    assert len(HOSTILE) >= 60
    assert len(BENIGN) >= 40
    assert len({file.name for file in HOSTILE}) == len(HOSTILE)
    assert {file.label for file in HOSTILE} >= {
        "pickle opcodes", "broken pickles", "indirect calls", "gadget names", "nested archives", "wrong names",
        "zip bombs", "zip layout", "paths and links", "polyglots", "safetensors", "torch files", "pt2", "onnx",
        "keras", "numpy", "no format",
    }  # fmt: skip


def test_control_the_payloads_are_real(tmp_path: Path) -> None:
    """Python's own unpickler runs them, polyglots included; otherwise the tests below would prove nothing."""
    folder, canaries = tmp_path / "files", tmp_path / "canaries"
    folder.mkdir()
    canaries.mkdir()
    for number, name in enumerate(RUNS):
        (folder / f"{number:03}").write_bytes(PICKLES[name][1](str(canaries / f"{number:03}")))
    polyglots = {name: ARCHIVES[name][1] for name in ("safetensors and pickle", "gif and pickle")}
    for name, make in polyglots.items():
        make(folder, str(canaries / name))
    subprocess.run([sys.executable, "-c", _CARELESS, str(folder)], cwd=tmp_path, check=True, timeout=60)
    expected = {*(f"{number:03}" for number in range(len(RUNS))), *polyglots}
    missing = expected - {path.name for path in canaries.iterdir()}
    assert missing == set()
    assert len(RUNS) >= 50


@pytest.mark.parametrize("file", HOSTILE, ids=lambda file: file.name)
def test_hostile_file_is_never_clean_never_run_and_never_a_crash(file: HostileFile, tmp_path: Path) -> None:
    judged = judge_hostile(file, tmp_path)
    assert not judged.payload_ran
    assert judged.crashed == ""
    assert judged.rules
    if file.label in CODE and not file.name.startswith(SELF_DEFEATING):
        assert judged.verdict == "dangerous"
    else:
        assert judged.verdict in ("dangerous", "inconclusive")
    assert not judged.loaded
    if "too-slow" in judged.rules and not file.name.startswith(ENDLESS):
        # On a busy machine the time may be up for any file, so it is given more.
        again = judge_hostile(file, tmp_path / "again", BENIGN_LIMITS)
        assert "too-slow" not in again.rules
    assert SCAN_LIMITS.timeout_s < LOAD_LIMITS.timeout_s


@pytest.mark.parametrize("name", BENIGN)
def test_benign_file_is_not_blocked(name: str, tmp_path: Path) -> None:
    judged = judge_benign(name, tmp_path)
    assert (judged.verdict, judged.rules, judged.crashed) == ("clean", (), "")
