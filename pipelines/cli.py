"""The `layerloop` command. It parses, imports what the command needs, and turns refusals into one line and a status."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from layerloop.components.runtime.environment import usable_environment
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli_campaign import add_campaign_commands
from layerloop.pipelines.cli_cluster import add_cluster_commands
from layerloop.pipelines.cli_compare import add_compare_command
from layerloop.pipelines.cli_decompose import add_decompose_command
from layerloop.pipelines.cli_parser import Parser

DESCRIPTION = """\
Fine-tune an image layer decomposition model by reinforcement learning, as a Kubeflow pipeline or on this machine.

  layerloop demo                                     everything on embedded defaults, on this machine
  layerloop run --images photos --campaign mine      the same on your own images
  layerloop continue mine                            more iterations of a campaign
  layerloop plan paper                               what a recipe costs: hours, GPUs, memory, judge
  layerloop compile -o pipeline.yaml                 the pipeline for a Kubeflow cluster
  layerloop submit pipeline.yaml --wait              a run of it there
  layerloop campaign show mine                       how far a campaign is, and its rewards
  layerloop campaign verify mine                     whether all of it is what was committed
  layerloop decompose photo.jpg -o layers            pictures into layered files
  layerloop judge check http://127.0.0.1:8000/v1     whether an endpoint is fit to be the judge
"""

RUN_EXAMPLES = """\
examples:
  layerloop run --images photos/ --campaign campaigns/mine --judge-url http://127.0.0.1:8000/v1
  OPENAI_API_KEY=... layerloop run --images 's3://bucket/photos/*' --campaign s3://bucket/mine \\
      --recipe my-recipe.yaml --judge-url https://api.example.com/v1 --iterations 10

Run it again to continue from the campaign's head; `layerloop continue CAMPAIGN` is the same without --images, --recipe
and --set. --iterations counts those of one run, and after a run that was killed the same command does what it left;
--until is where the campaign ends. Nothing that is done is done twice.
"""

COMPILE_EXAMPLES = """\
examples:
  layerloop compile -o train.yaml --recipe paper --iterations 5 --workers 4 --cluster cluster.yaml
  layerloop compile -o nightly.yaml --pipeline evaluate --recipe my-recipe.yaml --cluster cluster.yaml

