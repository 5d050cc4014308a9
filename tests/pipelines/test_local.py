"""The local runner, on small pipelines whose steps are modules written for the test."""

import builtins
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from kfp import components, dsl, local
from kfp.dsl import Dataset, Input, Metrics, Output

from layerloop.components.runtime.ranks import CPU_VARIABLE
from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.local import LocalRun, StepFailed, StepRun, _shares, run_pipeline
from layerloop.pipelines.packages import write_pipeline

MAKE = """
import time
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest

def run(*, text: str, worker: int = 0, workers: int = 1) -> StepResult:
    print(f"text is {text}", flush=True)
    if text == "bad":
        raise LayerloopError("text is bad: choose a good one")
    if text == "crash" and worker == 0:
        raise RuntimeError("boom")
    if text in ("crash", "wait"):
        time.sleep(60)
    return StepResult(manifests={"rollouts": Manifest(kind="rollouts", iteration=3, counts={"worker": worker})})

raise SystemExit(step_main(run))
"""

# A terminal: the run and, without a session of their own, its steps are one process group, which ctrl-C reaches.
TERMINAL = """
import signal
import sys
from pathlib import Path
from layerloop.pipelines.local import run_pipeline
# by name: a shell starts what it puts in the background with interrupts ignored, this test's parents perhaps as well
signal.signal(signal.SIGINT, signal.default_int_handler if sys.argv[3] == "raised" else lambda *_: None)
try:
    run_pipeline(Path(sys.argv[1]), {"text": "wait"}, folder=Path(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(130)
"""

GATHER = """
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.schema.steps import STEPS

def run(*, text: str, iteration: int) -> StepResult:
    return StepResult(metrics={"iteration": iteration, "length": len(text)})

raise SystemExit(step_main(run, step=STEPS["score_rollouts"]))
"""


