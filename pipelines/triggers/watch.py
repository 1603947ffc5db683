"""What is done with new versions: which models are watched, and what their runs look like.

One YAML file, read by the hook's worker and by the sweep::

    evidence: s3://quarantine/evidence        # where all runs keep their evidence
    controls: s3://quarantine/controls        # where positive controls are kept; left out: each is made
    rules:                                    # the first rule that names the model counts
      - models: ["vision-*"]                  # names of registered models; * and ? as in a shell
        register: quarantined-vision          # the registered model that the runs write to
        plan:                                 # as the options of `quarantine run`, without the model
          clean: s3://data/vision-clean.parquet
          policy: standard                    # a shipped policy, a file beside this one, or a mapping

Versions of a model that no rule names are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from components._runtime import registry_tags as tag
from components._runtime.plan import Plan, RunSettings, run_settings
from components._runtime.registered_names import require_usable
from defense_core.config import from_mapping, require
from defense_core.errors import ConfigError
from defense_core.policy import parse_policy
from pipelines.options import read_policy
from pipelines.triggers.keys import RegisteredVersion, WorkKey, source_digest
from pipelines.yaml_files import read_mapping

OWN_TAGS = (tag.DECISION, tag.IDENTITY, tag.SOURCE_DIGEST, tag.FILES_DIGEST)

_ADDRESSABLE = re.compile(r"[^/@:]{1,250}")
_ANY = "models:/any/1"


class TaggedVersion(RegisteredVersion, Protocol):
    """A version with its name, number and tags, as MLflow's ``ModelVersion``."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str | int: ...
    @property
    def tags(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Rule:
    """What is done with versions of some models.

    Attributes:
        models: patterns of names, ``*`` and ``?``.
        plan: of the run, with an address of no model.
        register: the registered model that runs write to.
        alias: what moves there on allow.
        policy_digest: digest of the plan's policy.
    """

    models: tuple[str, ...]
    plan: Plan
    register: str
    alias: str
    policy_digest: str


@dataclass(frozen=True)
class Watch:
    """All rules, where evidence goes, and where positive controls are kept, if anywhere."""

    evidence: str
    rules: tuple[Rule, ...] = field(default=())
    controls: str = ""

    def rule(self, model: str) -> Rule | None:
        """The first rule that names ``model``."""
        matching = (rule for rule in self.rules if any(fnmatchcase(model, pattern) for pattern in rule.models))
        return next(matching, None)

    def is_own(self, version: TaggedVersion) -> bool:
        """Whether this project made ``version``: its tags are there *and* it is of a model that runs write to.

        Tags alone prove nothing, since whoever registers a version sets them. A version elsewhere that carries
        them is judged like any other. In the models that runs write to, ``quarantine verify`` finds a forged one.
        """
        outputs = {rule.register for rule in self.rules}
        return version.name in outputs and all(version.tags.get(name) for name in OWN_TAGS)

    def key(self, version: TaggedVersion) -> WorkKey | str:
        """What ``version`` asks for; or, where it asks for nothing, the reason in one word.

        ``own``, ``unwatched``, or ``unaddressable`` where no ``models:/`` address can name it.
        """
        rule = self.rule(version.name)
        if self.is_own(version):
            return "own"
        if rule is None:
            return "unwatched"
        if not _ADDRESSABLE.fullmatch(version.name):
            return "unaddressable"
        return WorkKey(version.name, str(version.version), source_digest(version), rule.policy_digest)

    def plan(self, key: WorkKey) -> Plan | None:
        """The plan of a run for ``key``; ``None`` where the rules changed since it was made."""
        rule = self.rule(key.model)
        if rule is None or rule.policy_digest != key.policy_digest:
            return None
        return replace(rule.plan, model=f"models:/{key.model}/{key.version}")

    def run_settings(self, key: WorkKey) -> RunSettings | None:
        """Where that run keeps its records, in a folder of its own id, and what it promotes; ``None`` as above."""
        rule = self.rule(key.model)
        return None if rule is None else self.settings_of(rule)

    def settings_of(self, rule: Rule) -> RunSettings:
        """The same for every run of ``rule``."""
        return RunSettings(self.evidence, rule.register, rule.alias, controls=self.controls)


def run_name(key: WorkKey, run_key: str) -> str:
    """The run's name: for people, and made unique by the run key: ``vision-7-1f3a…``, ``….2`` in a later round."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", key.model).strip("-")[:40] or "model"
    fingerprint, _, later = run_key.removeprefix("sha256:").partition(".")
    return f"{plain}-{key.version}-{fingerprint[:32]}" + (f".{later}" if later else "")


def read_watch(path: Path) -> Watch:
    """The watch file at ``path``. Raises ConfigError, PolicyError."""
    return parse_watch(read_mapping(path), beside=path.parent)


def parse_watch(content: Mapping[str, Any], *, beside: Path) -> Watch:
    """A watch file's content; policy files are relative to ``beside``.

    Raises:
        ConfigError, PolicyError: something in it is not usable.
    """
    file = from_mapping(_File, content, where="watch")
    rules = tuple(_rule(each, f"watch.rules[{index}]", beside) for index, each in enumerate(file.rules))
    require(bool(rules), "watch.rules", "at least one rule", "none")
    for rule in rules:
        run_settings(RunSettings(file.evidence, rule.register, rule.alias, "any").to_json())
    return Watch(file.evidence, rules, file.controls)


@dataclass(frozen=True)
class _File:
    evidence: str
    rules: tuple[Mapping[str, Any], ...]
    controls: str = ""


@dataclass(frozen=True)
class _RuleFields:
    models: tuple[str, ...]
    register: str
    plan: Mapping[str, Any]
    alias: str = "champion"

    def __post_init__(self) -> None:
        require(bool(self.models), "models", "at least one pattern", "none")


def _rule(content: Mapping[str, Any], where: str, beside: Path) -> Rule:
    fields = from_mapping(_RuleFields, content, where=where)
    require_usable(fields.register, fields.alias, {})
    if "model" in fields.plan:
        raise ConfigError(f"{where}.plan names a model", expected="no model: each run gets its own", got="model")
    policy = fields.plan.get("policy", "standard")
    mapping = read_policy(policy, beside) if isinstance(policy, str) else policy
    plan = from_mapping(Plan, {**fields.plan, "model": _ANY, "policy": mapping}, where=f"{where}.plan")
    return Rule(fields.models, plan, fields.register, fields.alias, parse_policy(mapping).digest)
