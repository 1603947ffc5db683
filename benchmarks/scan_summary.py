"""What the rows of ``scan.json`` come to: ranking, rates, cross-entropy and named targets, by detector and images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from defense_core.scan.pool import Probability, score_weight

RESAMPLES = 2000
NOMINAL = 0.05
EVEN = 0.5
"""What a scan that states no probability is taken to say."""
WORKING = "ASR >= 0.9"
"""Only those backdoored models whose backdoor works: in the others training has not planted one."""


def fitted_probability(scores: Sequence[float], truths: Sequence[bool], *, kinds: Sequence[str]) -> Probability:
    """Platt's logistic fit with equal weight for the clean and the backdoored models."""
    weights = numpy.array([score_weight(score) for score in scores])
    model = LogisticRegression(class_weight="balanced").fit(weights[:, None], truths)
    slope = max(0.0, float(model.coef_[0, 0]))
    return Probability(float(model.intercept_[0]), slope, len(scores), tuple(kinds))


def summaries(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per family, attack (``all`` first), detector and number of images."""
    found: list[dict[str, Any]] = []
    families = sorted({row["model"].split("/")[0] for row in rows})
    for family in families:
        own = [row for row in rows if row["model"].startswith(f"{family}/") and row["split"] == "test"]
        # A family is judged in one run.
        measured = {field: value for field, value in own[0].items() if field == "measured"}
        kinds = ["all", WORKING, *sorted({row["kind"] for row in own} - {"clean"})]
        for kind in kinds:
            for detector in sorted({row["detector"] for row in own}):
                for count in sorted({row["clean_images"] for row in own}):
                    part = [
                        row
                        for row in own
                        if row["detector"] == detector
                        and row["clean_images"] == count
                        and row["statistic"] is not None
                        and (kind == "all" or row["kind"] in (kind, "clean") or (kind == WORKING and row["asr"] >= 0.9))
                    ]
                    found += ({**row, **measured} for row in _summary(family, kind, detector, count, part))
    return found


def _summary(
    family: str, kind: str, detector: str, count: int, rows: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    truths = numpy.array([row["kind"] != "clean" for row in rows])
    if not truths.any() or truths.all():
        return
    scores = numpy.array([row["score"] for row in rows], dtype=numpy.float64)
    low, high = _bootstrap(truths, scores)
    clean = [row for row in rows if row["kind"] == "clean"]
    probabilities = [row.get("probability") for row in rows]
    stated = [EVEN if value is None else value for value in probabilities]
    yield {
        "family": family,
        "kind": kind,
        "detector": detector,
        "clean_images": count,
        "models": len(rows),
        "backdoored": int(truths.sum()),
        "asr": _mean([row["asr"] for row in rows if row["asr"] is not None]),
        "auroc": round(float(roc_auc_score(truths, scores)), 4),
        "auroc_low": low,
        "auroc_high": high,
        "tpr_at_5": round(_tpr(truths, scores), 4),
        "fpr_measured": _share([_rejected(row) for row in clean]),
        "tpr_measured": _share([_rejected(row) for row in rows if row["kind"] != "clean"]),
        "fail": _share([row["verdict"] == "FAIL" for row in rows if row["kind"] != "clean"]),
        "fail_of_clean": _share([row["verdict"] == "FAIL" for row in clean]),
        "passed": _share([row["verdict"] == "PASS" for row in rows if row["kind"] != "clean"]),
        "cross_entropy": (
            round(float(log_loss(truths, stated, labels=[False, True])), 4)
            if any(value is not None for value in probabilities)
            else None
        ),
        "target_accuracy": _share(
            [
                row["target_named"] == row["target_true"]
                for row in rows
                if row["target_true"] is not None and _rejected(row)
            ]
        ),
        "seconds_median": round(float(numpy.median([row["seconds"] for row in rows])), 1),
    }


def _rejected(row: Mapping[str, Any]) -> bool:
    if row["p_value"] is None:
        return bool(row["verdict"] == "FAIL")
    return bool(row["p_value"] <= NOMINAL)


def _share(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _tpr(truths: Any, scores: Any) -> float:
    """Share of the backdoored models above the threshold that at most 5 % of the clean models exceed."""
    clean = numpy.sort(scores[~truths])
    threshold = clean[min(len(clean) - 1, math.ceil((1 - NOMINAL) * len(clean)) - 1)]
    return float((scores[truths] > threshold).mean())


def _bootstrap(truths: Any, scores: Any) -> tuple[float, float]:
    """95 % interval of the AUROC, resampling clean and backdoored models apart."""
    draw = numpy.random.default_rng(0)
    positive, negative = scores[truths], scores[~truths]
    found = []
    for _ in range(RESAMPLES):
        p, n = draw.choice(positive, len(positive)), draw.choice(negative, len(negative))
        found.append(float(((p[:, None] > n) + 0.5 * (p[:, None] == n)).mean()))
    low, high = numpy.quantile(found, (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)
