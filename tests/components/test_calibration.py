"""Making a calibration pool: references that are trained here, and what a second start finds of the first."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from components.scan_backdoor import calibrate
from defense_core.bundle import untrained_bundle
from defense_core.data import load_clean_set
from defense_core.errors import Cancelled, ConfigError, DataError, OutputExists, StorageError
from defense_core.loop import Tuning
from defense_core.progress import NullProgress
from defense_core.scan import references
from defense_core.scan.observe import Observed
from defense_core.scan.pool import Pool, load_pool
from defense_core.scan.references import ReferenceTraining, read_reference, train_reference
from tests.small_model import PLAN_OPTIONS, make_inputs, save_images


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the references that are trained from here on."""
    numbers: list[int] = []
    real = train_reference

    def counted(network: Any, data: Any, number: int, *rest: Any, **more: Any) -> Any:
        numbers.append(number)
        return real(network, data, number, *rest, **more)

    monkeypatch.setattr(calibrate, "train_reference", counted)
    return numbers


def denied(self: Path) -> bytes:
    """Reads like a file of somebody else."""
    raise PermissionError(errno.EACCES, "Permission denied", str(self))


def made(folder: Path) -> Pool:
    """The pool of three references, as short as they learn anything."""
    return calibrate.calibrate_pool(
        folder / "pool.json",
        clean=folder / "clean.npz",
        train=folder / "test.npz",
        count=3,
        specs=[PLAN_OPTIONS.spec],
        training={"epochs": 6, "batch_size": 16, "lr": 0.1},
        settings=PLAN_OPTIONS.scan["settings"],
        device="cpu",
    )


def interrupted(folder: Path, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start that is stopped while it reads reference ``last``."""
    real = read_reference

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


def test_references_are_not_read_on_images_that_they_were_trained_on(tmp_path: Path, trained: list[int]) -> None:
    make_inputs(tmp_path)
    (tmp_path / "test.npz").write_bytes((tmp_path / "clean.npz").read_bytes())
    with pytest.raises(DataError, match=r"clean set holds images of the training set.*80 of 80"):
        made(tmp_path)
    assert trained == []
    assert not (tmp_path / "pool.json").exists()


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


@pytest.mark.parametrize(("data", "said"), [("{", "is damaged"), ("{}", "is damaged"), (None, "cannot be read")])
def test_a_kept_reference_that_is_damaged_is_named(
    data: str | None, said: str, tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, 1, monkeypatch)
    (kept,) = (tmp_path / "pool.json.partial").glob("*.json")
    if data is not None:
        kept.write_text(data)
    else:
        monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(StorageError, match=said):
        made(tmp_path)
    assert trained == [0, 1], "nothing is trained before it is said"


def test_a_reference_that_has_learnt_nothing_is_refused(
    tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would answer at random, and every model would lie between it and the others."""
    make_inputs(tmp_path)
    monkeypatch.setattr(ReferenceTraining, "varied", lambda *_: (Tuning(epochs=1, lr=1e-9), 1.0, "none"))
    with pytest.raises(ConfigError, match="reference-0000 has learnt nothing"):
        made(tmp_path)
    assert trained == [0]
    assert not (tmp_path / "pool.json").exists()


def test_references_that_were_given_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path)
    bundle = untrained_bundle(PLAN_OPTIONS.spec)
    seen = load_clean_set(tmp_path / "test.npz", input_size=(1, 8, 8), num_classes=4)
    given = []
    for number in range(3):
        model, _ = train_reference(
            bundle.model, seen, number, ReferenceTraining(epochs=6, batch_size=16), task=bundle.spec.task_object(),
            device="cpu", progress=NullProgress(),
        )  # fmt: skip
        given.append(tmp_path / f"clean-{number}.safetensors")
        save_file(model.state_dict(), given[-1])
    read: list[str] = []
    real = read_reference

    def counted(name: str, *rest: Any, **more: Any) -> Any:
        read.append(name)
        if len(read) == 2:
            raise Cancelled("stopped", got="a stop request")
        return real(name, *rest, **more)

    monkeypatch.setattr(calibrate, "read_reference", counted)

    def taken() -> Pool:
        return calibrate.calibrate_pool(
            tmp_path / "pool.json", clean=tmp_path / "clean.npz", given=given, specs=[PLAN_OPTIONS.spec],
            settings=PLAN_OPTIONS.scan["settings"], device="cpu",
        )  # fmt: skip

    with pytest.raises(Cancelled):
        taken()
    names = [reference.name for reference in taken().references]
    assert names == ["0000-clean-0", "0001-clean-1", "0002-clean-2"]
    assert read == [names[0], names[1], names[1], names[2]]
    assert not (tmp_path / "pool.json.partial").exists()


def test_where_the_pool_is_to_lie_is_looked_at_first(tmp_path: Path, trained: list[int]) -> None:
    make_inputs(tmp_path)
    (tmp_path / "pool.json").mkdir()
    with pytest.raises(OutputExists, match="is a folder"):
        made(tmp_path)
    assert trained == []


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


def test_each_reference_is_read_on_its_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path)
    save_images(tmp_path / "clean.npz", 150, seed=1)
    read: list[tuple[str, list[list[int]], list[int]]] = []

    def seeing(_: Any, clean: Any, regime: str, *__: Any, **___: Any) -> Observed:
        read.append((regime, clean.images.flatten(1).tolist(), clean.labels.bincount().tolist()))
        return Observed({}, {}, ())

    monkeypatch.setattr(references, "observe", seeing)
    made(tmp_path)
    made(tmp_path)
    assert [regime for regime, *_ in read] == ["few", "many"] * 6
    # As many of each class as there are, like those that a scan searches with.
    assert {tuple(sorted(counts)) for _, _, counts in read} == {(2, 2, 3, 3), (25, 25, 25, 25)}
    assert read[:6] == read[6:]
    for regime, count in (("few", 10), ("many", 100)):
        drawn = [sorted(pixels) for of, pixels, _ in read[:6] if of == regime]
        assert [len(each) for each in drawn] == [count] * 3
        assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_a_pool_that_is_nested_too_deeply_is_none(tmp_path: Path) -> None:
    (tmp_path / "pool.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="no calibration pool"):
        load_pool(tmp_path / "pool.json")
