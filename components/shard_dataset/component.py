"""KFP declaration of the step `shard_dataset`; the work is in `step.py`."""

from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Model, Output


@dsl.container_component
def shard_dataset(
    campaign: str,
    recipe: str,
    images: str,
    sources: Output[Dataset],
    policy: Output[Model],
    metrics: Output[Metrics],
    designs: str = "",
    runtime: dict[str, Any] = {},  # noqa: B006
) -> dsl.ContainerSpec:
    """Normalise images into shards, once per campaign, and find the policy to continue from.

    Args:
        campaign: Root URI of the campaign (`s3://bucket/prefix` or a folder). Created by its first run.
        recipe: Recipe as YAML text, or the URI of a YAML file. A campaign made with another recipe is refused.
        images: Unlabelled images: a folder, glob, WebDataset or parquet with an image column.
        sources: Manifest of the shards of normalised images.
        policy: Manifest of the campaign's head; its metadata carries the iteration that the run continues from.
        metrics: Images read, rejected, dropped as duplicates, and kept in each split.
        designs: Held-out designs with ground-truth layers (parquet in Crello's columns); empty for none.
        runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}; it changes no result.
    """
    return dsl.ContainerSpec(
        image="layerloop-policy",  # caches the prompt embedding, which takes the text encoder
        command=["python3", "-m", "layerloop.components.shard_dataset"],
        args=["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
