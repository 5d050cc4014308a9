"""What `layerloop demo` says last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe, RolloutRecipe
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.manifests import add_file
from layerloop.pipelines.outcome import outcome_lines

BAD = {"base": 0.5, "tuned": 0.2, "difference": -0.3, "low": -0.4, "high": -0.2, "n": 24, "clear": True}


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    campaign = Campaign.create_or_open(
        str(tmp_path / "demo/campaign"), Recipe(name="demo", rollout=RolloutRecipe(min_layers=2, max_layers=2))
    )
    commit(campaign, campaign.policy_dir(1), "policy", {"weights": b"w"})
    return campaign


def commit(campaign: Campaign, folder: str, kind: str, files: dict[str, bytes]) -> None:
    named = tuple(add_file(campaign.store, f"{folder}/{name}", data) for name, data in files.items())
    campaign.commit(folder, Manifest.model_validate({"kind": kind, "iteration": 1, "files": named}))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {},
            "0.50 -> 0.20 after 1 iteration, clearly fewer (24 designs; 95 % interval of the difference -0.40 to "
            "-0.20)",
        ),
        ({"difference": 0.1, "tuned": 0.6}, "0.50 -> 0.60 after 1 iteration, clearly more"),
        ({"clear": False}, "0.50 -> 0.20 after 1 iteration, no clear difference"),
    ],
)
def test_it_says_what_changed_as_the_report_calls_it(campaign: Campaign, change: dict[str, object], said: str) -> None:
    metrics = json.dumps({"designs.bad_layers": BAD | change, "method": "text"}).encode()
    commit(campaign, campaign.evaluation_dir("iteration-000001"), "evaluation", {"metrics.json": metrics})
    (line,) = outcome_lines(campaign, shown="demo/campaign")
    assert line.startswith("Changed: bad layers a held-out design ") and said in line


def test_one_picture_is_told_without_an_interval_and_none_not_at_all(campaign: Campaign) -> None:
    one = BAD | {"n": 1, "low": None, "high": None, "clear": False}
    none = dict.fromkeys(BAD) | {"n": 0, "clear": False}
    metrics = json.dumps({"designs.bad_layers": none, "pictures.bad_layers": one}).encode()
    commit(campaign, campaign.evaluation_dir("iteration-000001"), "evaluation", {"metrics.json": metrics})
    assert outcome_lines(campaign, shown="x") == [
        "Changed: bad layers a held-out picture 0.50 -> 0.20 after 1 iteration, no clear difference (1 picture)"
    ]


@pytest.mark.parametrize(
    ("on_path", "typed"), [(True, "layerloop"), (False, "venv/bin/layerloop"), (None, "venv/bin/layerloop")]
)
def test_it_says_what_to_try_next_as_it_can_be_typed(
    campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_path: bool | None, typed: str
) -> None:
    """On the path of the shell is ours, another environment's, or none."""
    for folder in ("venv/bin", "other/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "layerloop").write_text(f"#!/bin/sh\n# {folder}")
        (tmp_path / folder / "layerloop").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv/bin/python"))
    monkeypatch.setenv("PATH", "" if on_path is None else str(tmp_path / ("venv/bin" if on_path else "other/bin")))
    commit(campaign, campaign.published_dir("demo-000001"), "published", {"README.md": b"card"})
    (line,) = outcome_lines(campaign, shown="my demo/campaign/")
    assert line == (
        f"Try next: {typed} decompose PICTURE --layers 2 --adapter 'my demo/campaign/published/demo-000001' -o layers"
    )
