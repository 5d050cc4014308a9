"""Phase 2 as it is sent: rows in shuffled order, phase-1 scores, observations; and scores follow the candidates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from layerloop.components.reference_judge.rules import CRITERIA
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.campaign import Campaign

from .judges import group_and_order, is_phase2, meddling_judge, rows_of

MakeCampaign = Callable[..., Campaign]


@pytest.fixture
def meddling() -> Iterator[Any]:
    with meddling_judge() as judge:
        yield judge


def test_each_grid_has_its_rows_in_an_order_of_its_own_and_scores_follow_the_candidates(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(groups=2, size=5, canaries=False, phase2={"resolution": 32, "repeats": 2})
    orders: list[tuple[int, tuple[int, ...]]] = []

    def by_candidate(body: dict[str, Any], number: int, text: str) -> str:
        if not is_phase2(body):
            return text
        group, order = group_and_order(body, campaign)
        orders.append((group, tuple(order)))
        names = json.loads(text)["scores"]["candidate_1"]
        scores = {f"candidate_{row + 1}": dict.fromkeys(names, 4.5 - c) for row, c in enumerate(order)}
        return json.dumps({"scores": scores})

    meddling.change = by_candidate
    run(campaign=campaign.uri, judge_url=meddling.url)
    assert sorted(group for group, _ in orders) == [0, 0, 1, 1]
    assert len({order for _, order in orders}) == 4 and (0, 1, 2, 3, 4) not in {order for _, order in orders}
    assert all(sorted(order) == [0, 1, 2, 3, 4] for _, order in orders)
    for row in rows_of(campaign):
        assert row.phase2 is not None
        assert list(row.phase2.values()) == pytest.approx([(4.5 - row.candidate) / 5] * 5)


def test_pairs_are_shown_in_both_orders_and_wins_follow_the_candidates(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(groups=1, size=5, canaries=False, phase2={"resolution": 32, "method": "pairwise"})
    pairs: list[tuple[int, int]] = []

    def lower_wins(body: dict[str, Any], number: int, text: str) -> str:
        if not is_phase2(body):
            return text
        _, (upper, lower) = group_and_order(body, campaign)
        pairs.append((upper, lower))
        return json.dumps({"better": dict.fromkeys(json.loads(text)["better"], 1 if upper < lower else 2)})

    meddling.change = lower_wins
    run(campaign=campaign.uri, judge_url=meddling.url)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 10
    assert 2 <= sum(upper > lower for upper, lower in pairs) <= 8
    for row in rows_of(campaign):
        assert row.phase2 is not None
        assert list(row.phase2.values()) == pytest.approx([1 - row.candidate / 4] * 5)


def test_the_judge_is_given_the_phase1_scores_of_every_row_in_phase_2(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(groups=2, size=4, canaries=False)
    sent: list[dict[str, Any]] = []

    def record(body: dict[str, Any], number: int, text: str) -> str:
        if is_phase2(body):
            sent.append(body)
        return text

    meddling.change = record
    run(campaign=campaign.uri, judge_url=meddling.url)
    phase1 = {(row.group, row.candidate): row.phase1 or {} for row in rows_of(campaign)}
    assert len({tuple(scores.values()) for scores in phase1.values()}) > 2  # so that a wrong row is noticed
    assert len(sent) == 2
    for body in sent:
        group, order = group_and_order(body, campaign)
        lines = body["messages"][1]["content"][-1]["text"].splitlines()
        start = lines.index("First judgements:") + 1
        for row, candidate in enumerate(order):
            scores = ", ".join(f"{name} {5 * phase1[group, candidate][name]:.1f}" for name in CRITERIA)
            assert lines[start + row] == f"candidate {row + 1}: {scores}"


@pytest.mark.parametrize("observations", [False, True])
def test_observations_are_in_the_schema_that_a_strict_judge_is_held_to(
    observations: bool, make_campaign: MakeCampaign, meddling: Any
) -> None:
    sent: list[dict[str, Any]] = []
    meddling.change = lambda body, number, text: sent.append(body) or text
    run(campaign=make_campaign(groups=1, canaries=False, observations=observations).uri, judge_url=meddling.url)
    expected = ["observations", "scores"] if observations else ["scores"]
    assert len(sent) == 4 + 1
    for body in sent:
        schema = body["response_format"]["json_schema"]["schema"]
        assert list(schema["properties"]) == schema["required"] == expected  # before the numbers, so written first
        assert schema["additionalProperties"] is False
