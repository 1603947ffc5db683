"""What every component does around its step: logging, progress, stop requests, records, exit code."""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from components._runtime.addresses import without_secret_parameters
from components._runtime.evidence import write_evidence
from components._runtime.plan import RunSettings, run_settings
from components._runtime.pod import check_identity
from components._runtime.store import EvidenceStore, open_store
from defense_core.errors import EXIT_UNKNOWN, Cancelled, QuarantineError, visible
from defense_core.progress import LogProgress, NullProgress

LOG_FORMAT = "%(asctime)s quarantine %(levelname)s %(message)s"
STEP_LINE = re.compile(r"\S+ \S+ quarantine (?P<level>[A-Z]+) (?P<message>.*)")
"""A line as steps log it, among those of the orchestrator."""

_MAX_TEXT = 2000  # characters; a stranger's file may have a name of a megabyte, which messages quote

logger = logging.getLogger("quarantine")


class OneLine(logging.Formatter):
    """A message is one line, whatever was quoted in it; a trace keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        record.message = visible(record.message)
        return super().formatMessage(record)


class StopRequest:
    """Whether the operator, or the cluster, has asked to stop."""

    def __init__(self) -> None:
        self.name = ""

    def __call__(self) -> bool:
        return bool(self.name)


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT and SIGHUP inside the block into :class:`Cancelled`.

    SIGHUP, which says that the terminal is gone, stays ignored where it is (``nohup``). The signal
    raises at once, as Ctrl-C does, so that a long call that knows no stop request (a download, an
    export) ends too. A library that swallows it is stopped at the next step of its progress.
    Outside the main thread signals stay as they are.

    Raises:
        Cancelled: a signal arrived.
    """
    stop = StopRequest()

    def request(number: int, frame: FrameType | None) -> None:
        first = not stop()
        stop.name = signal.Signals(number).name
        if first:
            raise KeyboardInterrupt

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        hung_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        previous = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT, *hung_up)}
    try:
        yield stop
    except KeyboardInterrupt as error:
        stop.name = stop.name or "SIGINT"
        raise Cancelled(f"stopped by {stop.name}", hint="Nothing was left behind; run it again") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Scope:
    """What a component is given while its step runs.

    Attributes:
        name: of the evidence, e.g. ``purify.tsbd``.
        settings: where records go.
        progress: log lines; also the cancellation point.
        store: the run's records.
    """

    name: str
    settings: RunSettings
    progress: NullProgress
    store: EvidenceStore

    def finish(self, evidence: Mapping[str, Any] | None, path: str | Path) -> None:
        """Put the step's evidence into the store and write it to ``path``, the component's output: the bytes that the
        store keeps, where an earlier attempt, whose outputs were never taken, said the same.

        ``None`` where nothing was asked of the step: it leaves no record, and an empty file, for an output must be one.
        """
        if evidence is None:
            self.store.settle(self.name)
            Path(path).write_bytes(b"")
            return
        write_evidence(Path(path), self.store.put(evidence))
        logger.info("%s: %s", self.name, evidence["verdict"])


@contextmanager
def step_scope(name: str, run: str, execution: str = "") -> Iterator[Scope]:
    """Run a component's body; end the process with a typed exit code if it fails.

    Args:
        name: of the step's evidence and failure record; its step is what precedes the dot.
        run: the pipeline parameter, see :class:`components._runtime.plan.RunSettings`.
        execution: names the run where ``run`` does not.

    Raises:
        SystemExit: with the error's exit code, after a failure record was put into the store.
    """
    configure_logging()
    try:
        settings = run_settings(run, execution)
        store = open_store(settings.evidence, settings.name)
    except QuarantineError as error:
        logger.error("%s failed: %s", name, error)  # noqa: TRY400 - the sentence is for the operator
        raise SystemExit(error.exit_code) from error
    try:
        with interruptible() as stop:
            logger.info("%s begins", name)
            check_identity()
            yield Scope(name, settings, LogProgress(stop), store)
    except QuarantineError as error:
        _record(store, name, error, failure_record(name, error))
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        # Not one of ours: a defect. Recorded, so that the report can name it, and raised on with its trace.
        _record(store, name, error, failure_record(name, error))
        raise


def failure_record(name: str, error: BaseException) -> dict[str, Any]:
    """Why a step failed, JSON types only, without credentials."""
    if isinstance(error, QuarantineError):
        facts = error.to_mapping()
    else:
        facts = {
            "error": type(error).__name__,
            "what": str(error),
            "expected": None,
            "got": None,
            "hint": "This is a defect of the program or of its environment; see the step's log",
            "exit_code": EXIT_UNKNOWN,
        }
    record = {"name": name, "step": name.partition(".")[0], **facts, "message": str(error)}
    return {key: redacted(value) if isinstance(value, str) else value for key, value in record.items()}


def redacted(text: str) -> str:
    """At most 2,000 characters of ``text``, without the ``user:password@`` of addresses and secret parameters."""
    # More is searched than is kept: what the cut breaks in two is no longer known for a secret.
    text = text[: 2 * _MAX_TEXT]
    text = re.sub(r"://(?:[^/\s]*@|[^/@:\s]*:(?![0-9]{1,5}/)[^@\s]*@)", "://", text)
    return without_secret_parameters(text)[:_MAX_TEXT]


def configure_logging() -> None:
    """One line an event on standard error for this project's messages; libraries only warn."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(OneLine(LOG_FORMAT))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)
    for chatty in ("botocore", "boto3", "urllib3", "s3transfer", "onnxscript", "onnx_ir", "torch.onnx", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _record(store: EvidenceStore, name: str, error: BaseException, record: Mapping[str, Any]) -> None:
    logger.error("%s failed: %s", name, record["message"])
    try:
        store.put_failure(name, record)
    except QuarantineError as second:
        logger.error("%s: the failure could not be recorded: %s", name, second)  # noqa: TRY400 - as above
        error.add_note(f"The failure could not be recorded: {second}")
