"""The cost of methods is measured case by case, and what stands is not measured again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results, speed

CASES = [("nft", 250), ("fip", 250), ("nft", 500)]


def row(method: str, images: int, seconds: float) -> dict[str, Any]:
    return {
        "method": method, "clean_images": images, "architecture": "resnet20", "width": None, "parameters": 9,
        "seconds": seconds,
    }  # fmt: skip


def test_what_was_measured_before_an_interruption_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, int]] = []
    stop_at = [2]

    def costs(train: object, known: set[tuple[Any, ...]], *, device: str) -> Any:
        for case in CASES:
            made = row(*case, seconds=float(len(measured)))
            if speed.case_of(made) in known:
                continue
            if len(measured) == stop_at[0]:
                raise KeyboardInterrupt
            measured.append(case)
            yield made

    monkeypatch.setattr(speed, "costs", costs)
    monkeypatch.setattr(speed, "load_cifar10", lambda folder: (None, None))
    for module in (results, speed):
        monkeypatch.setattr(module, "commit", lambda: "abc1234")
    monkeypatch.setattr(speed, "read_rows", lambda name: results.read_rows(name, folder=tmp_path))
    monkeypatch.setattr(
        speed, "write_results", lambda name, rows, **more: results.write_results(name, rows, folder=tmp_path, **more)
    )
    monkeypatch.setattr(sys, "argv", ["speed", "--data", str(tmp_path), "--part", "costs"])
    with pytest.raises(KeyboardInterrupt):
        speed.main()
    assert [each["seconds"] for each in results.read_rows("cost", folder=tmp_path)] == [0.0, 1.0]
    stop_at[0] = 9
    speed.main()
    assert measured == CASES
    assert [each["seconds"] for each in results.read_rows("cost", folder=tmp_path)] == [0.0, 1.0, 2.0]
    for module in (results, speed):
        monkeypatch.setattr(module, "commit", lambda: "def5678")
    stop_at[0] = 4
    with pytest.raises(KeyboardInterrupt):
        speed.main()
    rows = results.read_rows("cost", folder=tmp_path)
    assert [(each["seconds"], each["measured"]["commit"]) for each in rows] == [
        (3.0, "def5678"), (1.0, "abc1234"), (2.0, "abc1234"),
    ]  # fmt: skip
