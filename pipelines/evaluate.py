"""The nightly evaluation DAG: the campaign's head, or one of its earlier policies, against the base on fixed seeds."""

from kfp import dsl

from layerloop.components.evaluate_adapter.component import evaluate_adapter
from layerloop.components.shard_dataset.component import shard_dataset
from layerloop.pipelines.cluster import Cluster


def evaluate_pipeline(*, recipe: str, cluster: Cluster | None = None):  # type: ignore[no-untyped-def]
    """The evaluation pipeline.

    Args:
        recipe: YAML text that becomes the default of the pipeline's `recipe` parameter.
        cluster: The place; its defaults when None.

    Returns:
        A KFP pipeline (`kfp.dsl.graph_component.GraphComponent`), to be compiled or run.
    """
    place = (cluster or Cluster()).place

    @dsl.pipeline(name="layerloop-evaluate", display_name="layerloop: evaluation of a campaign's head")
    def evaluate(campaign: str, images: str = "", designs: str = "", recipe: str = recipe) -> None:
        """Evaluate the head of a campaign, as it is when the run starts.

        Args:
            campaign: Root URI of the campaign (s3://bucket/prefix).
            images: As in the training pipeline; not read again where the campaign has its sources.
            designs: As in the training pipeline; not read again where the campaign has its sources.
            recipe: The recipe that the campaign was made with, as YAML text or the URI of a YAML file.
        """
        shard = place("shard_dataset", shard_dataset(campaign=campaign, recipe=recipe, images=images, designs=designs))
        evaluation = evaluate_adapter(
            campaign=campaign,
            sources=shard.outputs["sources"],
            policy=shard.outputs["policy"],
            fail_when_worse=True,
        )
        place("evaluate_adapter", evaluation)

    return evaluate
