"""The options that say how a bare state dict is read, and what reading an artifact may cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from components._runtime.plan import Loading
from defense_core.config import from_mapping
from defense_core.errors import ConfigError
from pipelines import options as o
from pipelines.option_groups import takes
from pipelines.yaml_files import parse_yaml

ESSENTIAL = ("architecture", "input_size", "mean", "std")
"""Without these a network that was not trained yet cannot be built."""


def model_spec(
    *,
    architecture: o.Architecture = "",
    architecture_args: o.ArchitectureArgs = "",
    input_size: o.InputSize = "",
    mean: o.Mean = "",
    std: o.Std = "",
    class_names: o.ClassNames = "",
) -> dict[str, Any]:
    """What the model options say, as a partial :class:`~defense_core.bundle.ModelSpec` mapping; only
    what was given is in it, so that a bundle's own description is not contradicted by defaults."""
    spec: dict[str, Any] = {}
    if architecture:
        spec["architecture"] = architecture
    if architecture_args:
        arguments = parse_yaml(architecture_args, "--architecture-args")
        if not isinstance(arguments, dict):
            raise ConfigError(
                "--architecture-args is malformed", expected="a JSON mapping", got=repr(architecture_args)
            )
        spec["architecture_args"] = arguments
        if "num_classes" in arguments:
            spec["num_classes"] = arguments["num_classes"]
    if input_size:
        spec["input_size"] = [int(value) for value in _numbers(input_size, "--input-size", whole=True)]
    if mean:
        spec["mean"] = _numbers(mean, "--mean")
    if std:
        spec["std"] = _numbers(std, "--std")
    if class_names:
        spec["class_names"] = [name.strip() for name in class_names.split(",")]
    return spec


@takes(model_spec, into="spec")
def tuned_spec(*, spec: dict[str, Any], augment: o.Augment = "") -> dict[str, Any]:
    """The same for a model that is tuned: images are also varied."""
    return {**spec, "augment": augment} if augment else spec


def loading_of(
    *,
    trusted_module: o.TrustedModule = [],
    max_bytes: o.MaxBytes = o.DEFAULT_LIMITS.max_bytes,
    max_parameters: o.MaxParameters = o.DEFAULT_LIMITS.max_parameters,
    load_timeout_s: o.LoadTimeout = o.DEFAULT_LIMITS.timeout_s,
) -> Loading:
    """Limits and trust from the options. Raises ConfigError."""
    limits = {"max_bytes": max_bytes, "max_parameters": max_parameters, "timeout_s": load_timeout_s}
    return from_mapping(Loading, {"trusted_modules": list(trusted_module), "limits": limits})


@takes(loading_of, into="loading")
def pinned_loading(*, sha256: o.Sha256 = "", loading: Loading) -> Loading:
    """The same for an artifact that is fetched: it may have to be this one. Raises ConfigError."""
    return replace(loading, sha256=sha256)


def _numbers(text: str, option: str, *, whole: bool = False) -> list[float]:
    try:
        return [int(value) if whole else float(value) for value in text.split(",")]
    except ValueError as error:
        kind = "whole numbers" if whole else "numbers"
        raise ConfigError(f"{option} is malformed", expected=f"{kind} separated by commas", got=repr(text)) from error
