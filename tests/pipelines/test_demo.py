"""What `layerloop demo` says last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.manifests import add_file
from layerloop.pipelines.demo import outcome_lines

BAD = {"base": 0.5, "tuned": 0.2, "difference": -0.3, "low": -0.4, "high": -0.2, "n": 24, "clear": True}


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    campaign = Campaign.create_or_open(str(tmp_path / "demo/campaign"), Recipe(name="demo"))
    commit(campaign, campaign.policy_dir(1), "policy", {"weights": b"w"})
    return campaign


def commit(campaign: Campaign, folder: str, kind: str, files: dict[str, bytes]) -> None:
    named = tuple(add_file(campaign.store, f"{folder}/{name}", data) for name, data in files.items())
    campaign.commit(folder, Manifest.model_validate({"kind": kind, "iteration": 1, "files": named}))


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, "0.500 -> 0.200 after 1 iterations, clearly fewer (24 designs; difference -0.300, 95 % -0.400 to -0.200)"),
        ({"difference": 0.1, "tuned": 0.6}, "0.500 -> 0.600 after 1 iterations, clearly more"),
        ({"clear": False}, "0.500 -> 0.200 after 1 iterations, no clear difference"),
    ],
)
def test_it_says_what_changed_as_the_report_calls_it(campaign: Campaign, change: dict[str, object], said: str) -> None:
    metrics = json.dumps({"designs.bad_layers": BAD | change, "method": "text"}).encode()
    commit(campaign, campaign.evaluation_dir("iteration-000001"), "evaluation", {"metrics.json": metrics})
    (line,) = outcome_lines(campaign, shown=Path("demo/campaign"))
    assert line.startswith("Changed: bad layers a held-out design ") and said in line


def test_it_says_what_to_try_next_with_the_adapter(campaign: Campaign) -> None:
    commit(campaign, campaign.published_dir("demo-000001"), "published", {"README.md": b"card"})
    (line,) = outcome_lines(campaign, shown=Path("demo/campaign"))
    assert line == ("Try next: layerloop decompose PICTURE --adapter demo/campaign/published/demo-000001 -o layers")
