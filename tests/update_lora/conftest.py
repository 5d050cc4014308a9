"""Campaigns with real rollouts of a very small random policy, and rewards made up by the test."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save

from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.shards import Sample

from ..campaigns import CampaignBuilder

G = 4
WINDOW = 2


def nan_in_the_last_group(samples: list[Sample]) -> list[Sample]:
    """Spoil one latent of one candidate of the last group."""
    members = samples[-1][1]
    tensors = load(members["trajectory.safetensors"])
    tensors["window"][1, 2, 3] = math.nan
    members["trajectory.safetensors"] = save(tensors)
    return samples


MakeLab = Callable[..., CampaignBuilder]


@pytest.fixture(autouse=True)
def _runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quick on a small base; a test may give its step another one."""
    runtime = {"update": {"microbatch": 8}, "model": {"gradient_checkpointing": False}}
    monkeypatch.setenv("LAYERLOOP_RUNTIME", json.dumps(runtime))


@pytest.fixture
def make_lab(tiny_base: Path, tmp_path: Path) -> MakeLab:
    """`make_lab(name, update={...}, rollout={...})`: a campaign with sources, before its first iteration."""

    def make(name: str = "campaign", *, update: dict[str, Any] | None = None, **sections: Any) -> CampaignBuilder:
        rollout_section = {
            "groups": 4, "group_size": G, "min_layers": 1, "max_layers": 2, "steps": 5, "outside": "euler",
            "window": {"size": WINDOW, "start": 0}, "noise": {"eta": 0.7},
        }  # fmt: skip
        recipe = Recipe.model_validate(
            {
                "name": "lab",
                "model": {"base": str(tiny_base), "dtype": "float32"} | sections.pop("model", {}),
                "rollout": rollout_section | sections.pop("rollout", {}),
                "lora": {"rank": 2, "alpha": 2.0},
                "update": {"learning_rate": 1e-3, **(update or {})},
            }
            | sections
        )
        lab = CampaignBuilder(Campaign.create_or_open(str(tmp_path / name), recipe))
        lab.sources()
        return lab

    return make


@pytest.fixture
def lab(make_lab: MakeLab) -> CampaignBuilder:
    """A campaign whose first iteration is sampled and scored."""
    lab = make_lab()
    lab.ready(1)
    return lab
