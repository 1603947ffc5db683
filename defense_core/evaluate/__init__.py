"""What a model does on clean and on triggered samples, with intervals."""

from defense_core.evaluate.compare import HEADINGS, ComparisonRow, Estimate, compare
from defense_core.evaluate.evaluation import Probe, evaluate
from defense_core.evaluate.metrics import Interval, PairedCounts, Proportion, der, der_interval
from defense_core.evaluate.records import ClassAccuracy, Evaluation, ProbeResult

__all__ = [
    "HEADINGS",
    "ClassAccuracy",
    "ComparisonRow",
    "Estimate",
    "Evaluation",
    "Interval",
    "PairedCounts",
    "Probe",
    "ProbeResult",
    "Proportion",
    "compare",
    "der",
    "der_interval",
    "evaluate",
]
