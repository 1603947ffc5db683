"""A disk that fills while a bundle is written: a typed error, and nothing left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, because a limit on file size cannot be raised again.
PROGRAM = """
import json, resource, sys
from pathlib import Path
from defense_core.architectures import build
from defense_core.bundle import ModelSpec, bundle_of, save_bundle
from defense_core.errors import QuarantineError

arguments = {"width": 16, "in_channels": 1, "num_classes": 3}
spec = ModelSpec("small_cnn", arguments, (1, 8, 8), (0.5,), (0.5,), 3)
bundle = bundle_of(build("small_cnn", arguments), spec)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    save_bundle(bundle, Path(sys.argv[1]), replace=sys.argv[3] == "replace")
except QuarantineError as error:
    print(json.dumps({**error.to_mapping(), "text": str(error)}))
"""


def save(path: Path, max_file_bytes: int, how: str = "new") -> dict[str, object]:
    """What saving a bundle says in a process whose files may not grow beyond ``max_file_bytes``."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(max_file_bytes), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)) if done.stdout else {}


@pytest.mark.parametrize("max_file_bytes", [1000, 20_000])
def test_a_bundle_that_does_not_fit(max_file_bytes: int, tmp_path: Path) -> None:
    said = save(tmp_path / "out", max_file_bytes)
    assert (said["error"], said["exit_code"]) == ("StorageError", 2)
    assert "nothing was left behind" in str(said["text"])
    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_survives(tmp_path: Path) -> None:
    assert save(tmp_path / "out", 1 << 30) == {}
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert save(tmp_path / "out", 1000, "replace")["error"] == "StorageError"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
