"""KFP declaration of the step `evaluate_adapter`; the work is in `step.py`."""

from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output


@dsl.container_component
def evaluate_adapter(
    campaign: str,
    sources: Input[Dataset],
    policy: Input[Model],
    report: Output[HTML],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    baseline: str = "",
    samplers: bool = False,
    judge_url: str = "",
    runtime: dict[str, Any] = {},  # noqa: B006
) -> dsl.ContainerSpec:
    """Compare adapter and base on the same seeds, on held-out designs and unlabelled images.

    Args:
        campaign: Root URI of the campaign.
        sources: Manifest of the normalised images, held-out splits among them.
        policy: Manifest of the policy to evaluate.
        report: Self-contained HTML page with tables and contact sheets.
        evaluation: Manifest of the evaluation (report, metrics.json, contact sheets).
        metrics: Every measure for base and adapter.
        baseline: Fail where the adapter is clearly worse than the `metrics.json` at this URI, or than the evaluation
            before it (`previous`); empty: never.
        samplers: Compare both by every sampler that people use too: 1,548 model calls an image, up to 32 images.
        judge_url: Base URL of an OpenAI-compatible judge that also scores both on the unlabelled pictures; empty: none.
        runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}; it changes no result.
    """
    return dsl.ContainerSpec(
        image="layerloop-policy",
        command=["python3", "-m", "layerloop.components.evaluate_adapter"],
        args=["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
