"""`layerloop demo`, `run` and `continue`: the pipeline on this machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli_parser import at_least_one, command, counts_options, need_kfp, runtime_option, set_option

RUN_EXAMPLES = """\
examples:
  layerloop run --images photos/ --campaign campaigns/mine --judge-url http://127.0.0.1:8000/v1
  OPENAI_API_KEY=... layerloop run --images 's3://bucket/photos/*' --campaign s3://bucket/mine \\
      --recipe my-recipe.yaml --judge-url https://api.example.com/v1 --iterations 10

Run it again to continue from the campaign's head; `layerloop continue CAMPAIGN` is the same without --images, --recipe
and --set. --iterations counts those of one run, and after a run that was killed the same command does what it left;
--until is where the campaign ends. Nothing that is done is done twice.
"""

DEMO_ITERATIONS = 12  # what unlearns the demo's faults in minutes on two cores


def add_run_commands(commands: Any) -> None:
    """Add them to the command line."""
    demo = command(commands, "demo", _demo, "run everything on this machine with embedded defaults, and make a report")
    demo.add_argument("--fresh", action="store_true", help="remove the demo's campaign and start again")
    demo.add_argument("--folder", default="demo", metavar="DIR", help="where everything goes (default: %(default)s)")
    demo.add_argument("--campaign", default="", metavar="DIR", help="the campaign (default: DIR/campaign of --folder)")
    demo.add_argument("--images", default=[""], nargs="+", metavar="URI", help="your own images in place of the demo's")
    _job_options(demo, recipe="demo", judge="the reference judge, served for the run")
    demo.set_defaults(iterations=DEMO_ITERATIONS)

    run = command(commands, "run", _run, "run the training pipeline on this machine on your own images", RUN_EXAMPLES)
    run.add_argument(
        "--campaign", required=True, metavar="URI", help="folder or s3://bucket/prefix that holds the state"
    )
    run.add_argument(
        "--images",
        required=True,
        nargs="+",
        metavar="URI",
        help="folder, quoted glob, WebDataset, parquet or list (.txt) of images; local, s3:// or hf://datasets/",
    )
    run.add_argument(
        "--runs",
        default="layerloop-runs",
        metavar="DIR",
        help="logs go into a folder of the run in it (default: %(default)s)",
    )
    _job_options(run, recipe="tiny")

    continue_ = command(
        commands, "continue", _continue, "continue a campaign on this machine, with its own recipe and images"
    )
    continue_.add_argument("campaign", metavar="URI", help="folder or s3://bucket/prefix of the campaign")
    continue_.add_argument(
        "--runs",
        default="layerloop-runs",
        metavar="DIR",
        help="logs go into a folder of the run in it (default: %(default)s)",
    )
    _how_options(continue_)


def _job_options(parser: argparse.ArgumentParser, *, recipe: str, judge: str = "OPENAI_BASE_URL") -> None:
    parser.add_argument(
        "--designs",
        default="",
        metavar="URI",
        help="held-out designs with known layers: Crello's parquet, or a folder with a folder of PNG layers for each",
    )
    parser.add_argument(
        "--benchmark", default="", metavar="URI", help="pictures to evaluate on (default: some held out of the images)"
    )
    parser.add_argument(
        "--recipe",
        default=recipe,
        metavar="NAME|FILE",
        help="a packaged recipe (`layerloop recipe` lists them) or a YAML file (default: %(default)s, a toy)",
    )
    set_option(parser)
    _how_options(parser, judge=judge)


def _how_options(parser: argparse.ArgumentParser, *, judge: str = "OPENAI_BASE_URL") -> None:
    parser.add_argument(
        "--judge-url",
        default="",
        metavar="URL",
        help=f"OpenAI-compatible base URL; its key is taken from OPENAI_API_KEY (default: {judge})",
    )
    runtime_option(parser)
    counts_options(parser)
    until = (
        "run until the campaign is at this iteration, in place of --iterations: the same command again goes on to it"
    )
    parser.add_argument("--until", type=at_least_one, default=None, metavar="N", help=until)
    every = "run every step of every iteration as a process of its own, as the pipeline on a cluster does by default"
    parser.add_argument("--step-by-step", action="store_true", help=every)


def _demo(arguments: argparse.Namespace) -> None:
    need_kfp("layerloop demo")
    from layerloop.pipelines.demo import run_demo

    folder = Path(arguments.folder)
    if any(arguments.images) and not arguments.campaign:
        raise LayerloopError("--campaign is not given: other images need another campaign than the demo's, name it")
    job = _job(arguments, campaign=arguments.campaign or str(folder / "campaign"))
    run_demo(job, folder=folder, fresh=arguments.fresh)


def _run(arguments: argparse.Namespace) -> None:
    need_kfp("layerloop run")
    _run_with_judge(_job(arguments, campaign=arguments.campaign), arguments)


def _continue(arguments: argparse.Namespace) -> None:
    need_kfp("layerloop continue")
    from dataclasses import replace

    from layerloop.components.storage.runtime import runtime_values
    from layerloop.pipelines.job import job_of_campaign

    job = replace(job_of_campaign(arguments.campaign), **_how(arguments), runtime=runtime_values(arguments.runtime))
    _run_with_judge(job, arguments)


def _run_with_judge(job: Any, arguments: argparse.Namespace) -> None:
    from layerloop.components.schema.recipe import parse_recipe
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.runtime import read_runtime
    from layerloop.pipelines.inputs import absolute, check_judge, what_is_trained
    from layerloop.pipelines.job import run_job, say_what_was_made
    from layerloop.pipelines.outcome import outcome_lines

    judge_url = arguments.judge_url or os.environ.get("OPENAI_BASE_URL", "")
    if not judge_url:
        raise LayerloopError("--judge-url is empty: give an OpenAI-compatible base URL, or run `layerloop judge serve`")
    recipe = parse_recipe(job.recipe)
    judge = recipe.judge
    check_judge(judge_url, judge, read_runtime(job.runtime, recipe).judge)
    print(f"{what_is_trained(recipe)}\njudge {judge.model} at {without_secrets(judge_url)}", flush=True)
    say_what_was_made(run_job(job, runs=Path(arguments.runs)), job)
    print("\n".join(outcome_lines(Campaign.open(absolute(job.campaign)), shown=job.campaign)), flush=True)


def _job(arguments: argparse.Namespace, *, campaign: str) -> Any:
    from layerloop.pipelines.inputs import recipe_and_runtime
    from layerloop.pipelines.job import Job

    recipe, runtime = recipe_and_runtime(arguments.recipe, arguments.set, arguments.runtime)
    return Job(
        campaign=campaign,
        images=_one_uri(arguments.images),
        designs=arguments.designs,
        benchmark=arguments.benchmark,
        recipe=recipe,
        runtime=runtime,
        **_how(arguments),
    )


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    """The job's part that every local command has."""
    return {
        "judge_url": arguments.judge_url,
        "iterations": arguments.iterations,
        "until": arguments.until or 0,
        "workers": arguments.workers,
        "step_by_step": arguments.step_by_step,
    }


def _one_uri(images: Sequence[str]) -> str:
    """The one value of --images.

    Raises:
        LayerloopError: several, as a shell makes of a pattern.
    """
    if len(images) > 1:
        raise LayerloopError(
            f"--images got {len(images)} values, {images[0]} {images[1]} and so on, as a shell makes of a pattern: "
            "quote it, as in --images 'photos/*.jpg', or name the folder"
        )
    return images[0]
