"""From an input to a sample of the sources: one image or design at a time, on a few threads, in order."""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from layerloop.components.layers.normalise import image_key, on_white, resized, target_size, upright_srgb
from layerloop.components.layers.stack import Pixels, composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import counted, printable
from layerloop.components.schema.recipe import DataRecipe
from layerloop.components.shard_dataset.duplicates import DuplicateIndex, ImageHash, hash_image
from layerloop.components.shard_dataset.files import InputError, Passed
from layerloop.components.shard_dataset.items import Item, one_line
from layerloop.components.shard_dataset.layered import DesignItem
from layerloop.components.shard_dataset.spool import Spool
from layerloop.components.storage.images import decode_image, encode_png

T = TypeVar("T")
R = TypeVar("R")

_LOGGED = 5  # rejects named in the log


@dataclass(frozen=True)
class Prepared:
    """A normalised image, or composite of a design, ready to be a sample."""

    origin: str
    key: str
    image_hash: ImageHash
    members: dict[str, bytes]


@dataclass(frozen=True)
class Refused:
    """An input that was left out, and why: a reject is at fault, a duplicate and what is not read are not."""

    origin: str
    kind: Literal["reject", "duplicate", "passed over"]
    reason: str


@dataclass(frozen=True)
class Gathered:
    """Result for one kind of input: keys in the spool, and everything left out."""

    keys: list[str]  # sorted
    refused: list[Refused]  # rejects and duplicates

    @property
    def rejects(self) -> list[Refused]:
        """Inputs that cannot be used."""
        return [item for item in self.refused if item.kind == "reject"]

    @property
    def duplicates(self) -> int:
        """Number of duplicates."""
        return len(self.refused) - len(self.rejects)

    @property
    def seen(self) -> int:
        """Number of inputs read."""
        return len(self.keys) + len(self.refused)


def guarded(origin: str, load: Callable[[], T], work: Callable[[T], Prepared]) -> Prepared | Refused:
    """One input's sample, or why it has none, whatever it raises: an input that cannot be used ends no step.

    What a store raises that fails as a whole is no fault of the input, and does end the step: `load` lets it through.

    Raises:
        LayerloopError: from `load`, unless it is an InputError.
    """
    try:
        loaded = load()
    except InputError as error:
        return Refused(origin, "reject", printable(str(error)))
    except LayerloopError:
        raise
    except Exception as error:  # OSError and MemoryError of a single file
        return Refused(origin, "reject", f"file cannot be read ({_named(error)}): restore it, or make it smaller")
    try:
        return work(loaded)
    except LayerloopError as error:
        return Refused(origin, "reject", printable(str(error)))
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        return Refused(origin, "reject", f"image cannot be used ({_named(error)}): save it again")


def _named(error: Exception) -> str:
    text = one_line(error)
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"


def prepare_image(item: Item, data: DataRecipe) -> Prepared | Refused:
    """Decode, normalise and encode one image."""

    def work(loaded: bytes) -> Prepared:
        if item.problem is not None:
            raise LayerloopError(item.problem)
        image = decode_image(loaded, max_pixels=int(data.max_megapixels * 1e6))
        target_size(*image.size, data)  # refused before the work is done
        flat = on_white(upright_srgb(image))
        return _prepared(item.origin, resized(flat, data), hash_image(flat), flat.size)

    return guarded(item.origin, item.load, work)


def prepare_design(item: DesignItem) -> Prepared | Refused:
    """Render one design; its image is the composite of its layers."""

    def work(loaded: Any) -> Prepared:
        truth = item.render(loaded)
        layers = {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(truth.layers)}
        pixels = on_backdrop(composite(truth.layers), "white")
        facts = {"layers": len(layers), "truth": dict(truth.facts)}
        size = (pixels.shape[1], pixels.shape[0])
        return _prepared(item.origin, pixels, hash_image(pixels), size, facts, layers)

    return guarded(item.origin, item.load, work)


