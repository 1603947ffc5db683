"""The demo: what it uploads, what it asks for, and whose key signs it; neither trained nor run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from components._runtime.s3 import S3Settings
from components._runtime.s3_connection import S3Location
from components._runtime.signing_keys import load_signing_key
from defense_core.architectures import build
from defense_core.attacks import probe_from_spec
from defense_core.data import CleanSet
from pipelines import demo
from pipelines.demo import DemoInputs

SETTINGS = S3Settings(endpoint_url="http://127.0.0.1:9")


@pytest.fixture
def victim() -> DemoInputs:
    """What is uploaded, untrained."""
    draw = torch.Generator().manual_seed(0)
    clean, test = (
        CleanSet(torch.randint(256, (20, 1, 8, 8), generator=draw).to(torch.uint8), torch.arange(20) % 10, 10)
        for _ in range(2)
    )
    probe = probe_from_spec(demo.PROBE, num_classes=10)
    return DemoInputs(build(demo.ARCHITECTURE, demo.ARGUMENTS), clean, test, probe)


@pytest.fixture
def done(victim: DemoInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What :func:`demo.run_demo` of seed 3 did, in the order in which it did it."""
    seen: dict[str, Any] = {"uploaded": {}, "lines": [], "store": []}

    @contextmanager
    def store(bucket: str) -> Iterator[S3Settings]:
        seen["store"].append(bucket)
        yield SETTINGS
        seen["store"].append("closed")

    def make_inputs(seed: int) -> DemoInputs:
        seen["seed"] = seed
        return victim

    def upload(path: Path, where: S3Location, settings: S3Settings) -> None:
        assert settings is SETTINGS
        seen["uploaded"][where] = path

    def run_local(plan: Any, work: Path, **options: Any) -> str:
        assert seen["store"][-1] == demo.BUCKET, "the run needs the store"
        seen.update(plan=plan, work=work, options=options, before=dict(seen["uploaded"]))
        return "the run"

    for name, fake in {"embedded_s3": store, "make_inputs": make_inputs, "upload_file": upload}.items():
        monkeypatch.setattr(demo, name, fake)
    monkeypatch.setattr(demo, "run_local", run_local)
    seen["returned"] = demo.run_demo(tmp_path, seed=3, on_line=seen["lines"].append)
    return seen


def test_the_demo_runs_its_plan_on_what_it_uploaded(done: dict[str, Any], tmp_path: Path) -> None:
    plan, options = done["plan"], done["options"]
    assert done["returned"] == "the run"
    assert (done["seed"], plan.seed, done["work"], options["model_name"]) == (3, 3, tmp_path, "digits")
    assert plan == demo.make_plan(3)
    assert {where.uri for where in done["before"]} == {plan.model, plan.clean, plan.test}
    assert done["store"] == [demo.BUCKET, "closed"]
    options["on_line"]("said by a step")
    assert done["lines"][-1] == "said by a step"


def test_the_demo_signs_with_a_key_of_its_own_and_keeps_it(done: dict[str, Any], tmp_path: Path) -> None:
    private = done["options"]["signing_key"]
    assert private.parent == tmp_path / demo.KEYS
    first = load_signing_key(private).key_id
    demo.run_demo(tmp_path, seed=3)
    assert load_signing_key(done["options"]["signing_key"]).key_id == first
    assert str(private) in done["lines"][0]


def test_what_the_demo_uploads_is_the_victim_and_the_images(done: dict[str, Any], victim: DemoInputs) -> None:
    files = {path.name: path for path in done["before"].values()}
    state = torch.load(files["model.pt"], weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in victim.model.state_dict().items())
    for name, images in (("clean.npz", victim.clean), ("test.npz", victim.test)):
        with numpy.load(files[name]) as stored:
            assert numpy.array_equal(stored["images"], images.images.numpy())
            assert numpy.array_equal(stored["labels"], images.labels.numpy())
