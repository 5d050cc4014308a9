"""A campaign with a committed adapter on a very small random base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign

from ..campaigns import CampaignBuilder

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
