"""`layerloop compile`: a pipeline as YAML for Kubeflow."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli_parser import WORKERS, command, counts_options, need_kfp, runtime_option, set_option

COMPILE_EXAMPLES = """\
examples:
  layerloop compile -o train.yaml --recipe paper --iterations 5 --workers 4 --cluster cluster.yaml
  layerloop compile -o nightly.yaml --pipeline evaluate --recipe my-recipe.yaml --cluster cluster.yaml

A run covers a fixed number of iterations; a campaign is a chain of runs. cluster.yaml names images by digest, GPUs,
queues and secrets: see docs/cluster.md.
"""


def add_compile_command(commands: Any) -> None:
    """Add `compile` to the command line."""
    compile_ = command(commands, "compile", _compile, "write a pipeline as YAML for Kubeflow", COMPILE_EXAMPLES)
    compile_.add_argument("-o", "--output", required=True, metavar="FILE", help="the YAML file to write")
    compile_.add_argument("--pipeline", choices=("train", "evaluate"), default="train", help="(default: %(default)s)")
    compile_.add_argument(
        "--recipe", default="paper", metavar="NAME|FILE", help="of runs that name no other (default: %(default)s)"
    )
    compile_.add_argument(
        "--evaluate",
        choices=("end", "every-run", "never"),
        default="end",
        help="evaluate and publish in the run that reaches its target or has none, in every run, or publish only "
        "(default: %(default)s)",
    )
    resident = "one pod does all iterations of a run and loads the base once (not a pod for each step; no --workers)"
    compile_.add_argument("--resident", action="store_true", help=resident)
    compile_.add_argument("--cluster", default="", metavar="FILE", help="YAML: images by digest, GPUs, queues, secrets")
    set_option(compile_)
    runtime_option(compile_)
    counts_options(compile_, workers=None)


def _compile(arguments: argparse.Namespace) -> None:
    need_kfp("layerloop compile")
    from layerloop.components.schema.recipe import parse_recipe
    from layerloop.pipelines.cluster import Cluster, read_cluster
    from layerloop.pipelines.evaluate import evaluate_pipeline
    from layerloop.pipelines.evaluation_cost import STEP, EvaluationCost, with_evaluation_deadline
    from layerloop.pipelines.inputs import recipe_and_runtime
    from layerloop.pipelines.packages import write_pipeline
    from layerloop.pipelines.train import container_tasks, train_pipeline

    if arguments.resident and arguments.workers is not None:
        raise LayerloopError(
            "--workers is given with --resident, whose one pod has none: leave it out, or set gpus in the cluster file"
        )
    workers = arguments.workers or WORKERS
    recipe, runtime = recipe_and_runtime(arguments.recipe, arguments.set, arguments.runtime)
    cluster = read_cluster(arguments.cluster) if arguments.cluster else Cluster()
    if arguments.pipeline == "train":
        counts = {
            "iterations": arguments.iterations, "workers": workers, "evaluate": arguments.evaluate,
            "resident": arguments.resident,
        }  # fmt: skip
        pipeline = train_pipeline(**counts, recipe=recipe, cluster=cluster, runtime=runtime)
        tasks = container_tasks(**counts)
    else:
        pipeline, tasks = evaluate_pipeline(recipe=recipe, cluster=cluster, runtime=runtime), 2
    path = write_pipeline(pipeline, Path(arguments.output))
    print(f"{path}: {arguments.pipeline} pipeline, {tasks} container tasks, {path.stat().st_size / 1024:.0f} KiB")
    if arguments.pipeline == "evaluate" or arguments.evaluate != "never":
        for samplers in (False, True) if arguments.pipeline == "evaluate" else (False,):
            cost = EvaluationCost.of(parse_recipe(recipe), cluster, samplers=samplers)
            hours = with_evaluation_deadline(cluster, recipe, samplers=arguments.pipeline == "evaluate").hours(STEP)
            print(
                f"evaluation: {cost} (assumed {cluster.forward_seconds:g} s a forward at 640 px); deadline {hours:g} h"
                + (", too short for it: leave samplers false, or set a longer one" if hours < cost.hours else "")
            )
    each, groups = max(1, cluster.gpus_of("generate_rollouts")), parse_recipe(recipe).rollout.groups
    idle = workers * each - groups
    if arguments.pipeline == "train" and not arguments.resident and idle > 0:
        print(
            f"rollouts: {workers} workers with processes for {each} GPU each share {groups} groups: {idle} "
            "processes have nothing to do"
        )
    if not arguments.cluster:
        print(
            "images are layerloop-policy and layerloop-light, which a cluster looks for at docker.io/library: give "
            "--cluster FILE, which names yours"
        )
