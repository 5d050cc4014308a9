"""KFP declaration of the step `train_stretch`; the work is in `step.py`."""

from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output


@dsl.container_component
def train_stretch(
    campaign: str,
    iterations: int,
    sources: Input[Dataset],
    previous: Input[Model],
    policy: Output[Model],
    metrics: Output[Metrics],
    judge_url: str = "",
    until: int = 0,
    runtime: dict[str, Any] = {},  # noqa: B006
) -> dsl.ContainerSpec:
    """Several iterations of rollouts, scores and update in one pod, which loads the base once.

    Args:
        campaign: Root URI of the campaign.
        iterations: How many, from the one after `previous`.
        sources: Manifest of the normalised images.
        previous: Manifest of the policy to begin with.
        policy: Manifest of the policy after the last iteration.
        metrics: Those of the last update, and seconds of sampling, of waiting for the judge and of updating.
        judge_url: Base URL of an OpenAI-compatible endpoint; empty for the environment's OPENAI_BASE_URL.
        until: The campaign's target, beyond which there is no iteration. 0 for none.
        runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}; it changes no result.
    """
    return dsl.ContainerSpec(
        image="layerloop-policy",
        command=["python3", "-m", "layerloop.components.train_stretch"],
        args=["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
