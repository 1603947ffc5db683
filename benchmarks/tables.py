"""Figures from ``results/*.json`` into ``docs/benchmarks.md`` and ``README.md``, so that no figure is typed by hand.

``python -m benchmarks.tables`` rewrites what stands between the markers ``<!-- name -->`` and
``<!-- /name -->``; ``--check`` fails where that would change a file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks import purification_tables
from benchmarks.results import FOLDER

ROOT = FOLDER.parent.parent
PAGES = (
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("benchmarks", "methods", "artifact-scan", "evidence-format", "policy", "scan")
    ),
    ROOT / "README.md",
)
MARKED = re.compile(r"<!-- (?P<name>[a-z-]+) -->\n(?P<body>.*?)<!-- /(?P=name) -->", re.DOTALL)

MANY_IMAGES = 100
"""Clean images of the scan's table by attack."""
NARROW, WIDE = "preact_resnet18(width=16)", "preact_resnet18(width=64)"
VIT = "vit_tiny(patch_size=8 dim=96 depth=4 heads=4)"
"""Networks of the purification benchmark's presets."""

Rows = Sequence[Mapping[str, Any]]


def load(name: str) -> dict[str, Any] | None:
    """A results file; ``None`` where it has not been measured yet."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def grid(rows: Rows, columns: Sequence[str]) -> str:
    """Rows as a Markdown table of ``columns``."""
    return _table(columns, ([_text(row.get(column)) for column in columns] for row in rows))


def measured(name: str, columns: Sequence[str]) -> str:
    """All rows of a results file, with the command and the machine."""
    content = load(name)
    if content is None:
        return "Not yet measured.\n"
    return grid(content["rows"], columns) + _source(content)


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
                return _text(statistics.fmean(float(row[field]) for row in members))

            worst = _text(max(row["asr_after"] for row in members))
            figures = [mean(field) for field in ("acc_before", "acc_after", "asr_before", "asr_after")]
            yield [attack, str(seed), method, *figures, worst, mean("ra_after"), mean("der"), mean("seconds")]

    return _table(columns, lines())


def _tsbd_cifar() -> str:
    content = load("tsbd-cifar")
    return "Not yet measured.\n" if content is None else tsbd_summary(content["rows"]) + _source(content)


def _ablation_digits() -> str:
    """Means over seeds of each run, and the worst ASR."""
    content = load("ablation-digits")
    if content is None:
        return "Not yet measured.\n"
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        runs.setdefault(row["run"], []).append(row)

    def mean(rows: Rows, value: Callable[[Mapping[str, Any]], float]) -> str:
        return _text(statistics.fmean(map(value, rows)))

    lines = [
        [
            name,
            str(len(rows)),
            mean(rows, lambda row: row["acc_before"] - row["acc_after"]),
            mean(rows, lambda row: row["asr_after"]),
            _text(max(row["asr_after"] for row in rows)),
            mean(rows, lambda row: row["der"]),
        ]
        for name, rows in runs.items()
    ]
    return _table(("run", "seeds", "ACC drop", "ASR", "worst ASR", "DER"), lines) + _source(content)


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
    if purified:
        rows = [
            row
            for row in purified["rows"]
            if row["selected"] and row["clean_fraction"] == 0.05 and row["architecture"] == NARROW
        ]
        worst = max(rows, key=lambda row: float(row["asr_after"]))
        lines.append(
            [
                f"CIFAR-10, {len({row['attack'] for row in rows})} attacks, 5 % clean, the selected of five methods",
                f"{_change(rows)}; worst attack ASR {worst['asr_after']:.3f} ({worst['attack']})",
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
    return _table(("measured", "figure"), lines)


def purification(
    name: str, table: Callable[[Rows], purification_tables.Table], *, clean_fraction: float, architecture: str
) -> str:
    """A table of one network and one size of the clean set."""
    content = load(name)
    rows = content["rows"] if content else []
    wanted = purification_tables.part(rows, clean_fraction=clean_fraction, architecture=architecture)
    if content is None or not wanted:
        return "Not yet measured.\n"
    return _table(*table(wanted)) + _source(content)


def _purification_cpu(
    table: Callable[[Rows], purification_tables.Table], clean_fraction: float = 0.05, architecture: str = NARROW
) -> Callable[[], str]:
    return lambda: purification("purification-cpu", table, clean_fraction=clean_fraction, architecture=architecture)


def _victims(rows: Rows) -> purification_tables.Table:
    content = load("floor")
    return purification_tables.victims(rows, {row["attack"]: row for row in content["rows"]} if content else {})


def _purification_gpu(table: Callable[[Rows], purification_tables.Table]) -> Callable[[], str]:
    return lambda: purification("purification-gpu", table, clean_fraction=0.05, architecture=WIDE)


def hostile_summary() -> str:
    """Files by class: how many, what the scan says, and what went wrong."""
    content = load("hostile")
    if content is None:
        return "Not yet measured.\n"
    labels = dict.fromkeys(row["label"] for row in content["rows"])
    states = ("dangerous", "inconclusive", "clean")

    def lines() -> Iterable[list[str]]:
        for label in (*labels, "all hostile"):
            rows = [row for row in content["rows"] if label in (row["label"], f"all {row['kind']}")]
            verdicts = [sum(row["verdict"] == state for row in rows) for state in states]
            wrong = [sum(bool(row[field]) for row in rows) for field in ("payload_ran", "crashed")]
            yield [label, *map(str, (len(rows), *verdicts, *wrong))]

    columns = ("class", "files", *states, "payloads run", "crashes")
    return _table(columns, lines()) + _source(content)


def scan_summary(kinds: bool) -> str:
    """The scan's ranking and rates: by detector and number of images, or the combined scan by attack."""
    content = load("scan-summary")
    if content is None:
        return "Not yet measured.\n"
    at_detail = [
        row for row in content["rows"] if row["clean_images"] in (0, MANY_IMAGES) or row["detector"] == "combined"
    ]
    if kinds:
        combined = [row for row in at_detail if row["detector"] == "combined" and row["clean_images"] == MANY_IMAGES]
        rows = [row for row in combined if row["kind"] != "all"]
        first: tuple[str, ...] = ("family", "kind", "asr", "models")
    else:
        rows = [row for row in at_detail if row["kind"] == "all"]
        first = ("family", "detector", "clean_images", "models")
    rest = ("auroc", "auroc_low", "auroc_high", "tpr_at_5", "tpr_measured", "fpr_measured")
    more = () if kinds else ("fail", "fail_of_clean", "passed", "cross_entropy")
    return grid(rows, (*first, *rest, *more, "target_accuracy", "seconds_median")) + _source(content)


