"""The training job on this machine: the compiled pipeline, run step by step, and what it made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.runtime import without_nulls
from layerloop.components.storage.campaign import RECIPE, Campaign
from layerloop.components.storage.stores import open_store
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
    iterations: int = 3  # of this run
    until: int = 0  # the iteration at which the campaign ends, in place of `iterations`; 0 for none
    workers: int = 2  # processes that share the work on a machine without GPUs; with GPUs, one on each
    step_by_step: bool = False  # every step a process of its own, instead of one for all iterations
    runtime: Mapping[str, Any] = field(default_factory=dict)  # values that are not left to their defaults


def run_job(job: Job, *, runs: Path) -> LocalRun:
    """Compile the training pipeline and run it here, in a folder of its own under `runs`.

    Raises:
        LayerloopError: bad input, or a step failed.
    """
    with to_its_end(job, runs) as job:
        return _run(job, _new_folder(runs))


@contextlib.contextmanager
def to_its_end(job: Job, runs: Path) -> Iterator[Job]:
    """The job of this block; where the run before it, of as many iterations, was killed or failed, with the target of
    that one. So the same command again does what is left, evaluation and publication too, and trains no further.

    A run without a target writes its own down in `runs`, and forgets it when the block ends well.
    """
    if job.until:
        yield job
        return
    campaign = existing_campaign(job.campaign)
    head = campaign.head() if campaign else 0
    path = runs / f"unfinished-{hashlib.sha256(absolute(job.campaign).encode()).hexdigest()[:12]}.json"
    until = _unfinished(path, job.iterations)
    if campaign and head <= until:
        print(f"the run before this one did not end: this one goes on to iteration {until}, and no further", flush=True)
        yield replace(job, until=until)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"iterations": job.iterations, "until": head + job.iterations}))
        yield job
    path.unlink(missing_ok=True)


def _unfinished(path: Path, iterations: int) -> int:
    """The target that a run of so many iterations wrote down; -1 for none."""
    try:
        found = json.loads(path.read_text())
        return int(found["until"]) if found["iterations"] == iterations else -1
    except (OSError, ValueError, TypeError, KeyError):  # none, or one that was killed while it wrote
        return -1


def _run(job: Job, folder: Path) -> LocalRun:
    resident, iterations = not job.step_by_step, iterations_of(job)
    pipeline = train_pipeline(iterations=iterations, workers=job.workers, recipe=job.recipe, resident=resident)
    package = write_pipeline(pipeline, folder / "pipeline.yaml")
    arguments = {
        "campaign": absolute(job.campaign),
        "images": absolute(job.images),
        "designs": absolute(job.designs),
        "benchmark": absolute(job.benchmark),
        "judge_url": job.judge_url,
        "publish_as": job.publish_as,
        "until": job.until,
        "runtime": without_nulls(job.runtime),
    }
    goal = f", until iteration {job.until} of the campaign" if job.until else ""
    counts = ", ".join(
        f"{n} {what}{'s' * (n != 1)}" for n, what in ((iterations, "iteration"), (job.workers, "worker"))
    )
    print(f"{package}: {counts}{goal}; logs in the same folder", flush=True)
    return run_pipeline(package, arguments, folder=folder, processes=job.workers)


def iterations_of(job: Job) -> int:
    """Iterations that the run has: its own number, or what the campaign lacks to its target, 1 at least (a run whose
    campaign is there evaluates and publishes what is missing, and trains nothing).

    Raises:
        LayerloopError: a target below 1, or a campaign that cannot be read.
    """
    if not job.until:
        return job.iterations
    if job.until < 1:
        raise LayerloopError(f"--until is {job.until}: give the iteration at which the campaign ends, 1 or more")
    campaign = existing_campaign(job.campaign)
    return max(1, job.until - (campaign.head() if campaign else 0))


def existing_campaign(uri: str) -> Campaign | None:
    """The campaign at `uri`, if there is one yet."""
    return Campaign.open(absolute(uri)) if open_store(absolute(uri)).exists(RECIPE) else None


def job_of_campaign(uri: str) -> Job:
    """A job that continues a campaign: its own recipe, and the sources that it has.

    Raises:
        LayerloopError: there is no campaign, or it has no sources yet.
    """
    campaign = existing_campaign(uri)
    if campaign is None:
        raise LayerloopError(f"{uri} is no campaign: give its folder or URI, or begin one with `layerloop run`")
    if campaign.find(campaign.sources_dir) is None:
        raise LayerloopError(
            f"campaign {campaign.uri} has no sources yet, so its images are not known: run the `layerloop run` that "
            "began it again"
        )
    return Job(campaign=uri, images="", recipe=campaign.recipe.to_json().decode())


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
    campaign = Campaign.open(absolute(job.campaign))
    head, root = campaign.head(), campaign.uri.removeprefix("file://").rstrip("/")
    evaluation = campaign.find(campaign.evaluation_dir(f"iteration-{head:06d}"))
    steps = f"{len(run.steps)} step{'s' * (len(run.steps) != 1)}"
    print(f"\ncampaign {root}: iteration {head}, {steps} in {run.seconds:.0f} s")
    if evaluation:
        print(f"report   {root}/{evaluation.file('report.html').name}")
    if name := published_at(campaign, head):
        print(f"adapter  {root}/{campaign.published_dir(name)}", flush=True)


def published_at(campaign: Campaign, iteration: int) -> str:
    """The name under which an iteration's adapter is published, the last of several; empty for none."""
    found = {name: campaign.find(campaign.published_dir(name)) for name in campaign.published()}
    return next((name for name, m in reversed(found.items()) if m is not None and m.iteration == iteration), "")
