"""``python -m tests.pipelines.kfp_server --port 8888``: the test server as a process of its own, until SIGTERM.

It prints its address. ``GET /admin/runs`` tells what was created, ``POST /admin/modes`` changes its behaviour (fields
of ``cluster.Modes``), ``POST /admin/refuse {"seconds": 60}`` refuses connections for some time.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from tests.pipelines.kfp_server.http_server import KfpServer


def main() -> None:
    """Serve until asked to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0: a free one")
    parser.add_argument("--token", default="", help="bearer token that requests need")
    chosen = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = KfpServer(chosen.port)
    server.cluster.modes.token = chosen.token
    with server:
        print(server.endpoint, flush=True)
        stop.wait()
    sys.exit(0)


if __name__ == "__main__":
    main()
