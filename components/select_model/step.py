"""Select: the best candidate by a declared rule, blind to attacks. No tensor is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components._runtime.bundle_files import bundle_digest, copy_bundle
from components._runtime.evidence import Clock, compose, read_evidence, source_of
from defense_core.config import require, to_mapping
from defense_core.errors import EvidenceMismatch, EvidenceMissing
from defense_core.files import atomic_directory
from defense_core.verdict import Finding, Verdict

TIE_POINTS = 0.01
"""Candidates within one point of accuracy of the best are tied."""

RULE = (
    "Among the methods that ended well, the control left out: the highest accuracy on the select split; "
    f"within {TIE_POINTS:g} of it, the highest mean agreement with the other such candidates on noisy select images; "
    "then the order in which the methods were given."
)
RESULT = "result.json"


@dataclass(frozen=True)
class Candidate:
    """One purified model and what the choice may rest on.

    Attributes:
        method: its name.
        folder: where it lies.
        model: its digest; ``None`` where the method gave none.
        control: plain fine-tuning, shown for comparison and never chosen.
        accuracy: on the select split; ``None`` where that is empty.
        agreement: mean share of equal answers on noisy select images; ``None`` without another candidate.
        eligible: whether it can be chosen.
        why: the reason, where it cannot.
    """

    method: str
    folder: Path
    model: str | None
    control: bool
    accuracy: float | None
    noisy_labels: tuple[int, ...]
    agreement: float | None = None
    eligible: bool = True
    why: str = ""

    def row(self) -> dict[str, Any]:
        """As evidence records it."""
        keys = ("method", "model", "control", "accuracy", "agreement", "eligible", "why")
        return {key: getattr(self, key) for key in keys}


def select_model(candidates: Sequence[Path], out: Path, *, order: Sequence[str] = ()) -> dict[str, Any]:
    """Choose by :data:`RULE` and copy the chosen bundle, byte for byte, to ``out``.

    Args:
        candidates: folders that purification wrote.
        out: folder that becomes the chosen bundle.
        order: methods in order of preference; empty: the order of ``candidates``.

    Returns:
        Evidence ``select`` with every candidate's numbers.

    Raises:
        EvidenceMissing: no candidate can be chosen; the original is never chosen instead.
        EvidenceMismatch: the candidates were made from different models.
        DigestMismatch: a candidate's files are not those of its evidence.
    """
    clock = Clock.start()
    require(bool(candidates), "candidates", "at least one folder of purify", "none")
    evidences = [read_evidence(Path(folder) / RESULT) for folder in candidates]
    _require_one_origin(evidences)
    read = [_candidate(Path(folder), evidence) for folder, evidence in zip(candidates, evidences, strict=True)]
    ranked = _with_agreement(sorted(read, key=lambda each: _place(each.method, order)))
    chosen = choose(ranked)
    if chosen is None:
        raise EvidenceMissing(
            "no candidate can be selected",
            expected="a method other than the control that ended well",
            got="; ".join(f"{each.method}: {each.why}" for each in ranked),
            hint="Choose other methods or settings; the fetched model is not promoted instead",
        )
    with atomic_directory(out) as folder:
        copy_bundle(chosen.folder, folder)
        digest = bundle_digest(folder)
        if digest != chosen.model:
            raise EvidenceMismatch(
                f"{chosen.folder} is not the model of its evidence", expected=chosen.model, got=digest
            )
    return compose(
        "select",
        clock,
        inputs={"source": source_of(evidences[0]), "candidates": {each.method: each.model for each in ranked}},
        outputs={"model": digest},
        results={"method": chosen.method, "rule": RULE, "candidates": [each.row() for each in ranked]},
        findings=[
            Finding(
                "select.candidate", Verdict.PASS, chosen.accuracy, "the rule", f"{chosen.method} was chosen. {RULE}"
            )
        ],
    )


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The rule itself, on candidates in order of preference; ``None`` where none is eligible."""
    eligible = [each for each in candidates if each.eligible]
    if not eligible:
        return None
    best = max(_score(each.accuracy) for each in eligible)
    tied = [each for each in eligible if _score(each.accuracy) >= best - TIE_POINTS]
    # max() keeps the first of equals, which is the one that was given first.
    return max(tied, key=lambda each: _score(each.agreement))


def _score(value: float | None) -> float:
    return -1.0 if value is None else value


def _place(method: str, order: Sequence[str]) -> int:
    return list(order).index(method) if method in order else len(order)


def _require_one_origin(evidences: Sequence[Mapping[str, Any]]) -> None:
    origins = {(source_of(evidence), evidence["inputs"].get("model")) for evidence in evidences}
    if len(origins) != 1:
        raise EvidenceMismatch(
            "candidates were made from different models",
            expected="one source and one model",
            got=to_mapping(sorted(map(str, origins))),
            hint="Give the candidates of one run",
        )


def _candidate(folder: Path, evidence: Mapping[str, Any]) -> Candidate:
    results = evidence["results"]
    signals = results.get("select") or {}
    candidate = Candidate(
        method=str(results["method"]),
        folder=folder,
        model=evidence["outputs"].get("model"),
        control=bool(results["control"]),
        accuracy=signals.get("accuracy"),
        noisy_labels=tuple(signals.get("noisy_labels", ())),
    )
    why = ""
    if evidence["verdict"] != Verdict.PASS.value:
        why = (
            "; ".join(str(finding["why"]) for finding in evidence["findings"])
            or f"its verdict is {evidence['verdict']}"
        )
    elif candidate.control:
        why = "the control is shown for comparison only"
    return replace(candidate, eligible=not why, why=why)


def _with_agreement(candidates: Sequence[Candidate]) -> list[Candidate]:
    voters = [each for each in candidates if each.eligible and each.noisy_labels]
    done = []
    for each in candidates:
        others = [other for other in voters if other is not each and len(other.noisy_labels) == len(each.noisy_labels)]
        shares = [_share_equal(each.noisy_labels, other.noisy_labels) for other in others]
        done.append(replace(each, agreement=sum(shares) / len(shares) if shares and each in voters else None))
    return done


def _share_equal(first: Sequence[int], second: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
