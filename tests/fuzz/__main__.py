"""`make fuzz MINUTES=60 ONLY=tars`: every fuzz target for so many minutes, with new examples each time.

What fails is printed in its shortest form and kept in build/fuzz, so that the next run begins with it. Status 1 where
one failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LONGEST = 30.0  # seconds of an example
sys.path.insert(0, str(ROOT))


def timed(holds: Callable[[Any], None], seconds: list[float]) -> Callable[[Any], None]:
    """The target's function, with the seconds of every example written down, and none that takes long."""

    def one(drawn: Any) -> None:
        began = time.monotonic()
        try:
            holds(drawn)
        finally:
            seconds.append(time.monotonic() - began)
        assert seconds[-1] < LONGEST, f"it took {seconds[-1]:.0f} s"

    return one


def main() -> int:
    """Run the targets one after another."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis.database import DirectoryBasedExampleDatabase

    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", choices=TARGETS)
    arguments = parser.parse_args()
    database = DirectoryBasedExampleDatabase(ROOT / "build" / "fuzz")
    rounds = settings(
        max_examples=500, database=database, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    failed = 0
    for name, target in TARGETS.items():
        if arguments.only not in (None, name):
            continue
        seconds: list[float] = []
        holds = rounds(given(target.draws)(timed(target.holds, seconds)))
        until, outcome = time.monotonic() + 60 * arguments.minutes, ""
        try:
            while time.monotonic() < until:
                holds()
        except Exception:  # what fuzzing is for: shown, counted in the exit status, and the other targets go on
            failed, outcome = failed + 1, ", FAILED"
            traceback.print_exc()
        print(f"{name}: {len(seconds)} examples, the slowest {max(seconds, default=0.0):.2f} s{outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
