"""Tables that sum the rows of a results file up; :mod:`benchmarks.tables` puts them into the docs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.markdown import Rows, grid, load, table, text
from benchmarks.purification import CANDIDATES
from benchmarks.purification_tables import part, selected

MANY_IMAGES = 100
"""Clean images of the scan's table by attack."""
NARROW = "preact_resnet18(width=16)"
"""Network of the README's row of the purification benchmark."""


def tsbd_summary(rows: Rows) -> str:
    """Means over seeds, and the worst ASR, of each attack, victim and method."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["attack"], row["victim_seed"], row["method"]), []).append(row)
    columns = (
        "attack",
        "victim",
        "method",
        "ACC before",
        "ACC",
        "ASR before",
        "ASR",
        "worst ASR",
        "RA",
        "DER",
        "seconds",
    )

    def lines() -> Iterable[list[str]]:
        for (attack, seed, method), members in groups.items():

            def mean(field: str, members: list[Mapping[str, Any]] = members) -> str:
                return text(statistics.fmean(float(row[field]) for row in members))

            worst = text(max(row["asr_after"] for row in members))
            figures = [mean(field) for field in ("acc_before", "acc_after", "asr_before", "asr_after")]
            yield [attack, str(seed), method, *figures, worst, mean("ra_after"), mean("der"), mean("seconds")]

    return table(columns, lines())


def ablation_digits(rows: Rows) -> str:
    """Means over seeds of each ablation, and the worst ASR."""
    ablations: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        ablations.setdefault(row["run"], []).append(row)

    def mean(rows: Rows, value: Callable[[Mapping[str, Any]], float]) -> str:
        return text(statistics.fmean(map(value, rows)))

    lines = [
        [
            name,
            str(len(members)),
            mean(members, lambda row: row["acc_before"] - row["acc_after"]),
            mean(members, lambda row: row["asr_after"]),
            text(max(row["asr_after"] for row in members)),
            mean(members, lambda row: row["der"]),
        ]
        for name, members in ablations.items()
    ]
    return table(("run", "seeds", "ACC drop", "ASR", "worst ASR", "DER"), lines)


def cost_summary(rows: Rows) -> str:
    """Seconds by network and clean images, a column a method."""
    case_of = ("architecture", "width", "parameters", "clean_images")
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        case = tuple(row[field] for field in case_of)
        cases.setdefault(case, dict(zip(case_of, case, strict=True)))[row["method"]] = row["seconds"]
    methods = dict.fromkeys(row["method"] for row in rows)
    return grid(list(cases.values()), (*case_of, *methods))


def readme_rows() -> str:
    """The README's table: the figures that a visitor asks for first."""
    lines: list[list[str]] = []
    demo, quality, cifar, purified, scanned, fetch = (
        load(name) for name in ("demo", "demo-quality", "tsbd-cifar", "purification-cpu", "scan-summary", "fetch")
    )
    if demo:
        total = next(row for row in demo["rows"] if row["step"] == "total")
        lines.append(
            [f"`make demo` after installation, {demo['device']}", f"{total['seconds']} s, peak {total['peak_mb']} MB"]
        )
    if quality:
        for method, label in (("tsbd", "TSBD"), ("fine_tuning", "plain fine-tuning, the control")):
            rows = [row for row in quality["rows"] if row["method"] == method]
            worst = max(row["asr_after"] for row in rows)
            lines.append(
                [f"Digits, BadNets, {len(rows)} seeds, {label}", f"{_change(rows)}; worst seed ASR {worst:.3f}"]
            )
    if cifar:
        for attack in dict.fromkeys(row["attack"] for row in cifar["rows"]):
            for method, label in (("tsbd", "TSBD"), ("fine_tuning", "the control")):
                rows = [row for row in cifar["rows"] if (row["attack"], row["method"]) == (attack, method)]
                lines.append([f"CIFAR-10, {attack}, 5 % clean, {len(rows)} runs, {label}", _change(rows)])
    chosen = selected(part(purified["rows"], clean_fraction=0.05, architecture=NARROW)) if purified else []
    if chosen:
        attacks, worst = len({row["attack"] for row in chosen}), max(chosen, key=lambda row: float(row["asr_after"]))
        lines.append(
            [
                f"CIFAR-10, {attacks} attacks, 5 % clean, the selected of {len(CANDIDATES)} methods",
                f"{_change(chosen)}; worst run ASR {worst['asr_after']:.3f} ({worst['attack']})",
            ]
        )
    for row in scanned["rows"] if scanned else ():
        if (row["kind"], row["detector"], row["clean_images"]) == ("all", "combined", MANY_IMAGES):
            clean = row["models"] - row["backdoored"]
            rates = f"{row['tpr_measured']:.2f} of them found, {row['fpr_measured']:.2f} of the clean ones suspected"
            lines.append(
                [
                    f"Scan, {row['family']}, {row['backdoored']} backdoored and {clean} clean models, 100 clean images",
                    f"AUROC {row['auroc']:.3f}; {rates} at a nominal 0.05",
                ]
            )
    if fetch:
        row = fetch["rows"][-1]
        ratio = row["baseline_seconds"] / row["seconds"]
        size = row["size_bytes"] / 2**30
        lines.append(
            [
                f"Fetch of {size:g} GiB, digest included",
                f"{ratio:.2f} x boto3's throughput, {row['added_rss_mb']:.0f} MB added",
            ]
        )
    return table(("measured", "figure"), lines)


