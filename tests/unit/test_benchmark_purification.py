"""The purification benchmark runs its GPU preset on next to nothing, resumes, and chooses without seeing an attack."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from benchmarks import purification
from benchmarks.presets import ATTACKS, ONE_PER_CLASS, PRESETS, tiny
from benchmarks.purification import ASKED, CANDIDATES, completed, jobs, run
from benchmarks.purification_tables import SETS, on_same_runs, selected
from components._runtime.plan import DEFAULT_METHODS
from defense_core.purify import METHODS
from defense_core.purify.nft_masks import NFTConfig


def signals(*, before: float, after: float) -> dict[str, Any]:
    return {
        "images": 200, "correct_before": 180, "correct": 180, "cautious_accuracy": 0.9, "targets": [0],
        "reached_before": [before], "reached": [after], "accuracy": 0.9,
    }  # fmt: skip


def write_images(path: Path, count: int, seed: int) -> None:
    """``count`` PNG images of 32x32, ten classes that differ in brightness, in the data set's format."""
    random = numpy.random.default_rng(seed)
    labels = numpy.arange(count) % 10
    encoded = []
    for label in labels:
        pixels = (random.integers(0, 90, (32, 32, 3)) + 16 * label).clip(0, 255).astype(numpy.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    pyarrow.parquet.write_table(pyarrow.table({"image": encoded, "label": labels}), path)


def test_the_gpu_preset_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARANTINE_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "cifar10-train.parquet", 450, seed=0)
    write_images(tmp_path / "cifar10-test.parquet", 60, seed=1)
    settings = [tiny(each) for each in PRESETS["gpu"]]

    def measure(*methods: str) -> list[dict[str, Any]]:
        run(
            "purification-gpu",
            settings,
            tmp_path,
            wanted=lambda job: job["attack"] == "badnets" and job["method"] in methods,
            device="cpu",
            command="a test",
            folder=tmp_path,
        )
        rows: list[dict[str, Any]] = json.loads((tmp_path / "purification-gpu.json").read_text())["rows"]
        return rows

    first = measure("clp")
    assert [row["method"] for row in first] == ["clp"]
    assert first[0]["control_der"] is None
    again = measure("clp", "fine_tuning", "tsbd")
    assert {row["method"] for row in again} == {"clp", "fine_tuning", "tsbd"}
    (kept,) = [row for row in again if row["method"] == "clp"]
    assert kept["seconds"] == first[0]["seconds"]
    assert [row["method"] for row in again if row["selected"]] == ["tsbd"]
    control = next(row for row in again if row["method"] == "fine_tuning")
    assert {row["control_der"] for row in again} == {control["der"]}
    wanted = {
        "attack", "method", "seed", "clean_fraction", "architecture", "acc_before", "acc_after", "asr_before",
        "asr_after", "ra_before", "ra_after", "der", "control_der", "seconds", "peak_mb", "config_digest", "device",
        "selected",
    }  # fmt: skip
    assert all(wanted <= row.keys() for row in again)


def test_presets_hold_what_is_promised() -> None:
    rows = [job for _, job in jobs(PRESETS["cpu"])]
    wide = [row for row in rows if row["clean_fraction"] == 0.05 and row["architecture"] == "preact_resnet18(width=16)"]
    assert {(row["attack"], row["method"], row["seed"]) for row in wide} == {
        (attack, method, seed) for attack in ATTACKS for method in METHODS for seed in range(3)
    }
    for fraction in (0.01, ONE_PER_CLASS):
        assert len({row["attack"] for row in rows if row["clean_fraction"] == fraction}) == 4
    assert len({row["attack"] for row in rows if row["architecture"].startswith("vit")}) == 2
    full = {row["method"] for row in rows if row["architecture"] == "preact_resnet18(width=64)"}
    assert full >= {*CANDIDATES, "fine_tuning"}


def test_a_soup_of_other_members_is_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Other(NFTConfig):
        epochs: int = 3

    before = {name: purification.config_digest(name) for name in ("soup", "nft", "ngf")}
    changed = {**METHODS, "nft": replace(METHODS["nft"], config=Other)}
    monkeypatch.setattr(purification, "METHODS", changed)
    after = {name: purification.config_digest(name) for name in before}
    assert [name for name in before if before[name] != after[name]] == ["soup", "nft"]


def test_the_choice_sees_no_attack_figure() -> None:
    key = {"attack": "badnets", "seed": 0, "clean_fraction": 0.05, "architecture": "x"}
    rows = [
        {**key, "method": "tsbd", "der": 0.5, "asr_after": 1.0, "select": signals(before=1.0, after=0.1)},
        {**key, "method": "fip", "der": 0.9, "asr_after": 0.0, "select": signals(before=1.0, after=0.9)},
        {**key, "method": "fine_tuning", "der": 0.7, "asr_after": 0.0, "select": signals(before=1.0, after=0.0)},
        {**key, "method": "ft_sam", "der": 0.9, "asr_after": 0.0},
        {**key, "method": "nft", "diverged": "NaN", "seconds": 1.0},
    ]
    assert [row["selected"] for row in completed(rows)] == [True, False, False, False, False]
    assert {row["control_der"] for row in completed(rows)} == {0.7}
    better = {**key, "method": "ngf", "der": 0.1, "asr_after": 1.0, "select": signals(before=1.0, after=0.0)}
    assert [row["method"] for row in completed([*rows, better]) if row["selected"]] == ["ngf"]


