"""The training job on this machine: the compiled pipeline, run step by step, and what it made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerloop.components.schema.manifest import Manifest
from layerloop.pipelines.inputs import absolute
from layerloop.pipelines.local import LocalRun, run_pipeline
from layerloop.pipelines.packages import write_pipeline
from layerloop.pipelines.train import train_pipeline


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the training pipeline is run with; paths may be relative to the working directory."""

    campaign: str
    images: str
    recipe: str  # YAML text
    designs: str = ""
    benchmark: str = ""
    judge_url: str = ""
    publish_as: str = ""
    iterations: int = 3
    workers: int = 2  # processes that share the work on a machine without GPUs; with GPUs, one on each
    step_by_step: bool = False  # every step a process of its own, instead of one for all iterations
    runtime: Mapping[str, Any] = field(default_factory=dict)  # values that are not left to their defaults


def run_job(job: Job, *, runs: Path) -> LocalRun:
    """Compile the training pipeline and run it here, in a folder of its own under `runs`.

    Raises:
        LayerloopError: bad input, or a step failed.
    """
    folder = _new_folder(runs)
    resident = not job.step_by_step
    pipeline = train_pipeline(iterations=job.iterations, workers=job.workers, recipe=job.recipe, resident=resident)
    package = write_pipeline(pipeline, folder / "pipeline.yaml")
    arguments = {
        "campaign": absolute(job.campaign),
        "images": absolute(job.images),
        "designs": absolute(job.designs),
        "benchmark": absolute(job.benchmark),
        "judge_url": job.judge_url,
        "publish_as": job.publish_as,
        "runtime": dict(job.runtime),
    }
    print(f"{package}: {job.iterations} iterations, {job.workers} workers; logs in the same folder", flush=True)
    return run_pipeline(package, arguments, folder=folder, processes=job.workers)


def _new_folder(runs: Path) -> Path:
    """A folder of the run's own, also where another run begins in the same second."""
    stem, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = runs / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def say_what_was_made(run: LocalRun, job: Job) -> None:
    """End a run by naming its report and its adapter: paths, or URIs where the campaign is not a folder."""
    evaluation = Manifest.from_json(run.last("evaluate_adapter").output("evaluation"), where="evaluation manifest")
    published = Manifest.from_json(run.last("publish_adapter").output("adapter"), where="adapter manifest")
    root = absolute(job.campaign).removeprefix("file://").rstrip("/")
    print()
    print(f"campaign {root}: iteration {published.iteration}, {len(run.steps)} steps in {run.seconds:.0f} s")
    print(f"report   {root}/{evaluation.file('report.html').name}")
    print(f"adapter  {root}/published/{published.metadata['name']}", flush=True)
