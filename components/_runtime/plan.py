"""What a run was asked to do: parsed once, strictly, from strings, and identified by a digest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from components._runtime.registered_names import require_usable
from components._runtime.release import Identity
from components._runtime.spdx import require_spdx
from defense_core import __version__
from defense_core.config import digest, from_mapping, require, to_mapping
from defense_core.errors import ConfigError, EvidenceMismatch
from defense_core.evidence import UNPURIFIED
from defense_core.limits import LoadLimits

MAX_SEED = 2**63 - 1
"""Largest seed that torch takes."""
UNTOUCHED = UNPURIFIED
"""In place of a purifier's name: the scan found no evidence, and the fetched model goes on as it is."""
SOUP = "soup"
"""The purifier that averages what the others leave: where there are others, it comes after them."""
DEFAULT_METHODS = ("tsbd", "fip", "nft", "ngf", SOUP, "fine_tuning")
"""Purifiers that remove a backdoor in different ways, so that one finds what another leaves, their mean, and the
control."""
REPORT_SHARE = 0.2
"""Share of the clean set that figures are quoted on where there is no test set."""
_PLAIN = ("model", "clean", "test", "pool", "licence", "device", "seed", "methods")
_NESTED = ("policy", "spec", "probes", "configs", "scan", "loading")


@dataclass(frozen=True)
class Loading:
    """What reading the artifact may cost, and whose code may build the network.

    Attributes:
        sha256: ``"sha256:<hex>"`` that the artifact must have; empty: whatever it has.
        trusted_modules: Python modules of the operator whose factories may build the network.
        limits: sizes and times; an artifact over ``max_bytes`` is refused before the download.
    """

    sha256: str = ""
    trusted_modules: tuple[str, ...] = ()
    limits: LoadLimits = field(default_factory=LoadLimits)

    def __post_init__(self) -> None:
        usable = not self.sha256 or re.fullmatch(r"sha256:[0-9a-f]{64}", self.sha256)
        require(bool(usable), "sha256", "sha256: and 64 hexadecimal digits", repr(self.sha256))


@dataclass(frozen=True)
class Plan:
    """One run's whole configuration, JSON types only.

    Attributes:
        model: ``s3://bucket/key[?versionId=…]``, ``models:/name/3``, ``file://`` or a path.
        clean: the clean set: a path or an ``s3://`` address of a parquet or npz file.
        policy: the policy's mapping.
        spec: how to read a bare state dict: ``architecture``, ``architecture_args``,
            ``input_size``, ``mean``, ``std``, ``num_classes``, ``class_names``, ``augment``; empty for a bundle.
        test: like ``clean``; empty: figures are quoted on the *report* split of the clean set.
        pool: like ``clean``, of a calibration pool that the scan compares with; empty: the one that comes along for
            this kind of model, if any.
        probes: trigger specifications.
        methods: purifiers, in order of preference.
        configs: configuration per method; a missing one has its defaults.
        scan: settings of the backdoor scan, see :class:`defense_core.scan.judgement.ScanConfig`.
        licence: SPDX expression that the operator declares for the model; empty: what the artifact says counts alone.
        seed: of the splits and of every method.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    model: str
    clean: str
    policy: Mapping[str, Any]
    spec: Mapping[str, Any] = field(default_factory=dict)
    test: str = ""
    pool: str = ""
    probes: tuple[Mapping[str, Any], ...] = ()
    methods: tuple[str, ...] = DEFAULT_METHODS
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scan: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    seed: int = 0
    device: str = "auto"
    loading: Loading = field(default_factory=Loading)

    def __post_init__(self) -> None:
        require(bool(self.model), "model", "an address or path", repr(self.model))
        require(bool(self.clean), "clean", "an address or path", repr(self.clean))
        require(bool(self.methods), "methods", "at least one method", self.methods)
        require(len(set(self.methods)) == len(self.methods), "methods", "each method once", self.methods)
        unused = sorted(set(self.configs) - set(self.methods))
        require(not unused, "configs", "methods of this run: " + ", ".join(self.methods), ", ".join(unused))
        if self.licence:
            require_spdx(self.licence)
        require(0 <= self.seed <= MAX_SEED, "seed", f"0 to {MAX_SEED}", self.seed)
        require(self.device.split(":")[0] in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda", self.device)

    def identity(self, *, source: str, clean: str, test: str | None, policy: str, pool: str | None = None) -> Identity:
        """Who this work is, by the content of its inputs rather than by their names.

        The program's version is part of it: other code may turn the same inputs into another
        model, which must not come back to the version that the old code registered.

        Args:
            source: digest of the fetched artifact.
            clean, test, pool: digests of their content.
            policy: digest of the parsed policy.
        """
        mapping = to_mapping(self)
        for named_by_content in ("model", "clean", "test", "pool", "policy"):
            del mapping[named_by_content]
        configuration = {"version": __version__, "plan": mapping, "clean": clean, "test": test, "pool": pool}
        return Identity(source=source, config=digest(configuration), policy=policy)

    def arguments(self) -> dict[str, Any]:
        """The plan as pipeline arguments: strings, JSON strings, one int and one list."""
        mapping = to_mapping(self)
        strings = {name: mapping[name] for name in _PLAIN}
        nested = {name: json.dumps(mapping[name], sort_keys=True) for name in _NESTED}
        return {**strings, **nested}


def plan_from_arguments(arguments: Mapping[str, Any]) -> Plan:
    """The plan that :meth:`Plan.arguments` gave. Raises ConfigError, with the argument's name."""
    nested = {name: parse_json(arguments[name], name) for name in _NESTED}
    return from_mapping(Plan, {**arguments, **nested})


