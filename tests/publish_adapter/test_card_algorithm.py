"""The card names the algorithm that made the adapter, how it sampled, and its paper; and no other."""

from __future__ import annotations

import pytest
import yaml

from layerloop.components.publish_adapter.card import Publication, model_card
from layerloop.components.schema.learning import ALGORITHMS
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe


def card_of(**update: object) -> str:
    manifest = Manifest(kind="policy", iteration=3, metadata={"reward_mean": 0.5})
    recipe = Recipe.model_validate({"name": "r", "update": update, "rollout": {"outside": "euler", "steps": 12}})
    return model_card(
        Publication(
            name="layers", recipe=recipe, iteration=3, policy=manifest, first=manifest, averaged=False,
            parameters=1000, sha256="0" * 64, scores=[], evaluation=None, verification="Verified.",
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_card_names_its_algorithm_and_no_other(name: str) -> None:
    card = card_of(algorithm=name)
    tags = yaml.safe_load(card.split("---")[1])["tags"]
    for other, algorithm in ALGORITHMS.items():
        assert (algorithm.tag in tags) == (algorithm.title in card) == (algorithm.arxiv in card) == (other == name)


def test_a_card_says_what_was_set_and_how_was_sampled() -> None:
    grpo = card_of(algorithm="grpo", clip_low=0.001, clip_high=0.002, kl=0.5)
    assert "ratio norm `sum_rescale`, clip −0.001 / +0.002, gradient reweighting on, KL weight 0.5 |" in grpo
    assert "| 12 steps, flow_sde with eta 0.7 in a fixed window of 4 steps from step 0, euler outside it |" in grpo
    nft = card_of(algorithm="nft", nft={"beta": 0.5, "timesteps": 3, "weighting": "uniform"})
    assert "| DiffusionNFT, beta 0.5, 3 times a candidate, uniform weighting |" in nft
    assert "| Sampling | heun, 12 steps |" in nft, "final latents are sampled as at inference, whatever rollout.outside"
