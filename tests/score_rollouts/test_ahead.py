"""Candidates that are judged before their group is committed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from layerloop.components.judge.endpoint import Endpoint
from layerloop.components.schema.errors import UnavailableError
from layerloop.components.score_rollouts import ahead as limits
from layerloop.components.score_rollouts.ahead import Ahead, Arrivals
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.rollouts import read_groups

from .judges import meddling_judge, rows_of

MakeCampaign = Callable[..., Campaign]
SIZE = 4


class LateGroup(Arrivals):
    """The campaign's only group, which is committed when the judge has answered `replies` times about it."""

    def __init__(self, campaign: Campaign, replies: int) -> None:
        super().__init__()
        self.campaign, self.replies = campaign, replies
        (group,) = read_groups(campaign.store, campaign.rollouts(1), layers=True)
        self.image, self.stacks = group.image(), np.stack([candidate.stack() for candidate in group.candidates])
        self.name = f"{campaign.rollouts_dir(1)}/g000000.json"
        self.manifest = campaign.store.read(self.name)
        self.forget()

    def forget(self) -> None:
        """Leave the campaign without the group, and without scores."""
        for name in (self.name, *self.campaign.store.list(f"{self.campaign.scores_dir(1)}/")):
            self.campaign.store.delete(name)

    def sampled(self, *parts: range, blank: bool = False) -> None:
        stacks = np.zeros_like(self.stacks) if blank else self.stacks
        for part in parts:
            self.put(Ahead(1, 0, part.start, self.image, stacks[part.start : part.stop]))

    def answered(self) -> int:
        return len(self.campaign.store.list(f"{self.campaign.scores_dir(1)}/replies/"))

    def wait(self) -> None:
        super().wait()
        if self.answered() >= self.replies:
            self.campaign.store.write(self.name, self.manifest)


@pytest.fixture
def plain(
    make_campaign: MakeCampaign, judge_url: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Campaign, dict[str, float]]:
    """A campaign that was judged with its group there from the first, and the metrics of that."""
    monkeypatch.setattr(limits, "LOOK_SECONDS", 0.02)
    campaign = make_campaign(groups=1, size=SIZE, canaries=False, artifact_penalty=0.1, retries=1, give_up_seconds=0.5)
    return campaign, run(campaign=campaign.uri, judge_url=judge_url).metrics


def counts(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "seconds" not in name}


def test_candidates_are_judged_before_their_group_is_there_and_are_not_asked_about_again(
    plain: tuple[Campaign, dict[str, float]], judge_url: str
) -> None:
    campaign, metrics = plain
    expected = rows_of(campaign)
    late = LateGroup(campaign, replies=SIZE)
    late.sampled(range(1), range(1, SIZE))
    found = run(late, campaign=campaign.uri, judge_url=judge_url).metrics
    assert rows_of(campaign) == expected
    assert counts(found) == counts(metrics) and found["judge_requests"] == SIZE + 1


def test_what_was_judged_ahead_does_not_count_where_other_pixels_were_committed(
    plain: tuple[Campaign, dict[str, float]], judge_url: str
) -> None:
    """Another attempt at the group was faster."""
    campaign, _ = plain
    expected = rows_of(campaign)
    late = LateGroup(campaign, replies=1)
    late.sampled(range(SIZE), blank=True)
    found = run(late, campaign=campaign.uri, judge_url=judge_url).metrics
    assert rows_of(campaign) == expected
    assert found["judge_requests"] > SIZE + 1


def test_where_too_many_wait_the_judge_has_them_with_their_group(
    plain: tuple[Campaign, dict[str, float]], judge_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign, metrics = plain
    expected = rows_of(campaign)
    late = LateGroup(campaign, replies=0)
    monkeypatch.setattr(limits, "MOST_BYTES", late.stacks.nbytes - 1)
    late.sampled(range(SIZE))
    assert not late._kept
    found = run(late, campaign=campaign.uri, judge_url=judge_url).metrics
    assert rows_of(campaign) == expected and counts(found) == counts(metrics)


def test_candidates_of_the_next_iteration_are_kept_for_it() -> None:
    arrivals, taken = Arrivals(), list[int]()
    pixels = np.zeros((1, 1, 2, 2, 4), np.uint8)
    for iteration in (3, 2, 1):
        arrivals.put(Ahead(iteration, 0, 0, pixels[0, 0], pixels))
    arrivals.listen(2, lambda ahead: taken.append(ahead.iteration))
    arrivals.put(Ahead(2, 0, 0, pixels[0, 0], pixels))
    arrivals.stop()
    arrivals.put(Ahead(2, 0, 0, pixels[0, 0], pixels))
    assert taken == [2, 2]
    arrivals.listen(3, lambda ahead: taken.append(ahead.iteration))
    assert taken == [2, 2, 3]


def test_a_judge_that_is_gone_while_groups_are_missing_ends_the_step(
    plain: tuple[Campaign, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for the group, which will not come where the sampler ends with it."""
    campaign, _ = plain
    late = LateGroup(campaign, replies=1000)
    late.sampled(range(SIZE))

    async def gone(endpoint: Endpoint) -> bool:
        return False

    monkeypatch.setattr(Endpoint, "is_alive", gone)
    with meddling_judge() as judge, ThreadPoolExecutor() as pool:
        judge.change = lambda body, number, text: None  # it fails
        judged = pool.submit(run, late, campaign=campaign.uri, judge_url=judge.url)
        try:
            with pytest.raises(UnavailableError, match="answered nothing"):
                judged.result(timeout=30)
        finally:
            late.replies = 0  # so that a step that waits ends
