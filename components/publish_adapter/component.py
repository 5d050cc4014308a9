"""KFP declaration of the step `publish_adapter`; the work is in `step.py`."""

from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Input, Markdown, Metrics, Model, Output


@dsl.container_component
def publish_adapter(
    campaign: str,
    policy: Input[Model],
    adapter: Output[Model],
    card: Output[Markdown],
    metrics: Output[Metrics],
    evaluation: Input[Artifact] = None,
    publish_as: str = "",
    runtime: dict[str, Any] = {},  # noqa: B006
) -> dsl.ContainerSpec:
    """Write the adapter in peft and in diffusers layout with a model card, each loaded back and proven equal first.

    Args:
        campaign: Root URI of the campaign.
        policy: Manifest of the policy to publish.
        adapter: Manifest of the published files.
        card: The model card.
        metrics: Sizes, the adapter's effect on velocities, and what loading back and rounding change.
        evaluation: Manifest of its evaluation, which the model card quotes; none where the run does not evaluate.
        publish_as: Folder under `published/`; empty for the campaign's folder with the iteration.
        runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}; it changes no result.
    """
    return dsl.ContainerSpec(
        image="layerloop-policy",
        command=["python3", "-m", "layerloop.components.publish_adapter"],
        args=["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
