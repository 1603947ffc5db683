"""A model, its device and its images from what a step is given: paths and strings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from components._runtime.plan import REPORT_SHARE, Loading
from components._runtime.pod import accelerator
from components._runtime.trust import trusted_modules
from defense_core.bundle import Bundle, load_model_file
from defense_core.data import CleanSet, Splits, load_clean_set, split_clean_set
from defense_core.errors import ConfigError

logger = logging.getLogger("quarantine")


def open_model(path: Path, spec: Mapping[str, Any] | None = None, loading: Loading = Loading()) -> Bundle:
    """A bundle, or a model file that ``spec`` describes; with a bundle, ``spec`` must agree.

    Raises:
        ArtifactError: of the kind that fits what is wrong; see :mod:`defense_core.bundle`.
        ConfigError: a file without a spec.
    """
    trusted = trusted_modules(loading.trusted_modules)
    return load_model_file(Path(path), spec or None, limits=loading.limits, trusted_modules=trusted)


def source_digest(bundle: Bundle) -> str:
    """Digest of the artifact that the bundle was made from; its own where it was made from none."""
    return bundle.origin.sha256 if bundle.origin is not None else bundle.digest


def resolve_device(name: str) -> str:
    """``cpu`` or ``cuda[:n]``; ``auto`` takes a GPU where there is one.

    Raises:
        ConfigError: a GPU was asked for and none is usable.
    """
    if name == "auto":
        usable = torch.cuda.is_available()
        if not usable and accelerator() is not None:
            logger.warning("the pod was given %s, but PyTorch can use no GPU: this step runs on the CPU", accelerator())
        return "cuda" if usable else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "device is not usable", expected="a CUDA device", got="none on this machine", hint="Use auto or cpu"
        )
    if name != "cpu" and not name.startswith("cuda"):
        raise ConfigError("device is unknown", expected="auto, cpu or cuda", got=repr(name))
    return name


def open_images(path: Path, bundle: Bundle, *, require_all_classes: bool = True) -> CleanSet:
    """Labelled images that fit the bundle's model. Raises DataError."""
    return load_clean_set(
        path,
        input_size=bundle.spec.input_size,
        num_classes=bundle.spec.num_classes,
        require_all_classes=require_all_classes,
        class_names=bundle.spec.class_names,
    )


def open_splits(clean: Path, bundle: Bundle, *, seed: int, report: float) -> Splits:
    """The clean set's fit, select and report parts; the same seed and share give the same parts."""
    return split_clean_set(open_images(clean, bundle), seed=seed, report=report)


def quoted_images(bundle: Bundle, *, clean: Path | None, test: Path | None, seed: int) -> CleanSet:
    """What figures are quoted on: the test set, or the clean set's *report* split.

    Raises:
        ConfigError: neither is given.
    """
    if test is not None:
        return open_images(test, bundle, require_all_classes=False)
    if clean is None:
        raise ConfigError("nothing to evaluate on", expected="a test set or a clean set", got="neither")
    return open_splits(clean, bundle, seed=seed, report=REPORT_SHARE).report
