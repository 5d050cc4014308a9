"""A judge's criteria of the unlabelled pictures, beside the rules: every decomposition on its own, as in phase 1 of
scoring, by the campaign's judge, rubric and method."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from layerloop.components.evaluate_adapter.cases import Case
from layerloop.components.judge.address import judge_address
from layerloop.components.judge.client import Judge
from layerloop.components.judge.images import CandidateImages, EncodedImage, candidate_images, encode_image, fitted
from layerloop.components.judge.methods import PHASE1, rubric_of
from layerloop.components.judge.replies import UnusableError
from layerloop.components.layers.columns import JUDGED
from layerloop.components.layers.stack import Pixels
from layerloop.components.runtime.progress import log, progress
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.storage.replies import StoredReplies

if TYPE_CHECKING:
    from layerloop.components.evaluate_adapter.assess import Row
    from layerloop.components.schema.manifest import Shard
    from layerloop.components.storage.campaign import Campaign

Models = Mapping[str, "tuple[Sequence[Shard], list[Row]]"]
REPLIES = "evaluations/replies"  # of all evaluations of a campaign: the base's are paid for once
REFUSALS = 1  # times that a picture whose request was refused is asked about again


def check_judge(campaign: Campaign, url: str) -> None:
    """Refuse a judge that could not be asked, before hours of sampling.

    Raises:
        LayerloopError: no URL of a judge, nothing answers there, or it refuses the key or the recipe's model.
    """

    async def reach() -> None:
        async with _open(campaign, url, None) as judge:
            await judge.check_reachable()

    rubric_of(campaign.recipe.judge)
    asyncio.run(reach())


def add_judged(campaign: Campaign, url: str, chunks: Sequence[Sequence[Case]], models: Models) -> str:
    """Add the columns `judge_<criterion>` in [0, 1], and `judge_mean` of them, to the rows of unlabelled pictures; None
    where the judge gave no usable answer. Returns who judged what, in a sentence or two.

    Args:
        models: by name, its shards of decompositions, one for each chunk of cases, and its rows in the cases' order.

    Raises:
        LayerloopError: the judge is gone; its replies until then are stored, and not paid for again.
    """
    return asyncio.run(_add_judged(campaign, url, chunks, models))


def _open(campaign: Campaign, url: str, replies: StoredReplies | None) -> Judge:
    recipe, address = campaign.recipe, judge_address(url)
    judge = Judge(address, recipe.judge, campaign.runtime.judge, replies=replies, ledger=replies, seed=recipe.seed)
    judge.log = log
    return judge


async def _add_judged(campaign: Campaign, url: str, chunks: Sequence[Sequence[Case]], models: Models) -> str:
    from layerloop.components.evaluate_adapter.decompose import read_decompositions

    recipe, rubric = campaign.recipe.judge, rubric_of(campaign.recipe.judge)
    replies = await asyncio.to_thread(StoredReplies, campaign.store, REPLIES)
    names = [*(f"{JUDGED}{name}" for name in rubric.names), f"{JUDGED}mean"]
    asked = unusable = 0
    async with _open(campaign, url, replies) as judge:
        work = [(number, model) for number in range(len(chunks)) for model in models]
        for number, model in progress(work, what=f"judging by {recipe.model}", unit="shards"):
            shards, rows = models[model]
            start = sum(map(len, chunks[:number]))
            at = [start + index for index, case in enumerate(chunks[number]) if case.kind == "pictures"]
            if not at:
                continue
            stacks = await asyncio.to_thread(read_decompositions, campaign.store, shards[number])
            cases = [chunks[number][index - start] for index in at]
            scores = await asyncio.gather(
                *(_scores(judge, campaign, case, stacks[case.name], f"{model} {case.name}") for case in cases)
            )
            for index, found in zip(at, scores, strict=True):
                rows[index] |= dict.fromkeys(names) if found is None else found
            asked, unusable = asked + len(scores), unusable + sum(found is None for found in scores)
    version = ", ".join(sorted(judge.statistics.versions)) or "version unknown"
    text = (
        f"{recipe.model} ({version}), at {without_secrets(judge_address(url))} when it was asked, scored {asked} "
        f"decompositions of the unlabelled images, each on its own, by the rubric {rubric.name} {rubric.version}."
    )
    return f"{text} {unusable} of its answers could not be used." if unusable else text


async def _scores(judge: Judge, campaign: Campaign, case: Case, stack: Pixels, label: str) -> dict[str, float] | None:
    """The columns of one decomposition; None where no answer could be used."""
    recipe, rubric = campaign.recipe.judge, rubric_of(campaign.recipe.judge)
    method = PHASE1[recipe.method]

    def images() -> tuple[EncodedImage, CandidateImages]:
        source = encode_image(fitted(case.source, recipe.resolution))
        return source, candidate_images(fitted(stack, recipe.resolution), recipe.backdrops)

    source, candidate = await asyncio.to_thread(images)
    request = method.request(rubric, source, candidate, recipe, label=label)
    samples = []
    for sample in range(recipe.samples):
        try:
            answer, _ = await judge.ask(request, sample=sample, refusals=REFUSALS)
        except UnusableError:
            continue
        samples.append(answer[0])
    if not samples:
        return None
    combined = method.combine(samples, rubric.names)
    mean = sum(combined.values()) / len(combined)
    return {**{f"{JUDGED}{name}": value for name, value in combined.items()}, f"{JUDGED}mean": mean}
