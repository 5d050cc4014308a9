"""A judge's criteria of the unlabelled images, beside the rules."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from layerloop.components.evaluate_adapter.cases import read_cases
from layerloop.components.evaluate_adapter.decompose import read_decompositions
from layerloop.components.evaluate_adapter.step import run
from layerloop.components.evaluate_adapter.systems import read_evaluation
from layerloop.components.judge.client import Judge
from layerloop.components.judge.images import candidate_images, encode_image, fitted
from layerloop.components.judge.methods import PHASE1, rubric_of
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.inventory import unnamed_objects

from ..campaigns import CampaignBuilder
from ..score_rollouts.judges import meddling_judge


async def scores_by_hand(lab: CampaignBuilder, url: str, model: str) -> dict[str, dict[str, float]]:
    """The criteria of each unlabelled picture by its key, asked for one by one."""
    recipe, rubric = lab.recipe.judge, rubric_of(lab.recipe.judge)
    cases = {case.name: case for case in read_cases(lab.campaign, lab.campaign.sources()).of("pictures")}
    manifest = lab.campaign.find("evaluations/iteration-000002")
    assert manifest is not None
    found = {}
    async with Judge(url, recipe, seed=lab.recipe.seed) as judge:
        for shard in (shard for shard in manifest.shards if f"/{model}/" in shard.name):
            for name, stack in read_decompositions(lab.store, shard).items():
                if name in cases:
                    source = encode_image(fitted(cases[name].source, recipe.resolution))
                    shown = candidate_images(fitted(stack, recipe.resolution), recipe.backdrops)
                    request = PHASE1[recipe.method].request(rubric, source, shown, recipe, label=name)
                    found[cases[name].key] = (await judge.ask(request))[0][0]
    return found


def test_a_judge_scores_both_on_the_unlabelled_images_and_is_paid_once(lab: CampaignBuilder) -> None:
    with meddling_judge() as judge:
        result = run(campaign=lab.uri, judge_url=judge.url)
        assert judge.asked == 4  # two pictures by two models
        read = read_evaluation(f"{lab.uri}/evaluations/iteration-000002")
        for rows, model in ((read.base, "base"), (read.tuned, "iteration-000002")):
            expected = asyncio.run(scores_by_hand(lab, judge.url, model))
            for row in rows:
                if row["kind"] == "designs":
                    assert row["judge_mean"] is None
                    continue
                scores = expected[row["key"]]
                assert {name: row[f"judge_{name}"] for name in scores} == pytest.approx(scores) and len(scores) == 5
                assert row["judge_mean"] == pytest.approx(sum(scores.values()) / 5)
        asked = judge.asked
        run(campaign=lab.uri, iteration=1, judge_url=judge.url)
        assert judge.asked == asked + 2  # the base's were judged before
    assert not [name for name in unnamed_objects(lab.campaign) if name.startswith("evaluations")]  # paid, and kept
    page = result.files["report"].decode()
    assert "By the judge, 0 to 1" in page and "Judge, alpha cleanliness" in page
    assert "scored 4 decompositions of the unlabelled images" in page


def test_what_it_cannot_score_is_undefined(lab: CampaignBuilder) -> None:
    first: list[Any] = []

    def change(body: dict[str, Any], number: int, text: str) -> str:
        first[:] = first or [body["messages"]]
        return "none" if body["messages"] == first[0] else text

    with meddling_judge() as judge:
        judge.change = change
        page = run(campaign=lab.uri, judge_url=judge.url).files["report"].decode()
    read = read_evaluation(f"{lab.uri}/evaluations/iteration-000002")
    rows = [*read.base, *read.tuned]
    assert sum(row["judge_mean"] is None for row in rows if row["kind"] == "pictures") == 1
    assert "1 of its answers could not be used." in page


def test_a_judge_that_does_not_answer_is_refused_before_anything_is_sampled(lab: CampaignBuilder) -> None:
    runtime = "judge: {start_seconds: 0.1}"
    with pytest.raises(LayerloopError, match="http://127.0.0.1:9/v1"):
        run(campaign=lab.uri, judge_url="http://127.0.0.1:9/v1", runtime=runtime)
    with pytest.raises(LayerloopError, match="judge_url is 'nowhere': give a base URL"):
        run(campaign=lab.uri, judge_url="nowhere", runtime=runtime)
    assert not lab.store.list("evaluations/")