def identity_of(fetch: Mapping[str, Any]) -> Identity:
    """The identity that the evidence ``fetch`` states. Raises EvidenceMismatch."""
    inputs = fetch["inputs"]
    lacking = [name for name in ("source", "config", "policy") if name not in inputs]
    if lacking:
        raise EvidenceMismatch(
            "evidence fetch names no identity", expected="source, config and policy", got=f"no {', '.join(lacking)}"
        )
    return Identity(source=str(inputs["source"]), config=str(inputs["config"]), policy=str(inputs["policy"]))


def parse_json(text: str, where: str) -> Any:
    """JSON from a pipeline parameter. Raises ConfigError naming ``where``."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} is malformed",
            expected="a JSON string",
            got=f"{str(text)[:80]!r}: {error}",
            hint="Correct the parameter",
        ) from error


@dataclass(frozen=True)
class RunSettings:
    """Where one execution of the pipeline keeps its records, and what it promotes.

    Attributes:
        evidence: root of the evidence store, a folder or ``s3://bucket/prefix``.
        model_name: the registered model that is created or extended.
        alias: what moves to the new version on allow.
        controls: a folder or ``s3://bucket/prefix`` where positive controls are kept, so that one of the same work
            is not made twice; empty: each is made.
        name: the execution; a folder of this name holds its evidence. Empty: the
            orchestrator's own name for the execution, for recurring runs.
    """

    evidence: str
    model_name: str
    alias: str = "champion"
    name: str = ""
    controls: str = ""

    def __post_init__(self) -> None:
        require(bool(self.evidence), "evidence", "a folder or s3://bucket/prefix", repr(self.evidence))
        require(bool(self.model_name), "model_name", "the name of a registered model", repr(self.model_name))

    def to_json(self) -> str:
        """The pipeline parameter ``run``."""
        return json.dumps(to_mapping(self), sort_keys=True)


def run_settings(text: str, execution: str = "") -> RunSettings:
    """Settings from the pipeline parameter ``run``; ``execution`` names the run if it does not.

    Raises:
        ConfigError: malformed, a name that is no file name, or a model's name or alias that MLflow does not take.
    """
    settings = from_mapping(RunSettings, parse_json(text, "run"), where="run")
    settings = replace(settings, name=settings.name or execution)
    usable = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", settings.name)
    require(usable is not None, "run name", "1 to 100 letters, digits and . _ -", repr(settings.name))
    require_usable(settings.model_name, settings.alias, {})
    return settings
