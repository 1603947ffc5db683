"""Releases of earlier versions verify as they did, whatever the clock says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from components._runtime.signing_keys import TrustedSigner, generate_key_pair
from components._runtime.verification import Verification, verify_release
from defense_core.policy import parse_policy
from defense_core.verdict import Verdict

HERE = Path(__file__).resolve().parent
FOLDERS = sorted(path for path in HERE.glob("v*") if path.is_dir())
MAX_BYTES = 300_000

LATER = """
import datetime, json, sys, time
from pathlib import Path

SHIFT_S = float(sys.argv[1])
real_time, real_datetime = time.time, datetime.datetime

class Shifted(real_datetime):
    @classmethod
    def now(cls, tz=None):
        return real_datetime.fromtimestamp(real_time() + SHIFT_S, tz)

    @classmethod
    def utcnow(cls):
        return cls.now()

    today = utcnow

time.time = lambda: real_time() + SHIFT_S
time.time_ns = lambda: int(time.time() * 1e9)
datetime.datetime = Shifted

from components._runtime.signing_keys import TrustedSigner
from components._runtime.verification import verify_release

folder = Path(sys.argv[2])
found = verify_release(folder / "release", TrustedSigner(public_key=folder / "signing.pub"))
from components._runtime.evidence import Clock
differences = [str(each) for each in found.differences]
print(json.dumps([str(found.verdict), found.decision, Clock.start().started, differences]))
"""


def verified(folder: Path, release: Path | None = None, **options: Any) -> Verification:
    return verify_release(release or folder / "release", TrustedSigner(public_key=folder / "signing.pub"), **options)


def test_there_is_a_folder_of_the_first_format() -> None:
    assert [folder.name for folder in FOLDERS][:1] == ["v1"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_old_release_verifies(folder: Path) -> None:
    found = verified(folder)
    expected = json.loads((folder / "expected.json").read_text())
    assert found.verdict is Verdict.PASS, found.differences
    assert {key: getattr(found, key) for key in expected} == expected
    policy = json.loads((folder / "release" / "evidence" / "policy.json").read_text())
    assert verified(folder, policy=parse_policy(policy)).verdict is Verdict.PASS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("years", [-30, 40])
def test_an_old_release_verifies_under_any_clock(folder: Path, years: int) -> None:
    command = [sys.executable, "-c", LATER, str(years * 365.25 * 86400), str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent.parent)
    verdict, decision, clock, differences = json.loads(answer.stdout)
    assert (verdict, decision, differences) == ("PASS", "allow", [])
    assert abs(int(clock[:4]) - datetime.now(UTC).year) > 20


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_old_release_still_guards_every_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "release", tmp_path / "release")
    for path in sorted(path for path in (tmp_path / "release").rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        found = verified(folder, tmp_path / "release")
        assert path.relative_to(tmp_path / "release").as_posix() in {each.file for each in found.differences}
        path.write_bytes(data)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_only_the_key_that_signed_it_is_good(folder: Path, tmp_path: Path) -> None:
    other = generate_key_pair(tmp_path)
    found = verify_release(folder / "release", TrustedSigner(public_key=other.public))
    assert found.verdict is Verdict.FAIL


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_folder_is_small_and_holds_no_private_key(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert not any(b"PRIVATE KEY" in path.read_bytes() for path in files)
