"""What is no kill: a bad network, a full disk, missing permissions, and a parent that dies while its steps live on."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .places import Place
from .points import Outcome, changes, last_line, remove
from .proxy import bad_network
from .scenario import CONCURRENCY, Judged, Scenario, Stage, counted, environment, problems

NOBODY = 65534  # a user without any rights
NETWORKS = {  # what befalls one request of `share`
    "resets": (("reset",), 0.1),
    "answers lost": (("lost",), 0.1),
    "500 and 503": (("busy", "broken"), 0.1),
    "slow": (("slow",), 0.05),
    "truncated": (("truncated",), 0.1),
    "flipped bits": (("flipped",), 0.1),
    "everything": (("reset", "lost", "busy", "broken", "slow", "truncated", "flipped"), 0.15),
}
RETRIES = 4  # of a step that a bad network stopped, by its one line


def trouble(made: Scenario, places: Mapping[str, Place]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """All such cases by name."""
    partial, folder, store = functools.partial, places["folder"], places["s3"]
    for kind in ("s3", "rclone"):
        for name, (kinds, share) in NETWORKS.items():
            for seed in (1, 2):
                yield f"network {kind}, {name}, {seed}", partial(network, made, places[kind], kinds, share, seed)
    for stage in ("shard", "rollouts2", "scores2", "update2", "evaluate", "publish"):
        yield f"full folder, {stage}", partial(full_disk, made, folder, stage)
        yield f"full bucket, {stage}", partial(refused_store, made, store, stage, "full", "there is no room")
        yield f"forbidden bucket, {stage}", partial(refused_store, made, store, stage, "forbidden", "access denied")
        yield f"read-only folder, {stage}", partial(read_only, made, folder, stage)
        yield f"full TMPDIR, {stage}", partial(full_tmpdir, made, folder, stage)
    for at in range(3, 120, 12):
        yield f"parent folder {at:03d}", functools.partial(parent, made, places["folder"], at)


def network(made: Scenario, place: Place, kinds: tuple[str, ...], share: float, seed: int) -> Outcome:
    """The whole campaign through a bad network; a step that gives up with one line is run again."""
    began, outcome = time.monotonic(), Outcome()
    # A name that the seed decides: what befalls a request follows from its path.
    uri = f"{place.root}/{'-'.join(kinds)[:20]}-{place.kind}-{seed}/lab"
    made.judge.answered.clear()
    with bad_network(place.environment["AWS_ENDPOINT_URL"], *kinds, share=share, seed=seed) as (endpoint, server):
        for stage in made.stages:
            for _ in range(RETRIES):
                done = made.run(stage, uri, AWS_ENDPOINT_URL=endpoint, **_without_endpoint(place))
                if done.status != 2:
                    break
                outcome.label += f"{stage.name} again: {last_line(done.said)[:150]}; "
            if done.status != 0:
                outcome.problems.append(f"{stage.name} ended with {done.status}: {last_line(done.said)}")
                return outcome
        outcome.label += ", ".join(f"{count} {kind}" for kind, count in sorted(server.done.items()))
    with place.entered():
        outcome.problems += problems(made, made.stages[-1], uri)
        if twice := sum(count - 1 for count in made.judge.answered.values()):
            outcome.problems.append(f"{twice} requests were paid twice")
        if not outcome.problems:
            remove(uri)
    outcome.seconds = time.monotonic() - began
    return outcome


def _without_endpoint(place: Place) -> dict[str, str]:
    return {name: value for name, value in place.environment.items() if name != "AWS_ENDPOINT_URL"}


# ------------------------------------------------------------------------------------------------ stores that refuse


def refused(made: Scenario, stage: Stage, uri: str, *, words: str, attempt: Callable[[], tuple[int, str]]) -> list[str]:
    """Problems of an attempt that its store refuses: it has to say so in one line of `words`, and the next one, which
    is not refused, to end as if nothing had been."""
    status, said = attempt()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    found = []
    if status != 2 or len(lines) != 1 or "Traceback" in said or words not in lines[0]:
        found.append(f"it ended with {status} and said: {lines or last_line(said)}")
    paid = Judged(Counter(made.judge.answered), set())
    second = made.run(stage, uri)
    if second.status != 0:
        found.append(f"the next attempt ended with {second.status}: {last_line(second.said)}")
    if more := paid.problem(made.judge.answered):
        found.append(more)
    return found + problems(made, stage, uri)


def full_disk(made: Scenario, place: Place, name: str, *, at: int | None = None) -> Outcome:
    """From the middle of the stage on nothing more fits into the folder."""
    began, stage = time.monotonic(), made.stage(name)
    middle = len(changes(made, stage, place)) // 2 if at is None else at
    uri, log = made.put(name, place), made.folder / f"log-{uuid.uuid4().hex[:8]}"

    def attempt() -> tuple[int, str]:
        done = made.run(stage, uri, {"log": str(log), "at": middle, "action": "full"})
        return done.status, done.said

    made.judge.answered.clear()
    outcome = Outcome(problems=refused(made, stage, uri, words="No space left on device", attempt=attempt))
    outcome.label, outcome.seconds = log.read_text().splitlines()[middle], time.monotonic() - began
    remove(uri)
    return outcome


def refused_store(made: Scenario, place: Place, name: str, kind: str, words: str) -> Outcome:
    """An S3 store that takes nothing any more, but for the lease, from the first object of the stage on."""
    began, stage = time.monotonic(), made.stage(name)
    with place.entered():
        uri = made.put(name, place)

        def attempt() -> tuple[int, str]:
            with bad_network(place.environment["AWS_ENDPOINT_URL"]) as (endpoint, server):
                server.chosen = lambda request: (
                    kind if request.command in ("PUT", "POST") and "/lease/" not in request.path else ""
                )
                done = made.run(stage, uri, AWS_ENDPOINT_URL=endpoint)
            return done.status, done.said

        made.judge.answered.clear()
        found = refused(made, stage, uri, words=words, attempt=attempt)
        remove(uri)
    return Outcome(problems=found, seconds=time.monotonic() - began)


def read_only(made: Scenario, place: Place, name: str) -> Outcome:
    """A folder that belongs to somebody else and can only be read. The rights are the system's own: a step runs as a
    user without any, which takes root here to begin with."""
    began, stage, uri = time.monotonic(), made.stage(name), made.put(name, place)
    Path(uri).mkdir(parents=True, exist_ok=True)

    def attempt() -> tuple[int, str]:
        with others_may_only_read(made, Path(uri)) as scratch:
            done = made.run(stage, uri, user=NOBODY, TMPDIR=str(scratch), HOME=str(scratch))
        return done.status, done.said

    made.judge.answered.clear()
    found = refused(made, stage, uri, words="ermission denied", attempt=attempt)
    remove(uri)
    return Outcome(problems=found, seconds=time.monotonic() - began, reached=os.getuid() == 0)


@contextmanager
def others_may_only_read(made: Scenario, folder: Path) -> Iterator[Path]:
    """Everything in a folder, and the ways to it, can be read by everybody; yields a folder that can be written to."""
    for path in itertools.chain([folder, *folder.parents], folder.rglob("*")):
        if path == Path("/"):
            continue
        mode = path.stat().st_mode
        if mode & 0o005 != 0o005:
            path.chmod(mode | (0o055 if path.is_dir() else 0o044))
    scratch = made.folder / f"scratch-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    scratch.chmod(0o777)
    yield scratch
    shutil.rmtree(scratch, ignore_errors=True)


def full_tmpdir(made: Scenario, place: Place, name: str) -> Outcome:
    """A TMPDIR of 8 kB, a file system of its own; where none may be mounted, nothing is tried."""
    began, stage = time.monotonic(), made.stage(name)
    small = made.folder / f"small-{uuid.uuid4().hex[:8]}"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(small)], capture_output=True)
    if mount.returncode != 0:
        return Outcome(label="no file system may be mounted here", reached=False)
    uri = made.put(name, place)
    try:
        made.judge.answered.clear()
        done = made.run(stage, uri, TMPDIR=str(small))
        if done.status == 0:  # what it writes is small enough to stay in memory
            found = problems(made, stage, uri)
        else:
            words = "No space left on device"
            found = refused(made, stage, uri, words=words, attempt=lambda: (done.status, done.said))
        found += [f"{path.name} is left in TMPDIR" for path in small.iterdir()]
    finally:
        subprocess.run(["umount", str(small)], check=True)
    remove(uri)
    return Outcome(problems=found, seconds=time.monotonic() - began)


# --------------------------------------------------------------------------------------------------------- the parent


def parent(made: Scenario, place: Place, at: int) -> Outcome:
    """`layerloop run` is killed at a change of one of its steps, which lives on; the same command again ends with the
    campaign that was asked for, and with no iteration more."""
    began, uri = time.monotonic(), place.new()
    folder = made.folder / f"parent-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    log, victim = folder / "log", folder / "pid"
    options = dict(zip(made.stages[0].options[::2], made.stages[0].options[1::2], strict=True))
    command = [
        sys.executable, "-m", "layerloop.pipelines.cli", "run", "--campaign", uri, "--images", options["--images"],
        "--recipe", options["--recipe"], "--judge-url", made.judge.url, "--iterations", "2", "--workers", "1",
        "--runs", str(folder / "runs"),
    ]  # fmt: skip
    hook = {"path": counted(uri), "log": str(log), "at": at, "action": "kill victim", "victim": str(victim)}
    first = os.environ | environment(hook) | {"OMP_NUM_THREADS": "1"}
    made.judge.answered.clear()
    with (folder / "first").open("w") as output:
        process = subprocess.Popen(command, env=first, stdout=output, stderr=output)
        victim.write_text(str(process.pid))
        status = process.wait(600)
    labels = log.read_text().splitlines()
    if at >= len(labels):
        remove(uri)
        return Outcome(reached=False, seconds=time.monotonic() - began)
    outcome = Outcome(label=labels[at])
    if status != -9:
        outcome.problems.append(f"the first command ended with {status}")
    again = subprocess.run(command, env=os.environ | environment(None), capture_output=True, text=True, timeout=900)
    if again.returncode != 0:
        outcome.problems.append(f"the same command again ended with {again.returncode}: {last_line(again.stderr)}")
    if (twice := sum(made.judge.answered.values()) - len(made.judge.answered)) > CONCURRENCY:
        outcome.problems.append(f"{twice} requests were paid twice, {CONCURRENCY} may be")
    outcome.problems += problems(made, made.stages[-1], uri)
    if not outcome.problems:
        remove(uri)
        shutil.rmtree(folder)
    outcome.seconds = time.monotonic() - began
    return outcome
