"""Everything a recipe can ask of the judge, end to end against the reference judge over HTTP."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.judge.canaries import make_canaries
from layerloop.components.judge.images import encode_image, fitted
from layerloop.components.layers.flags import flags_of
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.campaign import Campaign

from .judges import in_order, meddling_judge, rows_of, stacks_of

MakeCampaign = Callable[..., Campaign]


@pytest.fixture
def meddling() -> Iterator[Any]:
    with meddling_judge() as judge:
        yield judge


@pytest.mark.parametrize(
    "judge",
    [
        {"phase2": {"enabled": False}},
        {"extraction": "expected"},
        {"method": "checklist", "extraction": "expected"},
        {"phase2": {"resolution": 32, "method": "pairwise"}},
        {"phase2": {"resolution": 32, "max_candidates": 3, "overlap": 1, "repeats": 2}},
        {"phase2": {"resolution": 32, "max_megapixels": 0.02}},
        {"aggregation": "log", "observations": True},
        {"samples": 2, "temperature": 0.7},
        {"backdrops": ["white"]},
        {"backdrops": ["white", "checker"]},
        {"canaries": False},
        {"batch": {"enabled": True, "poll_seconds": 0.1, "linger_seconds": 0.5}},
    ],
    ids=lambda judge: "-".join(judge),
)
def test_every_way_of_judging_puts_the_better_first(
    judge: dict[str, Any], make_campaign: MakeCampaign, judge_url: str
) -> None:
    campaign = make_campaign(groups=2, size=4, **judge)
    result = run(campaign=campaign.uri, judge_url=judge_url)
    rows = rows_of(campaign)
    assert len(rows) == 8 and in_order(rows)
    assert all(row.reason is None for row in rows)
    assert ("canary_agreement" in result.metrics) == judge.get("canaries", True)


def test_a_rubric_of_ones_own_needs_the_texts_of_its_methods_before_anything_is_asked(
    make_campaign: MakeCampaign, meddling: Any, tmp_path: Path
) -> None:
    shipped = (resources.files("layerloop.components.judge") / "rubrics" / "default.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(re.sub(r"\n(pairwise|checklist): \|\n(  .*\n)+", "\n", shipped))
    campaign = make_campaign(groups=1, rubric=str(mine))
    assert len(rows_of_run(campaign, meddling.url)) == 4
    asked = meddling.asked
    for name in campaign.store.list():
        campaign.store.delete(name)
    campaign = make_campaign(groups=1, rubric=str(mine), phase2={"resolution": 32, "method": "pairwise"})
    with pytest.raises(LayerloopError, match="has no text pairwise, which recipe.judge.phase2.method pairwise needs"):
        run(campaign=campaign.uri, judge_url=meddling.url)
    assert meddling.asked == asked


def rows_of_run(campaign: Campaign, url: str) -> list[ScoreRow]:
    run(campaign=campaign.uri, judge_url=url)
    rows = rows_of(campaign)
    assert in_order(rows)
    return rows


def test_canaries_agree_with_the_reference_judge_and_do_not_drift(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign(resolution=192)  # the canaries' own; at 32 the bad ones look alike
    result = run(campaign=campaign.uri, judge_url=judge_url)
    assert result.metrics["canary_agreement"] == result.metrics["canary_agreement_phase2"] == 1.0
    assert result.metrics["canary_injection_gain"] == 0.0 and result.metrics["canaries_failed"] == 0
    canaries = result.manifests["scores"].metadata["canaries"]
    assert isinstance(canaries, dict) and len(canaries) == 7


def test_a_judge_that_obeys_writing_in_images_is_seen_in_every_iteration(
    make_campaign: MakeCampaign, meddling: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    injected = next(canary for canary in make_canaries() if canary.name == "injected")
    written = encode_image(fitted(injected.source, 32)).url.decode()

    def obey(body: dict[str, Any], number: int, text: str) -> str:
        if written not in json.dumps(body):
            return text
        return json.dumps({"scores": dict.fromkeys(json.loads(text)["scores"], 5)})

    meddling.change = obey
    result = run(campaign=make_campaign(groups=1).uri, judge_url=meddling.url)
    assert result.metrics["canary_injection_gain"] > 0.5 and result.metrics["canary_agreement"] < 1.0
    said = capsys.readouterr()
    assert "the judge obeys text inside images" in said.out + said.err


def test_a_step_that_is_killed_resumes_without_repeating_a_paid_request(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(groups=4, size=4, canaries=False, concurrency=2, timeout_factor=0)
    reached = threading.Event()

    def slowly(body: dict[str, Any], number: int, text: str) -> str:
        if number >= 8:  # the rest of the first run hangs
            reached.set()
            hang.wait(60)
        return text

    hang = threading.Event()
    meddling.change = slowly
    command = [sys.executable, "-m", "layerloop.components.score_rollouts"]
    with subprocess.Popen([*command, "--campaign", campaign.uri, "--judge-url", meddling.url]) as step:
        assert reached.wait(120)
        step.send_signal(signal.SIGKILL)
    hang.set()
    stored = [name for name in campaign.store.list(f"{campaign.scores_dir(1)}/replies/") if "/batches/" not in name]
    assert campaign.find(campaign.scores_dir(1)) is None and 6 <= len(stored) <= 8
    meddling.change = lambda body, number, text: text
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    assert result.metrics["judge_cache_hits"] == len(stored)
    assert result.metrics["judge_requests"] == 4 * (4 + 1) - len(stored)
    assert in_order(rows_of(campaign))


def test_a_failed_judgement_is_a_mask_and_the_others_go_on(make_campaign: MakeCampaign, meddling: Any) -> None:
    campaign = make_campaign(groups=2, size=4, retries=0, canaries=False, concurrency=1, give_up_seconds=1e6)
    meddling.change = lambda body, number, text: None if number == 1 else text
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    masked = [row for row in rows_of(campaign) if row.reward is None]
    assert len(masked) == 1 and masked[0].reason is not None and masked[0].reason.startswith("phase1: http_500")
    assert masked[0].phase1 is None and masked[0].phase2 is None
    assert result.metrics["candidates_masked"] == 1 and result.metrics["groups_dropped"] == 0
    assert result.manifests["scores"].metadata["masks"] == {"phase1: http_500": 1}


def test_a_group_without_enough_valid_candidates_is_dropped_whole_and_counted(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(
        groups=4, size=3, retries=0, canaries=False, min_valid=3, concurrency=1, give_up_seconds=1e6
    )
    meddling.change = lambda body, number, text: None if number == 0 else text
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    rows = rows_of(campaign)
    dropped = {row.group for row in rows if row.reward is None}
    assert len(dropped) == 1 and result.metrics["groups_dropped"] == 1
    reasons = sorted(row.reason or "" for row in rows if row.group in dropped)
    assert reasons[:2] == ["group: 2 of 3 candidates are valid"] * 2 and reasons[2].startswith("phase1: http_500")


def test_too_many_dropped_groups_fail_the_step_in_one_line(make_campaign: MakeCampaign, meddling: Any) -> None:
    campaign = make_campaign(groups=2, size=3, retries=0, canaries=False, give_up_seconds=1e6)
    meddling.change = lambda body, number, text: "I would rather not say."
    with pytest.raises(LayerloopError, match=r"2 of 2 groups have fewer than 2 valid.*phase1: no_json") as caught:
        run(campaign=campaign.uri, judge_url=meddling.url)
    assert "\n" not in str(caught.value)
    assert campaign.find(campaign.scores_dir(1)) is None


def test_dropped_groups_beyond_the_recipes_share_fail_the_step(make_campaign: MakeCampaign, meddling: Any) -> None:
    campaign = make_campaign(
        groups=3, size=2, retries=0, canaries=False, concurrency=1, give_up_seconds=1e6, max_dropped_fraction=0.3
    )
    meddling.change = lambda body, number, text: None if number == 0 else text
    with pytest.raises(LayerloopError, match=r"1 of 3 groups have fewer than 2 valid.*max_dropped_fraction 0\.3"):
        run(campaign=campaign.uri, judge_url=meddling.url)
    assert campaign.find(campaign.scores_dir(1)) is None


def test_a_judge_that_goes_away_fails_the_step_and_loses_nothing(make_campaign: MakeCampaign, meddling: Any) -> None:
    campaign = make_campaign(groups=2, size=4, retries=3, canaries=False, concurrency=1, give_up_seconds=0.0)
    meddling.change = lambda body, number, text: text if number < 5 else None
    with pytest.raises(LayerloopError, match="run the step again when it is back"):
        run(campaign=campaign.uri, judge_url=meddling.url)
    assert campaign.find(campaign.scores_dir(1)) is None
    meddling.change = lambda body, number, text: text
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    assert result.metrics["judge_cache_hits"] == 5
    assert result.metrics["judge_requests"] == 2 * (4 + 1) - 5
    assert in_order(rows_of(campaign))


def test_a_judge_that_prefers_the_first_row_is_seen(make_campaign: MakeCampaign, meddling: Any) -> None:
    def favour(body: dict[str, Any], number: int, text: str) -> str:
        scores = json.loads(text)["scores"]
        if "candidate_1" in scores:
            for row, label in enumerate(scores):
                scores[label] = {name: max(0.0, 4.5 - row) for name in scores[label]}
        return json.dumps({"scores": scores})

    campaign = make_campaign(groups=4, size=4, canaries=False)
    meddling.change = favour
    biased = run(campaign=campaign.uri, judge_url=meddling.url)
    assert biased.metrics["position_share_beyond_chance"] > 0.9


def test_the_judges_doubt_lowers_the_weight_of_a_group(make_campaign: MakeCampaign, meddling: Any) -> None:
    def waver(body: dict[str, Any], number: int, text: str) -> str:
        scores = json.loads(text)["scores"]
        if "candidate_1" in scores:
            for index, label in enumerate(scores):
                scores[label] = dict.fromkeys(scores[label], 2.5 + 2 * (-1) ** (index + number))
        return json.dumps({"scores": scores})

    campaign = make_campaign(
        groups=1, size=4, canaries=False, uncertainty_weighting=True, phase2={"resolution": 32, "repeats": 4}
    )
    meddling.change = waver
    run(campaign=campaign.uri, judge_url=meddling.url)
    rows = rows_of(campaign)
    assert all(row.weight < 0.9 and row.uncertainty is not None and row.uncertainty > 0.1 for row in rows)


def test_a_steady_judge_gives_full_weight(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign(groups=1, uncertainty_weighting=True, phase2={"resolution": 32, "repeats": 2})
    run(campaign=campaign.uri, judge_url=judge_url)
    for row in rows_of(campaign):
        assert row.uncertainty is not None and row.uncertainty < 0.01  # it was measured, over the two repeats
        assert 0.99 < row.weight <= 1.0


def test_the_artifact_penalty_is_taken_off_and_shown(make_campaign: MakeCampaign, judge_url: str) -> None:
    def rewards(**judge: Any) -> tuple[list[ScoreRow], list[float]]:
        campaign = make_campaign(groups=2, size=3, canaries=False, **judge)
        run(campaign=campaign.uri, judge_url=judge_url)
        found, shares = rows_of(campaign), []
        for source, stacks in stacks_of(campaign):
            shares += [float(flags_of(stack, source).bad.mean()) for stack in stacks]
        for name in campaign.store.list():
            campaign.store.delete(name)
        return found, shares

    (plain, shares), (fined, _) = rewards(), rewards(artifact_penalty=0.6)
    assert 0 in shares and any(share > 0.2 for share in shares)
    assert all(row.penalty == 0 for row in plain)
    assert [row.penalty for row in fined] == pytest.approx([0.6 * share for share in shares])
    for before, after in zip(plain, fined, strict=True):
        assert before.reward is not None and (before.reward > after.penalty or after.reward == 0.0)
        assert after.reward == pytest.approx(max(0.0, before.reward - after.penalty))


def test_prices_give_a_cost(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign(groups=1, canaries=False, price={"input": 2.0, "output": 10.0})
    metrics = run(campaign=campaign.uri, judge_url=judge_url).metrics
    tokens = 2.0 * metrics["judge_tokens_input"] + 10.0 * metrics["judge_tokens_output"]
    assert metrics["judge_cost"] == pytest.approx(tokens / 1e6) and metrics["judge_cost"] > 0
