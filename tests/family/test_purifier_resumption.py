"""A purifier that is killed at any step and started again ends with the bytes of one that was not."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from defense_core.checkpoints import Checkpoints
from defense_core.config import canonical_json
from defense_core.errors import TransferFailed
from defense_core.files import sha256_bytes
from defense_core.loop import Tuning, tune, working_copy
from defense_core.progress import NullProgress, Phase, resumable
from defense_core.purify import METHODS, Purified, purify
from defense_core.stored_checkpoints import StoredCheckpoints, work_key
from tests.family.conftest import NETWORKS, TINY_TASK, tiny_images, tiny_splits
from tests.family.methods import DEVICES, cheap, every_method, methods_with, same, weights

KEY = "sha256:" + "1" * 64

# Parts of methods that train otherwise than their default does.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("fip", {"fisher": "true", "start": "given"}),
    ("nft", {"sites": "all", "ratio": 0.0, "statistics": "running"}),
    *(("ngf", {"part": part, "layers": 1}) for part in ("masked", "fresh_head", "feature_mask", "block")),
    ("ngf", {"part": "head", "fisher": "true"}),
]


class Killed(BaseException):
    """Nothing in the code knows it, as nothing knows SIGKILL."""


@dataclass
class Files:
    """Checkpoints in memory."""

    content: dict[str, bytes] = field(default_factory=dict)
    written: int = 0

    def read(self, name: str) -> bytes | None:
        return self.content.get(name)

    def write(self, name: str, data: bytes) -> None:
        self.content[name] = data
        self.written += 1

    def clear(self) -> None:
        self.content.clear()


class Counting(NullProgress):
    """Counts steps, and is killed at one of them."""

    def __init__(self, kill_at: int = 0) -> None:
        super().__init__()
        self.kill_at = kill_at
        self.steps = 0

    def phase(self, name: str, total: int | None = None) -> Phase:
        phase = super().phase(name, total)
        advance = phase.advance

        def counted(steps: int = 1, **metrics: float) -> None:
            self.steps += 1
            if self.steps == self.kill_at:
                raise Killed
            advance(steps, **metrics)

        phase.advance = counted  # type: ignore[method-assign]
        return phase


def ticking() -> Callable[[], float]:
    """A clock on which a second passes each time that it is read."""
    return lambda ticks=itertools.count(): float(next(ticks))  # type: ignore[misc]


def stored(files: Files, *, interval_s: float = 0.0, key: str = KEY) -> StoredCheckpoints:
    clock = ticking() if interval_s else (lambda: 0.0)
    return StoredCheckpoints(files, key=key, interval_s=interval_s, clock=clock)


def config_of(name: str, changes: dict[str, Any]) -> Any:
    return cheap(name, **{"epochs": 2, **changes})


def run(
    name: str,
    network: str,
    changes: dict[str, Any],
    *,
    progress: Counting | None = None,
    device: str = "cpu",
    **options: Any,
) -> Purified:
    return purify(
        NETWORKS[network](),
        tiny_splits(),
        config_of(name, changes),
        method=name,
        task=TINY_TASK,
        seed=0,
        device=device,
        progress=progress or Counting(),
        **options,
    )


def equal(one: Purified, other: Purified) -> bool:
    return (
        same(weights(one.model), weights(other.model))
        and canonical_json(one.facts) == canonical_json(other.facts)
        and one.history == other.history
    )


def killed_until_it_ends(
    name: str, network: str, changes: dict[str, Any], kills: list[int], files: Files, **options: Any
) -> tuple[Purified, int]:
    """Start again after each kill, until the kill would come too late; the result, and the steps of the last start."""
    interval_s = options.pop("interval_s", 0.0)
    for kill_at in [*kills, 0]:
        progress, checkpoints = Counting(kill_at), stored(files, interval_s=interval_s)
        with contextlib.suppress(Killed):
            return run(name, network, changes, progress=progress, checkpoints=checkpoints, **options), progress.steps
    raise AssertionError("killed by nobody")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("network", "kills"), [("norm_free", 2), ("preact_resnet18", 1)])
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_killed_at_any_step_it_ends_with_the_same_bytes(
    name: str, changes: dict[str, Any], network: str, kills: int, device: str
) -> None:
    undisturbed = Counting()
    expected = run(name, network, changes, progress=undisturbed, device=device)
    chosen = random.Random(f"{name} {changes} {network}")
    for _ in range(kills):
        kill_at = chosen.randint(1, undisturbed.steps)
        done, _ = killed_until_it_ends(name, network, changes, [kill_at], Files(), device=device)
        assert equal(done, expected), f"killed at {kill_at} of {undisturbed.steps}"


@every_method
def test_killed_again_and_again_it_still_ends_and_loses_no_finished_loop(name: str) -> None:
    undisturbed, every_candidate = Counting(), {"max_drop": 0.99}
    expected = run(name, "small_cnn", every_candidate, progress=undisturbed)
    files = Files()
    done, steps = killed_until_it_ends(name, "small_cnn", every_candidate, [undisturbed.steps * 3 // 4] * 4, files)
    assert equal(done, expected)
    assert steps < undisturbed.steps


@pytest.mark.parametrize("interval_s", [3.0, 7.0])
@every_method
def test_checkpoints_that_are_few_serve_too(name: str, interval_s: float) -> None:
    undisturbed = Counting()
    expected = run(name, "norm_free", {}, progress=undisturbed)
    often, seldom = Files(), Files()
    killed_until_it_ends(name, "norm_free", {}, [undisturbed.steps], often)
    done, _ = killed_until_it_ends(name, "norm_free", {}, [undisturbed.steps], seldom, interval_s=interval_s)
    assert equal(done, expected)
    assert seldom.written <= often.written


@every_method
def test_with_checkpoints_and_no_kill_nothing_changes(name: str) -> None:
    assert equal(run(name, "norm_free", {}, checkpoints=stored(Files())), run(name, "norm_free", {}))


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _signed(body: bytes) -> bytes:
    """``body`` as a file whose digest is right."""
    return sha256_bytes(body).encode() + b"\n" + body


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": _cut,
    "a bit flipped": _flipped,
    "no JSON": lambda data: _signed(b"{\n"),
    "no checkpoint": lambda data: _signed(b"{}\n"),
    "deep JSON": lambda data: _signed(b"[" * 100_000 + b"\n"),
    "no tensors": lambda data: _signed(data.partition(b"\n")[2].partition(b"\n")[0] + b"\n"),
    "odd strides": lambda data: _signed(data.partition(b"\n")[2].replace(b'"order":[1]', b'"order":[7]')),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["tsbd", "ngf"])
def test_a_damaged_checkpoint_is_not_used(name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed = Counting()
    expected = run(name, "small_cnn", {}, progress=undisturbed)
    files = Files()
    with pytest.raises(Killed):
        run(name, "small_cnn", {}, progress=Counting(undisturbed.steps * 3 // 4), checkpoints=stored(files))
    assert files.content
    files.content = {key: DAMAGE[damage](data) for key, data in files.content.items()}
    with caplog.at_level(logging.WARNING, "quarantine"):
        done = run(name, "small_cnn", {}, checkpoints=stored(files, interval_s=1e9))
    assert equal(done, expected)
    assert "not used" in caplog.text


@pytest.mark.parametrize("name", methods_with("epochs"))
def test_a_checkpoint_of_other_work_is_not_used(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Were it used, the other config would end with this one's weights: every loop is finished here."""
    assert run(name, "small_cnn", {}).history
    files = Files()
    run(name, "small_cnn", {}, checkpoints=stored(files))
    other = {"batch_size": 7}
    expected = run(name, "small_cnn", other)
    with caplog.at_level(logging.WARNING, "quarantine"):
        done = run(name, "small_cnn", other, checkpoints=stored(files, key="sha256:" + "2" * 64))
    assert equal(done, expected)
    assert "of other work" in caplog.text or not files.written


