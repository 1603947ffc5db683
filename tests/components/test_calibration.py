"""Making a calibration pool: references that are trained here, and what a second start finds of the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.scan_backdoor import calibrate
from defense_core.errors import Cancelled
from defense_core.loop import Tuning
from defense_core.scan.pool import Pool, load_pool
from defense_core.scan.references import ReferenceTraining
from tests.small_model import PLAN_OPTIONS, make_inputs


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the references that are trained from here on."""
    numbers: list[int] = []
    real = calibrate.train_reference

    def counted(network: Any, data: Any, number: int, *rest: Any, **more: Any) -> Any:
        numbers.append(number)
        return real(network, data, number, *rest, **more)

    monkeypatch.setattr(calibrate, "train_reference", counted)
    return numbers


def made(folder: Path) -> Pool:
    """The pool of three references, one epoch long."""
    return calibrate.calibrate_pool(
        folder / "pool.json",
        clean=folder / "clean.npz",
        train=folder / "clean.npz",
        count=3,
        specs=[PLAN_OPTIONS.spec],
        training={"epochs": 1, "batch_size": 32, "lr": 0.01},
        settings=PLAN_OPTIONS.scan["settings"],
        device="cpu",
    )


def interrupted(folder: Path, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start that is stopped while it reads reference ``last``."""
    real = calibrate.read_reference

    def read(name: str, *rest: Any, **more: Any) -> Any:
        if name == f"reference-{last:04}":
            raise Cancelled("stopped", got="a stop request")
        return real(name, *rest, **more)

    make_inputs(folder)
    with monkeypatch.context() as context:
        context.setattr(calibrate, "read_reference", read)
        with pytest.raises(Cancelled):
            made(folder)


def test_a_pool_of_references_that_were_trained(tmp_path: Path, trained: list[int]) -> None:
    make_inputs(tmp_path)
    pool = made(tmp_path)
    assert trained == [0, 1, 2]
    assert load_pool(tmp_path / "pool.json") == pool
    assert [reference.recipe["seed"] for reference in pool.references] == [0, 1, 2]
    assert len({str(reference.readings) for reference in pool.references}) == 3


def test_a_second_start_trains_what_the_first_had_not_read(
    tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, 2, monkeypatch)
    assert not (tmp_path / "pool.json").exists()
    (tmp_path / "pool.json.partial" / ".half.json.tmp").write_text("{", "utf-8")
    resumed = made(tmp_path)
    assert trained == [0, 1, 2, 2]
    assert not (tmp_path / "pool.json.partial").exists()
    (tmp_path / "pool.json").unlink()
    assert made(tmp_path) == resumed


def test_what_another_recipe_left_is_not_taken(
    tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, 1, monkeypatch)
    real = ReferenceTraining.varied

    def otherwise(self: ReferenceTraining, number: int) -> tuple[Tuning, float, Any]:
        tuning, share, augment = real(self, number)
        return replace(tuning, weight_decay=0.0), share, augment

    monkeypatch.setattr(ReferenceTraining, "varied", otherwise)
    assert {reference.recipe["weight_decay"] for reference in made(tmp_path).references} == {0.0}
    assert trained == [0, 1, 0, 1, 2]
