"""`make faults`: every stage of a small campaign is cut off at every change of its store, and run again.

    python tests/faults                     all of it, about an hour
    python tests/faults --part 1/4          the first quarter, for runs that share the work
    python tests/faults --only 's3 update'  cases whose names begin so

What held is kept in build/faults.json under a hash of the code, so an interrupted run is continued. Status 1 where
something did not hold; its campaign is then left in the folder that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

Case = Callable[[], Any]


STEPS = ("shard", "rollouts2", "scores2", "update2", "evaluate", "publish", "stretch")
EVERY = {"folder": 1, "s3": 1, "rclone": 5}  # of so many changes one is struck
OF_A_STRETCH = {"folder": 5, "s3": 10, "rclone": 40}  # which takes several seconds


def cases(made: Any, places: dict[str, Any], only: tuple[str, ...]) -> Iterator[tuple[str, Case]]:
    """All cases by name. Those of a stage are known once its changes are counted."""
    from tests.faults.points import Point, changes, strike
    from tests.faults.trouble import trouble

    for kind, place in places.items():
        for stage in map(made.stage, STEPS):
            begin = f"{kind} {stage.name} "
            if not any(begin.startswith(text[: len(begin)]) for text in only):
                continue
            apart = (OF_A_STRETCH if stage is made.stretch else EVERY)[kind]
            for at in range(0, len(changes(made, stage, place)), apart):
                for action in ("kill",) if kind == "folder" else ("kill", "kill sent"):
                    point = Point(stage.name, kind, at, action)
                    yield point.name, functools.partial(strike, made, point, place, spoil=at % 2 == 0)
    yield from trouble(made, places)


def digest() -> str:
    """Hash of the code that is tested, and of this."""
    found = hashlib.sha256()
    for folder in ("components", "pipelines", "tests/faults"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


class Results:
    """build/faults.json; several runs may write to it."""

    def __init__(self) -> None:
        self.path, self.code = ROOT / "build" / "faults.json", digest()

    def read(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(self.path.read_text())
            if found.get("code") == self.code:
                return dict(found["cases"])
        return {}

    def put(self, name: str, outcome: Any) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = self.read() | {name: asdict(outcome)}
            self.path.write_text(json.dumps({"code": self.code, "cases": known}, indent=1, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose names begin so (may be repeated)")
    arguments = parser.parse_args()
    only = tuple(arguments.only or [""])
    number, parts = (int(text) for text in arguments.part.split("/"))
    from tests.faults.places import places
    from tests.faults.scenario import scenario

    results, began, count, failed = Results(), time.monotonic(), Counter[str](), list[str]()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["OMP_NUM_THREADS"] = "1"
    with places(folder) as where, scenario(folder / "made") as made:
        known = results.read()
        for at, (name, case) in enumerate(cases(made, where, only)):
            if at % parts != number - 1 or not name.startswith(only):
                continue
            if name not in known or known[name]["problems"]:
                results.put(name, case())
                known = results.read()
            found = known[name]
            kind = name.rstrip("0123456789").rstrip()
            state = "not reached" if not found["reached"] else "broken" if found["problems"] else "held"
            count[f"{kind}: {state}"] += 1
            failed += [f"{name}: {problem}" for problem in found["problems"]]
            said = "; ".join([found["label"], *found["problems"]])
            print(f"{state} {name} in {found['seconds']:.1f} s ({said})", flush=True)
    print("\n".join(f"{what:40} {n:5}" for what, n in sorted(count.items())))
    print(f"{sum(count.values())} cases in {time.monotonic() - began:.0f} s" + (f"; see {folder}" if failed else ""))
    print("\n".join(failed))
    if not failed:
        import shutil

        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
