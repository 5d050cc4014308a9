"""Runs a compiled pipeline on this machine: kfp.local walks the DAG, every step is a process of its own.

kfp.local's SubprocessRunner refuses container components, although their commands run as well where the package is
installed. `step_processes` below replaces the handler that refuses; nothing else of KFP is changed.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from kfp import components, local
from kfp.local import status, subprocess_task_handler

from layerloop.components.runtime.progress import time_left
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.steps import RUN, STEPS
from layerloop.pipelines.gpus import GpuPool, visible_gpus
from layerloop.pipelines.packages import check_parameters, count_tasks, read_spec

CPU_PROCESSES = "LAYERLOOP_CPU_PROCESSES"  # runtime/ranks.py
# Libraries' own bars and advice, which say nothing about the job; images/ sets the same.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
STOP_SECONDS = 30.0  # that a step has to end when it is told to
STARTED = re.compile(r"started \w+ (\d+\.\d+) s after process start")  # runtime/contract.py


class StepFailed(LayerloopError):
    """A step ended with a non-zero status: `status` is 2 for bad input, which the step explained, 1 for a defect."""

    def __init__(self, message: str, *, exit_status: int) -> None:
        super().__init__(message)
        self.status = exit_status


@dataclass(frozen=True)
class StepRun:
    """One step that succeeded."""

    step: str
    title: str
    began: float  # seconds after the run's begin
    start: float  # seconds from its process's start to its first work
    seconds: float  # of its process
    executor_input: dict[str, Any]

    def output(self, artifact: str) -> bytes:
        """Content of one of its output artifacts, such as a manifest."""
        return Path(self.executor_input["outputs"]["artifacts"][artifact]["artifacts"][0]["uri"]).read_bytes()


@dataclass(frozen=True)
class LocalRun:
    """A run that succeeded: its steps in the order in which they started, and its seconds."""

    folder: Path
    seconds: float
    steps: tuple[StepRun, ...]

    def last(self, name: str) -> StepRun:
        """The last run of a step."""
        return next(run for run in reversed(self.steps) if run.step == name)

    def overhead(self) -> float:
        """Share of the run's time in which no step was at its own work: KFP, process starts, imports."""
        working, until = 0.0, 0.0
        for step in sorted(self.steps, key=lambda step: step.began + step.start):
            begin, end = step.began + step.start, step.began + step.seconds
            working += max(0.0, end - max(begin, until))
            until = max(until, end)
        return 1 - working / self.seconds


