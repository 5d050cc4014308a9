"""Pictures made here, and what a step needs besides them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.storage.campaign import Campaign

from ..campaigns import save_tiny_base


@pytest.fixture
def encoded(draw_image: Callable[..., Image.Image]) -> Callable[..., bytes]:
    """The bytes of such an image in some format."""

    def encode(seed: int = 0, kind: str = "PNG", width: int = 96, height: int = 64, **options: object) -> bytes:
        buffer = io.BytesIO()
        draw_image(seed, width, height).save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def folder(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """A folder of seven different images, three of them in a subfolder."""
    root = tmp_path / "pictures"
    for seed in range(7):
        path = root / ("more" if seed > 3 else "") / f"{seed}.{'jpg' if seed % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(seed, "JPEG" if seed % 2 else "PNG"))
    return root


RECIPE = """
name: test
seed: 5
model: {base: /no/such/model, dtype: float32}
data: {resolution: 64, images_per_shard: 3, holdout: 2, max_reject_fraction: 0.5}
"""


@pytest.fixture
def recipe() -> str:
    return RECIPE


@pytest.fixture
def with_prompt() -> Callable[..., str]:
    """Begin a campaign and put a prompt embedding into it, as an interrupted run leaves it: then no model is loaded."""

    def put(uri: str, recipe: str = RECIPE) -> str:
        from safetensors.numpy import save

        opened = Campaign.create_or_open(uri, parse_recipe(recipe))
        opened.store.write("sources/prompt.safetensors", save({"prompt_embeds": np.ones((3, 4), np.float32)}))
        return uri

    return put


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layered model of one block, all of whose text side is dead, and 16 pixels a token."""
    return save_tiny_base(tmp_path_factory.mktemp("one-block") / "base", blocks=1)


@pytest.fixture
def base(one_block: Path, tmp_path: Path) -> Path:
    """The model of one block in a folder that the test may change."""
    return Path(shutil.copytree(one_block, tmp_path / "base"))


@pytest.fixture
def local_campaign(tmp_path: Path, with_prompt: Callable[..., str]) -> str:
    """A folder for a campaign that needs no model."""
    return with_prompt(f"{tmp_path}/campaign")


@pytest.fixture
def campaign_uri(store_uri: str, with_prompt: Callable[..., str]) -> str:
    """A URI for a campaign, in a folder and on S3, that needs no model."""
    return with_prompt(f"{store_uri}/campaign")
