"""Progress: what it shows, and that it is the cancellation point."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable

import pytest

from defense_core.errors import EXIT_UNKNOWN, Cancelled
from defense_core.progress import BarProgress, LogProgress, NullProgress, default_progress

KINDS: list[Callable[..., NullProgress]] = [NullProgress, BarProgress, LogProgress]


@pytest.mark.parametrize("kind", KINDS)
def test_a_phase_counts_to_its_end(kind: Callable[..., NullProgress]) -> None:
    with kind().phase("work", total=3) as phase:
        for _ in range(3):
            phase.advance(loss=0.5)
        assert phase.done == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_a_phase_of_unknown_length(kind: Callable[..., NullProgress]) -> None:
    with kind().phase("work") as phase:
        phase.advance(5)
        phase.advance()
        assert phase.done == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_request_takes_effect_at_the_next_step(kind: Callable[..., NullProgress]) -> None:
    stop: list[int] = []
    progress = kind(lambda: bool(stop))
    with progress.phase("unlearn", total=9) as phase:
        phase.advance()
        stop.append(1)
        with pytest.raises(Cancelled, match=r"stopped during unlearn.*at step 2") as caught:
            phase.advance()
    assert caught.value.exit_code == EXIT_UNKNOWN


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_the_work_pass_through(kind: Callable[..., NullProgress]) -> None:
    with pytest.raises(ZeroDivisionError), kind().phase("work", total=1):
        _ = 1 / 0


def test_null_progress_is_silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), NullProgress().phase("work", total=2) as phase:
        phase.advance(loss=1.0)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("quarantine"), "propagate", True)
    caplog.set_level(logging.INFO, logger="quarantine")
    return caplog


def test_log_progress_gives_one_line_at_the_end(lines: pytest.LogCaptureFixture) -> None:
    with LogProgress(every_s=1000).phase("repair", total=4) as phase:
        for _ in range(4):
            phase.advance(loss=0.25)
    assert len(lines.messages) == 1
    assert lines.messages[0].startswith("repair 4/4 ")


def test_log_progress_tells_how_far_it_is(lines: pytest.LogCaptureFixture) -> None:
    with LogProgress(every_s=0).phase("repair", total=2) as phase:
        phase.advance(loss=0.25)
        phase.advance(loss=0.125)
    assert [line.split(" ")[1] for line in lines.messages] == ["1/2", "2/2", "2/2"]
    assert lines.messages[0].endswith("loss=0.2500")


def test_what_is_not_known_yet_is_not_shown(lines: pytest.LogCaptureFixture) -> None:
    with LogProgress(every_s=0).phase("repair", total=2) as phase:
        phase.advance(loss=math.nan)
        phase.advance(loss=0.125)
    assert "loss" not in lines.messages[0]
    assert lines.messages[1].endswith("loss=0.1250")


def test_log_progress_is_silent_about_what_failed(lines: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), LogProgress(every_s=1000).phase("repair", total=2):
        _ = 1 / 0
    assert lines.messages == []


def test_a_bar_goes_to_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    with BarProgress().phase("repair", total=2) as phase:
        phase.advance(loss=0.25)
        phase.advance()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "repair" in shown.err


@pytest.mark.parametrize(("terminal", "kind"), [(True, BarProgress), (False, LogProgress)])
def test_a_bar_on_a_terminal_and_lines_elsewhere(
    terminal: bool, kind: type[NullProgress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert type(default_progress()) is kind
    with default_progress(lambda: True).phase("work") as phase, pytest.raises(Cancelled):
        phase.advance()
