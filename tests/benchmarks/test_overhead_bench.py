"""Overhead of the pipeline over the steps' own work: KFP's walk, process starts, imports."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from layerloop.pipelines.demo import make_pictures, reference_judge
from layerloop.pipelines.inputs import packaged_recipes
from layerloop.pipelines.job import Job, run_job
from layerloop.pipelines.local import STARTED, LocalRun

IMPORT = re.compile(r"^import time: +(\d+) \|", re.MULTILINE)  # microseconds in the module itself


def with_imports(run: LocalRun) -> LocalRun:
    """Each step's start moved on by the imports that it does after its `started` line: they are not work of its own."""
    steps = []
    for step, log in zip(run.steps, sorted(run.folder.glob("[0-9]*.log")), strict=True):
        text = log.read_text()
        started = STARTED.search(text)
        assert started is not None
        late = sum(map(int, IMPORT.findall(text, started.end()))) / 1e6
        steps.append(replace(step, start=step.start + late))
    return replace(run, steps=tuple(steps))


@pytest.mark.timeout(3600)
def test_most_of_the_demos_time_is_the_steps_own_work(
    tmp_path: Path, record_benchmark: Callable[[str, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, designs = make_pictures(tmp_path)
    with reference_judge(tmp_path / "judge.log") as judge_url:
        monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # of the steps, reported in their logs
        job = Job(
            campaign=str(tmp_path / "campaign"),
            images=str(images),
            designs=str(designs),
            recipe=packaged_recipes()["tiny"],
            judge_url=judge_url,
            step_by_step=True,
        )
        run = with_imports(run_job(job, runs=tmp_path / "runs"))
    starts = defaultdict(list)
    for step in run.steps:
        starts[step.step].append(step.start)
    for verb, seconds in starts.items():
        record_benchmark(f"step_start_{verb}_seconds", statistics.median(seconds))
    record_benchmark("step_start_seconds", statistics.mean(step.start for step in run.steps))
    record_benchmark("local_demo_run_seconds", run.seconds)
    overhead = run.overhead()
    record_benchmark("pipeline_overhead_fraction", overhead)
    assert overhead < 0.35
    assert statistics.median(starts["score_rollouts"]) < statistics.median(
        starts["update_lora"]
    )  # it never loads torch
