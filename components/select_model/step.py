"""Select: the best candidate by a declared rule, blind to attacks. No tensor is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components._runtime.bundle_files import bundle_digest, copy_bundle
from components._runtime.evidence import Clock, compose, is_absent, read_evidence, source_of, why_of
from components._runtime.plan import UNTOUCHED
from defense_core.config import require, to_mapping
from defense_core.errors import EvidenceMismatch, EvidenceMissing
from defense_core.files import atomic_directory
from defense_core.selection import RULE, Candidate, Signals, choose, suspected_class, with_residuals
from defense_core.verdict import Finding, Verdict

RESULT = "result.json"


@dataclass(frozen=True)
class Made:
    """A purified model on disk.

    Attributes:
        candidate: as the rule sees it.
        folder: where it lies.
        model: its digest; ``None`` where the method gave none.
        control: plain fine-tuning, shown for comparison and never chosen.
    """

    candidate: Candidate
    folder: Path
    model: str | None
    control: bool

    def row(self) -> dict[str, Any]:
        """As evidence records it."""
        signals = self.candidate.signals
        return {
            "method": self.candidate.method,
            "model": self.model,
            "control": self.control,
            "accuracy": None if signals is None else signals.accuracy,
            "residual": self.candidate.residual,
            "averaged": self.candidate.averaged,
            "eligible": self.candidate.eligible,
            "why": self.candidate.why,
        }


def select_model(candidates: Sequence[Path], out: Path, *, order: Sequence[str] = ()) -> dict[str, Any]:
    """Choose by :data:`defense_core.selection.RULE` and copy the chosen bundle, byte for byte, to ``out``.

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
    made = [_made(Path(folder), evidence) for folder, evidence in zip(candidates, evidences, strict=True)]
    made.sort(key=lambda each: _place(each.candidate.method, order))
    if [each.candidate.method for each in made] == [UNTOUCHED]:
        return _as_it_is(made[0], evidences[0], out, clock)
    judged = with_residuals([each.candidate for each in made])
    made = [replace(each, candidate=candidate) for each, candidate in zip(made, judged, strict=True)]
    winner = choose(judged)
    if winner is None:
        raise EvidenceMissing(
            "no candidate can be selected",
            expected="a method other than the control that ended well",
            got="; ".join(f"{each.method}: {each.why}" for each in judged),
            hint="Choose other methods or settings; the fetched model is not promoted instead",
        )
    chosen = next(each for each in made if each.candidate.method == winner.method)
    digest = _copied(chosen, out)
    return compose(
        "select",
        clock,
        inputs={
            "source": source_of(evidences[0]),
            "candidates": {each.candidate.method: each.model for each in made},
        },
        outputs={"model": digest},
        results={
            "method": winner.method,
            "purified": True,
            "rule": RULE,
            "suspected_class": suspected_class(judged),
            "candidates": [each.row() for each in made],
        },
        findings=[
            Finding(
                "select.candidate", Verdict.PASS, winner.residual, "the rule", f"{winner.method} was chosen. {RULE}"
            )
        ],
    )


def with_evidence(folders: Sequence[Path]) -> list[Path]:
    """The folders of purifiers that ran: the others hold an empty ``result.json``."""
    return [each for each in folders if not is_absent(each / RESULT)]


def _copied(chosen: Made, out: Path) -> str:
    """Copy the bundle of ``chosen`` to ``out``; its digest. Raises EvidenceMismatch."""
    with atomic_directory(out) as folder:
        copy_bundle(chosen.folder, folder)
        digest = bundle_digest(folder)
        if digest != chosen.model:
            raise EvidenceMismatch(
                f"{chosen.folder} is not the model of its evidence", expected=chosen.model, got=digest
            )
    return digest


def _as_it_is(only: Made, evidence: Mapping[str, Any], out: Path, clock: Clock) -> dict[str, Any]:
    rule = "The scan found no evidence of a backdoor and the policy forces no purification: the fetched model goes on."
    return compose(
        "select",
        clock,
        inputs={"source": source_of(evidence), "candidates": {UNTOUCHED: only.model}},
        outputs={"model": _copied(only, out)},
        results={
            "method": UNTOUCHED,
            "purified": False,
            "rule": rule,
            "suspected_class": None,
            "candidates": [only.row()],
        },
        findings=[Finding("select.candidate", Verdict.PASS, None, "the rule", rule)],
    )


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


def _made(folder: Path, evidence: Mapping[str, Any]) -> Made:
    results = evidence["results"]
    signals = results.get("select")
    control = bool(results["control"])
    why = ""
    if evidence["verdict"] != Verdict.PASS.value:
        why = why_of(evidence) or f"its verdict is {evidence['verdict']}"
    elif control:
        why = "the control is shown for comparison only"
    candidate = Candidate(
        method=str(results["method"]),
        signals=None if signals is None else Signals.from_mapping(signals),
        eligible=not why,
        why=why,
        averaged=len(results.get("facts", {}).get("averaged", ())),
    )
    return Made(candidate, folder, evidence["outputs"].get("model"), control)
