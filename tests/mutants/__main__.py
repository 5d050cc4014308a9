"""Deliberate faults that the tests must catch: `make mutants`.

`faults.yaml` lists one-line patches, each with the tests that must fail under it. A fault is applied to a copy of the
checkout, its tests run there, and it is *caught* when they fail. A fault that survives means that a mechanism could
break without anyone noticing; one whose old line is not found exactly once is stale. Both end with status 1.

A test that fails anyway catches nothing, so the named tests must first pass on the unchanged copy. What passed and what
was caught is kept in build/mutants.json under a hash of all that decides it, so an interrupted run is continued and a
new fault costs its own tests only.

    python tests/mutants                      all of them, two at a time
    python tests/mutants --part 1/4           the first quarter, for runs that share the work
    python tests/mutants --only ema-cap       one, with the output of its tests
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import yaml
from in_fork import PRELOADED, run_pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("components", "pipelines", "tests", "manifests", "images", "docs")
FILES = ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "LICENSE")
PACKAGES = ("components", "pipelines")  # importable as layerloop.<name>
SECONDS = 900  # for one fault's tests: a fault that makes them hang is caught
HUNG = 124


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A one-line patch and the tests that must fail under it."""

    name: str
    file: str  # relative to the root of the checkout
    old: str  # occurs exactly once in the file
    new: str
    tests: tuple[str, ...]  # pytest arguments: files or node ids
    why: str = ""  # what would be lost, where the name does not say it

    def patched(self, root: Path) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: the old line is not there exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: its old line is in {self.file} {count} times, not once")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Outcome:
    """Result of a fault: `state` is caught, survived, stale (not applied) or broken (its tests could not run)."""

    state: str
    output: str


def read_faults(path: Path) -> list[Fault]:
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


def select(faults: Sequence[Fault], *, only: Sequence[str], part: str) -> list[Fault]:
    """The faults of a run.

    Raises:
        SystemExit: no such fault, or a part that is not one of its number.
    """
    if unknown := sorted(set(only) - {fault.name for fault in faults}):
        raise SystemExit(f"error: --only {unknown[0]} is not in faults.yaml")
    chosen = [fault for fault in faults if not only or fault.name in only]
    try:
        number, parts = (int(text) for text in part.split("/"))
    except ValueError:
        number, parts = 0, 0
    if not 1 <= number <= parts:
        raise SystemExit(f"error: --part {part} is not K/N with 1 <= K <= N")
    return chosen[number - 1 :: parts]


def room(test: str) -> str:
    """The folder of a test, whose conftest it shares."""
    return test.partition("::")[0].rpartition("/")[0]


# ----------------------------------------------------------------------------------------- copies, and pytest in them


def copy_checkout(root: Path, target: Path) -> Path:
    """A copy of what tests read, importable under the names that installing gives: layerloop.components and so on."""
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache", "build")
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=ignore)
    for name in FILES:
        if (root / name).is_file():
            shutil.copy2(root / name, target / name)
    (target / "layerloop").mkdir(parents=True)
    for name in PACKAGES:
        (target / "layerloop" / name).symlink_to(target / name)
    return target


class Runner:
    """Runs pytest in copies of a checkout, several at a time, each run in a fork of a server with libraries loaded."""

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self.copies: Queue[Path] = Queue()
        self.running: set[int] = set()  # sessions of tests
        for number in range(jobs):
            self.copies.put(copy_checkout(root, folder / str(number)))
        # One thread a process: jobs share the processors, and a library's threads would not survive a fork.
        os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of semaphores that tqdm makes in the server
        self.context = multiprocessing.get_context("forkserver")
        wanted = imported(root) | {"pytest"}
        self.context.set_forkserver_preload([name for name in PRELOADED if name.partition(".")[0] in wanted])

    def run(self, copy: Path, tests: Sequence[str]) -> tuple[int, str]:
        """(exit status, end of the output); HUNG for tests that do not end."""
        output, temporary = copy.with_suffix(".out"), copy.with_suffix(".tmp")
        output.touch()
        process = self.context.Process(target=run_pytest, args=(str(copy), tests, str(temporary), str(output)))
        process.start()
        assert process.pid is not None
        self.running.add(process.pid)
        process.join(SECONDS)
        status = HUNG if process.exitcode is None else process.exitcode
        self.running.discard(process.pid)
        _kill(process.pid)  # and what it started
        process.join()
        return status, output.read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        """End all tests that are running."""
        for pid in tuple(self.running):
            _kill(pid)

    def outcome(self, fault: Fault) -> Outcome:
        """Apply a fault in a copy, run its tests, take it back."""
        copy = self.copies.get()
        path = copy / fault.file
        try:
            patched = fault.patched(copy)
            original = path.read_bytes()
            try:
                path.write_text(patched, encoding="utf-8")
                status, output = self.run(copy, fault.tests)
            finally:
                path.write_bytes(original)
        except ValueError as error:
            return Outcome("stale", str(error))
        finally:
            self.copies.put(copy)
        # 1: a test failed. SIGABRT: C++ ended the process over the fault. 2..5: interrupted, internal error, usage,
        # nothing collected: that says nothing of the fault.
        state = {0: "survived", 1: "caught", HUNG: "caught", -signal.SIGABRT: "caught"}.get(status, "broken")
        if state == "broken" and re.search(r"ERROR collecting |errors? during collection", output):
            state = "caught"  # the patched module cannot even be imported
        return Outcome(state, output)

    def unchanged(self, tests: Sequence[str]) -> Outcome:
        """Run tests without any fault: "passed", or "failed"."""
        copy = self.copies.get()
        try:
            status, output = self.run(copy, tests)
        finally:
            self.copies.put(copy)
        return Outcome("failed" if status else "passed", output)


