"""The hostile corpus and the zoo of benign files through the artifact scan and the loader.

Each hostile file is made, scanned, given to the loader whatever the scan said, and its canary looked for.
Each benign file is made and scanned. Rows: file, kind (hostile or benign), payload_ran, crashed, verdict.

    python -m benchmarks.hostile
"""

from __future__ import annotations

import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import write_results
from tests.hostile.benign_files import BENIGN
from tests.hostile.corpus import Judged, hostile_files, judge_benign, judge_hostile


def main() -> None:
    """Judge every file, print what went wrong and the sums, and write ``results/hostile.json``."""
    # Exporters that make the benign files announce their successors.
    warnings.simplefilter("ignore")
    started = datetime.now(UTC)
    rows = []
    with tempfile.TemporaryDirectory(prefix="quarantine-hostile-") as folder:
        for number, file in enumerate(hostile_files()):
            rows.append(_row("hostile", judge_hostile(file, Path(folder) / f"h{number}")))
        for number, name in enumerate(BENIGN):
            inside = Path(folder) / f"b{number}"
            inside.mkdir()
            rows.append(_row("benign", judge_benign(name, inside)))
    for row in rows:
        expected = row["verdict"] == "clean" if row["kind"] == "benign" else row["verdict"] != "clean"
        if row["payload_ran"] or row["crashed"] or not expected:
            print(row)
    for kind in ("hostile", "benign"):
        chosen = [row for row in rows if row["kind"] == kind]
        verdicts = {verdict: sum(row["verdict"] == verdict for row in chosen) for verdict in VERDICTS}
        print(kind, len(chosen), verdicts)
    print(write_results("hostile", rows, command="python -m benchmarks.hostile", started=started))


VERDICTS = ("clean", "dangerous", "inconclusive")


def _row(kind: str, judged: Judged) -> dict[str, Any]:
    return {
        "file": judged.name,
        "kind": kind,
        "payload_ran": judged.payload_ran,
        "crashed": bool(judged.crashed),
        "verdict": judged.verdict,
        "label": judged.label,
        "rules": sorted(set(judged.rules)),
        "loaded": judged.loaded,
    }


if __name__ == "__main__":
    main()
