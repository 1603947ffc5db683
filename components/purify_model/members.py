"""What the purifiers of a run left, as members of a soup that is mixed after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime.evidence import read_evidence, why_of
from components._runtime.loading import open_model, source_digest
from components._runtime.plan import UNTOUCHED, Loading
from defense_core.bundle import Bundle
from defense_core.data import Splits
from defense_core.errors import EvidenceMismatch, MethodDiverged, MethodNotApplicable
from defense_core.evidence import parse_evidence
from defense_core.purify.base import Purified
from defense_core.purify.soup import SoupConfig, joined, mixed
from defense_core.verdict import Verdict

RESULT = "result.json"
NOT_APPLICABLE = "purify.not_applicable"
"""The rule of the finding that a method has nothing to work on."""


@dataclass(frozen=True)
class Left:
    """What one purifier left.

    Attributes:
        folder: a bundle with its evidence beside it, or the evidence alone.
        evidence: ``purify.<method>``.
    """

    folder: Path
    evidence: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Its name."""
        return str(self.evidence["results"]["method"])

    @property
    def ended_well(self) -> bool:
        """Whether there is a model."""
        return bool(self.evidence["verdict"] == Verdict.PASS.value)

    @property
    def found_nothing(self) -> bool:
        """Whether the method has nothing to work on in this network."""
        return any(finding.get("rule") == NOT_APPLICABLE for finding in self.evidence["findings"])


@dataclass(frozen=True)
class Mixture:
    """A soup of what members left.

    Attributes:
        config: its configuration, with the members' own, so that ``soup`` by itself makes the same again.
        purified: the mean.
        digests: of the members' models, by name.
    """

    config: SoupConfig
    purified: Purified
    digests: Mapping[str, str]


def is_asked_for(method: str, methods: Sequence[str], folders: Sequence[Path]) -> bool:
    """Whether ``method`` is still to come after those that left ``folders``: it is one of ``methods`` and none of them
    has run in its place, nor was the model left untouched.

    Raises:
        EvidenceMissing, EvidenceMismatch: a folder holds no evidence of a purifier.
    """
    return method in methods and not {each.method for each in _left(folders)} & {method, UNTOUCHED}


def mix_members(
    config: Any, folders: Sequence[Path], bundle: Bundle, clean: Splits, *, loading: Loading, **shared: Any
) -> Mixture | None:
    """Average what the members among ``folders`` left.

    Args:
        config: of the method that was asked for; a member of a soup that did not run is left out.
        folders: what the purifiers of this run left.
        bundle: the fetched model.
        shared: ``task``, ``seed``, ``device`` and ``progress`` as for a purifier.

    Returns:
        ``None`` where the method is no soup, or none of its members ran: then it runs by itself.

    Raises:
        ConfigError: ``config`` has other settings for a member than it ran with.
        EvidenceMismatch: a member was made of something else, or its files are not those of its evidence.
        MethodNotApplicable: no member that ran found anything to work on.
        MethodDiverged: no member that ran left a model, and one of them diverged.
    """
    if not isinstance(config, SoupConfig):
        return None
    ran = {each.method: each for each in _left(folders)}
    members = {name: ran[name] for name in config.members if name in ran}
    if not members:
        return None
    used = joined(config, {name: each.evidence["results"]["config"] for name, each in members.items()})
    work = {"source": source_digest(bundle), "model": bundle.digest, "clean": clean.digest, "seed": shared["seed"]}
    for name, each in members.items():
        _require_same_work(name, each, work)
    opened = {name: open_model(each.folder, None, loading) for name, each in members.items() if each.ended_well}
    for name, model in opened.items():
        stated = members[name].evidence["outputs"].get("model")
        if model.digest != stated:
            raise EvidenceMismatch(f"{name} is not the model of its evidence", expected=stated, got=model.digest)
    failed = {name: why_of(each.evidence) for name, each in members.items() if not each.ended_well}
    if not opened:
        idle = all(each.found_nothing for each in members.values())
        refused = MethodNotApplicable if idle else MethodDiverged
        raise refused("no member of the soup left a model", got="; ".join(failed.values()))
    made = {
        name: Purified(model.model, (), members[name].evidence["results"]["facts"]) for name, model in opened.items()
    }
    purified = mixed(bundle.model, made, clean, max_drop=used.max_drop, **shared)
    facts = {**purified.facts, "failed": failed}
    return Mixture(used, Purified(purified.model, (), facts), {name: each.digest for name, each in opened.items()})


def _left(folders: Sequence[Path]) -> list[Left]:
    left: dict[str, Left] = {}
    for folder in folders:
        path = Path(folder) / RESULT
        evidence = read_evidence(path)
        name = str(evidence["name"])
        parsed = parse_evidence({name: evidence}).get(name)
        method = parsed.results.get("method") if parsed is not None else None
        if not isinstance(method, str) or name != f"purify.{method}" or name in left:
            raise EvidenceMismatch(
                f"{path} is not what another purifier left",
                expected="evidence of a purifier, and one of each",
                got=name,
                hint="Mix models of one run",
            )
        left[name] = Left(Path(folder), evidence)
    return list(left.values())


def _require_same_work(name: str, left: Left, work: Mapping[str, Any]) -> None:
    """Raise EvidenceMismatch where a member was made of another model or from other images."""
    found = {**left.evidence["inputs"], "seed": left.evidence["environment"]["seed"]}
    for key, value in work.items():
        if found.get(key) != value:
            raise EvidenceMismatch(
                f"{name} was made from another {key}", expected=value, got=found.get(key), hint="Mix models of one run"
            )
