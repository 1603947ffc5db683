"""The demo: a digits classifier with a planted backdoor goes through the whole pipeline, offline.

Everything comes from installed packages: scikit-learn's handwritten digits, an embedded S3
server, and MLflow on a file.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import nn

from components._runtime.embedded_s3 import embedded_s3
from components._runtime.plan import Plan
from components._runtime.s3 import parse_s3_uri, upload_file
from components._runtime.signing_keys import existing_or_new_pair
from defense_core import architectures
from defense_core.attacks import Probe, poison, probe_from_spec
from defense_core.data import CleanSet
from defense_core.errors import ConfigError
from defense_core.files import atomic_file
from defense_core.loop import Tuning, finished, tune, working_copy
from defense_core.progress import default_progress
from defense_core.task import ImageClassification
from pipelines.local import LocalRun, run_local
from pipelines.options import read_policy

BUCKET = "untrusted-models"
ARCHITECTURE, ARGUMENTS = "small_cnn", {"width": 32, "in_channels": 1, "num_classes": 10}
TASK = ImageClassification((1, 8, 8), 10, mean=(0.3,), std=(0.35,), class_names=tuple("0123456789"))
PROBE = {"name": "white 2x2 corner", "kind": "badnets", "target": 0, "size": 2}
TRAINING_IMAGES, CLEAN_IMAGES = 900, 397
POISONING_RATE = 0.1
KEYS = "keys"
"""Folder of the demo's own key pair, below its output."""


@dataclass(frozen=True, eq=False)
class DemoInputs:
    """What the vendor has (the model) and what the buyer has (clean and test images).

    Attributes:
        model: the backdoored network.
        clean: images that the model has not seen, for purification.
        test: images that figures are quoted on.
        probe: the planted trigger, known because this is a demonstration.
    """

    model: nn.Module
    clean: CleanSet
    test: CleanSet
    probe: Probe


def make_inputs(seed: int) -> DemoInputs:
    """Train a classifier on poisoned digits.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    digits = _digits()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    train, clean, test = (
        digits.subset(part) for part in order.tensor_split([TRAINING_IMAGES, TRAINING_IMAGES + CLEAN_IMAGES])
    )
    probe = probe_from_spec(PROBE, num_classes=10)
    network = working_copy(architectures.initialise(architectures.build(ARCHITECTURE, ARGUMENTS), seed), "cpu")
    tune(
        network,
        poison(train, probe, rate=POISONING_RATE, seed=seed).data,
        task=TASK,
        tuning=Tuning(epochs=30, batch_size=64, lr=0.05, weight_decay=5e-4, schedule="onecycle"),
        seed=seed,
        device="cpu",
        progress=default_progress(),
        name="train a backdoored model",
    )
    return DemoInputs(finished(network, "demo"), clean, test, probe)


def run_demo(out: Path, *, seed: int = 0, on_line: Callable[[str], None] = lambda line: None) -> LocalRun:
    """Train, upload, and run the pipeline; the work folder keeps everything.

    The release is signed with a key pair that the first run makes in ``keys``; a real one would
    come from a secret store.

    Raises:
        ConfigError: the extra ``demo`` is not installed.
        StorageError: ``out`` cannot be written.
    """
    keys = existing_or_new_pair(out / KEYS)
    on_line(f"releases of this demo are signed with a key of its own, in {keys.private}")
    on_line("training a digits classifier with a planted BadNets backdoor")
    inputs = make_inputs(seed)
    files = write_inputs(inputs, out / "inputs")
    with embedded_s3(BUCKET) as settings:
        for path in files:
            upload_file(path, parse_s3_uri(f"s3://{BUCKET}/digits/{path.name}"), settings)
        on_line(f"uploaded to s3://{BUCKET}/digits/; running the pipeline")
        return run_local(make_plan(seed), out, model_name="digits", signing_key=keys.private, on_line=on_line)


def make_plan(seed: int) -> Plan:
    """The run that a user would write by hand for this model."""
    return Plan(
        model=f"s3://{BUCKET}/digits/model.pt",
        clean=f"s3://{BUCKET}/digits/clean.npz",
        test=f"s3://{BUCKET}/digits/test.npz",
        policy=read_policy("standard"),
        spec={
            "architecture": ARCHITECTURE,
            "architecture_args": ARGUMENTS,
            "input_size": list(TASK.input_size),
            "mean": list(TASK.mean),
            "std": list(TASK.std),
            "num_classes": TASK.num_classes,
            "class_names": list(TASK.class_names),
        },
        probes=(PROBE,),
        methods=("tsbd", "fine_tuning"),
        seed=seed,
    )


def write_inputs(inputs: DemoInputs, folder: Path) -> list[Path]:
    """``model.pt`` (a state dict nested as training scripts do), ``clean.npz`` and ``test.npz``."""
    paths = [folder / "model.pt", folder / "clean.npz", folder / "test.npz"]
    checkpoint = io.BytesIO()
    torch.save({"state_dict": inputs.model.state_dict(), "epoch": 30}, checkpoint)
    contents = [checkpoint.getvalue(), _npz(inputs.clean), _npz(inputs.test)]
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, contents, strict=True):
        with atomic_file(path) as stream:
            stream.write(content)
    return paths


def _npz(data: CleanSet) -> bytes:
    stream = io.BytesIO()
    numpy.savez(stream, images=data.images.numpy(), labels=data.labels.numpy())
    return stream.getvalue()


def _digits() -> CleanSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the demo's data is not installed",
            expected="the extra demo",
            got=str(error),
            hint="pip install 'model-quarantine[demo]'",
        ) from error
    with contextlib.redirect_stderr(io.StringIO()):
        digits = load_digits()
    pixels = torch.from_numpy((digits.images / 16 * 255).round().astype(numpy.uint8)).unsqueeze(1)
    return CleanSet(pixels, torch.from_numpy(digits.target.astype(numpy.int64)), 10)