def scan_stability() -> str:
    """By family and truth: on how many models five sets of clean images give one verdict."""
    content = load("scan-stability")
    if content is None:
        return "Not yet measured.\n"
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        truth = "clean" if row["kind"] == "clean" else "backdoored"
        groups.setdefault((row["model"].split("/")[0], truth), []).append(row)
    lines = [
        {
            "family": family,
            "models": truth,
            "scanned": len(rows),
            "same verdict": sum(row["same"] for row in rows) / len(rows),
            "agreeing scans": statistics.fmean(row["agreeing"] for row in rows),
        }
        for (family, truth), rows in groups.items()
    ]
    return grid(lines, tuple(lines[0])) + _source(content)


def tamper_summary() -> str:
    """Mutations by kind, and how many were found and named."""
    content = load("tamper")
    if content is None:
        return "Not yet measured.\n"
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        kinds.setdefault(str(row["kind"]).replace("_", " "), []).append(row)

    def line(name: str, rows: Rows) -> list[str]:
        return [name, str(len(rows)), *(str(sum(bool(row[key]) for row in rows)) for key in ("found", "named_file"))]

    lines = [line(name, rows) for name, rows in sorted(kinds.items())]
    return _table(("mutation", "made", "found", "file named"), [*lines, line("all", content["rows"])]) + _source(
        content
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "purification-cpu": _purification_cpu(purification_tables.by_method),
    "purification-cpu-attacks": _purification_cpu(purification_tables.by_attack),
    "purification-cpu-victims": _purification_cpu(_victims),
    "purification-cpu-one-percent": _purification_cpu(purification_tables.by_method, 0.01),
    "purification-cpu-one-per-class": _purification_cpu(purification_tables.by_method, 10 / 20_000),
    "purification-cpu-vit": _purification_cpu(purification_tables.by_method, 0.05, VIT),
    "purification-gpu": _purification_gpu(purification_tables.by_method),
    "purification-gpu-attacks": _purification_gpu(purification_tables.by_attack),
    "speed": lambda: measured(
        "speed", ("method", "baseline", "ratio", "seconds", "baseline_seconds", "der", "baseline_der")
    ),
    "cost": lambda: measured("cost", ("method", "clean_images", "architecture", "width", "parameters", "seconds")),
    "demo": lambda: measured("demo", ("step", "seconds", "peak_mb")),
    "demo-quality": lambda: measured(
        "demo-quality", ("seed", "method", "acc_before", "acc_after", "asr_before", "asr_after", "ra_after", "der")
    ),
    "fetch": lambda: measured("fetch", ("size_bytes", "seconds", "baseline_seconds", "added_rss_mb")),
    "overhead": lambda: measured(
        "overhead", ("step", "seconds", "direct_seconds", "import_seconds", "overhead_seconds")
    ),
    "tsbd-cifar": _tsbd_cifar,
    "ablation-digits": _ablation_digits,
    "tsbd-ablation": lambda: measured(
        "tsbd-ablation", ("attack", "ablation", "acc_before", "acc_after", "asr_after", "ra_after", "der", "seconds")
    ),
    "gate-mutants": lambda: measured("gate-mutants", ("module", "mutants", "killed")),
    "hostile": hostile_summary,
    "verify": lambda: measured("verify", ("what", "seconds", "baseline_seconds", "bytes")),
    "sweep": lambda: measured(
        "sweep", ("sweep", "versions", "seconds", "cpu_seconds", "server_cpu_seconds", "peak_mb", "models_listed")
    ),
    "tamper": tamper_summary,
    "scan-growth": lambda: measured("scan-growth", ("detector", "seconds_10_classes", "seconds_100_classes", "ratio")),
    "scan-stability": scan_stability,
    "scan-summary": lambda: scan_summary(kinds=False),
    "scan-attacks": lambda: scan_summary(kinds=True),
    "preemption": lambda: measured(
        "preemption", ("method", "kill_at_fraction", "same_digest", "same_results", "resumed_at_step")
    ),
    "hook-burst": lambda: measured(
        "hook-burst",
        ("scenario", "versions", "submitted", "lost", "doubled", "kills", "found_by_sweep", "median_s", "p99_s"),
    ),
    "hook-load": lambda: measured(
        "hook-load", ("rate_per_s", "seconds", "p50_ms", "p99_ms", "rss_start_mb", "rss_end_mb", "not_accepted", "lost")
    ),
    "hook-fuzz": lambda: measured("hook-fuzz", ("inputs", "accepted", "server_errors")),
    "readme": readme_rows,
}


