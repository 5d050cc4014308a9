"""The training DAG: shard -> [rollouts x workers -> score -> update] x iterations -> evaluate -> publish.

KFP has no loop over time, so the number of iterations is fixed when the DAG is compiled. A campaign of hundreds of
iterations is a chain of such runs: each finds the campaign's head when it starts (`shard_dataset`) and goes on from it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl import Dataset, Input, Model

from layerloop.components.evaluate_adapter.component import evaluate_adapter
from layerloop.components.generate_rollouts.component import generate_rollouts
from layerloop.components.publish_adapter.component import publish_adapter
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.score_rollouts.component import score_rollouts
from layerloop.components.shard_dataset.component import shard_dataset
from layerloop.components.update_lora.component import update_lora
from layerloop.pipelines.cluster import Cluster

# A workflow is one etcd object (1.5 MiB) and a v2 task costs about 35 KiB of it (kubeflow/pipelines#13738): with more
# tasks than this, a failed run cannot be retried from the UI any more.
MAX_TASKS = 40


class Updated(NamedTuple):
    """What one iteration hands to the next."""

    policy: Model


def container_tasks(iterations: int, workers: int) -> int:
    """Pods that do work in one run: shard, per iteration the workers, score and update, then evaluate and publish."""
    return 1 + iterations * (workers + 2) + 2


def train_pipeline(  # type: ignore[no-untyped-def]
    *,
    iterations: int,
    workers: int,
    recipe: str,
    cluster: Cluster | None = None,
    runtime: Mapping[str, Any] | None = None,
):
    """The training pipeline for a fixed number of iterations and rollout workers.

    Args:
        iterations: Iterations of one run.
        workers: Pods that share an iteration's groups.
        recipe: YAML text that becomes the default of the pipeline's `recipe` parameter.
        cluster: The place; its defaults when None.
        runtime: Default of the pipeline's `runtime` parameter; empty when None.

    Returns:
        A KFP pipeline (`kfp.dsl.graph_component.GraphComponent`), to be compiled or run.

    Raises:
        LayerloopError: no iteration, no worker, or more tasks than one workflow object carries.
    """
    place = (cluster or Cluster()).place
    _check_size(iterations, workers)
    free = dict(runtime or {})

    # A sub-pipeline needs at least one parameter: without one, kfp.local 2.17 finds no artifact inputs.
    @dsl.pipeline(name="iteration")
    def iteration(
        campaign: str, judge_url: str, sources: Input[Dataset], policy: Input[Model], runtime: dict[str, Any]
    ) -> Updated:
        with dsl.ParallelFor(items=list(range(workers)), name="workers") as worker:
            rollouts = generate_rollouts(
                campaign=campaign, worker=worker, workers=workers, sources=sources, policy=policy, runtime=runtime
            )
            place("generate_rollouts", rollouts)
        scores = score_rollouts(
            campaign=campaign, judge_url=judge_url, rollouts=dsl.Collected(rollouts.outputs["rollouts"]),
            runtime=runtime,
        )  # fmt: skip
        place("score_rollouts", scores)
        update = update_lora(campaign=campaign, scores=scores.outputs["scores"], previous=policy, runtime=runtime)
        place("update_lora", update)
        return Updated(policy=update.outputs["policy"])

    @dsl.pipeline(name="layerloop-train", display_name=f"layerloop: {iterations} iterations, {workers} workers")
    def train(
        campaign: str,
        images: str,
        designs: str = "",
        recipe: str = recipe,
        judge_url: str = "",
        name: str = "",
        runtime: dict[str, Any] = free,
    ) -> None:
        """Fine-tune the campaign's policy by `iterations` more iterations, evaluate it and publish the adapter.

        Args:
            campaign: Root URI of the campaign (s3://bucket/prefix). Created by its first run, continued by later ones.
            images: Unlabelled images: a folder, glob, WebDataset or parquet with images. Read by the first run.
            designs: Held-out designs with ground-truth layers, for the evaluation; empty for none.
            recipe: Recipe as YAML text or the URI of a YAML file; it must be the one that the campaign was made with.
            judge_url: Base URL of an OpenAI-compatible endpoint; empty for OPENAI_BASE_URL of the pods.
            name: Folder under published/; empty for the recipe's name with the iteration.
            runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}. It changes no result and may
                differ from run to run; what it leaves out has its default.
        """
        shard = shard_dataset(campaign=campaign, recipe=recipe, images=images, designs=designs, runtime=runtime)
        place("shard_dataset", shard)
        sources, policy = shard.outputs["sources"], shard.outputs["policy"]
        for number in range(1, iterations + 1):
            step = iteration(campaign=campaign, judge_url=judge_url, sources=sources, policy=policy, runtime=runtime)
            step.set_display_name(f"iteration {number}")  # of this run; the campaign's number is in the artifacts
            policy = step.outputs["policy"]
        evaluation = evaluate_adapter(campaign=campaign, sources=sources, policy=policy, runtime=runtime)
        place("evaluate_adapter", evaluation)
        publish = publish_adapter(
            campaign=campaign, name=name, policy=policy, evaluation=evaluation.outputs["evaluation"], runtime=runtime
        )
        place("publish_adapter", publish)

    return train


def _check_size(iterations: int, workers: int) -> None:
    for what, value in (("iterations", iterations), ("workers", workers)):
        if value < 1:
            raise LayerloopError(f"{what} is {value}: choose 1 or more")
    tasks = container_tasks(iterations, workers)
    if tasks > MAX_TASKS:
        fitting = (MAX_TASKS - 3) // (workers + 2)
        less = f"{fitting} iterations and chain runs" if fitting else f"{MAX_TASKS - 5} workers"
        raise LayerloopError(
            f"iterations is {iterations} with {workers} workers, which makes {tasks} container tasks where a workflow "
            f"object carries about {MAX_TASKS}: choose at most {less}"
        )
