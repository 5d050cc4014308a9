"""The nightly evaluation DAG: the campaign's head, or one of its earlier policies, against the base on fixed seeds."""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from layerloop.components.evaluate_adapter.component import evaluate_adapter
from layerloop.components.shard_dataset.component import shard_dataset
from layerloop.pipelines.cluster import Cluster


def evaluate_pipeline(  # type: ignore[no-untyped-def]
    *, recipe: str, cluster: Cluster | None = None, runtime: Mapping[str, Any] | None = None
):
    """The evaluation pipeline.

    Args:
        recipe: YAML text that becomes the default of the pipeline's `recipe` parameter.
        cluster: The place; its defaults when None.
        runtime: Default of the pipeline's `runtime` parameter; empty when None.

    Returns:
        A KFP pipeline (`kfp.dsl.graph_component.GraphComponent`), to be compiled or run.
    """
    place = (cluster or Cluster()).place
    free = dict(runtime or {})

    @dsl.pipeline(name="layerloop-evaluate", display_name="layerloop: evaluation of a campaign's head")
    def evaluate(
        campaign: str, images: str = "", designs: str = "", recipe: str = recipe, runtime: dict[str, Any] = free
    ) -> None:
        """Evaluate the head of a campaign, as it is when the run starts.

        Args:
            campaign: Root URI of the campaign (s3://bucket/prefix).
            images: As in the training pipeline; not read again where the campaign has its sources.
            designs: As in the training pipeline; not read again where the campaign has its sources.
            recipe: The recipe that the campaign was made with, as YAML text or the URI of a YAML file.
            runtime: As in the training pipeline.
        """
        shard = shard_dataset(campaign=campaign, recipe=recipe, images=images, designs=designs, runtime=runtime)
        place("shard_dataset", shard)
        evaluation = evaluate_adapter(
            campaign=campaign, sources=shard.outputs["sources"], policy=shard.outputs["policy"], runtime=runtime
        )
        place("evaluate_adapter", evaluation)

    return evaluate
