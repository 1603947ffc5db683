"""The file of node pools that a team edits: one YAML file says where and as whom each step of the pipeline runs.

A step's own setting replaces the ``default``'s, whole; where neither says anything, the component's ``metadata.yaml``
does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defense_core.config import from_mapping, require
from defense_core.errors import ConfigError
from pipelines.pod_secrets import check_disjoint, check_plain_environment, is_name
from pipelines.pod_settings import PodSettings, cpu_cores, memory_bytes
from pipelines.resources import component_names, metadata_of
from pipelines.yaml_files import read_mapping

POOLS = Path(__file__).resolve().parent / "pools"
FORMAT = 1


@dataclass(frozen=True)
class NodePools:
    """The whole file.

    Attributes:
        format: 1.
        namespace: that the runs' pods live in; needed where a step names a service account or a priority class.
        run_service_account: of the run's other pods (KFP's drivers), and of a step that names none; the name that
            the run is submitted with.
        default: settings of every step.
        steps: settings by component, before the default's.
    """

    format: int
    namespace: str = ""
    run_service_account: str = ""
    default: PodSettings = field(default_factory=PodSettings)
    steps: Mapping[str, PodSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.format == FORMAT, "format", str(FORMAT), self.format)
        for name in (self.namespace, self.run_service_account):
            require(not name or is_name(name), "namespace and run_service_account", "names", repr(name))
        known = component_names()
        for step in self.steps:
            if step not in known:
                raise ConfigError(f"steps.{step} is no step", expected="one of " + ", ".join(known), got=repr(step))
        merged = {step: self.for_step(step) for step in known}
        for step, settings in merged.items():
            _located(f"step {step}", _check_together, settings)
            _check_rights(step, settings)
            identified = settings.service_account is not None or settings.priority_class is not None
            if identified and not self.namespace:
                raise ConfigError(
                    f"step {step} names a service account or a priority class, and the file no namespace",
                    expected="the namespace that the runs' pods live in",
                    got="none",
                    hint="Both are set by an admission policy, which must not reach into other namespaces",
                )
        _check_one_meaning(merged)

    def for_step(self, component: str) -> PodSettings:
        """What the pod of ``component`` gets, everything merged."""
        resources = {name: str(value) for name, value in metadata_of(component)["resources"].items()}
        own = self.steps.get(component, PodSettings())
        chosen: dict[str, Any] = dict(resources)
        for layer in (self.default, own):
            values = {each.name: getattr(layer, each.name) for each in dataclasses.fields(layer)}
            chosen |= {name: value for name, value in values.items() if value is not None}
        return PodSettings(**chosen)


def parse_node_pools(mapping: Mapping[str, Any], where: str = "node pools") -> NodePools:
    """Node pools from plain data.

    Raises:
        ConfigError: an unknown key, a value of the wrong kind or out of range, settings that contradict each other,
            or a step that would be given more than it reaches.
    """
    # A heading with nothing below it is read as null.
    content = {key: {} if value is None and key in ("default", "steps") else value for key, value in mapping.items()}
    steps = content.get("steps", {})
    if not isinstance(steps, Mapping):
        raise ConfigError(f"{where}: steps is malformed", expected="a mapping", got=type(steps).__name__)
    content["steps"] = {name: _located(f"steps.{name}", from_mapping, PodSettings, own) for name, own in steps.items()}
    content["default"] = _located("default", from_mapping, PodSettings, content.get("default", {}))
    pools: NodePools = _located(where, from_mapping, NodePools, content)
    return pools


def read_node_pools(name: str) -> NodePools:
    """Node pools by the name of a shipped file (gke, eks, bare_metal) or by their own file. Raises ConfigError."""
    shipped = POOLS / f"{name}.yaml"
    path = shipped if "/" not in name and shipped.is_file() else Path(name)
    return parse_node_pools(read_mapping(path), str(path if path is not shipped else name))


def _located(where: str, call: Any, *arguments: Any) -> Any:
    """``call(*arguments)``, whose ConfigError says where in the file."""
    try:
        return call(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.what}", expected=error.expected, got=error.got, hint=error.hint) from error


def _check_together(settings: PodSettings) -> None:
    """What only the merged settings can tell. Raises ConfigError."""
    for request, limit, amount in (
        ("cpu_request", "cpu_limit", cpu_cores),
        ("memory_request", "memory_limit", memory_bytes),
        ("shared_memory", "memory_limit", memory_bytes),
    ):
        low, high = getattr(settings, request), getattr(settings, limit)
        if low and high and amount(low) > amount(high):
            raise ConfigError(f"{request} is larger than {limit}", expected=f"at most {high}", got=low)
    if settings.retries is not None and settings.retries.count and not settings.timeout_s:
        raise ConfigError(
            "retries have no end",
            expected="a timeout_s",
            got="none",
            hint="Argo gives up retrying a fixed time after the first start; it is computed from timeout_s",
        )
    check_plain_environment(settings.environment or {})
    check_disjoint(settings.secrets or (), settings.environment or {})


def _check_rights(step: str, settings: PodSettings) -> None:
    """Raise ConfigError where the step would be given what it does not reach."""
    reaches = [str(each) for each in metadata_of(step)["reaches"]]
    for name, grants in _granted(settings):
        extra = sorted(set(grants) - set(reaches))
        if extra:
            raise ConfigError(
                f"step {step} is given {name}, which opens more than the step reaches",
                expected="rights among " + ", ".join(reaches),
                got=", ".join(extra),
                hint="Give the step a secret or service account of its own with fewer rights",
            )


def _check_one_meaning(merged: Mapping[str, PodSettings]) -> None:
    """One secret opens the same things wherever it is named. Raises ConfigError."""
    seen: dict[str, tuple[str, frozenset[str]]] = {}
    for step, settings in merged.items():
        for name, grants in _granted(settings):
            first, rights = seen.setdefault(name, (step, frozenset(grants)))
            if rights != frozenset(grants):
                raise ConfigError(
                    f"{name} opens other things in step {step} than in step {first}",
                    expected=", ".join(sorted(rights)) or "nothing",
                    got=", ".join(sorted(grants)) or "nothing",
                    hint="Write down everything that it opens; a step that reaches less needs another one",
                )


def _granted(settings: PodSettings) -> list[tuple[str, tuple[str, ...]]]:
    account = settings.service_account
    named = [(f"service account {account.name}", account.grants)] if account is not None else []
    return [*named, *((f"secret {each.secret}", each.grants) for each in settings.secrets or ())]
