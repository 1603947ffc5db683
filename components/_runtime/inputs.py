"""What several components read from their KFP inputs in the same way: paths and JSON strings, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime.datasets import read_data
from components._runtime.plan import REPORT_SHARE, Loading, parse_json
from defense_core.config import from_mapping
from defense_core.errors import ConfigError
from defense_core.policy import parse_policy
from defense_core.policy_types import Requirements


@dataclass(frozen=True)
class ImageInputs:
    """Images and probes of a run, and how models are loaded."""

    clean: Path
    test: Path | None
    probes: tuple[Mapping[str, Any], ...]
    loading: Loading


@dataclass(frozen=True)
class MethodInputs:
    """What a method or the scan is given: no probe and no test image."""

    clean: Path
    report: float
    config: Mapping[str, Any]
    loading: Loading
    pool: Path | None = None


def for_images(data: str, loading: str) -> ImageInputs:
    """Inputs of evaluate and export. Raises DataError or ConfigError."""
    found = read_data(Path(data))
    return ImageInputs(found.clean, found.test, found.probes, _loading(loading))


def for_scan(data: str, loading: str, scan: str) -> MethodInputs:
    """Inputs of scan: as a method's, with the scan's own configuration. Raises DataError or ConfigError."""
    found = read_data(Path(data))
    parsed = parse_json(scan, "scan")
    if not isinstance(parsed, dict):
        raise ConfigError("scan is malformed", expected="settings of the scan", got=type(parsed).__name__)
    return MethodInputs(found.clean, found.report_share(REPORT_SHARE), parsed, _loading(loading), found.pool)


def for_method(data: str, loading: str, configs: str, method: str) -> MethodInputs:
    """Inputs of purify. Raises DataError or ConfigError."""
    found = read_data(Path(data))
    parsed = parse_json(configs, "configs")
    if not isinstance(parsed, dict):
        raise ConfigError("configs is malformed", expected="configuration by method", got=type(parsed).__name__)
    return MethodInputs(found.clean, found.report_share(REPORT_SHARE), parsed.get(method, {}), _loading(loading))


def requirements(policy: str) -> Requirements:
    """What the policy, a JSON string, requires. Raises ConfigError or PolicyError."""
    return parse_policy(parse_json(policy, "policy")).require


def _loading(text: str) -> Loading:
    return from_mapping(Loading, parse_json(text, "loading"), where="loading")
