"""How the test server behaves, and how it says no."""

from __future__ import annotations

from dataclasses import dataclass, field


class Refused(Exception):
    """An answer that is an error: HTTP status, gRPC code, message."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Modes:
    """How the server behaves; changed at any time.

    Attributes:
        token: bearer token that every request needs; empty: none.
        dex: user name and password of the login; ``None``: no login.
        dex_elsewhere: send the login to another host name.
        forbidden: every request is answered 403.
        down: every request is answered 503.
        speaks: ``v2``; ``v1``: the paths are not known; ``html``: every path is a page.
        delay_s: waited before every answer, after the request was carried out.
        lose: by operation, how many of the next answers are lost: carried out, then the connection is dropped.
        fail: by operation, how many of the next requests are answered 503 without being carried out.
        multi_user: whether a namespace is needed.
        page_size: most records of one page.
        states: state of a run at its creation and after each time that it is read.
        tasks: names of the tasks of a run.
    """

    token: str = ""
    dex: tuple[str, str] | None = None
    dex_elsewhere: bool = False
    forbidden: bool = False
    down: bool = False
    speaks: str = "v2"
    delay_s: float = 0.0
    lose: dict[str, int] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    multi_user: bool = False
    page_size: int = 100
    states: tuple[str, ...] = ("PENDING", "RUNNING", "SUCCEEDED")
    tasks: tuple[str, ...] = ("fetch-model", "gate-promotion")
