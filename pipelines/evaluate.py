"""The nightly evaluation DAG: the campaign's head, or one of its earlier policies, against the base on fixed seeds."""

from collections.abc import Mapping
from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Input, Model

from layerloop.components.evaluate_adapter.component import evaluate_adapter
from layerloop.components.schema.runtime import without_nulls
from layerloop.components.shard_dataset.component import shard_dataset
from layerloop.pipelines.cluster import Cluster
from layerloop.pipelines.evaluation_cost import with_evaluation_deadline


def evaluate_pipeline(  # type: ignore[no-untyped-def]
    *, recipe: str, cluster: Cluster | None = None, runtime: Mapping[str, Any] | None = None
):
    """The evaluation pipeline.

    Args:
        recipe: YAML text of the campaign's recipe, for the deadline; what is evaluated, the campaign's own says.
        cluster: Where steps run; the defaults when None.
        runtime: Default of the pipeline's `runtime` parameter; empty when None.

    Returns:
        A KFP pipeline (`kfp.dsl.graph_component.GraphComponent`), to be compiled or run.

    Raises:
        LayerloopError: the recipe's evaluation does not fit the deadline that the cluster file sets.
    """
    cluster = with_evaluation_deadline(cluster or Cluster(), recipe, samplers=True)
    apply, free = cluster.apply, without_nulls(runtime or {})

    # As in train.py: kfp.local takes a condition on another task's output for false.
    @dsl.pipeline(name="evaluation")
    def evaluation(
        campaign: str,
        left: str,
        baseline: str,
        samplers: bool,
        judge_url: str,
        sources: Input[Dataset],
        policy: Input[Model],
        runtime: dict[str, Any],
    ) -> None:
        with dsl.If(left != "nothing", name="there is a policy"):
            task = evaluate_adapter(
                campaign=campaign, sources=sources, policy=policy, baseline=baseline, samplers=samplers,
                judge_url=judge_url, runtime=runtime,
            )  # fmt: skip
            apply("evaluate_adapter", task)

    @dsl.pipeline(
        name="layerloop-evaluate",
        display_name="layerloop: evaluation of a campaign",
        pipeline_root=cluster.pipeline_root,
    )
    def evaluate(
        campaign: str,
        iteration: int = 0,
        baseline: str = "previous",
        samplers: bool = False,
        judge_url: str = "",
        runtime: dict[str, Any] = free,
    ) -> None:
        """Evaluate a policy of a campaign; green, with a word in the log, while the campaign has none.

        Args:
            campaign: Root URI of the campaign (s3://bucket/prefix), which a training run has begun.
            iteration: Whose adapter; 0 for the head, as it is when the run starts.
            baseline: Fail where it is clearly worse than the adapter evaluated before it (`previous`), or than the
                `metrics.json` at this URI; empty: never.
            samplers: Compare base and adapter by every sampler that people use too; the deadline has room for it.
            judge_url: Base URL of a judge that also scores both on the unlabelled pictures; empty: none does.
            runtime: As in the training pipeline.
        """
        shard = shard_dataset(campaign=campaign, iteration=iteration, evaluate="only", runtime=runtime)
        apply("shard_dataset", shard)
        evaluation(
            campaign=campaign,
            left=shard.outputs["left"],
            sources=shard.outputs["sources"],
            policy=shard.outputs["policy"],
            baseline=baseline,
            samplers=samplers,
            judge_url=judge_url,
            runtime=runtime,
        )

    return evaluate
