"""From an input to a sample of the sources: one picture or design at a time, on a few threads, in order."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from layerloop.components.layers.stack import Pixels, composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import DataRecipe
from layerloop.components.shard_dataset.duplicates import Gallery, Look, look_at
from layerloop.components.shard_dataset.inputs import Item
from layerloop.components.shard_dataset.layered import DesignItem
from layerloop.components.shard_dataset.normalise import image_key, normalise
from layerloop.components.shard_dataset.spool import Spool
from layerloop.components.storage.images import decode_image, encode_png

T = TypeVar("T")
R = TypeVar("R")

_SHOWN = 5  # rejects named in the log


@dataclass(frozen=True)
class Prepared:
    """A normalised picture, or composite of a design, ready to be a sample."""

    origin: str
    key: str
    look: Look
    members: dict[str, bytes]


@dataclass(frozen=True)
class Refused:
    """What was left out, and why. A duplicate is not at fault; a reject is."""

    origin: str
    kind: Literal["reject", "duplicate"]
    reason: str


@dataclass(frozen=True)
class Gathered:
    """What became of one kind of input: keys in the spool, and everything left out."""

    keys: list[str]  # sorted
    refused: list[Refused]

    @property
    def rejects(self) -> list[Refused]:
        return [item for item in self.refused if item.kind == "reject"]

    @property
    def duplicates(self) -> int:
        return len(self.refused) - len(self.rejects)

    @property
    def seen(self) -> int:
        return len(self.keys) + len(self.refused)


def prepare_picture(item: Item, data: DataRecipe) -> Prepared | Refused:
    """Decode, normalise and encode one picture."""
    loaded = item.load()  # a store that fails is no fault of the picture, and ends the step
    try:
        if item.problem is not None:
            raise LayerloopError(item.problem)
        image = decode_image(loaded, max_pixels=int(data.max_megapixels * 1e6))
        pixels = normalise(image, data)
    except LayerloopError as error:
        return Refused(item.origin, "reject", str(error))
    return _prepared(item.origin, pixels, image.size, {})


def prepare_design(item: DesignItem) -> Prepared | Refused:
    """Render one design; its picture is the composite of its layers."""
    try:
        stack = item.render()
    except LayerloopError as error:
        return Refused(item.origin, "reject", str(error))
    layers = {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(stack)}
    pixels = on_backdrop(composite(stack), "white")
    return _prepared(item.origin, pixels, (pixels.shape[1], pixels.shape[0]), layers)


def gather(prepared: Iterable[Prepared | Refused], spool: Spool, gallery: Gallery, *, near: bool) -> Gathered:
    """Put what is new into the spool, and note what was left out.

    Args:
        gallery: every picture seen, here and by earlier calls.
        near: leave out near-exact duplicates too, not only exact ones.
    """
    keys: list[str] = []
    refused: list[Refused] = []
    for item in prepared:
        if isinstance(item, Refused):
            refused.append(item)
            continue
        twin = gallery.twin_of(item.key, item.look, near=near)
        if twin is not None:
            refused.append(Refused(item.origin, "duplicate", f"same picture as {twin}"))
            continue
        gallery.add(item.key, item.look, item.origin)
        spool.add(item.key, item.members)
        keys.append(item.key)
    return Gathered(sorted(keys), refused)


def check_rejects(gathered: Gathered, data: DataRecipe, *, what: str, log: Callable[[str], None]) -> None:
    """Log the first rejects; too many end the step.

    Raises:
        LayerloopError: more than `recipe.data.max_reject_fraction` of what was seen, or nothing is left.
    """
    rejects = gathered.rejects
    for item in rejects[:_SHOWN]:
        log(f"rejected {item.origin}: {item.reason}")
    if len(rejects) > _SHOWN:
        log(f"rejected {len(rejects) - _SHOWN} more {what}, listed in rejects.parquet")
    if len(rejects) > data.max_reject_fraction * gathered.seen:
        raise LayerloopError(
            f"{len(rejects)} of {gathered.seen} {what} are rejected, over recipe.data.max_reject_fraction "
            f"{data.max_reject_fraction:g}: correct the input or allow more; the first is {rejects[0].origin}: "
            f"{rejects[0].reason}"
        )


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map`, lazily, on up to 8 threads (Pillow works outside the interpreter's lock), with few items in flight."""
    threads = min(8, os.cpu_count() or 1)
    waiting: collections.deque[Future[R]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepared(origin: str, pixels: Pixels, original: tuple[int, int], layers: dict[str, bytes]) -> Prepared:
    height, width = pixels.shape[:2]
    record = {
        "origin": origin,
        "width": width,
        "height": height,
        "original_width": original[0],
        "original_height": original[1],
        **({"layers": len(layers)} if layers else {}),
    }
    members = {"png": encode_png(pixels), "json": json.dumps(record, sort_keys=True).encode(), **layers}
    return Prepared(origin, image_key(pixels), look_at(pixels), members)