A run covers a fixed number of iterations; a campaign is a chain of runs. cluster.yaml names images by digest, GPUs,
queues and secrets: see docs/cluster.md.
"""


DEMO_ITERATIONS = 12  # what unlearns the demo's faults in minutes on two cores


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 a failure, 2 bad input (one `error: ...` line), 130 interrupted."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # of nohup; else steps would outlive their terminal
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        with usable_environment():
            status = int(arguments.handler(arguments) or 0)
        sys.stdout.flush()
        return status
    except LayerloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(getattr(error, "status", 2))
    except BrokenPipeError:  # `layerloop ... | head`: nobody reads on, which is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted: what was done is kept, run the same command to continue", file=sys.stderr)
        return 130


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------------- commands


def _demo(arguments: argparse.Namespace) -> None:
    _need_kfp("layerloop demo")
    from layerloop.pipelines.demo import run_demo

    folder = Path(arguments.folder)
    if any(arguments.images) and not arguments.campaign:
        raise LayerloopError("--campaign is not given: other images need another campaign than the demo's, name it")
    job = _job(arguments, campaign=arguments.campaign or str(folder / "campaign"))
    run_demo(job, folder=folder, fresh=arguments.fresh)


def _run(arguments: argparse.Namespace) -> None:
    _need_kfp("layerloop run")
    _run_with_judge(_job(arguments, campaign=arguments.campaign), arguments)


def _continue(arguments: argparse.Namespace) -> None:
    _need_kfp("layerloop continue")
    from dataclasses import replace

    from layerloop.components.storage.runtime import runtime_values
    from layerloop.pipelines.job import job_of_campaign

    job = replace(job_of_campaign(arguments.campaign), **_how(arguments), runtime=runtime_values(arguments.runtime))
    _run_with_judge(job, arguments)


def _run_with_judge(job: Any, arguments: argparse.Namespace) -> None:
    from layerloop.components.schema.recipe import parse_recipe
    from layerloop.components.storage.runtime import read_runtime
    from layerloop.pipelines.inputs import check_judge, what_is_trained
    from layerloop.pipelines.job import run_job, say_what_was_made

    judge_url = arguments.judge_url or os.environ.get("OPENAI_BASE_URL", "")
    if not judge_url:
        raise LayerloopError("--judge-url is empty: give an OpenAI-compatible base URL, or run `layerloop judge serve`")
    recipe = parse_recipe(job.recipe)
    judge = recipe.judge
    check_judge(judge_url, judge, read_runtime(job.runtime, recipe).judge)
    print(f"{what_is_trained(recipe)}\njudge {judge.model} at {without_secrets(judge_url)}", flush=True)
    say_what_was_made(run_job(job, runs=Path(arguments.runs)), job)


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
    if arguments.until is not None and arguments.until < 1:
        raise LayerloopError(
            f"--until is {arguments.until}: give the iteration at which the campaign is to be, 1 or more"
        )
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


def _compile(arguments: argparse.Namespace) -> None:
    _need_kfp("layerloop compile")
    from layerloop.components.schema.recipe import parse_recipe
    from layerloop.pipelines.cluster import Cluster, read_cluster
    from layerloop.pipelines.evaluate import evaluate_pipeline
    from layerloop.pipelines.evaluation_cost import STEP, EvaluationCost, with_evaluation_deadline
    from layerloop.pipelines.inputs import recipe_and_runtime
    from layerloop.pipelines.packages import write_pipeline
    from layerloop.pipelines.train import container_tasks, train_pipeline

    recipe, runtime = recipe_and_runtime(arguments.recipe, arguments.set, arguments.runtime)
    cluster = read_cluster(arguments.cluster) if arguments.cluster else Cluster()
    if arguments.pipeline == "train":
        counts = {
            "iterations": arguments.iterations, "workers": arguments.workers, "evaluate": arguments.evaluate,
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
    idle = arguments.workers * each - groups
    if arguments.pipeline == "train" and not arguments.resident and idle > 0:
        print(
            f"rollouts: {arguments.workers} workers with processes for {each} GPU each share {groups} groups: {idle} "
            "processes have nothing to do"
        )
    if not arguments.cluster:
        print(
            "images are layerloop-policy and layerloop-light, which a cluster looks for at docker.io/library: give "
            "--cluster FILE, which names yours"
        )


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.cluster:
        _need_kfp("layerloop plan --cluster")
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


def _need_kfp(command: str) -> None:
    """Refuse in one line where kfp is not installed, in an image of the steps for instance.

    Raises:
        LayerloopError: it is not.
    """
    import importlib.util

    for module in ("kfp", "kfp.kubernetes"):
        if importlib.util.find_spec("kfp") is None or importlib.util.find_spec(module) is None:
            raise LayerloopError(f"{command} needs {module}, which is not here: pip install 'layerloop[pipelines]'")


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
    for name, text in {} if arguments.recipe else packaged_recipes().items():
        print(f"{name:8} {text.splitlines()[0].lstrip('# ')}")


def _runtime(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.inputs import runtime_text

    print(runtime_text(), end="")


def _judge_serve(arguments: argparse.Namespace) -> None:
    from layerloop.components.reference_judge.identity import FINE, NAME
    from layerloop.components.reference_judge.server import serve

    serve(arguments.host, arguments.port, model=FINE if arguments.fine else NAME)


def _judge_check(arguments: argparse.Namespace) -> int:
    from layerloop.components.judge.check import check

    report = check(arguments.url, model=arguments.model)
    print("\n".join(report.lines()))
    return 1 if report.verdict == "unfit" else 0


def _adapter_merge(arguments: argparse.Namespace) -> int:
    import subprocess

    # Torch's work, so a process of its own: nothing under pipelines/ imports torch.
    adapters = [_fetched(text) for text in arguments.adapters]
    command = [sys.executable, "-m", "layerloop.components.policy.merge", arguments.out, *adapters]
    rank = [] if arguments.rank is None else ["--rank", str(arguments.rank)]
    return subprocess.run([*command, *rank], check=False).returncode


def _fetched(adapter: str) -> str:
    """`URI=WEIGHT` with a local copy in the URI's place; anything else as it is, for the merge to judge."""
    from layerloop.components.storage.folders import local_folder

    uri, mark, weight = adapter.rpartition("=")
    if not mark:
        uri, weight = adapter, "1"
    try:
        float(weight)
    except ValueError:
        return adapter
    if "://" not in uri:
        return adapter
    folder = local_folder(uri)
    print(f"{uri} is in {folder}", flush=True)
    return f"{folder}={weight}"


