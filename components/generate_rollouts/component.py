"""KFP declaration of the step `generate_rollouts`; the work is in `step.py`."""

from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output


@dsl.container_component
def generate_rollouts(
    campaign: str,
    worker: int,
    workers: int,
    sources: Input[Dataset],
    policy: Input[Model],
    rollouts: Output[Dataset],
    metrics: Output[Metrics],
    until: int = 0,
    runtime: dict[str, Any] = {},  # noqa: B006
) -> dsl.ContainerSpec:
    """Sample candidate decompositions of this worker's groups with the current policy.

    Args:
        campaign: Root URI of the campaign.
        worker: This worker's number, from 0; it takes a share of the groups by estimated cost.
        workers: How many workers share the iteration.
        sources: Manifest of the normalised images.
        policy: Manifest of the policy to sample with; the iteration is one more than its own.
        rollouts: Manifest of this worker's trajectory shards.
        metrics: Groups, candidates, and seconds of the sampler's parts.
        until: The campaign's target; an iteration past it passes through. 0 for none.
        runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}; it changes no result.
    """
    return dsl.ContainerSpec(
        image="layerloop-policy",
        command=["python3", "-m", "layerloop.components.generate_rollouts"],
        args=["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
