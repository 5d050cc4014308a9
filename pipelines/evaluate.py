"""The nightly evaluation DAG: the campaign's head, or one of its earlier policies, against the base on fixed seeds."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model

from layerloop.components.evaluate_adapter.component import evaluate_adapter
from layerloop.components.shard_dataset.component import shard_dataset
from layerloop.pipelines.cluster import Cluster
from layerloop.pipelines.evaluation_cost import with_evaluation_deadline


def evaluate_pipeline(*, recipe: str, cluster: Cluster | None = None):  # type: ignore[no-untyped-def]
    """The evaluation pipeline.

    Args:
        recipe: YAML text of the campaign's recipe, for the deadline; what is evaluated, the campaign's own says.
        cluster: The place; its defaults when None.

    Returns:
        A KFP pipeline (`kfp.dsl.graph_component.GraphComponent`), to be compiled or run.

    Raises:
        LayerloopError: the recipe's evaluation does not fit the deadline that the place sets.
    """
    cluster = with_evaluation_deadline(cluster or Cluster(), recipe)
    place = cluster.place

    # As in train.py: kfp.local takes a condition on another task's output for false.
    @dsl.pipeline(name="evaluation")
    def evaluation(campaign: str, left: str, sources: Input[Dataset], policy: Input[Model]) -> None:
        with dsl.If(left != "nothing", name="there is a policy"):
            place("evaluate_adapter", evaluate_adapter(campaign=campaign, sources=sources, policy=policy))

    @dsl.pipeline(
        name="layerloop-evaluate",
        display_name="layerloop: evaluation of a campaign",
        pipeline_root=cluster.pipeline_root,
    )
    def evaluate(campaign: str, iteration: int = 0) -> None:
        """Evaluate a policy of a campaign; green, with a word in the log, while the campaign has none.

        Args:
            campaign: Root URI of the campaign (s3://bucket/prefix), which a training run has begun.
            iteration: Whose adapter; 0 for the head, as it is when the run starts.
        """
        shard = shard_dataset(campaign=campaign, iteration=iteration, evaluate="only")
        place("shard_dataset", shard)
        evaluation(
            campaign=campaign,
            left=shard.outputs["left"],
            sources=shard.outputs["sources"],
            policy=shard.outputs["policy"],
        )

    return evaluate
