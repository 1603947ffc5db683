"""Inputs that must not get in: forged, replayed, oversized and malformed calls of a running hook.

Four generators, one hook in a process of its own:

- schemathesis makes calls from the hook's OpenAPI description, of permitted and of broken form, and each body once more
  under a genuine signature;
- hypothesis makes forgeries: a genuine delivery with something changed after it was signed;
- hypothesis makes genuine signatures under bodies that are no events;
- replays, oversized bodies and broken HTTP, over a plain socket.

Accepted is every answer of 2xx, and every row that stands in the queue afterwards beside those that were let in on
purpose before. A server error is every answer of 5xx, and every connection that ends without an answer where one was
due.

    python -m benchmarks.hook_fuzz [--inputs 12000]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import hook_fuzz_inputs as inputs_of
from benchmarks.hook_fuzz_inputs import Tally, Target, event, signed
from benchmarks.hook_process import HookProcess, free_port
from benchmarks.results import write_results
from pipelines.triggers.app import PATH
from pipelines.triggers.queue import Queue

GENUINE = 50
"""Deliveries that are let in first, so that there is something to replay."""


def measure(folder: Path, inputs: int) -> dict[str, Any]:
    """One row."""
    hook = HookProcess(folder, free_port(), options=("--rate-per-s", "0", "--body-timeout-s", "5"))
    hook.start()
    target, tally = Target(hook.port), Tally()
    try:
        genuine = [(signed(event(number + 1), f"genuine-{number}"), event(number + 1)) for number in range(GENUINE)]
        if {target.call("POST", PATH, *each) for each in genuine} != {202}:
            raise RuntimeError(f"the hook did not take genuine deliveries; see {folder / 'hook.log'}")
        before = _rows(hook)
        share = inputs // 12
        inputs_of.by_schemathesis(target, tally, 3 * share)
        inputs_of.replayed(target, tally, share, genuine)
        inputs_of.forged(target, tally, 3 * share)
        inputs_of.malformed(target, tally, 3 * share)
        inputs_of.oversized(target, tally, share)
        inputs_of.broken_http(target, tally, max(share, inputs - tally.total()))
        if not hook.ready():
            raise RuntimeError("the hook is not ready after the inputs")
        after = _rows(hook)
    finally:
        hook.stop()
    by_kind = {kind: tally.total(kind) for kind in dict.fromkeys(kind for kind, _ in tally.statuses)}
    return {
        "inputs": tally.total(),
        "accepted": max(tally.among(200, 299), after - before),
        "server_errors": tally.among(500, 599) + tally.among(0, 0),
        "by_kind": by_kind,
        "by_status": {str(status): tally.among(status, status) for status in sorted({s for _, s in tally.statuses})},
    }


def _rows(hook: HookProcess) -> int:
    queue = Queue.open(hook.queue_url)
    with queue.engine.begin() as connection:
        kept = connection.exec_driver_sql("SELECT (SELECT count(*) FROM deliveries) + (SELECT sum(seen) FROM hints)")
        rows = int(kept.scalar_one())
    queue.close()
    return rows


def main() -> int:
    """Measure, write ``hook-fuzz.json``; exit code 1 where something got in or broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=12_000)
    parser.add_argument("--dry", action="store_true", help="print the row, write no file")
    options = parser.parse_args()
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="quarantine-hook-fuzz-") as folder:
        row = measure(Path(folder), options.inputs)
    print(json.dumps(row, indent=2))
    if not options.dry:
        command = f"python -m benchmarks.hook_fuzz --inputs {options.inputs}"
        write_results("hook-fuzz", [row], command=command, started=started)
    return int(bool(row["accepted"] or row["server_errors"]))


if __name__ == "__main__":
    sys.exit(main())
