"""Log lines of a step, and progress that suits a terminal as well as a pod's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from layerloop.components.schema.messages import counted

T = TypeVar("T")

LINE_SECONDS = 5.0  # between progress lines where there is no terminal; once a minute in a job of hours


def log(message: str) -> None:
    """One line on standard error; standard output is left to results."""
    print(message, file=sys.stderr, flush=True)


def progress(iterable: Iterable[T], *, what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on a terminal, else a line every few seconds and one at the end; none where it is quick.

    Args:
        what: what is being done, "sampling".
        unit: what an item is, in the plural, "groups".
        total: number of items, taken from the iterable where it has a length.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, desc=what, unit=f" {unit}", total=total, dynamic_ncols=True, file=sys.stderr)
        return
    start = logged_at = time.monotonic()
    count = 0
    for item in iterable:
        yield item
        count += 1
        now = time.monotonic()
        if now - logged_at >= max(LINE_SECONDS, min(60.0, (now - start) / 50)) and count != total:
            logged_at = now
            log(progress_line(what, unit, count, total, now - start))
    if (seconds := time.monotonic() - start) >= LINE_SECONDS:
        log(f"{what}: {counted(count, unit)} in {_duration(seconds)}")


def progress_line(what: str, unit: str, count: int, total: int | None, seconds: float) -> str:
    """`sampling: 12/40 groups, 0.8 groups/s, 35 s left`."""
    rate = count / seconds if seconds > 0 else 0.0
    speed = f"{rate:.2g} {unit}/s" if 1 <= rate < 10 else f"{rate:.0f} {unit}/s" if rate else "none yet"
    if 0 < rate < 1:
        speed = f"{_duration(seconds / count)} each"
    if total is None:
        return f"{what}: {count} {unit}, {speed}"
    return (
        f"{what}: {count}/{total} {unit}, {speed}, {_duration((total - count) / rate) if rate else 'unknown time'} left"
    )


def time_left(done: int, total: int, seconds: float) -> str:
    """`about 4 min left`: what the rest takes where `done` of `total` took `seconds`; empty while nothing is done."""
    if done < 1:
        return ""
    left = seconds / done * (total - done)
    return "less than a minute left" if left < 60 else f"about {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    """A time of a minute and more, to no more digits than an estimate has."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 48:
        return f"{round(hours / 24)} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
