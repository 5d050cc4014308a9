"""A campaign with sources, made without the step that makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.tiny import build_tiny_pipeline, save_pipeline
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import ModelRecipe, Recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.manifests import add_file, commit
from layerloop.components.storage.shards import write_shard


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(build_tiny_pipeline(vae_dim=8, blocks=2, heads=2, seed=3), folder)
    return folder


@pytest.fixture(scope="session")
def prompt(base_folder: Path) -> bytes:
    policy = LayeredPolicy.load(ModelRecipe(base=str(base_folder), dtype="float32"), text_encoder=True)
    return save({"prompt_embeds": policy.embed_prompt(ModelRecipe().prompt)})


def write_sources(campaign: Campaign, prompt: bytes, *, images: int = 5, sizes: tuple[tuple[int, int], ...]) -> None:
    rng = np.random.default_rng(0)
    pictures = [
        (f"{index:016x}", {"png": encode_png(rng.integers(0, 256, (*sizes[index % len(sizes)], 3), dtype=np.uint8))})
        for index in range(images)
    ]
    shards = [
        write_shard(campaign.store, f"sources/train-{n:06d}.tar", pictures[start : start + 2])
        for n, start in enumerate(range(0, images, 2))
    ]
    file = add_file(campaign.store, "sources/prompt.safetensors", prompt)
    commit(campaign.store, "sources/manifest.json", Manifest(kind="sources", shards=tuple(shards), files=(file,)))


@pytest.fixture
def make_campaign(base_folder: Path, prompt: bytes, tmp_path: Path) -> Callable[..., Campaign]:
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
                **sections,
                "rollout": rollout | {"window": {"size": 2}} | sections.pop("rollout", {}),
            }
        )
        campaign = Campaign.create_or_open(uri or str(tmp_path / f"campaign{made}"), recipe)
        write_sources(campaign, prompt, sizes=sizes)
        return campaign

    return make