def hostile_summary(rows: Rows) -> str:
    """Files by class: how many, what the scan says, and what went wrong."""
    labels = dict.fromkeys(row["label"] for row in rows)
    states = ("dangerous", "inconclusive", "clean")

    def lines() -> Iterable[list[str]]:
        for label in (*labels, "all hostile"):
            members = [row for row in rows if label in (row["label"], f"all {row['kind']}")]
            verdicts = [sum(row["verdict"] == state for row in members) for state in states]
            wrong = [sum(bool(row[field]) for row in members) for field in ("payload_ran", "crashed")]
            yield [label, *map(str, (len(members), *verdicts, *wrong))]

    columns = ("class", "files", *states, "payloads run", "crashes")
    return table(columns, lines())


def scan_summary(rows: Rows, *, kinds: bool) -> str:
    """The scan's ranking and rates: by detector and number of images, or the combined scan by attack."""
    at_detail = [row for row in rows if row["clean_images"] in (0, MANY_IMAGES) or row["detector"] == "combined"]
    if kinds:
        combined = [row for row in at_detail if row["detector"] == "combined" and row["clean_images"] == MANY_IMAGES]
        shown = [row for row in combined if row["kind"] != "all"]
        first: tuple[str, ...] = ("family", "kind", "asr", "models")
    else:
        shown = [row for row in at_detail if row["kind"] == "all"]
        first = ("family", "detector", "clean_images", "models")
    rest = ("auroc", "auroc_low", "auroc_high", "tpr_at_5", "tpr_measured", "fpr_measured")
    more = () if kinds else ("fail", "fail_of_clean", "passed", "cross_entropy")
    return grid(shown, (*first, *rest, *more, "target_accuracy", "seconds_median"))


def scan_stability(rows: Rows) -> str:
    """By family and truth: on how many models five sets of clean images give one verdict, and float32 the first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        truth = "clean" if row["kind"] == "clean" else "backdoored"
        groups.setdefault((row["model"].split("/")[0], truth), []).append(row)
    lines = [
        {
            "family": family,
            "models": truth,
            "scanned": len(members),
            "same verdict": sum(row["same"] for row in members) / len(members),
            "agreeing scans": statistics.fmean(row["agreeing"] for row in members),
            "same in float32": statistics.fmean(row["verdict_float32"] == row["verdicts"][0] for row in members),
        }
        for (family, truth), members in groups.items()
    ]
    return grid(lines, tuple(lines[0]))


def tamper_summary(rows: Rows) -> str:
    """Mutations by kind, and how many were found and named."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(str(row["kind"]).replace("_", " "), []).append(row)

    def line(name: str, some: Rows) -> list[str]:
        return [name, str(len(some)), *(str(sum(bool(row[key]) for row in some)) for key in ("found", "named_file"))]

    lines = [line(name, members) for name, members in sorted(kinds.items())]
    return table(("mutation", "made", "found", "file named"), [*lines, line("all", rows)])


def _change(rows: Rows) -> str:
    def mean(field: str) -> float:
        return statistics.fmean(float(row[field]) for row in rows)

    asr = f"ASR {mean('asr_before'):.3f} → {mean('asr_after'):.3f}"
    return f"{asr}, ACC {mean('acc_before'):.3f} → {mean('acc_after'):.3f}"