@dsl.container_component
def make(text: str, rollouts: Output[Dataset], worker: int = 0, workers: int = 1) -> dsl.ContainerSpec:
    arguments = ["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER]
    return dsl.ContainerSpec(image="any", command=["python3", "-m", "make_step"], args=arguments)


@dsl.container_component
def gather(text: str, rollouts: Input[list[Dataset]], metrics: Output[Metrics]) -> dsl.ContainerSpec:
    arguments = ["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER]
    return dsl.ContainerSpec(image="any", command=["python3", "-m", "gather_step"], args=arguments)


@dsl.pipeline(name="one-step")
def one_step(text: str) -> None:
    make(text=text)


@dsl.pipeline(name="two-workers")
def two_workers(text: str) -> None:
    """Loop and collect.

    Args:
        text: Words to pass. Any will do.
    """
    with dsl.ParallelFor(items=[0, 1], name="workers") as worker:
        made = make(text=text, worker=worker, workers=2).set_retry(3, backoff_duration="60s")
    gather(rollouts=dsl.Collected(made.outputs["rollouts"]), text=text)


class Runner:
    """Runs a pipeline in a folder of the test and keeps what it printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.console = folder, io.StringIO()

    def __call__(self, pipeline: Any, **arguments: str) -> LocalRun:
        package = write_pipeline(pipeline, self.folder / "pipeline.yaml")
        return run_pipeline(package, arguments, folder=self.folder / "run", console=self.console)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    (tmp_path / "make_step.py").write_text(MAKE)
    (tmp_path / "gather_step.py").write_text(GATHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Runner(tmp_path)


def test_kfp_still_refuses_container_components_so_the_handler_must_be_replaced(tmp_path: Path) -> None:
    package = write_pipeline(one_step, tmp_path / "pipeline.yaml")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"))
    with pytest.raises(RuntimeError, match="attempting to run a Container Component"):
        components.load_component_from_file(str(package))(text="x")


def test_a_loop_and_a_collected_list_run_and_every_step_is_reported_once(runner: Runner) -> None:
    run = runner(two_workers, text="hello")
    assert [step.step for step in run.steps] == ["make_step", "make_step", "gather_step"]
    lines = runner.console.getvalue().splitlines()
    titles = [line.removeprefix("[").split("] ") for line in lines if line.startswith("[")]
    assert [number for number, _ in titles] == [" 1/3", " 2/3", " 3/3"]
    assert {title for _, title in titles[:2]} == {"make step, worker 1 of 2", "make step, worker 2 of 2"}
    assert titles[2][1] == "gather step"
    assert "        worker 1 | text is hello" in lines
    assert "        worker 2 | text is hello" in lines
    assert sum("done in" in line for line in lines) == 3
    assert {json.loads(step.output("rollouts"))["counts"]["worker"] for step in run.steps[:2]} == {0, 1}
    assert json.loads(run.last("gather_step").output("metrics")) == {"iteration": 3, "length": 5}


def test_the_console_has_nothing_of_kfp_and_the_log_has_all_of_it(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = list[str](), tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    run = runner(one_step, text="hello")
    assert not [path for path in made if "kfp" in path], "in TMPDIR, where a kill would leave it"
    assert "Executing task" not in runner.console.getvalue()
    assert "Executing task" in (run.folder / "kfp.log").read_text()
    assert "text is hello" in (run.folder / "01-make_step.log").read_text()


def test_text_that_names_python_reaches_the_step_as_it_is(runner: Runner) -> None:
    runner(one_step, text="/usr/lib/python3/photos")
    assert "text is /usr/lib/python3/photos\n" in runner.console.getvalue()


def test_print_and_logging_are_as_before_after_a_loop(runner: Runner) -> None:
    before = builtins.print, logging.getLogger().handlers[:], logging.getLogger().level
    runner(two_workers, text="hello")
    assert (builtins.print, logging.getLogger().handlers[:], logging.getLogger().level) == before


def test_bad_input_ends_the_run_with_the_steps_own_line_without_retries(runner: Runner) -> None:
    line = r"^make step, worker \d of 2: text is bad: choose a good one \(log: "
    with pytest.raises(StepFailed, match=line) as caught:
        runner(two_workers, text="bad")
    assert caught.value.status == 2
    said = runner.console.getvalue()
    assert "gather step" not in said
    assert "error: text is bad" not in said, "the run's own last line says it"


def test_a_crash_is_a_failure_of_status_one_that_names_its_log_and_stops_the_other_worker(runner: Runner) -> None:
    began = time.monotonic()
    with pytest.raises(StepFailed, match="crashed with exit status 1: RuntimeError: boom") as caught:
        runner(two_workers, text="crash")
    assert caught.value.status == 1
    assert time.monotonic() - began < 30  # the other worker sleeps for a minute
    log = Path(str(caught.value).rsplit("(log: ", 1)[1].rstrip(")"))
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("exception", ["raised", "lost"])
def test_an_interrupt_ends_every_step_and_prints_nothing_of_theirs(runner: Runner, exception: str) -> None:
    """Also where its exception is lost, as one that is raised while Python removes an object."""
    package = write_pipeline(two_workers, runner.folder / "pipeline.yaml")
    command = [sys.executable, "-c", TERMINAL, str(package), str(runner.folder / "run"), exception]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as terminal:
        assert terminal.stdout is not None
        lines = []
        while sum("text is wait" in line for line in lines) < 2:
            lines.append(terminal.stdout.readline())
        began = time.monotonic()
        os.killpg(terminal.pid, signal.SIGINT)
        rest = terminal.stdout.read()
    assert terminal.returncode == 130 and time.monotonic() - began < 30  # the steps sleep for a minute
    assert rest == ""
    for log in (runner.folder / "run").glob("*-make_step.log"):
        assert "Traceback" not in log.read_text()


def test_a_missing_and_an_unknown_parameter_are_named_before_anything_runs(runner: Runner) -> None:
    with pytest.raises(LayerloopError, match="^text is missing: two-workers needs words to pass$"):
        runner(two_workers)
    with pytest.raises(LayerloopError, match="^txet is not a parameter of two-workers: known are text$"):
        runner(two_workers, text="x", txet="y")
    assert runner.console.getvalue() == ""


def test_cores_are_shared_among_the_ranks_of_a_step_and_among_workers_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def shares(step: str, processes: int, **values: int) -> dict[str, str]:
        given = json.dumps({"inputs": {"parameterValues": values}})
        return _shares(["python3", "-m", f"layerloop.components.{step}", "--executor-input", given], processes)

    assert shares("train_stretch", 2) == {CPU_VARIABLE: "2"}
    assert shares("evaluate_adapter", 9) == {CPU_VARIABLE: "4"}
    assert shares("generate_rollouts", 2, worker=0, workers=2) == {"OMP_NUM_THREADS": "2"}
    assert shares("score_rollouts", 2) == shares("publish_adapter", 2) == {}


def test_overhead_is_the_time_in_which_no_step_works() -> None:
    def step(began: float, start: float, seconds: float) -> StepRun:
        return StepRun("step", "title", began, start, seconds, {})

    # Works during [2, 5], [3, 8] (overlapping workers) and [9, 10] of 20 seconds.
    run = LocalRun(Path(), 20.0, (step(1, 1, 4), step(1, 2, 7), step(8, 1, 2)))
    assert run.overhead() == pytest.approx(1 - 7 / 20)
