"""KFP declaration of the step `shard_dataset`; the work is in `step.py`."""

from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Model, Output


@dsl.container_component
def shard_dataset(
    campaign: str,
    sources: Output[Dataset],
    policy: Output[Model],
    metrics: Output[Metrics],
    left: dsl.OutputPath(str),  # type: ignore[valid-type]
    recipe: str = "",
    overrides: dict[str, Any] = {},  # noqa: B006
    images: str = "",
    designs: str = "",
    benchmark: str = "",
    judge_url: str = "",
    default_recipe: str = "",
    iterations: int = 1,
    evaluate: str = "end",
    iteration: int = 0,
    until: int = 0,
    max_failures: int = 0,
    publish_as: str = "",
    run_id: str = "",
    runtime: dict[str, Any] = {},  # noqa: B006
) -> dsl.ContainerSpec:
    """Normalise images into shards, once per campaign, find the policy to continue from, and say if anything is left.

    Args:
        campaign: Root URI of the campaign (`s3://bucket/prefix` or a folder). Created by its first run.
        sources: Manifest of the shards of normalised images.
        policy: Manifest of the campaign's head; its metadata carries the iteration that the run continues from.
        metrics: Images read, rejected, dropped as duplicates, and kept in each split.
        left: Work left for this run: `nothing`, `iterations`, or `everything`: evaluation and publication too.
        recipe: Name of a packaged recipe, or the URI of a YAML file; empty for `default_recipe`. A campaign made with
            another recipe is refused.
        overrides: Changes of the recipe, section by section.
        images: Unlabelled images: a folder, glob, WebDataset or parquet with an image column.
        designs: Held-out designs with ground-truth layers (parquet in Crello's columns); empty for none.
        benchmark: Unlabelled pictures to evaluate on, in any form of images; empty: those held out of the images.
        judge_url: Base URL of the judge that the run will ask; checked before hours of work.
        default_recipe: YAML text of the recipe that the pipeline was compiled with.
        iterations: Iterations of this run.
        evaluate: When a run evaluates: `end`, `every-run`, `never`; `only` is a run that does nothing else.
        iteration: With `only`, whose adapter; 0 for the head.
        until: The campaign's target; 0 for none.
        max_failures: Runs in a row without progress after which no further one starts; 0 for no limit.
        publish_as: Folder under `published/` in which the run will publish; checked before hours of work.
        run_id: KFP's id of the run.
        runtime: Where and how fast to run, such as {"judge": {"concurrency": 64}}; it changes no result.
    """
    return dsl.ContainerSpec(
        image="layerloop-policy",  # caches the prompt embedding, which takes the text encoder
        command=["python3", "-m", "layerloop.components.shard_dataset"],
        args=["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
