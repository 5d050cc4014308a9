"""What `layerloop campaign show` says of an iteration under way."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.pipelines.show import campaign_text

from ..campaigns import CampaignBuilder, drawn_group, lay_out_by_worker


@pytest.fixture
def builder(tmp_path: Path) -> CampaignBuilder:
    recipe = Recipe.model_validate({"name": "test", "rollout": {"groups": 6, "group_size": 2}})
    return CampaignBuilder(Campaign.create_or_open(str(tmp_path / "campaign"), recipe))


def row(builder: CampaignBuilder) -> list[str]:
    """Iteration, groups, candidates, state."""
    (line,) = (line for line in campaign_text(builder.uri).splitlines() if line.split()[:1] == ["1"])
    number, groups, candidates, *state, _, _ = line.split()
    return [number, groups, candidates, " ".join(state)]


def test_groups_that_are_committed_are_counted(builder: CampaignBuilder) -> None:
    builder.put([drawn_group(group) for group in (0, 1, 4)])
    builder.store.write(f"{builder.campaign.rollouts_dir(1)}/g000002.tar", b"not committed")
    assert row(builder) == ["1", "3", "6", "3 of 6 groups sampled"]


def test_groups_of_workers_of_an_earlier_version_are_counted(builder: CampaignBuilder) -> None:
    builder.put([drawn_group(group) for group in range(6)])
    lay_out_by_worker(builder.campaign, 1, workers=3, complete=[2])
    assert row(builder) == ["1", "2", "4", "2 of 6 groups sampled"]


def test_an_iteration_of_which_no_group_is_committed_has_begun(builder: CampaignBuilder) -> None:
    builder.store.write(f"{builder.campaign.rollouts_dir(1)}/g000002.tar", b"not committed")
    assert row(builder) == ["1", "0", "0", "begun"]
