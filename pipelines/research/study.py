"""`layerloop study`: does the method learn? Arms and seeds of the complete loop on the tiny policy, resumable.

Every run is a campaign of its own under the study's folder; its steps are the pipeline's own commands, its iterations
resident stretches (components/train_stretch). A run that has its evaluation is done; one that was cut short continues
from its head. arms.py says what is run, outcomes.py reads what came out, page.py writes it down.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from layerloop.components.reference_judge.identity import FINE, NAME
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.schema.runtime import TINY
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.runtime import VARIABLE
from layerloop.pipelines.research.arms import ARMS, LAYERS, Run, Study, plan

STRETCH = 5  # iterations between two looks at the clock
TRAINING_DESIGNS, HELD_OUT_DESIGNS, SEED = 240, 144, 20260529


def run_study(study: Study, runs: Sequence[Run], *, jobs: int, hours: float) -> list[Run]:
    """Advance every run until it is done or the time is up; returns the runs that are done.

    Args:
        jobs: runs side by side, each on an equal share of the cores.
        hours: no stretch of iterations starts after this many; run again to continue.

    Raises:
        LayerloopError: a step failed; the message names the run.
    """
    deadline = time.monotonic() + 3600 * hours
    waiting: Queue[Run] = Queue()
    for run in runs:
        if not study.done(run):
            waiting.put(run)
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def work() -> None:
        while time.monotonic() < deadline:
            try:
                run = waiting.get_nowait()
            except Empty:
                return
            advance(study, run, Commands(study.folder / "logs" / f"{run.name}.log", threads), deadline)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work) for _ in range(jobs)]:
            future.result()
    return [run for run in runs if study.done(run)]


class Commands:
    """The steps' commands on a share of the cores, with one log."""

    def __init__(self, log: Path, threads: int) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._environment = {VARIABLE: json.dumps(TINY)} | os.environ | own

    def __call__(self, step: str, **arguments: Any) -> dict[str, Any]:
        """Run one step; returns its metrics.

        Raises:
            LayerloopError: the step failed.
        """
        words = list(itertools.chain.from_iterable(map(_option, arguments, arguments.values())))
        with open(self.log, "a") as log:
            began = log.tell()
            command = [sys.executable, "-m", f"layerloop.components.{step}", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment)
        if done.returncode:
            said = self.log.read_text()[began:].strip().splitlines()
            raise LayerloopError(
                f"{step} of {arguments.get('campaign')} ended with status {done.returncode}: "
                f"{said[-1].removeprefix('error: ') if said else 'it printed nothing'} (log: {self.log})"
            )
        return dict(json.loads(done.stdout.splitlines()[-1])["metrics"])


def _option(name: str, value: Any) -> list[str]:
    """An argument of a step as its command takes it; True and False are a switch."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else []
    return [option, str(value)]


def advance(study: Study, run: Run, step: Commands, deadline: float) -> None:
    """Continue one run from its head, to its evaluation or to the deadline."""
    campaign_uri = str(study.campaign(run).resolve())
    recipe = study.recipe_of(run)
    judge_url = study.judge_urls[parse_recipe(recipe).judge.model]
    step(
        "shard_dataset",
        campaign=campaign_uri,
        recipe=recipe,
        images=str(study.images.resolve()),
        designs=str(study.designs.resolve()),
    )
    campaign = Campaign.open(campaign_uri)
    goal = study.iterations
    while (head := campaign.head()) < goal:
        if time.monotonic() > deadline:
            print(f"{run.name}: stopped after iteration {head} of {goal}", flush=True)
            return
        start, ahead = time.monotonic(), min(STRETCH, goal - head)
        learned = step(
            "train_stretch", campaign=campaign_uri, iteration=head + 1, iterations=ahead, judge_url=judge_url
        )
        seconds = (time.monotonic() - start) / ahead
        print(
            f"{run.name}: iteration {head + ahead} of {goal}, reward {learned['reward_mean']:.4f}, "
            f"{seconds:.1f} s an iteration",
            flush=True,
        )
    step("evaluate_adapter", campaign=campaign_uri, iteration=goal, samplers=ARMS[run.arm].samplers)
    print(f"{run.name}: evaluated", flush=True)


def study(*, folder: Path, docs: Path, arms: Sequence[str], iterations: int, jobs: int, hours: float) -> int:
    """Make images and designs, serve the reference judge, advance all runs and write the results; 0 if every run is
    done.

    Raises:
        LayerloopError: an unknown arm, or a step failed.
    """
    from layerloop.pipelines.demo import reference_judge
    from layerloop.pipelines.research.page import write_results

    runs = plan(arms)
    folder.mkdir(parents=True, exist_ok=True)
    images, designs = make_designs(folder)
    with (
        reference_judge(folder / "judge.log") as judge_url,
        reference_judge(folder / "judge-fine.log", "--fine") as fine_url,
    ):
        this = Study(
            folder=folder, recipe=study_recipe(), iterations=iterations, images=images, designs=designs,
            judge_urls={NAME: judge_url, FINE: fine_url},
        )  # fmt: skip
        done = run_study(this, runs, jobs=jobs, hours=hours)
    page = write_results(this, done, runs, docs)
    print(f"{len(done)} of {len(runs)} runs are done; results in {page}", flush=True)
    return 0 if len(done) == len(runs) else 1


def study_recipe() -> str:
    """YAML text of the recipe that the arms change."""
    return (importlib.resources.files(__package__) / "study.yaml").read_text()


def make_designs(folder: Path) -> tuple[Path, Path]:
    """The study's images, made once: `images/*`, flat designs to train on, and `designs.parquet`, held out."""
    images, held_out = folder / "images", folder / "designs.parquet"
    if held_out.exists():  # written last
        return images, held_out
    import numpy as np
    from PIL import Image

    from layerloop.components.layers.crello import generate_design, render_design, write_designs_parquet
    from layerloop.components.layers.stack import flatten

    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    designs = [generate_design(rng, layers=LAYERS[n % len(LAYERS)]) for n in range(TRAINING_DESIGNS + HELD_OUT_DESIGNS)]
    for number, design in enumerate(designs[:TRAINING_DESIGNS]):
        Image.fromarray(flatten(render_design(design), "black")).save(images / f"design-{number:03}.png")
    temporary = held_out.with_suffix(".tmp")
    write_designs_parquet(temporary, designs[TRAINING_DESIGNS:])
    temporary.rename(held_out)
    return images, held_out