def gather(prepared: Iterable[Prepared | Refused], spool: Spool, index: DuplicateIndex, *, near: bool) -> Gathered:
    """Put new images into the spool, and record those left out.

    Args:
        index: every image seen, here and in earlier calls.
        near: leave out near-exact duplicates too, not only exact ones.
    """
    keys: list[str] = []
    refused: list[Refused] = []
    for item in prepared:
        if isinstance(item, Refused):
            refused.append(item)
            continue
        duplicate = index.find_duplicate(item.key, item.image_hash, near=near)
        if duplicate is not None:
            refused.append(Refused(item.origin, "duplicate", f"same image as {duplicate}"))
            continue
        index.add(item.key, item.image_hash, item.origin)
        spool.add(item.key, item.members)
        keys.append(item.key)
    return Gathered(sorted(keys), refused)


def check_rejects(gathered: Gathered, data: DataRecipe, *, what: str, log: Callable[[str], None]) -> None:
    """Log the first rejects; too many end the step.

    Raises:
        LayerloopError: more than `recipe.data.max_reject_fraction` of what was seen, or nothing is left.
    """
    rejects = gathered.rejects
    for item in rejects[:_LOGGED]:
        log(f"rejected {item.origin}: {item.reason}")
    if len(rejects) > _LOGGED:
        log(f"rejected {len(rejects) - _LOGGED} more {what}, listed in rejects.parquet")
    if len(rejects) > data.max_reject_fraction * gathered.seen:
        allowed = math.ceil(100 * len(rejects) / gathered.seen) / 100
        more = f", or allow as many with --set data.max_reject_fraction={allowed:g}" if gathered.keys else ""
        raise LayerloopError(
            f"{len(rejects)} of {counted(gathered.seen, what)} {'are' if len(rejects) > 1 else 'is'} rejected, over "
            f"recipe.data.max_reject_fraction {data.max_reject_fraction:g}: correct the input{more}; the first is "
            f"{rejects[0].origin}: {rejects[0].reason}"
        )


def account(gathered: Gathered, passed: Sequence[Passed], *, what: str) -> str:
    """One line of what became of everything: used, duplicates, rejects by reason, passed over by suffix."""
    by_sort: dict[str, list[str]] = {}
    for item in gathered.rejects:
        by_sort.setdefault(_sort_of(item.reason), []).append(item.reason)
    rejects = {sort if len(found) > 1 else _brief(found[0])[:80]: len(found) for sort, found in by_sort.items()}
    over = collections.Counter(item.kind for item in passed)
    return (
        f"{what}: {len(gathered.keys)} used, {counted(gathered.duplicates, 'duplicates')}, "
        f"{counted(len(gathered.rejects), 'rejects')}{_listed(rejects)}, {len(passed)} passed over{_listed(over)}"
    )


def _listed(parts: Mapping[str, int]) -> str:
    ranked = sorted(parts.items(), key=lambda part: (-part[1], part[0]))
    return f" ({', '.join(f'{count} {name}' for name, count in ranked)})" if ranked else ""


def _sort_of(reason: str) -> str:
    """A reason without what is this input's own: numbers, quotations, names, what is in brackets, and the remedy."""
    text = re.sub(r"b?'.*?'|b?\".*?\"", "...", _brief(reason))
    text = re.sub(r"[\d.,]*\d", "N", text)
    text = re.sub(r"element \S+ .*? has no image", "an element has no image", text)
    return re.sub(r"\S*/\S+", "...", text).replace("... ...", "...").replace(" ,", ",").strip()[:80]


def _brief(reason: str) -> str:
    """A reason without what stands in brackets, in which a library's own words may have some, and the remedy."""
    text = reason
    while (inner := re.sub(r"\s*\([^()]*\)", "", text)) != text:
        text = inner
    return text.partition(": ")[0].strip()


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


def _prepared(
    origin: str,
    pixels: Pixels,
    image_hash: ImageHash,
    original: tuple[int, int],
    facts: Mapping[str, Any] = {},
    layers: Mapping[str, bytes] = {},
) -> Prepared:
    height, width = pixels.shape[:2]
    record = {
        "origin": origin,
        "width": width,
        "height": height,
        "original_width": original[0],
        "original_height": original[1],
        **facts,
    }
    members = {"png": encode_png(pixels), "json": json.dumps(record, sort_keys=True).encode(), **layers}
    return Prepared(origin, image_key(pixels), image_hash, members)