def test_the_key_changes_with_everything_that_the_bytes_depend_on() -> None:
    config = METHODS["tsbd"].config
    work: dict[str, Any] = {"model": "m", "clean": "c", "method": "tsbd", "config": config(), "seed": 0}
    others: list[dict[str, Any]] = [
        {"model": "n"},
        {"clean": "d"},
        {"method": "fip"},
        {"config": config(epochs=3)},
        {"seed": 1},
    ]
    keys = [work_key(**{**work, **change}, device="cpu") for change in [{}, *others]]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        keys.append(work_key(**work, device="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert len(set(keys)) == len(keys)
    assert work_key(**work, device="cpu") == keys[0]


# -- how often, and what failing costs -------------------------------------------------------


def loops(checkpoints: Checkpoints, count: int = 3) -> list[nn.Module]:
    """Short loops one after the other."""
    models = [working_copy(NETWORKS["small_cnn"](), "cpu") for _ in range(count)]
    for model in models:
        tune(
            model,
            tiny_images(4),
            task=TINY_TASK,
            tuning=Tuning(2, 8),
            seed=0,
            device="cpu",
            progress=resumable(NullProgress(), checkpoints),
            name="one of several",
        )
    return models


def test_nothing_is_written_before_the_interval_is_over() -> None:
    files = Files()
    loops(stored(files, interval_s=1e6))
    assert files.written == 0


def test_loops_of_the_same_name_have_places_of_their_own() -> None:
    files = Files()
    loops(stored(files))
    assert sorted(files.content) == [f"00{number}-one-of-several" for number in (1, 2, 3)]


def test_results_of_finished_loops_wait_for_the_next_write() -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    files, clock = Files(), Clock()
    checkpoints = StoredCheckpoints(files, key=KEY, interval_s=10, clock=clock)
    loops(checkpoints, 2)
    assert files.written == 0
    clock.now = 10.0
    loops(checkpoints, 1)
    assert sorted(files.content) == [f"00{number}-one-of-several" for number in (1, 2, 3)]
    assert files.written == 3


def test_a_slow_store_is_written_to_more_seldom() -> None:
    class Slow(Files):
        def write(self, name: str, data: bytes) -> None:
            super().write(name, data)
            clock.now += 100.0

    class Clock:
        now = 0.0

        def __call__(self) -> float:
            self.now += 1.0
            return self.now

    files, clock = Slow(), Clock()
    loops(StoredCheckpoints(files, key=KEY, interval_s=1.0, clock=clock), 3)
    assert files.written == 1  # the next is due 2,000 s later


def test_a_store_that_fails_does_not_end_the_work(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Files):
        def read(self, name: str) -> bytes | None:
            raise TransferFailed(f"{name} cannot be read")

        def write(self, name: str, data: bytes) -> None:
            raise TransferFailed(f"{name} cannot be written")

    expected = loops(stored(Files()), 1)
    with caplog.at_level(logging.WARNING, "quarantine"):
        done = loops(stored(Failing()), 1)
    assert same(weights(done[0]), weights(expected[0]))
    assert "cannot be read" in caplog.text
    assert "the work goes on" in caplog.text
