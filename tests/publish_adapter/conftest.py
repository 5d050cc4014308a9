"""A campaign with a committed adapter on a very small random base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from layerloop.components.policy.adapters import Adapter
from layerloop.components.policy.lora import adapter_of, add_lora, write_peft
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.tiny import build_tiny_pipeline, save_pipeline
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import add_file, commit

MakeCampaign = Callable[..., Campaign]


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole diffusers folder, as users of the published adapter have one."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_pipeline(build_tiny_pipeline(vae_dim=8, blocks=2, heads=1, head_dim=16), folder)
    return folder


def trained(policy: LayeredPolicy, recipe: Recipe, seed: int) -> Adapter:
    """An adapter with values in both factors, as training leaves it; `policy` keeps it on."""
    add_lora(policy.transformer, recipe.lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.trainable_parameters().items():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return adapter_of(policy.transformer)


@pytest.fixture
def make_campaign(pipeline_folder: Path, tmp_path: Path) -> MakeCampaign:
    """`make_campaign(iterations=2, ema=False, ...)`: policies 1..iterations are committed, with sources and scores."""

    def make(
        *, iterations: int = 1, ema: bool = False, judge: str = "layerloop-reference-judge", **sections: Any
    ) -> Campaign:
        recipe = Recipe.model_validate(
            {
                "name": "shop",
                "model": {"base": str(pipeline_folder), "dtype": "float32"},
                "lora": {"rank": 4, "alpha": 8.0},  # a scale other than 1, so that losing it would show
            }
            | sections
        )
        place = Campaign.create_or_open(str(tmp_path / "campaign"), recipe)
        embeds = save({"prompt_embeds": torch.randn(7, 16, generator=torch.Generator().manual_seed(5))})
        prompt = add_file(place.store, "sources/prompt.safetensors", embeds)
        commit(place.store, f"sources/{MANIFEST}", Manifest(kind="sources", files=(prompt,)))
        for k in range(1, iterations + 1):
            commit_policy(place, k, ema=ema)
            scores = {"judge": judge, "rubric": "default", "rubric_version": "3"}
            commit(
                place.store,
                f"{place.scores_dir(k)}/{MANIFEST}",
                Manifest(kind="scores", iteration=k, metadata=scores),
            )
        return place

    return make


def commit_policy(place: Campaign, k: int, *, ema: bool) -> None:
    policy = LayeredPolicy.load(place.recipe.model)
    adapter = trained(policy, place.recipe, seed=k)
    with tempfile.TemporaryDirectory() as temporary:
        write_peft(adapter, temporary, transformer=policy.transformer, base="base")
        names = ["adapter_model.safetensors", "adapter_config.json"]
        data = {name: (Path(temporary) / name).read_bytes() for name in names}
    if ema:
        data["ema.safetensors"] = save({key: 0.5 * value for key, value in load(data[names[0]]).items()})
    folder = place.policy_dir(k)
    files = tuple(add_file(place.store, f"{folder}/{name}", content) for name, content in data.items())
    facts = {
        "adapter_sha256": files[0].sha256,
        "base_fingerprint": policy.fingerprint,
        "reward_mean": 0.4 + 0.1 * k,
    }
    manifest = Manifest(kind="policy", iteration=k, files=files, metadata=facts)
    commit(place.store, f"{folder}/{MANIFEST}", manifest)
