"""What ``quarantine run``, ``submit`` and ``schedule`` ask of a run, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from components._runtime.plan import DEFAULT_METHODS, Plan
from defense_core.config import from_mapping
from pipelines import options as o
from pipelines.model_options import tuned_spec
from pipelines.option_groups import takes


@dataclass(frozen=True)
class Request:
    """What is asked of a run, but for where its model and clean set are.

    Attributes:
        asked: the fields of its plan that are decided so far.
        model_name: the registered model that gets a new version.
        alias: what moves on allow.
        controls: where positive controls are kept; empty: nowhere.
    """

    asked: Mapping[str, Any] = field(repr=False)
    model_name: str
    alias: str
    controls: str

    def plan(self, **others: Any) -> Plan:
        """The whole plan, with its ``others``. Raises ConfigError."""
        return from_mapping(Plan, {**self.asked, **others})


@takes(tuned_spec, into="spec")
def run_request(
    *,
    policy: Annotated[str, typer.Option(help="strict, standard, observe, or a policy file.")] = "standard",
    methods: Annotated[str, typer.Option(help="Purifiers in order of preference, comma-separated.")] = ",".join(
        DEFAULT_METHODS
    ),
    test: o.Test = "",
    probe: o.Probes = [],
    register: Annotated[str, typer.Option(help="Registered model that gets a new version.")] = "quarantined-model",
    alias: Annotated[str, typer.Option(help="Alias that moves on allow.")] = "champion",
    spec: dict[str, Any],
    config: Annotated[str, typer.Option(help="Settings by method, a YAML file.")] = "",
    settings: Annotated[
        list[str], typer.Option("--set", help="tsbd.n=0.15; repeatable.", metavar="METHOD.KEY=VALUE")
    ] = [],
    scan_settings: o.ScanSettings = [],
    pool: o.PoolFile = "",
    controls: o.Controls = "",
    licence: Annotated[
        str, typer.Option(help="Licence of the model, an SPDX expression; must agree with what the artifact says.")
    ] = "",
) -> Request:
    """The options of every run. Raises ConfigError, or what reading the files raises."""
    asked = {
        "policy": o.read_policy(policy),
        "spec": spec,
        "test": test,
        "probes": o.read_probes(probe),
        "methods": [name.strip() for name in methods.split(",")],
        "configs": o.parse_settings(settings, o.optional_mapping(config)),
        "pool": pool,
        "licence": licence,
        "scan": o.parse_settings(scan_settings, option="--scan-set"),
    }
    return Request(asked, register, alias, controls)
