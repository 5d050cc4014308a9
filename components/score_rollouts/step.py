"""The step `score_rollouts`: a judge scores every candidate on its own, then against the others of its group."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence

from pydantic import JsonValue

from layerloop.components.judge.address import judge_address
from layerloop.components.judge.canaries import FOOLED
from layerloop.components.judge.client import Judge
from layerloop.components.judge.methods import prompt_hash, rubric_of
from layerloop.components.judge.rubric import Rubric
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.progress import log
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe, ScoreRow
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.messages import counted
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.steps import STEPS
from layerloop.components.score_rollouts.ahead import Arrivals
from layerloop.components.score_rollouts.judging import judge_all
from layerloop.components.score_rollouts.results import (
    canary_metrics,
    counts_of,
    judge_metrics,
    mask_reasons,
    position_metrics,
    reward_metrics,
    samples_of,
    table_of,
)
from layerloop.components.score_rollouts.scoring import ScoredGroup, Scorer
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.lease import hold
from layerloop.components.storage.manifests import add_file
from layerloop.components.storage.replies import StoredReplies
from layerloop.components.storage.rollouts import rollouts_sha256
from layerloop.components.storage.shards import write_shard
from layerloop.components.storage.stores import open_store


def run(
    arrivals: Arrivals | None = None,
    *,
    campaign: str,
    iteration: int | None = None,
    judge_url: str = "",
    runtime: str = "",
) -> StepResult:
    """Let the judge score every candidate on its own, then against the others of its group.

    Replies are stored as they come, so a step that is run again repeats no request. The scores are committed when every
    group is judged; a failed judgement is a mask with its reason, never a number.

    Args:
        arrivals: Of groups of the iteration that may be missing, which are then awaited; without it they are refused.
        campaign: Root URI of the campaign.
        iteration: Which iteration to score; by default the one after the last committed policy.
        judge_url: Base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8788/v1; by default the
            environment's OPENAI_BASE_URL. The key is the environment's OPENAI_API_KEY, if there is one.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults (`layerloop runtime`). It changes no result.

    Raises:
        LayerloopError: rollouts are missing or damaged; no judge's URL; a rubric that lacks a text; a judge that does
            not answer, refuses the key or does not serve the model; too many groups with too few valid candidates.
            Nothing is committed then.
    """
    opened = Campaign.open(campaign, runtime)
    current = opened.open_iteration(iteration)
    folder = opened.scores_dir(current)
    if (done := opened.already_committed(folder, log=log)) is not None:
        return _result(done)
    with hold(opened.store, log=log):
        done = opened.already_committed(folder, log=log)  # by the run that held it until now
        return _result(done if done is not None else _score(opened, current, judge_url, arrivals))


def _score(opened: Campaign, current: int, judge_url: str, arrivals: Arrivals | None) -> Manifest:
    """Judge an iteration and commit its scores. Raises as `run`."""
    opened.check_unfinished(current)
    recipe, folder = opened.recipe, opened.scores_dir(current)
    url = judge_address(judge_url)
    rubric = rubric_of(recipe.judge)
    replies = StoredReplies(opened.store, f"{folder}/replies")
    if arrivals is None:
        opened.rollouts(current)
    where = without_secrets(url)
    if arrivals is None:
        log(f"judging iteration {current} by {recipe.judge.model} at {where}")
    if len(replies):
        log(f"{counted(len(replies), 'replies')} of the judge {'are' if len(replies) > 1 else 'is'} stored already")

    start = time.monotonic()
    judge = Judge(url, recipe.judge, opened.runtime.judge, replies=replies, ledger=replies, seed=recipe.seed)
    judge.log = log
    scorer = Scorer(judge, recipe.judge, rubric, seed=recipe.seed)
    judged = asyncio.run(judge_all(judge, scorer, opened, current, arrivals))
    seconds = time.monotonic() - start

    version = ", ".join(sorted(judge.statistics.versions)) or "unknown"
    rows = [row.model_copy(update={"judge_version": version}) for group in judged.groups for row in group.rows]
    reasons = mask_reasons(rows)
    for reason, count in reasons.most_common():
        log(f"masked {count} of {len(rows)} candidates: {_example(rows, reason)}")
    _refuse_too_many_dropped(judged.groups, recipe, rows, reasons)

    metrics = {
        **reward_metrics(rows, rubric.names),
        **position_metrics(judged.groups),
        **judge_metrics(judge.statistics, opened.runtime.judge.price),
        **canary_metrics(judged.canaries, _canaries_before(opened, current)),
        "seconds": seconds,
    }
    if metrics.get("canary_injection_gain", 0.0) > FOOLED:
        log(f"the judge obeys text inside images: reward +{metrics['canary_injection_gain']:.2f}")
    metadata: dict[str, JsonValue] = {
        **_provenance(recipe.judge, rubric, version),
        "rollouts_sha256": rollouts_sha256(opened.rollouts(current)),
        "masks": dict(sorted(reasons.items())),
        "canaries": {} if judged.canaries is None else dict(judged.canaries.rewards),
        "metrics": {name: float(value) for name, value in sorted(metrics.items())},
    }
    return _commit(opened, current, rows, rubric, metadata)


def _provenance(recipe: JudgeRecipe, rubric: Rubric, version: str) -> dict[str, JsonValue]:
    """The judge that scored, and the hashes of its words."""
    return {
        "judge": recipe.model,
        "judge_version": version,
        "rubric": rubric.name,
        "rubric_version": rubric.version,
        "rubric_sha256": rubric.sha256,
        "prompt_sha256": prompt_hash(rubric, recipe),
    }


def _commit(
    campaign: Campaign, iteration: int, rows: Sequence[ScoreRow], rubric: Rubric, metadata: dict[str, JsonValue]
) -> Manifest:
    """Write the rows as a shard and as a table, then the manifest."""
    folder = campaign.scores_dir(iteration)
    shard = write_shard(campaign.store, f"{folder}/000000.tar", samples_of(rows))
    table = add_file(campaign.store, f"{folder}/scores.parquet", table_of(rows, rubric.names))
    manifest = Manifest(
        kind="scores",
        iteration=iteration,
        shards=(shard,),
        files=(table,),
        counts=counts_of(rows),
        metadata=metadata,
    )
    return campaign.commit(folder, manifest)


def _canaries_before(campaign: Campaign, iteration: int) -> dict[str, float]:
    """Rewards that the canaries got in the iteration before; empty if they were not judged."""
    before = campaign.find(campaign.scores_dir(iteration - 1)) if iteration > 1 else None
    canaries = None if before is None else before.metadata.get("canaries")
    return _numbers(canaries)


def _example(rows: Sequence[ScoreRow], reason: str) -> str:
    """The first full reason of a mask that has this short form."""
    full = next(row.reason for row in rows if row.reason is not None and row.reason.startswith(reason))
    return " ".join(full.split())[:400]


def _refuse_too_many_dropped(
    groups: list[ScoredGroup], recipe: Recipe, rows: Sequence[ScoreRow], reasons: dict[str, int]
) -> None:
    dropped = sum(group.dropped for group in groups)
    allowed = recipe.judge.max_dropped_fraction
    if dropped > allowed * len(groups) or dropped == len(groups):
        common = max(reasons, key=lambda reason: reasons[reason])
        raise LayerloopError(
            f"{dropped} of {len(groups)} groups have fewer than {recipe.judge.min_valid} valid candidates "
            f"(most often {_example(rows, common)}), over recipe.judge.max_dropped_fraction {allowed:g}: look at the "
            "judge's answers in scores/replies, try `layerloop judge check`, and run the step again: what was unusable "
            "is asked again"
        )


def _result(manifest: Manifest) -> StepResult:
    return StepResult(manifests={"scores": manifest}, metrics=_numbers(manifest.metadata.get("metrics")))


def _numbers(value: JsonValue) -> dict[str, float]:
    """The numbers of a JSON object."""
    return (
        {name: float(v) for name, v in value.items() if isinstance(v, int | float)} if isinstance(value, dict) else {}
    )


main = functools.partial(step_main, run, step=STEPS["score_rollouts"], beyond=("scores", "scores"), store=open_store)

if __name__ == "__main__":
    raise SystemExit(main())
