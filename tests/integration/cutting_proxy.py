"""A TCP proxy that breaks connections in the middle, and notes what went through."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_REQUEST = re.compile(rb"^(GET|HEAD|PUT|POST) (\S+) HTTP/1.1\r\n(.*?)\r\n\r\n", re.S | re.M)
_RANGE = re.compile(rb"^Range: *(\S+)", re.M | re.I)


@dataclass
class CuttingProxy:
    """Pass bytes to ``upstream_port`` on 127.0.0.1 and back.

    Attributes:
        upstream_port: where the server listens.
        cuts: for the first, second, … download, how many bytes of the answers come through before the
            connection breaks; None breaks nothing.
        then: the same for all later downloads.
        on_cut: called at each break, before the client notices.
        requests: method, path and Range header of every request.
        answered: bytes that came back to the client.
    """

    upstream_port: int
    cuts: list[int | None] = field(default_factory=list)
    then: int | None = None
    on_cut: Callable[[], None] = lambda: None
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    answered: int = 0
    port: int = 0

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def downloads(self) -> list[str]:
        """Range header ("" for none) of every GET of an object."""
        return [part for method, path, part in self.requests if method == "GET" and "list-type" not in path]

    @contextlib.contextmanager
    def running(self) -> Iterator[CuttingProxy]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            thread = threading.Thread(target=self._accept, args=(listener,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=5)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.upstream_port)) as server:
            limit: list[int | None] = [None]
            up = threading.Thread(target=self._forward, args=(client, server, limit), daemon=True)
            up.start()
            if self._return(server, client, limit):
                self.on_cut()  # while the client still waits, so that it sees what this changed
            for each in (client, server):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            up.join(timeout=5)

    def _forward(self, client: socket.socket, server: socket.socket, limit: list[int | None]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                for method, path, headers in _REQUEST.findall(data):
                    part = _RANGE.search(headers)
                    self.requests.append((method.decode(), path.decode(), part[1].decode() if part else ""))
                    if method == b"GET" and b"list-type" not in path:
                        limit[0] = self.cuts.pop(0) if self.cuts else self.then
                server.sendall(data)

    def _return(self, server: socket.socket, client: socket.socket, limit: list[int | None]) -> bool:
        """Pass the answers on until their end (False) or until the limit (True)."""
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                left = limit[0]
                if left is not None:
                    data, limit[0] = data[:left], max(left - len(data), 0)
                client.sendall(data)
                self.answered += len(data)
                if limit[0] == 0:
                    return True
        return False
