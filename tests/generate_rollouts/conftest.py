"""A campaign with sources, made without the step that makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign

from ..campaigns import CampaignBuilder, save_tiny_base


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layered model of two blocks of 64 channels."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "base", heads=2, head_dim=32, seed=3)


MakeCampaign = Callable[..., Campaign]


@pytest.fixture
def make_campaign(base_folder: Path, tmp_path: Path) -> MakeCampaign:
    """`make_campaign(uri=..., sizes=..., rollout={...}, ...)`: a campaign of a random tiny policy with five images."""
    made = 0

    def make(
        *,
        uri: str | None = None,
        sizes: tuple[tuple[int, int], ...] = ((32, 48), (48, 32)),
        **sections: dict[str, object],
    ) -> Campaign:
        nonlocal made
        made += 1
        rollout = {"groups": 4, "group_size": 3, "steps": 4, "min_layers": 1, "max_layers": 3}
        model = {"base": str(base_folder), "dtype": "float32"} | sections.pop("model", {})
        recipe = Recipe.model_validate(
            {
                "name": "test",
                "model": model,
                "lora": {"rank": 2},
                **sections,
                "rollout": rollout | {"window": {"size": 2}} | sections.pop("rollout", {}),
            }
        )
        campaign = Campaign.create_or_open(uri or str(tmp_path / f"campaign{made}"), recipe)
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (*sizes[n % len(sizes)], 3), dtype=np.uint8) for n in range(5)]
        CampaignBuilder(campaign).sources(train=images, per_shard=2, tokens=11)  # as many as the recipe's own
        return campaign

    return make
