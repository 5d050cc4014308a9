from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from layerloop.components.runtime import progress as module
from layerloop.components.runtime.progress import log, progress, progress_line, time_left


def test_what_is_quick_passes_through_without_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(4), what="sampling", unit="groups")) == [0, 1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_items_pass_through_and_the_end_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "monotonic", iter([0.0, 1.0, 2.0, 3.0, 4.0, 7.26]).__next__)
    assert list(progress(range(4), what="sampling", unit="groups")) == [0, 1, 2, 3]
    assert capsys.readouterr() == ("", "sampling: 4 groups in 7.3 s\n")


def test_a_line_every_few_seconds_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    assert list(progress(iter("abc"), what="scoring", unit="replies", total=3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["scoring: 1/3 replies", "scoring: 2/3 replies"]
    assert lines[2].startswith("scoring: 3 replies in ")
    assert len(lines) == 3


def test_work_is_not_done_ahead_of_its_consumer() -> None:
    done = []

    def work() -> Iterator[int]:
        for number in range(3):
            done.append(number)
            yield number

    items = progress(work(), what="w", unit="x")
    next(items)
    assert done == [0]


@pytest.mark.parametrize(
    ("count", "total", "seconds", "line"),
    [
        (10, 40, 5.0, "w: 10/40 images, 2 images/s, 15 s left"),
        (2, 40, 10.0, "w: 2/40 images, 5 s each, 3 min 10 s left"),
        (1, 2000, 10.0, "w: 1/2000 images, 10 s each, 5 h 33 min left"),
        (7, None, 2.0, "w: 7 images, 3.5 images/s"),
    ],
)
def test_lines_have_units(count: int, total: int | None, seconds: float, line: str) -> None:
    assert progress_line("w", "images", count, total, seconds) == line


@pytest.mark.parametrize(
    ("done", "total", "seconds", "line"),
    [
        (0, 12, 100.0, ""),
        (2, 12, 50.0, "about 4 min left"),
        (11, 12, 600.0, "less than a minute left"),
        (50, 200, 158_650.0, "about 6 days left"),
        (150, 200, 30_000.0, "about 2 h 47 min left"),
    ],
)
def test_the_time_left_of_a_run_has_few_digits(done: int, total: int, seconds: float, line: str) -> None:
    assert time_left(done, total, seconds) == line


def test_log_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log("shard 3 of 4 written, 12.5 MB")
    assert capsys.readouterr() == ("", "shard 3 of 4 written, 12.5 MB\n")


def test_a_terminal_gets_a_bar() -> None:
    code = (
        "from layerloop.components.runtime.progress import progress\n"
        "list(progress(range(3), what='sampling', unit='groups'))"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # EIO is how a terminal without writers ends
        while True:
            text += os.read(ours, 10000)
    os.close(ours)
    assert b"sampling: 100%" in text
    assert b"3/3" in text
