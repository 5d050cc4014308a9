"""KFP declaration of the step `score_rollouts`; the work is in `step.py`."""

from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Output


@dsl.container_component
def score_rollouts(
    campaign: str,
    rollouts: Input[list[Dataset]],
    scores: Output[Dataset],
    metrics: Output[Metrics],
    judge_url: str = "",
    until: int = 0,
    runtime: dict[str, Any] = {},  # noqa: B006
) -> dsl.ContainerSpec:
    """Let the judge score every candidate on its own, then side by side within its group.

    Args:
        campaign: Root URI of the campaign.
        rollouts: Manifests of all workers of the iteration.
        scores: Manifest of the scores (a shard and `scores.parquet`).
        metrics: Rewards, masked candidates with their reasons, judge calls and tokens.
        judge_url: Base URL of an OpenAI-compatible endpoint; empty for the environment's OPENAI_BASE_URL.
        until: The campaign's target; an iteration past it passes through. 0 for none.
        runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}; it changes no result.
    """
    return dsl.ContainerSpec(
        image="layerloop-light",
        command=["python3", "-m", "layerloop.components.score_rollouts"],
        args=["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
