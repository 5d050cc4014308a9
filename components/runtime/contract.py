"""One contract for a step as a command and as a Kubeflow task: flags in (arguments.py), or the executor input
(executor_input.py); manifests out (outputs.py).

A `container_component` passes `--executor-input {{$}}`, the JSON that the Kubeflow launcher (and kfp.local) makes of a
task's inputs and outputs. Parameters become the keyword arguments of `run`; of input artifacts only the iteration
number is read, for they are small manifests that carry lineage while the data is in the campaign. The step's outputs
are written where the executor input says, and listed in its `outputs.outputFile`. Standard library and pydantic only.

The driver asks for more than component.py declares (`executor-logs`, whose file the launcher holds open): an output
that the step did not make is left alone. A refusal is remembered for the pod that Kubeflow starts next (refusals.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from layerloop.components.runtime.arguments import flag, kind_of, mapping, parameters_of, parser_of, step_name
from layerloop.components.runtime.environment import usable_environment
from layerloop.components.runtime.executor_input import (
    parse_executor_input,
    passed_through,
    run_of,
    task_arguments,
    until_of,
)
from layerloop.components.runtime.outputs import StepResult, write_outputs
from layerloop.components.runtime.progress import log
from layerloop.components.runtime.rank_errors import report
from layerloop.components.runtime.refusals import Objects, Refusals
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Kind
from layerloop.components.schema.steps import RUN, Step

_IMPORTED = time.monotonic()


def step_main(
    run: Callable[..., StepResult],
    *,
    step: Step | None = None,
    beyond: tuple[str, Kind | str] | None = None,
    store: Callable[[str], Objects] | None = None,
    launch: Callable[[str, Sequence[str], Mapping[str, Any]], int | None] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a step from its command line or from `--executor-input`.

    Args:
        run: the step; its keyword-only arguments (str, int, float, bool, dict, or one of these | None) become flags,
            whose help is taken from the `Args:` section of its docstring. A dict is given as JSON. A positional one is
            for callers in Python.
        step: its row of the step table, which says from which input artifact's `iteration` metadata a Kubeflow task's
            argument `iteration` follows; None where it does not.
        beyond: of a step that is skipped for an iteration past the run's target (the task's parameter `until`): its
            output artifact, and its content then: an empty manifest of a kind, or the input artifact of that name.
        store: opens the campaign's store, where the refusals of a task are remembered; None remembers none.
        launch: of a step that shares its work among ranks: runs a module with a command line in several processes and
            returns its exit status, or None where one process will do (ranks.py). It is given the arguments of `run`
            as well, for a step whose number of processes depends on them.
        argv: arguments, by default the process's own.

    Returns:
        The exit status: 0, or the error's (2, if it is not one of its own) after a one-line `error: ...` on standard
        error. Defects keep their traceback.
    """
    name = step_name(run)
    parser = parser_of(run, name)
    arguments = vars(parser.parse_args(argv))
    given = arguments.pop("executor_input")
    refusals: Refusals | None = None
    try:
        task: dict[str, Any] = {}
        if given is not None:
            task = parse_executor_input(given)
            if run_name := run_of(task):
                os.environ.setdefault(RUN, run_name)
            until = until_of(task) if beyond else 0
            arguments = task_arguments(run, task, step)
            if beyond and 0 < until < int(arguments.get("iteration") or 0):
                log(f"iteration {arguments['iteration']} is past the run's target {until}: nothing to do")
                write_outputs(passed_through(*beyond, arguments["iteration"], task), task.get("outputs", {}))
                return 0
            if store is not None and arguments.get("campaign"):
                refusals = Refusals(functools.partial(store, str(arguments["campaign"])), given, step=name)
                refusals.repeat()
        else:
            texts = [name for name in arguments if kind_of(run, name) is dict]
            arguments |= {name: mapping(flag(name), arguments[name]) for name in texts}
        missing = [flag(p.name) for p in parameters_of(run) if p.name not in arguments and p.default is p.empty]
        if missing:
            parser.error(f"these are required: {', '.join(missing)}")
        if launch is not None:
            status = launch(f"layerloop.components.{name}", sys.argv[1:] if argv is None else argv, arguments)
            if status is not None:
                return status
        reports = os.environ.get("RANK", "0") == "0"  # under torchrun every rank gets here
        if reports:
            log(f"started {name} {_seconds_since_process_start():.3f} s after process start")
        with usable_environment():
            result = run(**arguments)
        if reports:
            if given is None:
                print(json.dumps({"metrics": result.metrics, "parameters": result.parameters}), flush=True)
            else:
                write_outputs(result, task.get("outputs", {}))
    except LayerloopError as error:
        if report(error):
            return error.status
        print(f"error: {error}", file=sys.stderr, flush=True)
        if refusals is not None:
            refusals.remember(error)
        return error.status
    return 0


def end_process(status: int) -> NoReturn:
    """End the process with `status` at once: what a step made is committed, and its threads have been joined.

    The interpreter's own end would run the destructors of torch, pyarrow and CUDA in an order that nobody chose. With
    both torch and pyarrow loaded it aborts now and then ("terminate called without an active exception", status 134),
    and a step that has done its work counts as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or ever did
            stream.flush()
    os._exit(status)


def _seconds_since_process_start() -> float:
    """Age of this process, from Linux's /proc; elsewhere, since this module was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED
