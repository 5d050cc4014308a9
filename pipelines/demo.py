"""`layerloop demo`: the job on embedded defaults, from images to a report, with nothing to set up.

Images: photographs that ship inside scikit-image and scikit-learn, and designs drawn by components/layers/designs.py,
whose layers are known. Policy: the tiny one of the package. Judge: the reference judge of the package, over HTTP.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.runtime import read_runtime
from layerloop.pipelines.inputs import absolute, check_judge, what_is_trained
from layerloop.pipelines.job import Job, run_job, say_what_was_made
from layerloop.pipelines.outcome import outcome_lines

PHOTOGRAPHS = {
    "skimage.data": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
TRAINING_DESIGNS, HELD_OUT_DESIGNS, LAYERS = 96, 48, 2
SEED = 20260528
LISTENING = re.compile(r"^listening on (http\S+)$", re.MULTILINE)  # the judge's first line


def run_demo(job: Job, *, folder: Path, fresh: bool) -> None:
    """Run the training pipeline on the demo's own images and judge, or on those that `job` names.

    Args:
        job: What to run; empty `images` and `judge_url` mean the demo's own.
        folder: Where images, campaign and logs go. An existing campaign is continued from its head.
        fresh: Remove the demo's campaign first.

    Raises:
        LayerloopError: bad input, or a step failed.
    """
    from layerloop.components.reference_judge.identity import SCORE_RANGE

    campaign = Path(job.campaign)
    if fresh and campaign.exists():
        if not (campaign / "recipe.json").exists() and any(campaign.iterdir()):
            raise LayerloopError(f"{campaign} holds something that is no campaign: remove it yourself, or name another")
        shutil.rmtree(campaign)
    if not job.images:
        images, designs = make_pictures(folder)
        job = replace(job, images=str(images), designs=str(designs))
    log = folder / "judge.log"
    with contextlib.nullcontext(job.judge_url) if job.judge_url else reference_judge(log) as judge_url:
        recipe = parse_recipe(job.recipe)
        judge = recipe.judge
        check_judge(judge_url, judge, read_runtime(job.runtime, recipe).judge)
        print(f"{what_is_trained(recipe)}\njudge {judge.model} at {without_secrets(judge_url)}", flush=True)
        run = run_job(replace(job, judge_url=judge_url), runs=folder / "runs")
    say_what_was_made(run, job)
    if judge.model in SCORE_RANGE:
        print(f"The judge was {judge.model}: rules over pixels that stand in for a vision-language model.")
    print("Again: the same command continues this campaign from its head; --fresh (`make demo FRESH=1`) starts again.")
    print("\n".join(outcome_lines(Campaign.open(absolute(job.campaign)), shown=job.campaign)))


def make_pictures(folder: Path) -> tuple[Path, Path]:
    """The demo's images, made once: `images/*` to train on, and `designs.parquet` held out, with its layers."""
    images, held_out = folder / "images", folder / "designs.parquet"
    if held_out.exists():  # written last
        return images, held_out
    import numpy as np
    from PIL import Image

    from layerloop.components.layers.crello import generate_design, render_design, write_designs_parquet
    from layerloop.components.layers.stack import flatten

    images.mkdir(parents=True, exist_ok=True)
    for package, names in PHOTOGRAPHS.items():
        for name in names:
            (images / name).write_bytes((importlib.resources.files(package) / name).read_bytes())
    rng = np.random.default_rng(SEED)
    designs = [generate_design(rng, layers=LAYERS) for _ in range(TRAINING_DESIGNS + HELD_OUT_DESIGNS)]
    for number, design in enumerate(designs[:TRAINING_DESIGNS]):
        Image.fromarray(flatten(render_design(design), "black")).save(images / f"design-{number:02}.png")
    temporary = held_out.with_suffix(".tmp")
    write_designs_parquet(temporary, designs[TRAINING_DESIGNS:])
    temporary.rename(held_out)
    photographs = sum(map(len, PHOTOGRAPHS.values()))
    print(f"made {photographs} photographs and {TRAINING_DESIGNS} designs to train on in {images}")
    print(f"made {HELD_OUT_DESIGNS} designs with known layers, held out, in {held_out}", flush=True)
    return images, held_out


@contextlib.contextmanager
def reference_judge(log: Path, *options: str) -> Iterator[str]:
    """The package's own judge in a process of its own on a free loopback port: its base URL.

    Args:
        options: more of `layerloop judge serve`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "layerloop.pipelines.cli", "judge", "serve", "--port", "0", *options]
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + 60
            while not (listening := LISTENING.search(log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise LayerloopError(f"the reference judge did not start: see {log}")
                time.sleep(0.05)
            yield listening[1]
        finally:
            process.terminate()
