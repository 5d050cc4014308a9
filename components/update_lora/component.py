"""KFP declaration of the step `update_lora`; the work is in `step.py`."""

from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output


@dsl.container_component
def update_lora(
    campaign: str,
    scores: Input[Dataset],
    previous: Input[Model],
    policy: Output[Model],
    metrics: Output[Metrics],
    until: int = 0,
    runtime: dict[str, Any] = {},  # noqa: B006
) -> dsl.ContainerSpec:
    """One iteration of learning: group-relative advantages, clipped surrogate, LoRA and optimizer state carried on.

    Args:
        campaign: Root URI of the campaign.
        scores: Manifest of the iteration's scores.
        previous: Manifest of the policy that sampled the rollouts.
        policy: Manifest of the updated policy.
        metrics: Loss, clip fractions, ratio and gradient norms, groups used and filtered.
        until: The campaign's target; an iteration past it passes its policy through. 0 for none.
        runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}; it changes no result.
    """
    return dsl.ContainerSpec(
        image="layerloop-policy",
        command=["python3", "-m", "layerloop.components.update_lora"],
        args=["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
