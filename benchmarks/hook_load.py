"""The hook alone under load: signed deliveries from a second process, at a fixed rate, for ten minutes.

The load is open: each delivery has its moment, and its latency counts from that moment, whether or not a connection
was free then. So a hook that stalls cannot slow the clock that measures it. Every delivery is new and names a version
of its own, signed just before it is sent; the hook writes to an SQLite file that waits for the disk.

    python -m benchmarks.hook_load [--seconds 600] [--rate-per-s 600]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.hook_process import SECRET, HookProcess, free_port
from benchmarks.results import write_results
from pipelines.triggers.app import PATH
from pipelines.triggers.queue import Queue
from pipelines.triggers.signature import sign

CONNECTIONS = 64
WARM_UP_S = 10.0
SAMPLE_S = 5.0


class Caller:
    """One kept-open connection."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, number: int) -> int:
        """Send one delivery; the status of its answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        writer.write(self._request(number))
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
        await reader.readexactly(length)
        return int(lines[0].split()[1])

    def _request(self, number: int) -> bytes:
        now, delivery_id = int(time.time()), f"load-{os.getpid()}-{number}"
        data = {
            "name": f"model-{number % 100}",
            "version": str(1 + number),
            "source": f"s3://models/{number}/model.safetensors",
            "run_id": f"{number:032x}",
            "tags": {"team": "vision", "framework": "torch"},
            "description": "A version that the load registers.",
        }
        event = {"entity": "model_version", "action": "created", "timestamp": str(now), "data": data}
        body = json.dumps(event).encode()
        return (
            f"POST {PATH} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"X-MLflow-Delivery-Id: {delivery_id}\r\nX-MLflow-Timestamp: {now}\r\n"
            f"X-MLflow-Signature: {sign(SECRET.encode(), delivery_id, now, body)}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body


async def load(port: int, *, rate_per_s: float, seconds: float, first: int = 0) -> dict[str, Any]:
    """Send ``rate_per_s * seconds`` deliveries; latencies in ms, how many of each status, and the seconds it took."""
    idle: asyncio.Queue[Caller] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        idle.put_nowait(Caller("127.0.0.1", port))
    latencies_ms: list[float] = []
    statuses: dict[int, int] = {}
    began = time.perf_counter()

    async def one(number: int, due: float) -> None:
        caller = await idle.get()
        status = await caller.post(number)
        latencies_ms.append((time.perf_counter() - due) * 1e3)
        statuses[status] = statuses.get(status, 0) + 1
        idle.put_nowait(caller)

    async with asyncio.TaskGroup() as tasks:
        for number in range(int(rate_per_s * seconds)):
            due = began + number / rate_per_s
            if due > time.perf_counter():
                await asyncio.sleep(due - time.perf_counter())
            tasks.create_task(one(first + number, due))
    took_s = time.perf_counter() - began
    return {"latencies_ms": latencies_ms, "statuses": statuses, "seconds": took_s}


def _load_process(port: int, rate_per_s: float, seconds: float) -> dict[str, Any]:
    """The second process: warms the hook up, loads it, prints what it saw as JSON."""
    warm = asyncio.run(load(port, rate_per_s=rate_per_s, seconds=WARM_UP_S))
    print("warm", flush=True)
    seen = asyncio.run(load(port, rate_per_s=rate_per_s, seconds=seconds, first=len(warm["latencies_ms"])))
    ordered = sorted(seen["latencies_ms"])
    return {
        "sent": len(ordered) + len(warm["latencies_ms"]),
        "accepted": seen["statuses"].get(202, 0),
        "others": sum(count for status, count in seen["statuses"].items() if status != 202),
        "seconds": seen["seconds"],
        "p50_ms": statistics.median(ordered),
        "p99_ms": ordered[int(0.99 * (len(ordered) - 1))],
        "max_ms": ordered[-1],
    }


def measure(folder: Path, *, rate_per_s: float, seconds: float) -> dict[str, Any]:
    """One row: the hook in one process, the load in another."""
    hook = HookProcess(folder, free_port(), options=("--rate-per-s", "0"))
    hook.start()
    try:
        command = [sys.executable, "-m", "benchmarks.hook_load", "--as-load", str(hook.port)]
        command += ["--rate-per-s", str(rate_per_s), "--seconds", str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
            assert caller.stdout is not None
            if caller.stdout.readline().strip() != "warm":
                raise RuntimeError("the load did not warm up")
            memory_mb, cpu_s = [hook.rss_mb()], hook.cpu_s()
            while caller.poll() is None:
                time.sleep(min(SAMPLE_S, seconds / 4))
                memory_mb.append(hook.rss_mb())
            cpu_s = hook.cpu_s() - cpu_s
            seen = json.loads(caller.stdout.read())
        memory_mb.append(hook.rss_mb())
    finally:
        code = hook.stop()
    queue = Queue.open(hook.queue_url)
    kept = queue.counts()["hints"]
    queue.close()
    return {
        "rate_per_s": round(seen["accepted"] / seen["seconds"], 1),
        "p50_ms": round(seen["p50_ms"], 2),
        "p99_ms": round(seen["p99_ms"], 2),
        "max_ms": round(seen["max_ms"], 2),
        "rss_start_mb": round(memory_mb[0], 1),
        "rss_end_mb": round(memory_mb[-1], 1),
        "rss_peak_mb": round(max(memory_mb), 1),
        "seconds": round(seen["seconds"], 1),
        "accepted": seen["accepted"],
        "cpu_ms_per_delivery": round(1e3 * cpu_s / max(1, seen["accepted"]), 3),
        "not_accepted": seen["others"],
        "lost": seen["sent"] - kept,
        "exit_code": code,
    }


def main() -> None:
    """Measure, and write ``hook-load.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate-per-s", type=float, default=600.0)
    parser.add_argument("--dry", action="store_true", help="print the row, write no file")
    parser.add_argument("--as-load", type=int, default=0, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_load:
        print(json.dumps(_load_process(options.as_load, options.rate_per_s, options.seconds)))
        return
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="quarantine-hook-load-") as folder:
        row = measure(Path(folder), rate_per_s=options.rate_per_s, seconds=options.seconds)
    print(json.dumps(row, indent=2))
    if not options.dry:
        command = f"python -m benchmarks.hook_load --seconds {options.seconds:g} --rate-per-s {options.rate_per_s:g}"
        write_results("hook-load", [row], command=command, started=started)


if __name__ == "__main__":
    main()