def test_a_control_of_another_victim_is_none() -> None:
    key = {"attack": "badnets", "seed": 0, "clean_fraction": 0.05, "architecture": "x", "asr_before": 1.0}
    rows = [
        {**key, "method": "fine_tuning", "der": 0.7, "acc_before": 0.8},
        {**key, "method": "ft_sam", "der": 0.9, "acc_before": 0.8},
        {**key, "method": "anp", "der": 0.9, "acc_before": 0.79},
    ]
    assert [row["control_der"] for row in completed(rows)] == [0.7, 0.7, None]


def test_the_control_and_the_methods_of_others_are_not_asked() -> None:
    others = {"ft_sam", "fine_pruning", "anp", "clp"}
    assert set(ASKED) == {name for name, method in METHODS.items() if not method.control} - others


def test_candidates_of_another_victim_are_not_chosen_among() -> None:
    key = {"attack": "badnets", "seed": 0, "clean_fraction": 0.05, "architecture": "x", "der": 0.5}
    asked = {"tsbd": (0.9, 0.3), "fip": (0.9, 0.2), "nft": (0.8, 0.0)}
    rows = [
        {**key, "method": method, "select": signals(before=before, after=after)}
        for method, (before, after) in asked.items()
    ]
    assert [row["method"] for row in completed(rows) if row["selected"]] == ["fip"]


def test_methods_are_compared_on_the_runs_that_all_of_them_have() -> None:
    key = {"seed": 0, "clean_fraction": 0.05, "architecture": "x", "acc_before": 0.9, "acc_after": 0.9, "ra_after": 0.5}
    left = [("a", "tsbd", 0.2), ("a", "fip", 0.4), ("a", "soup", 0.1), ("b", "tsbd", 0.9), ("b", "fip", 0.9)]
    rows = [
        {
            **key,
            "attack": a,
            "method": m,
            "asr_after": asr,
            "der": 1.0,
            "seconds": 1.0,
            "select": signals(before=0.9, after=asr),
        }
        for a, m, asr in left
    ]
    columns, lines = on_same_runs(rows, ("tsbd", "fip", "soup"))
    column = columns.index("ASR")
    assert {line[0]: line[column] for line in lines} == {
        "**selected** of 2": "0.200", "**selected** of 3": "0.100", "tsbd": "0.200", "fip": "0.400", "soup": "0.100"
    }  # fmt: skip
    assert {line[1] for line in lines} == {"1"}
    assert on_same_runs(rows[3:], ("tsbd", "fip", "soup"))[1] == []


def test_the_selected_costs_what_all_that_it_was_chosen_among_cost() -> None:
    key = {"seed": 0, "clean_fraction": 0.05, "architecture": "x"}
    costs = [
        ("a", "tsbd", 3.0, 0.9, True),
        ("a", "fip", 5.0, 0.9, False),
        ("a", "fine_tuning", 7.0, 0.9, False),
        ("of two victims", "tsbd", 3.0, 0.9, True),
        ("of two victims", "fip", 5.0, 0.8, False),
        ("one is missing", "fip", 2.0, 0.9, True),
    ]
    rows = [
        {**key, "attack": a, "method": m, "seconds": s, "select": signals(before=before, after=0.1), "selected": chosen}
        for a, m, s, before, chosen in costs
    ]
    found = selected(rows, ("tsbd", "fip"))
    assert [(row["attack"], row["method"], row["seconds"]) for row in found] == [("a", "tsbd", 8.0)]


def test_a_mean_of_what_stands_beside_it_costs_its_mixing_only() -> None:
    key = {"attack": "a", "seed": 0, "clean_fraction": 0.05, "architecture": "x", "selected": True}
    costs = {"tsbd": 3.0, "fip": 5.0, "nft": 2.0, "ngf": 1.0, "soup": 11.5}
    rows = [
        {**key, "method": method, "seconds": seconds, "select": signals(before=0.9, after=0.1)}
        for method, seconds in costs.items()
    ]
    assert {row["seconds"] for row in selected(rows, tuple(costs))} == {11.5}
    assert {row["seconds"] for row in selected(rows[1:], tuple(costs)[1:])} == {19.5}, "its fourth member ran in it"


def test_the_default_of_a_run_is_among_the_sets() -> None:
    assert SETS[0] == tuple(name for name in DEFAULT_METHODS if not METHODS[name].control)
    assert all(set(names) <= set(ASKED) for names in SETS)
