"""Standard output and error: what they cannot show is escaped, and a reader that goes away decides nothing."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def escape_what_cannot_be_shown() -> tuple[TextIO, ...]:
    """Standard output and error, which from now on escape what their encoding lacks.

    A file name need not be valid UTF-8, and a terminal may lack a character of ours; neither is a reason to end.
    """
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return streams


def flush(streams: tuple[TextIO, ...]) -> None:
    """Write what is still to be written. Raises OSError if it cannot be, BrokenPipeError if nobody reads it."""
    for stream in streams:
        stream.flush()


def drop(streams: tuple[TextIO, ...]) -> None:
    """Let what cannot be written go nowhere, also at the interpreter's end."""
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
