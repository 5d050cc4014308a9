"""The images of the groups, read from the train shards that hold them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from layerloop.components.layers.stack import resize
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.images import read_png
from layerloop.components.storage.shards import read_shard
from layerloop.components.storage.stores import Store


def train_images(sources: Manifest) -> int:
    """Number of images in the train split.

    Raises:
        LayerloopError: the train split is empty.
    """
    count = sum(shard.samples for shard in sources.shards_of("train"))
    if not count:
        raise LayerloopError("the campaign's sources have no train images: start a campaign with more images")
    return count


def read_images(
    store: Store, sources: Manifest, wanted: Sequence[int], recipe: Recipe
) -> Iterator[tuple[int, str, np.ndarray]]:
    """(number, key, `(H, W, 3 or 4)` uint8) of the wanted images of the train split, by ascending number, in the size
    that the recipe samples.

    Each shard that holds one of them is read once.
    """
    numbers = sorted(set(wanted))
    shards = sources.shards_of("train")
    ends = list(itertools.accumulate(shard.samples for shard in shards))
    for shard, end in zip(shards, ends, strict=True):
        inside = [number - (end - shard.samples) for number in numbers if end - shard.samples <= number < end]
        if not inside:
            continue
        for position, (key, members) in enumerate(read_shard(store, shard, required=("png",))):
            if position in inside:
                image = read_png(members, "png", where=f"{store.uri}/{shard.name}:{key}")
                yield (
                    end - shard.samples + position,
                    key,
                    resize(image, sampled_size(image.shape[0], image.shape[1], recipe)),
                )


def sampled_size(height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """(width, height) in which an image of the sources is sampled: its own, or with `recipe.rollout.resolution` the
    longest side of that many pixels, each side rounded to `recipe.data.multiple`, one of it at least."""
    if recipe.rollout.resolution is None:
        return width, height
    multiple, scale = recipe.data.multiple, min(1.0, recipe.rollout.resolution / max(height, width))
    w, h = (max(1, round(side * scale / multiple)) * multiple for side in (width, height))
    return w, h
