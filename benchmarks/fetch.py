"""Fetch of an object from a real S3 server on loopback, against plain boto3: time and memory.

Our fetch asks, pins, streams, hashes and fsyncs; the baseline is ``client.download_file`` as boto3 ships it.
The two alternate in one process, the order changing from pair to pair, and the medians are reported.
The added memory is the peak resident size during one fetch in a fresh process, less the size just before it.

    python -m benchmarks.fetch [--size-bytes 1073741824]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.results import write_results
from components._runtime.s3 import S3Location, S3Settings, fetch_object, upload_file
from components._runtime.s3_connection import connect
from defense_core.files import sha256_file
from tests.integration.swift_server import SwiftServer

MIB = 1 << 20
SMALL_BYTES = 64 * MIB
LARGE_BYTES = 1024 * MIB
BUCKET = "benchmark"


def main() -> None:
    """Measure every size, print a line for each and write ``results/fetch.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-bytes", type=int, action="append", help=f"default: {SMALL_BYTES} and {LARGE_BYTES}")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each kind; the median counts (default 5)")
    options = parser.parse_args()
    sizes = options.size_bytes or [SMALL_BYTES, LARGE_BYTES]
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder, SwiftServer(Path(folder) / "swift") as swift:
        settings = _settings(swift)
        connect(settings).create_bucket(Bucket=BUCKET)
        rows = [measure(size_bytes, Path(folder), settings, options.pairs) for size_bytes in sizes]
    command = f"python -m benchmarks.fetch --pairs {options.pairs}"
    command += "".join(f" --size-bytes {size}" for size in options.size_bytes or ())
    print(write_results("fetch", rows, command=command, started=started))


def measure(size_bytes: int, folder: Path, settings: S3Settings, pairs: int) -> dict[str, Any]:
    """One row of the results for an object of ``size_bytes`` random bytes."""
    source, target = folder / "source", folder / "target"
    with open(source, "wb") as stream:
        for start in range(0, size_bytes, MIB):
            stream.write(os.urandom(min(MIB, size_bytes - start)))
    location = S3Location(BUCKET, f"object-{size_bytes}")
    upload_file(source, location, settings)
    digest = sha256_file(source)
    source.unlink()
    client = connect(settings)

    def ours() -> None:
        fetch_object(location, target, max_bytes=size_bytes, expected_sha256=digest, settings=settings)

    def baseline() -> None:
        client.download_file(location.bucket, location.key, str(target))

    ours_s: list[float] = []
    baseline_s: list[float] = []
    for pair in range(pairs):
        kinds: list[tuple[Callable[[], None], list[float]]] = [(ours, ours_s), (baseline, baseline_s)]
        for action, seconds in kinds if pair % 2 == 0 else reversed(kinds):
            seconds.append(_timed(action))
            target.unlink()
    row = {
        "size_bytes": size_bytes,
        "seconds": round(statistics.median(ours_s), 3),
        "baseline_seconds": round(statistics.median(baseline_s), 3),
        "added_rss_mb": round(_in_fresh_process(added_rss_bytes, location, folder / "memory", settings) / 1e6, 1),
    }
    print(row, f"{row['baseline_seconds'] / row['seconds']:.2f} x the baseline's throughput", flush=True)
    return row


def added_rss_bytes(location: S3Location, target: Path, settings: S3Settings) -> int:
    """Peak resident size of this process during one fetch, less the size before it. Linux only."""
    connect(settings).head_bucket(Bucket=location.bucket)  # what boto3 loads once is no part of a fetch
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = int(psutil.Process().memory_info().rss)
    fetch_object(location, target, max_bytes=1 << 40, settings=settings)
    target.unlink()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def _in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return int(pool.apply(function, arguments))


def _timed(action: Callable[[], None]) -> float:
    os.sync()  # neither kind pays for what the other left in the page cache
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _settings(swift: SwiftServer) -> S3Settings:
    # This process stands for a worker that was given these credentials.
    os.environ |= {"AWS_ACCESS_KEY_ID": swift.access_key, "AWS_SECRET_ACCESS_KEY": swift.secret_key}
    return S3Settings(endpoint_url=swift.endpoint_url, region=swift.region)


if __name__ == "__main__":
    main()
