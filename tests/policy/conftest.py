"""A tiny policy with random weights: the real classes, everything but the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.prompt import embed_prompt
from layerloop.components.schema.recipe import ModelRecipe

from ..campaigns import save_tiny_base


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a two-block policy, 16 pixels a token."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "base", heads=2, head_dim=32, seed=3)


@pytest.fixture(scope="session")
def base_recipe(random_folder: Path) -> ModelRecipe:
    return ModelRecipe(base=str(random_folder), dtype="float32")


@pytest.fixture(scope="session")
def frozen_policy(base_recipe: ModelRecipe) -> LayeredPolicy:
    """Shared by tests that leave it as it is."""
    return LayeredPolicy.load(base_recipe)


@pytest.fixture
def policy(base_recipe: ModelRecipe) -> LayeredPolicy:
    """One that a test may change."""
    return LayeredPolicy.load(base_recipe)


@pytest.fixture(scope="session")
def prompt_embeds(base_recipe: ModelRecipe) -> torch.Tensor:
    return embed_prompt(base_recipe)


def sample_image(height: int = 64, width: int = 64, *, seed: int = 0) -> np.ndarray:
    """`(H, W, 3)` uint8: smooth colour with a disc, so that the latents are neither flat nor noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    image = np.stack([a * x + b * y + c for a, b, c in rng.uniform(-0.5, 0.5, (3, 3))], axis=-1) + 0.5
    image[(x - 0.4) ** 2 + (y - 0.4) ** 2 < 0.05] = rng.uniform(size=3)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


@pytest.fixture(scope="session")
def condition(frozen_policy: LayeredPolicy, prompt_embeds: torch.Tensor) -> Condition:
    return frozen_policy.encode(sample_image()[None], prompt_embeds)


@pytest.fixture(scope="session")
def make_image():  # type: ignore[no-untyped-def]
    return sample_image


def shake_adapter(transformer: torch.nn.Module, *, seed: int = 0, scale: float = 0.05) -> None:
    """Give the adapter's B matrices values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


@pytest.fixture(scope="session")
def shake():  # type: ignore[no-untyped-def]
    return shake_adapter
