"""The training DAG: shard -> [rollouts x workers -> score -> update] x iterations -> evaluate -> publish.

Or, resident: shard -> stretch -> evaluate -> publish, where one pod does all iterations of the run and loads the base
once. Both leave the same campaign; step by step every part can be seen and run anywhere, resident the GPUs are busy.

KFP has no loop over time, so the number of iterations is fixed when the DAG is compiled. A campaign of hundreds of
iterations is a chain of such runs: each finds the campaign's head when it starts (`shard_dataset`) and continues there.
Where the head has reached the run's target, everything after the first step is skipped; where fewer iterations are left
than were compiled, the others pass their policy through (`beyond` in runtime/contract.py), so that a campaign ends
exactly at its target.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl import Dataset, Input, Model

from layerloop.components.evaluate_adapter.component import evaluate_adapter
from layerloop.components.generate_rollouts.component import generate_rollouts
from layerloop.components.publish_adapter.component import publish_adapter
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.runtime import without_nulls
from layerloop.components.schema.steps import STEPS
from layerloop.components.score_rollouts.component import score_rollouts
from layerloop.components.shard_dataset.component import shard_dataset
from layerloop.components.train_stretch.component import train_stretch
from layerloop.components.update_lora.component import update_lora
from layerloop.pipelines.cluster import Cluster
from layerloop.pipelines.evaluation_cost import with_evaluation_deadline

# A workflow is one etcd object (1.5 MiB) and a v2 task costs about 35 KiB of it (kubeflow/pipelines#13738): with more
# tasks than this, a failed run cannot be retried from the UI any more.
MAX_TASKS = 40


class Updated(NamedTuple):
    """What one iteration hands to the next."""

    policy: Model


EVALUATE = ("end", "every-run", "never")
Apply = Callable[[str, dsl.PipelineTask], dsl.PipelineTask]  # gives a task of a step its image, resources and so on


def container_tasks(iterations: int, workers: int, evaluate: str = "end", resident: bool = False) -> int:
    """Pods that do work in one run: shard, per iteration the workers, score and update, then evaluate and publish. The
    iterations of a resident run are one pod."""
    return 1 + (1 if resident else iterations * (workers + 2)) + (1 if evaluate == "never" else 2)


def train_pipeline(  # type: ignore[no-untyped-def]
    *,
    iterations: int,
    workers: int,
    recipe: str,
    cluster: Cluster | None = None,
    evaluate: str = "end",
    runtime: Mapping[str, Any] | None = None,
    resident: bool = False,
):
    """The training pipeline for a fixed number of iterations and rollout workers.

    Args:
        iterations: Iterations of one run.
        workers: Pods that share an iteration's groups.
        recipe: YAML text, compiled in: the recipe of runs that name no other.
        cluster: Where steps run. None: on this machine, whose runs are no workflow object and of any length.
        evaluate: When a run evaluates and then publishes. `end`: where it reaches its target `until`, or has none;
            `every-run`: always; `never`: no run evaluates, and each publishes.
        runtime: Default of the pipeline's `runtime` parameter; empty when None.
        resident: One pod does all iterations, with a rank on each of its GPUs; `workers` says nothing then.

    Returns:
        A KFP pipeline (`kfp.dsl.graph_component.GraphComponent`), to be compiled or run.

    Raises:
        LayerloopError: no iteration, no worker, more tasks than one workflow object carries, or an evaluation that its
            deadline does not hold.
    """
    tasks = _check_size(iterations, workers, evaluate, resident)
    if cluster is not None:
        _check_workflow(tasks, iterations, workers)
    recipe_text, cluster = recipe, cluster or Cluster()
    if resident:
        cluster = _with_stretch_deadline(cluster, iterations)
    if evaluate != "never":
        cluster = with_evaluation_deadline(cluster, recipe)
    apply, free = cluster.apply, without_nulls(runtime or {})

    remaining_work = _remaining_work(iterations, workers, evaluate, resident, apply)

    @dsl.pipeline(
        name="layerloop-train",
        display_name=f"layerloop: {iterations} iterations, {'resident' if resident else f'{workers} workers'}",
        pipeline_root=cluster.pipeline_root,
    )
    def train(
        campaign: str,
        images: str,
        designs: str = "",
        benchmark: str = "",
        judge_url: str = "",
        recipe: str = "",
        overrides: dict[str, Any] = {},  # noqa: B006
        publish_as: str = "",
        until: int = 0,
        max_failures: int = 0,
        runtime: dict[str, Any] = free,
    ) -> None:
        """Fine-tune the campaign's policy by `iterations` more iterations, evaluate it and publish the adapter.

        Args:
            campaign: Root URI of the campaign (s3://bucket/prefix). Created by its first run, continued by later ones.
            images: Unlabelled images: a folder, glob, WebDataset or parquet with images. Read by the first run.
            designs: Held-out designs with ground-truth layers, for the evaluation; empty for none.
            benchmark: Unlabelled pictures to evaluate on, in any form of images; empty: those held out of the images.
            judge_url: Base URL of an OpenAI-compatible endpoint; empty for OPENAI_BASE_URL of the pods.
            recipe: Name of a packaged recipe, or the URI of a YAML file; empty for the one that was compiled in. A
                campaign that was made with another one is refused.
            overrides: Changes of the recipe as JSON, such as {"update": {"learning_rate": 1e-4}}.
            publish_as: Folder under published/; empty for the campaign's folder with the iteration.
            until: Target of the campaign: the iteration at which it ends; 0 for none.
            max_failures: Runs in a row without progress after which no further one begins; 0 for no limit.
            runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}. It changes no result and may
                differ from run to run; what it leaves out has its default.
        """
        shard = shard_dataset(
            campaign=campaign,
            recipe=recipe,
            overrides=overrides,
            images=images,
            designs=designs,
            benchmark=benchmark,
            judge_url=judge_url,
            default_recipe=recipe_text,
            iterations=iterations,
            evaluate=evaluate,
            until=until,
            max_failures=max_failures,
            publish_as=publish_as,
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            runtime=runtime,
        )
        apply("shard_dataset", shard)
        work = remaining_work(
            campaign=campaign,
            judge_url=judge_url,
            publish_as=publish_as,
            until=until,
            left=shard.outputs["left"],
            sources=shard.outputs["sources"],
            policy=shard.outputs["policy"],
            runtime=runtime,
        )
        work.set_display_name("remaining work")

    return train


def _iteration(workers: int, apply: Apply):  # type: ignore[no-untyped-def]
    """The sub-pipeline of one iteration by `workers` pods."""

    # A sub-pipeline needs at least one parameter: without one, kfp.local 2.17 finds no artifact inputs.
    @dsl.pipeline(name="iteration")
    def iteration(
        campaign: str,
        judge_url: str,
        until: int,
        sources: Input[Dataset],
        policy: Input[Model],
        runtime: dict[str, Any],
    ) -> Updated:
        with dsl.ParallelFor(items=list(range(workers)), name="workers") as worker:
            rollouts = generate_rollouts(
                campaign=campaign,
                worker=worker,
                workers=workers,
                until=until,
                sources=sources,
                policy=policy,
                runtime=runtime,
            )
            apply("generate_rollouts", rollouts)
        scores = score_rollouts(
            campaign=campaign,
            judge_url=judge_url,
            until=until,
            rollouts=dsl.Collected(rollouts.outputs["rollouts"]),
            runtime=runtime,
        )
        apply("score_rollouts", scores)
        update = update_lora(
            campaign=campaign, until=until, scores=scores.outputs["scores"], previous=policy, runtime=runtime
        )
        apply("update_lora", update)
        return Updated(policy=update.outputs["policy"])

    return iteration


def _remaining_work(  # type: ignore[no-untyped-def]
    iterations: int, workers: int, evaluate: str, resident: bool, apply: Apply
):
    """The sub-pipeline of what is left after the sources: iterations, evaluation, publication."""
    iteration = _iteration(workers, apply)

    # A sub-pipeline of its own because kfp.local 2.17 finds what a condition compares among a pipeline's parameters
    # and not among the outputs of its tasks: it would take such a condition for false.
    @dsl.pipeline(name="remaining-work")
    def remaining_work(
        campaign: str,
        judge_url: str,
        publish_as: str,
        until: int,
        left: str,
        sources: Input[Dataset],
        policy: Input[Model],
        runtime: dict[str, Any],
    ) -> None:
        with dsl.If(left != "nothing", name="not at the target"):
            if resident:
                stretch = train_stretch(
                    campaign=campaign,
                    iterations=iterations,
                    judge_url=judge_url,
                    until=until,
                    sources=sources,
                    previous=policy,
                    runtime=runtime,
                )
                apply("train_stretch", stretch)
                policy = stretch.outputs["policy"]
            for number in () if resident else range(1, iterations + 1):
                step = iteration(
                    campaign=campaign,
                    judge_url=judge_url,
                    until=until,
                    sources=sources,
                    policy=policy,
                    runtime=runtime,
                )
                step.set_display_name(f"iteration {number} of this run")  # the campaign's number is in the artifacts
                policy = step.outputs["policy"]
            ends = dsl.If(left == "everything", name="no iteration is left before the target")
            with ends if evaluate == "end" else contextlib.nullcontext():
                made = {}
                if evaluate != "never":
                    evaluation = evaluate_adapter(campaign=campaign, sources=sources, policy=policy, runtime=runtime)
                    apply("evaluate_adapter", evaluation)
                    made = {"evaluation": evaluation.outputs["evaluation"]}
                publish = publish_adapter(
                    campaign=campaign, publish_as=publish_as, policy=policy, runtime=runtime, **made
                )
                apply("publish_adapter", publish)

    return remaining_work


def _with_stretch_deadline(cluster: Cluster, iterations: int) -> Cluster:
    """The cluster with the step table's deadline for each iteration of the stretch; one that the file sets stays."""
    if cluster.own_hours("train_stretch") is not None:
        return cluster
    hours = STEPS["train_stretch"].timeout_hours * iterations
    return cluster.model_copy(update={"timeout_hours": {**cluster.timeout_hours, "train_stretch": hours}})


def _check_size(iterations: int, workers: int, evaluate: str, resident: bool) -> int:
    """The run's container tasks."""
    if evaluate not in EVALUATE:
        raise LayerloopError(f"evaluate is {evaluate!r}: choose one of {', '.join(EVALUATE)}")
    for what, value in (("iterations", iterations), ("workers", workers)):
        if value < 1:
            raise LayerloopError(f"{what} is {value}: choose 1 or more")
    return container_tasks(iterations, workers, evaluate, resident)


def _check_workflow(tasks: int, iterations: int, workers: int) -> None:
    """Raises LayerloopError for more tasks than a workflow object of Kubernetes carries."""
    if tasks > MAX_TASKS:
        fitting = (MAX_TASKS - 3) // (workers + 2)
        less = f"{fitting} iterations and chain runs" if fitting else f"{MAX_TASKS - 5} workers"
        raise LayerloopError(
            f"iterations is {iterations} with {workers} workers, which makes {tasks} container tasks where a workflow "
            f"object carries about {MAX_TASKS}: choose at most {less}, or --resident"
        )
