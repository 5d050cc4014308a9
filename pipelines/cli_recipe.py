"""`layerloop recipe`, `runtime` and `plan`: what to run, how, and what it costs."""

from __future__ import annotations

import argparse
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli_parser import command, need_kfp, runtime_option, set_option


def add_recipe_commands(commands: Any) -> None:
    """Add them to the command line."""
    recipe = command(commands, "recipe", _recipe, "list the packaged recipes, or print one to begin your own with")
    recipe.add_argument("recipe", nargs="?", metavar="NAME|FILE", help="which to print")
    set_option(recipe)
    command(commands, "runtime", _runtime, "print the runtime's defaults: where and how fast, free at every run")

    plan = command(commands, "plan", _plan, "what a recipe costs: hours, GPUs' busy share, memory, storage, judge")
    plan.add_argument("recipe", metavar="NAME|FILE", help="a packaged recipe or a YAML file")
    plan.add_argument("--cluster", default="", metavar="FILE", help="its GPUs (default: 1, 8 and 4 x 8)")
    plan.add_argument(
        "--workers", type=int, default=1, metavar="N", help="rollout pods, with --cluster (default: %(default)s)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    set_option(plan, "; or an assumption, as plan.tflops=600")
    runtime_option(plan)


def _recipe(arguments: argparse.Namespace) -> None:
    from layerloop.components.schema.runtime import flat
    from layerloop.pipelines.inputs import packaged_recipes, recipe_and_runtime

    if arguments.recipe:
        text, runtime = recipe_and_runtime(arguments.recipe, arguments.set)
        if arguments.set and runtime:
            raise LayerloopError(
                f"{', '.join(flat(runtime))} is not of the recipe but of the runtime: set it for a run"
            )
        print(text, end="")
    elif arguments.set:
        raise LayerloopError(f"--set needs a recipe that it changes: name one of {', '.join(packaged_recipes())}")
    packaged = {} if arguments.recipe else packaged_recipes()
    width = max(map(len, packaged), default=0)
    for name, text in packaged.items():
        print(f"{name:{width}}  {text.splitlines()[0].lstrip('# ')}")


def _runtime(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.inputs import runtime_text

    print(runtime_text(), end="")


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.cluster:
        need_kfp("layerloop plan --cluster")
    from layerloop.components.schema.recipe import parse_recipe
    from layerloop.components.storage.runtime import read_runtime
    from layerloop.pipelines.inputs import plan_assumptions, recipe_and_runtime
    from layerloop.pipelines.plan_text import Plan, plan_json, plan_text

    assumed, changes = plan_assumptions(arguments.set)
    text, runtime = recipe_and_runtime(arguments.recipe, changes, arguments.runtime)
    recipe, cluster = parse_recipe(text), None
    if arguments.cluster:
        from layerloop.pipelines.cluster import read_cluster

        cluster = read_cluster(arguments.cluster)
    plan = Plan.of(recipe, read_runtime(runtime, recipe), assumed, cluster=cluster, workers=arguments.workers)
    print(plan_json(plan) if arguments.json else plan_text(plan))