def run_pipeline(
    package: Path, arguments: dict[str, Any], *, folder: Path, console: TextIO | None = None, processes: int = 1
) -> LocalRun:
    """Run a compiled pipeline.

    Args:
        package: The YAML that `layerloop compile` wrote.
        arguments: The pipeline's parameters. Paths must be absolute.
        folder: Logs and the artifacts that pass between steps; the campaign is elsewhere. Created, and kept.
        console: Where to report, one header line a step and its progress below it; standard output when None.
        processes: Of a step that shares its work among ranks, on a machine without GPUs.

    Raises:
        StepFailed: a step failed; the message carries its own error line and names its log.
        LayerloopError: the package is no compiled pipeline; a parameter is unknown or missing.
    """
    spec = read_spec(package)
    check_parameters(spec, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    run = _Run(folder.resolve(), count_tasks(spec), console or sys.stdout, began, processes)
    with open(folder / "kfp.log", "w") as log, _quiet(log), step_processes(run.step), _signals(run.end) as signals:
        workspace = str(folder / "workspace")  # never made; else KFP makes one in TMPDIR, where a kill leaves it
        runner = local.SubprocessRunner(use_venv=False)
        local.init(runner, pipeline_root=str(folder / "artifacts"), workspace_root=workspace)
        pipeline = components.load_component_from_file(str(package))
        try:
            pipeline(**arguments)
        except Exception:
            if run.failure is None:  # KFP's own; else the step's failure is raised below, which says more
                raise
        finally:
            run.stop()
    if signals:  # whose exception was lost on its way, as one that is raised while an object is removed
        raise KeyboardInterrupt
    if run.failure is not None:
        raise run.failure
    return LocalRun(run.folder, time.monotonic() - began, tuple(run.steps[number] for number in sorted(run.steps)))


@contextlib.contextmanager
def _signals(end: Callable[[], None]) -> Iterator[list[int]]:
    """Call `end` when a signal comes that ends us, and then do what was done before: KFP waits for the steps of a loop,
    so an interrupt of its own would come through only when they are done. Gives those that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if callable(handler)}

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        end()
        handler = before[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    for number in before:
        signal.signal(number, handle)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------- the one thing that changes KFP


@contextlib.contextmanager
def step_processes(execute: Callable[[list[str], dict[str, str]], None]) -> Iterator[None]:
    """Let kfp.local's SubprocessRunner run container components through `execute(argv, environment)`.

    tests/pipelines/test_local.py fails when KFP no longer refuses them, and this can go.
    """

    class StepHandler(subprocess_task_handler.SubprocessTaskHandler):
        def validate_image(self, image: str) -> None:
            pass

        def validate_not_container_component(self, full_command: list[str]) -> None:
            pass

        def validate_not_containerized_python_component(self, full_command: list[str]) -> None:
            pass

        def run(self) -> status.Status:
            execute(self.full_command, self.env_vars)
            return status.Status.SUCCESS

    original = subprocess_task_handler.SubprocessTaskHandler
    subprocess_task_handler.SubprocessTaskHandler = StepHandler
    try:
        yield
    finally:
        subprocess_task_handler.SubprocessTaskHandler = original


@contextlib.contextmanager
def _quiet(log: TextIO) -> Iterator[None]:
    """Send what KFP prints, logs and warns to `log`, and undo what its two loop threads leave behind.

    kfp.local patches `print` and the root logger around every task, which two threads undo in the wrong order.
    """
    root, original = logging.getLogger(), builtins.print
    level, handlers = root.level, root.handlers[:]
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        builtins.print = original
        root.setLevel(level)
        root.handlers[:] = handlers


# ------------------------------------------------------------------------------------------------------------ the steps


@dataclass
class _Run:
    """State of one run, shared by the threads of a loop."""

    folder: Path
    total: int  # steps
    console: TextIO
    began: float  # time.monotonic()
    processes: int = 1
    name: str = field(default_factory=lambda: f"local-{uuid.uuid4()}")  # its processes share the campaign's lease
    steps: dict[int, StepRun] = field(default_factory=dict)
    failure: StepFailed | None = None
    started: int = 0
    sampling: dict[int, tuple[float, int]] = field(default_factory=dict)  # iteration: begin, number of its first step
    stopped: bool = False
    live: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)  # `end` is called in a signal's handler
    gpus: GpuPool = field(default_factory=lambda: GpuPool(visible_gpus()))

    def step(self, argv: list[str], environment: dict[str, str]) -> None:
        """Run one step to its end, reporting as it goes.

        Raises:
            StepFailed: it failed, or another step of the run had failed before.
        """
        executor_input = json.loads(argv[argv.index("--executor-input") + 1])
        step = argv[2].rpartition(".")[2]
        with self.lock:
            if self.failure is not None:
                raise self.failure
            if self.stopped:
                raise StepFailed("interrupted", exit_status=130)
            self.started += 1
            number = self.started
            title = _title(step, executor_input)
            self._say(f"[{number:2}/{self.total}] {title}{self._left(step, executor_input, number)}")
        log, label = self.folder / f"{number:02}-{step}.log", _label(executor_input)
        workers = executor_input.get("inputs", {}).get("parameterValues", {}).get("workers", 1)
        with self.gpus.lend(step, int(workers)) as own:
            with self.lock:
                if self.failure is not None:  # of a worker whose turn it was
                    raise self.failure
            began = time.monotonic()
            exit_status, last, start = self._process(number, argv, {**environment, **own}, log, label)
            seconds = time.monotonic() - began
        with self.lock:
            if exit_status == 0:
                self._say(f"        {label}done in {seconds:.1f} s")
                self.steps[number] = StepRun(step, title, began - self.began, start, seconds, executor_input)
                return
            if self.failure is None:
                self.failure = _failure(title, exit_status, last, log)
                for process in self.live.values():  # the other worker: its shards are kept and found again
                    process.terminate()
            raise self.failure

    def _left(self, step: str, executor_input: dict[str, Any], number: int) -> str:
        """What is added to the header line that begins an iteration: the time that the run's other steps take, where
        they take what those of the iterations before it took."""
        iteration = _iteration(step, executor_input)
        if step != "generate_rollouts" or iteration is None or iteration in self.sampling:
            return ""
        now = time.monotonic()
        self.sampling[iteration] = now, number
        first, first_number = next(iter(self.sampling.values()))
        left = time_left(number - first_number, self.total - first_number + 1, now - first)
        return f"; {left}" if left else ""

    def _process(
        self, number: int, argv: list[str], environment: dict[str, str], log: Path, label: str
    ) -> tuple[int, str, float]:
        """Exit status, last line and start seconds of a step; every line goes to its log and to the console."""
        # Only argv[0]: KFP's own handler replaces the text "python3" in every argument, so in paths as well.
        command = [sys.executable if argv[0] == "python3" else argv[0], *argv[1:]]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            bufsize=1,
            start_new_session=True,  # the terminal's ctrl-C is ours alone: `stop` ends the step, wherever it is
            env={
                **QUIET,
                **os.environ,
                RUN: self.name,
                **_shares(argv, self.processes),
                **environment,
                "PYTHONUNBUFFERED": "1",
            },
        )
        with self.lock:
            self.live[number] = process
            if self.stopped:  # between the look in `step` and now
                process.terminate()
        last, start, held = "", 0.0, ""
        assert process.stdout is not None
        with open(log, "w") as file, process.stdout:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if began := STARTED.search(line):  # for the accounts, not for the reader
                    start = float(began[1])
                elif line.strip():
                    last = line.strip()
                    with self.lock:
                        if held:
                            self._say(f"        {label}{held}")
                        held = line.rstrip() if line.startswith("error: ") else ""
                        if not held:
                            self._say(f"        {label}{line.rstrip()}")
        exit_status = process.wait()
        with self.lock:
            if held and exit_status != 2 and self.failure is None:  # else the run's own last line says it
                self._say(f"        {label}{held}")
            del self.live[number]
        return exit_status, last, start

    def end(self) -> None:
        """Tell what still runs to end; what it says about that goes to its log alone."""
        with self.lock:
            self.stopped = True
            for process in self.live.values():
                process.terminate()

    def stop(self) -> None:
        """End what still runs, after an interrupt or a failure, and wait for it."""
        self.end()
        with self.lock:
            live = list(self.live.values())
        for process in live:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _say(self, line: str) -> None:
        if not self.stopped:
            self.console.write(line + "\n")
            self.console.flush()


def _iteration(step: str, executor_input: dict[str, Any]) -> int | None:
    """The iteration that a step is of, the first one of a stretch; None where its inputs do not say."""
    row = STEPS.get(step)
    artifact = row.iteration_from if row else None
    listed = executor_input.get("inputs", {}).get("artifacts", {}).get(artifact, {}).get("artifacts", [])
    before = listed[0].get("metadata", {}).get("iteration") if listed else None
    return None if row is None or before is None else int(before) + row.iteration_offset


def _title(step: str, executor_input: dict[str, Any]) -> str:
    """What a step's header line says, such as `iteration 4: generate rollouts, worker 1 of 2`."""
    words, row, first = step.replace("_", " "), STEPS.get(step), _iteration(step, executor_input)
    values = executor_input.get("inputs", {}).get("parameterValues", {})
    if row and row.composes and first is not None:
        last = first + int(values["iterations"]) - 1
        which = f"iteration {first}" if first == last else f"iterations {first} to {last}"
        return f"{which}: train"
    if first is not None:
        words = f"iteration {first}: {words}"
    return f"{words}, worker {values['worker'] + 1} of {values['workers']}" if "workers" in values else words


def _label(executor_input: dict[str, Any]) -> str:
    """What distinguishes the lines of simultaneous workers."""
    values = executor_input.get("inputs", {}).get("parameterValues", {})
    return f"worker {values['worker'] + 1} | " if values.get("workers", 1) > 1 else ""


def _shares(argv: list[str], processes: int) -> dict[str, str]:
    """How a step shares the cores, a user's own settings aside: simultaneous workers (kfp.local runs two of a loop at a
    time) a part of them each, a step of several ranks one each, which small products use better than threads."""
    values = json.loads(argv[argv.index("--executor-input") + 1]).get("inputs", {}).get("parameterValues", {})
    row, cores = STEPS.get(argv[2].rpartition(".")[2]), os.cpu_count() or 1
    if values.get("workers", 1) > 1:
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // 2))}
    if row and row.gpus == "all":
        return {CPU_PROCESSES: str(max(1, min(processes, cores)))}
    return {}


def _failure(title: str, exit_status: int, last: str, log: Path) -> StepFailed:
    if exit_status == 2 and last.startswith("error: "):
        return StepFailed(f"{title}: {last.removeprefix('error: ')} (log: {log})", exit_status=2)
    how = f"was ended by signal {-exit_status}" if exit_status < 0 else f"crashed with exit status {exit_status}"
    return StepFailed(f"{title} {how}: {last or 'it printed nothing'} (log: {log})", exit_status=1)
