"""The images of the groups, read from the train shards that hold them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.images import decode_png
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


def read_images(store: Store, sources: Manifest, wanted: Sequence[int]) -> Iterator[tuple[int, str, np.ndarray]]:
    """(number, key, `(H, W, 3 or 4)` uint8) of the wanted images of the train split, by ascending number.

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
                yield end - shard.samples + position, key, decode_png(members["png"])
