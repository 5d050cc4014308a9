"""A campaign with a committed adapter on a very small random base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign

from ..campaigns import CampaignBuilder, prompt_embeds

MakeCampaign = Callable[..., Campaign]


@pytest.fixture
def make_campaign(tiny_base: Path, tmp_path: Path) -> MakeCampaign:
    """`make_campaign(iterations=2, ema=False, ...)`: policies 1..iterations are committed, with sources and scores."""

    def make(
        *, iterations: int = 1, ema: bool = False, judge: str = "layerloop-reference-judge", **sections: Any
    ) -> Campaign:
        recipe = Recipe.model_validate(
            {
                "name": "shop",
                "model": {"base": str(tiny_base), "dtype": "float32"},
                "lora": {"rank": 4, "alpha": 8.0},  # a scale other than 1, so that losing it would show
            }
            | sections
        )
        lab = CampaignBuilder(Campaign.create_or_open(str(tmp_path / "campaign"), recipe))
        lab.sources()
        for iteration in range(1, iterations + 1):
            lab.adapter(iteration, scale=0.05, average=0.5 if ema else None)
            lab.scores(iteration, judge=judge, rubric_version="3")
        return lab.campaign

    return make


def velocity(policy: LayeredPolicy) -> torch.Tensor:
    h, w = policy.tokens(32, 48)
    seen = torch.randn(1, h * w, 64, generator=torch.Generator().manual_seed(1))
    condition = Condition(seen, prompt_embeds()[None].to(policy.dtype), 32, 48)
    with torch.no_grad():
        return policy.velocity(policy.noise(3, 2, 32, 48), 0.8, condition)