def _kill(session: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)


def imported(root: Path) -> set[str]:
    """First names of all modules that the packages import."""
    pattern = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    files = (path for name in PACKAGES for path in (root / name).rglob("*.py"))
    return {name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}


# -------------------------------------------------------------------------------------------------------------- results


class Results:
    """build/mutants.json: by name, the state and the hash of all that decides it. Several runs may write to it."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "build" / "mutants.json"
        shared = [path for name in COPIED if name != "tests" for path in (root / name).rglob("*")]
        self._shared = _digest(root, [*shared, *(root / name for name in FILES), *(root / "tests").glob("*")])
        self._rooms: dict[str, str] = {}
        self.states: dict[str, Any] = self._read()

    def key(self, tests: Sequence[str], *more: Any) -> str:
        """Hash of the sources, of what the tests share, of their rooms, and of `more`."""
        for name in map(room, tests):
            self._rooms.setdefault(name, _digest(self.root, (self.root / name).rglob("*")))
        decisive = [self._shared, *sorted({self._rooms[room(test)] for test in tests}), *tests, *more]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

    def get(self, name: str, key: str) -> str:
        """The state that is kept under `name`; empty if it is of another key."""
        found = self.states.get(name, {})
        return str(found.get("state", "")) if found.get("key") == key else ""

    def put(self, name: str, key: str, state: str) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.states = {**self._read(), name: {"state": state, "key": key}}
            self.path.write_text(json.dumps(self.states, indent=1, sort_keys=True) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            value = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}


def _digest(root: Path, paths: Iterable[Path]) -> str:
    """Hash of names and contents, prose and what Python made aside."""
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        if path.suffix == ".md" or "__pycache__" in path.parts:
            continue
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- command


def failing_rooms(runner: Runner, results: Results, pool: ThreadPoolExecutor, faults: Sequence[Fault]) -> set[str]:
    """Folders of whose tests one fails without any fault; says which."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for fault in faults:
        for test in fault.tests:
            rooms[room(test)].add(test)
    todo = {name: sorted(tests) for name, tests in rooms.items()}
    keys = {name: results.key(tests) for name, tests in todo.items()}
    todo = {name: tests for name, tests in todo.items() if results.get(f"unchanged {name}", keys[name]) != "passed"}
    failing = set()
    for name, outcome in finished(pool, runner.unchanged, todo):
        results.put(f"unchanged {name}", keys[name], outcome.state)
        print(f"{name}, unchanged: {len(todo[name])} files or tests {outcome.state}", flush=True)
        if outcome.state != "passed":
            print(outcome.output, flush=True)
            failing.add(name)
    return failing


def finished(
    pool: ThreadPoolExecutor, work: Callable[[Any], Outcome], todo: Mapping[str, Any]
) -> Iterator[tuple[str, Outcome]]:
    """Names and outcomes of `todo`, as they come."""
    futures = {pool.submit(work, item): name for name, item in todo.items()}
    for future in as_completed(futures):
        yield futures[future], future.result()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/mutants", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="one fault (may be repeated)")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="at a time")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout (default: this one)")
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()

    faults = select(read_faults(root / "tests/mutants/faults.yaml"), only=arguments.only, part=arguments.part)
    results = Results(root)
    keys = {fault.name: results.key(fault.tests, asdict(fault)) for fault in faults}
    todo = {f.name: f for f in faults if arguments.only or results.get(f.name, keys[f.name]) != "caught"}
    states = dict.fromkeys(keys, "caught")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        runner = Runner(root, Path(folder), arguments.jobs)
        try:
            if failing := failing_rooms(runner, results, pool, list(todo.values())):
                rooms = ", ".join(sorted(failing))
                print(f"error: tests of {rooms} fail without any fault, so they catch none: repair them")
            for name in [name for name, fault in todo.items() if failing & set(map(room, fault.tests))]:
                states[name] = "no verdict"
                del todo[name]
            for count, (name, outcome) in enumerate(finished(pool, runner.outcome, todo), 1):
                states[name] = outcome.state
                results.put(name, keys[name], outcome.state)
                print(f"{count:3}/{len(todo)} {outcome.state:8} {name}", flush=True)
                if outcome.state != "caught" or arguments.only:
                    print(outcome.output, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            print("interrupted: run it again to continue")
            return 130
    missed = [f"{name} ({state})" for name, state in states.items() if state != "caught"]
    print(f"{len(faults) - len(missed)} of {len(faults)} faults caught in {time.monotonic() - began:.0f} s")
    if missed:
        print("not caught: " + ", ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
