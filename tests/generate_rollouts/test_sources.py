"""Images of the sources, as rollouts read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from layerloop.components.generate_rollouts.sources import read_images
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.shards import write_shard
from layerloop.components.storage.stores import open_store


def test_an_image_that_cannot_be_read_is_named_with_its_shard(tmp_path: Path) -> None:
    store, sound = open_store(tmp_path), encode_png(np.zeros((32, 32, 3), np.uint8))
    samples = [("first", {"png": sound}), ("second", {"png": sound[:60]}), ("third", {"png": sound})]
    shard = write_shard(store, "sources/train-000000.tar", samples)
    sources = Manifest(kind="sources", shards=(shard,), counts={"images": 3})
    assert [key for _, key, _ in read_images(store, sources, [0, 2], Recipe(name="test"))] == ["first", "third"]
    with pytest.raises(LayerloopError, match=rf"^{tmp_path}/{shard.name}:second\.png: image is truncated"):
        list(read_images(store, sources, [1], Recipe(name="test")))