def _publish(arguments: argparse.Namespace) -> int:
    import subprocess

    # Torch's work, so a process of its own: nothing under pipelines/ imports torch.
    command = [sys.executable, "-m", "layerloop.components.publish_adapter.hub", arguments.campaign]
    command += ["--publish-as", arguments.publish_as] if arguments.publish_as else []
    command += [] if arguments.iteration is None else ["--iteration", str(arguments.iteration)]
    command += ["--hub", arguments.hub] if arguments.hub else []
    return subprocess.run(command + ["--private"] * arguments.private, check=False).returncode


def _study(arguments: argparse.Namespace) -> int:
    import importlib.util

    if importlib.util.find_spec("layerloop.pipelines.research") is None:
        raise LayerloopError(
            "`layerloop study` is not installed here: run it in a checkout of layerloop, as `make study`"
        )
    from layerloop.pipelines.research.arms import ARMS
    from layerloop.pipelines.research.study import study

    return study(
        folder=Path(arguments.folder),
        docs=Path(arguments.docs),
        arms=arguments.arms.split(",") if arguments.arms else list(ARMS),
        iterations=arguments.iterations,
        jobs=arguments.jobs,
        hours=arguments.hours,
    )


# --------------------------------------------------------------------------------------------------------------- parser


def build_parser() -> argparse.ArgumentParser:
    """The command line; also what the README's commands are tested against."""
    parser = Parser(prog="layerloop", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and those of what it builds on")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = _command(commands, "demo", _demo, "run everything on this machine with embedded defaults, and make a report")
    demo.add_argument("--fresh", action="store_true", help="remove the demo's campaign and start again")
    demo.add_argument("--folder", default="demo", metavar="DIR", help="where everything goes (default: %(default)s)")
    demo.add_argument("--campaign", default="", metavar="DIR", help="the campaign (default: DIR/campaign of --folder)")
    demo.add_argument("--images", default=[""], nargs="+", metavar="URI", help="your own images in place of the demo's")
    _job_options(demo, recipe="demo")
    demo.set_defaults(iterations=DEMO_ITERATIONS)

    run = _command(commands, "run", _run, "run the training pipeline on this machine on your own images", RUN_EXAMPLES)
    run.add_argument(
        "--campaign", required=True, metavar="URI", help="folder or s3://bucket/prefix that holds the state"
    )
    run.add_argument(
        "--images", required=True, nargs="+", metavar="URI", help="folder, quoted glob, WebDataset or parquet of images"
    )
    run.add_argument("--runs", default="layerloop-runs", metavar="DIR", help="logs of this run (default: %(default)s)")
    _job_options(run, recipe="tiny")

    continue_ = _command(
        commands, "continue", _continue, "continue a campaign on this machine, with its own recipe and images"
    )
    continue_.add_argument("campaign", metavar="URI", help="folder or s3://bucket/prefix of the campaign")
    continue_.add_argument(
        "--runs", default="layerloop-runs", metavar="DIR", help="logs of this run (default: %(default)s)"
    )
    _how_options(continue_)

    compile_ = _command(commands, "compile", _compile, "write a pipeline as YAML for Kubeflow", COMPILE_EXAMPLES)
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
    _set_option(compile_)
    _runtime_option(compile_)
    _counts(compile_)

    recipe = _command(commands, "recipe", _recipe, "list the packaged recipes, or print one to begin your own with")
    recipe.add_argument("recipe", nargs="?", metavar="NAME|FILE", help="which to print")
    _set_option(recipe)
    _command(commands, "runtime", _runtime, "print the runtime's defaults: where and how fast, free at every run")

    plan = _command(commands, "plan", _plan, "what a recipe costs: hours, GPUs' busy share, memory, storage, judge")
    plan.add_argument("recipe", metavar="NAME|FILE", help="a packaged recipe or a YAML file")
    plan.add_argument("--cluster", default="", metavar="FILE", help="its GPUs (default: 1, 8 and 4 x 8)")
    plan.add_argument("--workers", type=int, default=1, metavar="N", help="rollout pods (default: %(default)s)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    _set_option(plan, "; or an assumption, as plan.tflops=600")
    _runtime_option(plan)

    judge = commands.add_parser("judge", help="the reference judge, and a check of any judge").add_subparsers(
        required=True
    )
    serve = _command(judge, "serve", _judge_serve, "serve the reference judge, rules that stand in for a VLM")
    serve.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    serve.add_argument("--port", type=int, default=8788, metavar="N", help="0 takes a free one (default: %(default)s)")
    fine = "its full-range variant: all of 0..5 about a single candidate, model layerloop-reference-judge-fine"
    serve.add_argument("--fine", action="store_true", help=fine)
    check = _command(
        judge, "check", _judge_check, "send known good and bad decompositions to a judge, and say if it is fit"
    )
    check.add_argument("--model", default="", help="model to ask for (default: the only one that it serves)")
    check.add_argument("url", metavar="URL", help="base URL; key: OPENAI_API_KEY")

    campaign = commands.add_parser(
        "campaign", help="look into campaigns, compare, verify, thin out, copy, delete"
    ).add_subparsers(required=True)
    adapter = commands.add_parser("adapter", help="work with trained adapters").add_subparsers(required=True)
    merge = _command(adapter, "merge", _adapter_merge, "write the weighted sum of adapters as one, in both layouts")
    merge.add_argument("out", metavar="OUT", help="folder to make, with peft/ and diffusers/ in it")
    merge.add_argument(
        "adapters", nargs="+", metavar="ADAPTER=WEIGHT", help="folder, file or URI, either layout; weight 1 if none"
    )
    merge.add_argument("--rank", type=int, default=None, metavar="N", help="cut the sum to this rank (default: exact)")

    add_decompose_command(commands, _command)
    publish = _command(commands, "publish", _publish, "publish a campaign's adapter, also to the Hugging Face hub")
    publish.add_argument("campaign", metavar="URI", help="folder or s3://bucket/prefix of the campaign")
    publish.add_argument(
        "--publish-as", default="", metavar="NAME", help="folder under published/ (default: campaign and iteration)"
    )
    publish.add_argument("--iteration", type=int, default=None, metavar="N", help="whose adapter (default: the head)")
    publish.add_argument(
        "--hub", default="", metavar="OWNER/NAME", help="upload it there; HF_TOKEN has the token (default: no upload)"
    )
    publish.add_argument("--private", action="store_true", help="a repository that is made is private")

    study = _command(commands, "study", _study, "does it learn? arms and seeds on the tiny policy, resumable")
    study.add_argument("--folder", default="build/study", metavar="DIR", help="campaigns (default: %(default)s)")
    study.add_argument("--docs", default="docs", metavar="DIR", help="where results go (default: %(default)s)")
    study.add_argument("--arms", default="", metavar="A,B", help="only these arms (default: all)")
    study.add_argument("--iterations", type=int, default=25, metavar="N", help="of each run (default: %(default)s)")
    study.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side (default: %(default)s)")
    study.add_argument("--hours", type=float, default=4.0, metavar="X", help="stop after these (default: %(default)s)")

    add_campaign_commands(campaign, _command)
    add_compare_command(commands, _command)
    add_cluster_commands(commands, campaign, _command)
    return parser


class _Version(argparse.Action):
    """Print what a report of a fault needs: layerloop's version, Python's, and those of the packages it builds on."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata
        import platform

        print(f"layerloop {importlib.metadata.version('layerloop')}")
        found = [f"Python {platform.python_version()}"]
        for name in ("torch", "diffusers", "peft", "transformers", "kfp", "openai", "boto3"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{name} {importlib.metadata.version(name)}")
        print(f"{', '.join(found)}; {platform.platform()}")
        parser.exit()


def _command(commands: Any, name: str, handler: Any, summary: str, examples: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def _job_options(parser: argparse.ArgumentParser, *, recipe: str) -> None:
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
        "--recipe", default=recipe, metavar="NAME|FILE", help="a packaged recipe or a YAML file (default: %(default)s)"
    )
    _set_option(parser)
    _how_options(parser)


def _how_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge-url", default="", metavar="URL", help="OpenAI-compatible base URL; key: OPENAI_API_KEY"
    )
    _runtime_option(parser)
    _counts(parser)
    until = (
        "run until the campaign is at this iteration, in place of --iterations: the same command again goes on to it"
    )
    parser.add_argument("--until", type=int, default=None, metavar="N", help=until)
    every = "run every step of every iteration as a process of its own, as the pipeline on a cluster does by default"
    parser.add_argument("--step-by-step", action="store_true", help=every)


def _set_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    help_ = f"change a value of the recipe or the runtime, such as judge.model=Qwen/Qwen3.5-9B{more} (may be repeated)"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_)


def _runtime_option(parser: argparse.ArgumentParser) -> None:
    help_ = "YAML: where and how fast, as `layerloop runtime` prints it (default: LAYERLOOP_RUNTIME, then its defaults)"
    parser.add_argument("--runtime", default="", metavar="FILE", help=help_)


def _counts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--iterations", type=int, default=3, metavar="N", help="iterations of one run (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="processes, or pods, that share an iteration's rollouts (default: %(default)s)",
    )


if __name__ == "__main__":
    raise SystemExit(main())