def rendered(text: str) -> str:
    """A page with its marked sections made anew."""

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- {name} -->\n{SECTIONS[name]()}<!-- /{name} -->"

    return MARKED.sub(section, text)


def main() -> int:
    """Exit code 0, or 1 where ``--check`` finds a page behind its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is behind")
    options = parser.parse_args()
    behind = []
    for page in PAGES:
        before = page.read_text("utf-8")
        after = rendered(before)
        if after != before:
            behind.append(page)
            if not options.check:
                page.write_text(after, "utf-8")
    if options.check and behind:
        print(
            "behind their figures: " + ", ".join(map(str, behind)) + "; run python -m benchmarks.tables",
            file=sys.stderr,
        )
        return 1
    return 0


def _change(rows: Rows) -> str:
    def mean(field: str) -> float:
        return statistics.fmean(float(row[field]) for row in rows)

    asr = f"ASR {mean('asr_before'):.3f} → {mean('asr_after'):.3f}"
    return f"{asr}, ACC {mean('acc_before'):.3f} → {mean('acc_after'):.3f}"


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    drawn = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*drawn, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def _source(content: Mapping[str, Any]) -> str:
    return (
        f"\n`{content['command']}` at commit `{content['commit']}`, {content['device']}, {content['started'][:10]}.\n"
    )


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
