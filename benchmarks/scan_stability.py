"""Whether other clean images, or another arithmetic, give another verdict: ``scan-stability.json``.

``python -m benchmarks.scan_stability --family FAMILY [--data FOLDER] [--every N]``. Every backdoored and every N-th
clean test model of the zoo is scanned five times, each time with another 100 of the images that it was not trained on.
That is the only chance left in a scan: what it draws besides is fixed, so a repetition with the same images gives the
same verdict whatever the seed (``tests/pipelines/test_scan_cli.py``). The first of the five is repeated as on a machine
that does not multiply bfloat16, against the same pool.
"""

from __future__ import annotations

import argparse
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.results import read_rows, write_results
from benchmarks.scan import shipped_pool
from benchmarks.scan_readings import clean_images
from benchmarks.scan_zoo import FAMILIES, sets_of
from benchmarks.zoo import Victim, ZooModel, recipe_task, victim
from defense_core.progress import NullProgress
from defense_core.scan.detectors import MANY
from defense_core.scan.judgement import ScanConfig, scan
from defense_core.scan.pool import Pool, load_pool

DRAWN, FIRST_DRAW = 5, 100


def stability(model: ZooModel, loaded: Victim, pool: Pool, family: str) -> dict[str, Any]:
    """Verdicts and p-values of one model with each draw of images, and with the first in float32."""

    def scanned(draw: int) -> tuple[str, float | None]:
        images = clean_images(loaded.held_out, MANY, seed=FIRST_DRAW + draw)
        task = recipe_task(model.recipe)
        report = scan(loaded.model, images, ScanConfig(), pool=pool, task=task, device="cpu", progress=NullProgress())
        return str(report.verdict), report.p_value

    verdicts, p_values = zip(*map(scanned, range(DRAWN)), strict=True)
    with mock.patch("defense_core.inference.multiplies_bfloat16", return_value=False):
        verdict_float32, p_value_float32 = scanned(0)
    return {
        "model": f"{family}/{model.name}",
        "kind": model.kind,
        "verdicts": verdicts,
        "same": len(set(verdicts)) == 1,
        "agreeing": Counter(verdicts).most_common(1)[0][1] / DRAWN,
        "p_values": p_values,
        "verdict_float32": verdict_float32,
        "p_value_float32": p_value_float32,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="digits")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with cifar10-{train,test}.parquet")
    parser.add_argument("--every", type=int, default=1, help="take every n-th clean test model")
    options = parser.parse_args()
    started = datetime.now(UTC)
    models = FAMILIES[options.family]()
    sets = sets_of(options.family, options.data)
    pool = load_pool(shipped_pool(options.family, models))
    rows: list[dict[str, Any]] = []
    tests = [model for model in models if model.split == "test"]
    clean = [model for model in tests if model.kind == "clean"]
    for model in [model for model in tests if model.kind != "clean"] + clean[:: options.every]:
        loaded = victim(model.recipe, *sets, device="cpu", progress=NullProgress())
        rows.append(stability(model, loaded, pool, options.family))
        print(rows[-1], flush=True)
    others = [row for row in read_rows("scan-stability") if not row["model"].startswith(f"{options.family}/")]
    command = "python -m benchmarks.scan_stability --family FAMILY --data DATA --every N"
    write_results("scan-stability", [*others, *rows], command=command, started=started)


if __name__ == "__main__":
    main()
