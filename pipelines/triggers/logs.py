"""Structured logs, one JSON object a line, with secrets taken out."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, TextIO

import structlog

REDACTED = "[redacted]"

_SECRET_NAME = re.compile(
    r"secret|passw|token|credential|authorization|signature|cookie|api_?key|private", re.IGNORECASE
)
_CREDENTIALS = re.compile(r"(?<=//)(?:[^/\s'\"]+@|[^/@:\s'\"]*:(?![0-9]{1,5}/)[^@\s'\"]*@)")
_PARAMETER = re.compile(r"(?i)\b([\w-]*(?:signature|token|credential|password|secret)[\w-]*=)[^&\s'\"]+")
_BEARER = re.compile(r"(?i)\b(bearer|basic) +[A-Za-z0-9._~+/=-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Event = MutableMapping[str, Any]


class Redactor:
    """A structlog processor that lets no secret through, whoever put it there.

    Args:
        known: gives the secrets that must not appear anywhere, as text.
    """

    def __init__(self, known: Callable[[], Iterable[str]] = tuple) -> None:
        self._known = known

    def __call__(self, _: Any, __: str, event: Event) -> Event:
        """The event with secrets replaced, at any depth."""
        secrets = [secret for secret in self._known() if secret]
        return {name: self._clean(name, value, secrets) for name, value in event.items()}

    def text(self, text: str) -> str:
        """``text`` without secrets and credentials."""
        return self._plain(text, [secret for secret in self._known() if secret])

    def _clean(self, name: str, value: Any, secrets: list[str]) -> Any:
        if _SECRET_NAME.search(name) and not isinstance(value, (bool, int, float)):
            return REDACTED
        if isinstance(value, dict):
            return {str(key): self._clean(str(key), item, secrets) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._clean("", item, secrets) for item in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self._plain(value if isinstance(value, str) else str(value), secrets)

    def _plain(self, text: str, secrets: list[str]) -> str:
        for secret in secrets:
            text = text.replace(secret, REDACTED)
        text = _CREDENTIALS.sub(f"{REDACTED}@", text)
        text = _PARAMETER.sub(rf"\g<1>{REDACTED}", text)
        return _BEARER.sub(rf"\g<1> {REDACTED}", text)


def logger(redactor: Redactor, stream: TextIO | None = None, **bound: Any) -> Any:
    """A structlog logger that writes to ``stream`` (standard error), bound to ``bound``; changes nothing global."""
    return structlog.wrap_logger(
        structlog.WriteLogger(stream or sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redactor,
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    ).bind(**bound)


class ForwardedRecords(logging.Handler):
    """Records of the standard library's loggers (uvicorn, urllib3) as events of ours."""

    def __init__(self, log: Any) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a failing log line must not fail what it speaks of."""
        try:
            message = _CONTROL.sub(" ", record.getMessage())
            at = (
                "error"
                if record.levelno >= logging.ERROR
                else "warning"
                if record.levelno >= logging.WARNING
                else "info"
            )
            getattr(self._log, at)(message, logger=record.name, exc_info=record.exc_info)
        except (TypeError, ValueError):
            self.handleError(record)
