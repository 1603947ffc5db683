"""Figures from ``results/*.json`` into ``docs/benchmarks.md`` and ``README.md``, so that no figure is typed by hand.

``python -m benchmarks.tables`` rewrites what stands between the markers ``<!-- name -->`` and
``<!-- /name -->``; ``--check`` fails where that would change a file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial

from benchmarks import ngf_parts, purification_tables
from benchmarks.markdown import Rows, figures, load, measured, source, table
from benchmarks.results import FOLDER
from benchmarks.summary_tables import (
    NARROW,
    ablation_digits,
    cost_summary,
    hostile_summary,
    readme_rows,
    scan_stability,
    scan_summary,
    tamper_summary,
    tsbd_summary,
)

ROOT = FOLDER.parent.parent
PAGES = (
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("benchmarks", "methods", "methods-nft-ngf", "artifact-scan", "evidence-format", "policy", "scan")
    ),
    ROOT / "README.md",
)
MARKED = re.compile(r"<!-- (?P<name>[a-z-]+) -->\n(?P<body>.*?)<!-- /(?P=name) -->", re.DOTALL)

WIDE = "preact_resnet18(width=64)"
VIT = "vit_tiny(patch_size=8 dim=96 depth=4 heads=4)"
"""Networks of the purification benchmark's presets."""


def purification(
    name: str, drawn: Callable[[Rows], purification_tables.Table], *, clean_fraction: float, architecture: str
) -> str:
    """A table of one network and one size of the clean set."""
    content = load(name)
    rows = content["rows"] if content else []
    wanted = purification_tables.part(rows, clean_fraction=clean_fraction, architecture=architecture)
    if content is None or not wanted:
        return "Not yet measured.\n"
    return table(*drawn(wanted)) + source(content)


def _purification_cpu(
    drawn: Callable[[Rows], purification_tables.Table], clean_fraction: float = 0.05, architecture: str = NARROW
) -> Callable[[], str]:
    return lambda: purification("purification-cpu", drawn, clean_fraction=clean_fraction, architecture=architecture)


def _victims(rows: Rows) -> purification_tables.Table:
    content = load("floor")
    return purification_tables.victims(rows, {row["attack"]: row for row in content["rows"]} if content else {})


def _ngf_parts(masked: Rows) -> str:
    content = load("purification-cpu")
    return table(*ngf_parts.comparison(masked, content["rows"] if content else []))


def _purification_gpu(drawn: Callable[[Rows], purification_tables.Table]) -> Callable[[], str]:
    return lambda: purification("purification-gpu", drawn, clean_fraction=0.05, architecture=WIDE)


SECTIONS: dict[str, Callable[[], str]] = {
    "purification-cpu": _purification_cpu(purification_tables.by_method),
    "purification-cpu-sets": _purification_cpu(purification_tables.by_set),
    "purification-cpu-soup": _purification_cpu(purification_tables.on_same_runs),
    "purification-cpu-attacks": _purification_cpu(purification_tables.by_attack),
    "purification-cpu-victims": _purification_cpu(_victims),
    "purification-cpu-one-percent": _purification_cpu(purification_tables.by_method, 0.01),
    "purification-cpu-one-per-class": _purification_cpu(purification_tables.by_method, 10 / 20_000),
    "purification-cpu-vit": _purification_cpu(purification_tables.by_method, 0.05, VIT),
    "purification-cpu-wide": _purification_cpu(purification_tables.by_method, 0.05, WIDE),
    "purification-cpu-wide-attacks": _purification_cpu(purification_tables.by_attack, 0.05, WIDE),
    "purification-gpu": _purification_gpu(purification_tables.by_method),
    "purification-gpu-attacks": _purification_gpu(purification_tables.by_attack),
    "speed": lambda: measured(
        "speed", ("method", "baseline", "ratio", "seconds", "baseline_seconds", "der", "baseline_der")
    ),
    "curvature": lambda: measured(
        "curvature", ("quantity", "architecture", "threads", "seconds", "loop_seconds", "ratio", "bound")
    ),
    "ngf-parts": lambda: figures("ngf-parts", _ngf_parts),
    "cost": lambda: figures("cost", cost_summary),
    "demo": lambda: measured("demo", ("step", "seconds", "peak_mb")),
    "demo-quality": lambda: measured(
        "demo-quality", ("seed", "method", "acc_before", "acc_after", "asr_before", "asr_after", "ra_after", "der")
    ),
    "fetch": lambda: measured("fetch", ("size_bytes", "seconds", "baseline_seconds", "added_rss_mb")),
    "overhead": lambda: measured(
        "overhead", ("step", "seconds", "direct_seconds", "import_seconds", "overhead_seconds")
    ),
    "tsbd-cifar": lambda: figures("tsbd-cifar", tsbd_summary),
    "ablation-digits": lambda: figures("ablation-digits", ablation_digits),
    "tsbd-ablation": lambda: measured(
        "tsbd-ablation", ("attack", "ablation", "acc_before", "acc_after", "asr_after", "ra_after", "der", "seconds")
    ),
    "gate-mutants": lambda: measured("gate-mutants", ("module", "mutants", "killed")),
    "hostile": lambda: figures("hostile", hostile_summary),
    "verify": lambda: measured("verify", ("what", "seconds", "baseline_seconds", "bytes")),
    "sweep": lambda: measured(
        "sweep", ("sweep", "versions", "seconds", "cpu_seconds", "server_cpu_seconds", "peak_mb", "models_listed")
    ),
    "tamper": lambda: figures("tamper", tamper_summary),
    "scan-growth": lambda: measured("scan-growth", ("detector", "seconds_10_classes", "seconds_100_classes", "ratio")),
    "scan-stability": lambda: figures("scan-stability", scan_stability),
    "scan-summary": lambda: figures("scan-summary", partial(scan_summary, kinds=False)),
    "scan-attacks": lambda: figures("scan-summary", partial(scan_summary, kinds=True)),
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


if __name__ == "__main__":
    sys.exit(main())
