"""A model, its device and its images from what a step is given: paths and strings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from components._runtime.evidence import read_evidence
from components._runtime.plan import REPORT_SHARE, Loading
from components._runtime.pod import accelerator
from components._runtime.trust import trusted_modules
from defense_core.bundle import Bundle, load_model_file
from defense_core.config import require
from defense_core.data import CleanSet, Splits, load_clean_set, split_clean_set
from defense_core.errors import ConfigError
from defense_core.evidence import parse_evidence

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
    known = ["cpu", "cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if name not in known:
        raise ConfigError("device is not usable", expected=", ".join(["auto", *known]), got=repr(name))
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


def require_same_interface(bundle: Bundle, reference: Bundle) -> None:
    """Refuse to compare models that are not given the same numbers for an image.

    Raises:
        ConfigError: input size, normalisation or number of classes differ.
    """
    names = ("input_size", "mean", "std", "num_classes")
    pairs = {name: (getattr(bundle.spec, name), getattr(reference.spec, name)) for name in names}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        raise ConfigError(
            f"the reference has another {', '.join(differing)} than the model",
            expected="; ".join(f"{name} {own}" for name, (own, _) in differing.items()),
            got="; ".join(f"{name} {other}" for name, (_, other) in differing.items()),
            hint="Compare with the model that this one was made from",
        )


def quoted_images(
    bundle: Bundle,
    *,
    clean: Path | None,
    test: Path | None,
    seed: int,
    report: float = REPORT_SHARE,
    purification: Path | None = None,
) -> CleanSet:
    """What figures are quoted on: the test set, or the clean set's *report* split; of exact copies the first.

    Args:
        report: share of the clean set that is quoted on.
        purification: ``result.json`` beside the model, if there is one: the model may be fitted on all images of
            ``clean`` that are not in its own *report* split.

    Raises:
        ConfigError: neither set is given, no share, or another split than the purification's.
        EvidenceMismatch: ``purification`` is damaged.
    """
    if test is not None:
        return open_images(test, bundle, require_all_classes=False).without_copies()
    if clean is None:
        raise ConfigError("nothing to evaluate on", expected="a test set or a clean set", got="neither")
    require(report > 0, "report", "a share above 0", report)
    splits = open_splits(clean, bundle, seed=seed, report=report)
    if purification is not None and purification.is_file():
        _require_split_of(read_evidence(purification), bundle, splits, {"seed": seed, "report": report})
    return splits.report.without_copies()


def _require_split_of(evidence: Mapping[str, Any], bundle: Bundle, splits: Splits, asked: Mapping[str, Any]) -> None:
    if evidence.get("step") != "purify":
        return
    (found,) = parse_evidence({str(evidence["name"]): evidence}).values()
    fitted = found.input_digest("clean")
    if found.output_digest("model") != bundle.digest or fitted in (None, splits.digest):
        return
    parts = found.results.get("parts")
    if parts == asked:
        hint = "The clean set is another: give the purification's, or other images as --test"
    elif isinstance(parts, Mapping) and not parts.get("report"):
        hint = "The purification left nothing of its clean set: give other images as --test"
    else:
        hint = "Give these with the purification's clean set, or other images as --test"
    raise ConfigError(
        "figures would be quoted on images that the model may be fitted on",
        expected=f"the split of {found.name}: {_options(parts)}",
        got=_options(asked),
        hint=hint,
    )


def _options(parts: Any) -> str:
    if not isinstance(parts, Mapping):
        return "the --seed and --report that it was given"
    return f"--seed {parts.get('seed')} --report {parts.get('report')}"
