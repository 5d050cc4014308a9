"""Deliberate faults that the tests must catch: `make mutants`.

`faults.yaml` lists one-line patches, each with the tests that must fail under it. A fault is applied to a copy of the
checkout, its tests run there, and it is *caught* when they fail. A fault that survives means that a mechanism could
break without anyone noticing; one whose old line is not found exactly once is stale. Both end with status 1.

Before any fault is applied, the named tests must pass on the unchanged copy: a test that fails anyway catches nothing.
Results are kept in build/mutants.json under a hash of everything that decides them, so an interrupted run goes on.

    python tests/mutants                      all of them, two at a time
    python tests/mutants --part 1/4           the first quarter, for runs that share the work
    python tests/mutants --only ema-cap       one, with the output of its tests
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import yaml

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults.yaml")
RESULTS = ROOT / "build" / "mutants.json"
COPIED = ("components", "pipelines", "tests", "manifests", "images", "docs")
FILES = ("pyproject.toml", "README.md", "Makefile", "constraints.txt")
SECONDS = 900  # for one fault's tests: a fault that makes them hang is caught


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A one-line patch and the tests that must fail under it."""

    name: str
    file: str  # relative to the root of the checkout
    old: str  # occurs exactly once in the file
    new: str
    tests: tuple[str, ...]  # pytest arguments: files or node ids
    why: str = ""  # what would be lost, where the name does not say it

    def apply(self, root: Path) -> None:
        """Patch the file under `root`.

        Raises:
            ValueError: the old line is not there exactly once.
        """
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: its old line stands {count} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new))


def read_faults(path: Path = FAULTS) -> list[Fault]:
    """The list of `faults.yaml`.

    Raises:
        ValueError: two faults of one name, or one that changes nothing.
    """
    faults = [
        Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    names = [fault.name for fault in faults]
    for fault in faults:
        if names.count(fault.name) > 1:
            raise ValueError(f"{fault.name} is the name of two faults")
        if fault.old == fault.new:
            raise ValueError(f"{fault.name} changes nothing")
    return faults


def copy_checkout(target: Path) -> Path:
    """A copy of what tests read, importable under the names that installing gives: layerloop.components and so on."""
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache", "build")
    for name in COPIED:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in FILES:
        shutil.copy2(ROOT / name, target / name)
    (target / "layerloop").mkdir()
    for name in ("components", "pipelines"):
        (target / "layerloop" / name).symlink_to(target / name)
    return target


def run_tests(root: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """pytest in a copy, its packages before the installed ones; an answer that never comes is status 124."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end within {SECONDS} s")


def fingerprint() -> str:
    """Hash of everything that decides a result: sources, tests, settings."""
    digest = hashlib.sha256()
    files = [path for name in COPIED for path in sorted((ROOT / name).rglob("*")) if path.is_file()]
    for path in [*files, *(ROOT / name for name in FILES)]:
        if "__pycache__" not in path.parts and path.suffix in (".py", ".yaml", ".toml"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def judge(root: Path, fault: Fault) -> tuple[str, str]:
    """Apply a fault in a copy, run its tests, take it back: ("caught" | "survived" | "stale" | "broken", output)."""
    original = (root / fault.file).read_bytes() if (root / fault.file).is_file() else b""
    try:
        fault.apply(root)
    except ValueError as error:
        return "stale", str(error)
    try:
        result = run_tests(root, fault.tests)
    finally:
        (root / fault.file).write_bytes(original)
    # 1: a test failed. 2..5: interrupted, internal error, usage, nothing collected, which says nothing about the fault.
    outcome = {0: "survived", 1: "caught", 124: "caught"}.get(result.returncode, "broken")
    if outcome == "broken" and "error during collection" in result.stdout + result.stderr:
        outcome = "caught"  # the patched module cannot even be imported
    return outcome, result.stdout[-4000:] + result.stderr[-2000:]


def select(faults: Sequence[Fault], *, only: Sequence[str], part: str) -> list[Fault]:
    """The faults of a run.

    Raises:
        SystemExit: no such fault, or a part that is not one of its number.
    """
    if unknown := sorted(set(only) - {fault.name for fault in faults}):
        raise SystemExit(f"error: --only {unknown[0]} is not in {FAULTS.name}")
    chosen = [fault for fault in faults if not only or fault.name in only]
    try:
        number, parts = (int(text) for text in part.split("/"))
    except ValueError:
        number, parts = 0, 0
    if not 1 <= number <= parts:
        raise SystemExit(f"error: --part {part} is not K/N with 1 <= K <= N")
    return chosen[number - 1 :: parts]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/mutants", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="one fault (may be repeated)")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="at a time")
    arguments = parser.parse_args(argv)

    faults = select(read_faults(), only=arguments.only, part=arguments.part)
    state = fingerprint()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    done: dict[str, str] = stored.get("results", {}) if stored.get("fingerprint") == state else {}
    todo = [fault for fault in faults if arguments.only or done.get(fault.name) != "caught"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies: Queue[Path] = Queue()
        for number in range(arguments.jobs):
            copies.put(copy_checkout(Path(folder) / str(number)))
        root = copies.get()
        tests = sorted({test for fault in todo for test in fault.tests})
        if tests and (result := run_tests(root, tests)).returncode:
            print(result.stdout[-4000:] + result.stderr[-2000:])
            print("error: these tests fail without any fault, so they can catch none: mend them first")
            return 1
        copies.put(root)
        print(f"{len(tests)} test files or tests pass unchanged ({time.monotonic() - began:.0f} s)", flush=True)

        def work(fault: Fault) -> tuple[Fault, str, str]:
            copy = copies.get()
            try:
                return fault, *judge(copy, fault)
            finally:
                copies.put(copy)

        for count, (fault, outcome, output) in enumerate(pool.map(work, todo), 1):
            done[fault.name] = outcome
            print(f"{count:3}/{len(todo)} {outcome:8} {fault.name}", flush=True)
            if outcome != "caught" or arguments.only:
                print(output)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps({"fingerprint": state, "results": done}, indent=1, sort_keys=True) + "\n")
    missed = [fault.name for fault in faults if done.get(fault.name) != "caught"]
    print(f"{len(faults) - len(missed)} of {len(faults)} faults caught in {time.monotonic() - began:.0f} s")
    if missed:
        print("not caught: " + ", ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
