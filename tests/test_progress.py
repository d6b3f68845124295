"""Progress in a log file: a line now and then and at the end, nothing where it is not wanted."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from spatial_forcing import progress
from spatial_forcing.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def log():
    shown = io.StringIO()
    return shown, Console(file=shown, force_terminal=False, width=200)


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock):
    shown, console = log()
    with progress_bar(console=console, note="won") as bar:
        task = bar.add_task("evaluate", total=40, won="")
        for done in range(1, 41):
            clock[0] += 7.0
            bar.update(task, completed=done, won=f"{done // 2} succeed")
    assert shown.getvalue().split("\n")[:2] == [
        "evaluate: 5/40, 245 s left, 2 succeed",
        "evaluate: 10/40, 210 s left, 5 succeed",
    ]
    assert shown.getvalue().splitlines()[-1] == "evaluate: 40/40, 0 s left, 20 succeed"
    assert len(shown.getvalue().splitlines()) == 8


def test_what_was_done_before_does_not_count_for_the_time_left(clock):
    shown, console = log()
    with progress_bar(console=console) as bar:
        task = bar.add_task("record", total=100, completed=90)
        clock[0] += 40.0
        bar.advance(task, 4)
    assert shown.getvalue() == "record: 94/100, 60 s left\n"


def test_nothing_is_said_twice_nor_where_it_is_not_wanted(clock):
    shown, console = log()
    with progress_bar(console=console) as bar:
        task = bar.add_task("cache", total=2)
        bar.advance(task, 2)
        bar.update(task, completed=2)
        clock[0] += 100.0
        bar.update(task, completed=2)
    assert shown.getvalue() == "cache: 2/2, 0 s left\n"
    hidden, console = log()
    with progress_bar(False, console=console) as bar:
        bar.advance(bar.add_task("cache", total=1))
    assert hidden.getvalue() == ""


def test_a_terminal_gets_bars():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with progress_bar(console=console) as bar:
        bar.advance(bar.add_task("cache", total=1))
    assert "1/1" in shown.getvalue()
    assert "s left" not in shown.getvalue()
