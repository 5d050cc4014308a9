"""The cases of an evaluation: held-out designs with their true layers, and unlabelled images, each with its seed.

Their pixels stay encoded in a scratch file and are decoded where they are needed, so memory does not grow with their
number.
"""

from __future__ import annotations

import bisect
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from layerloop.components.layers.stack import Pixels, on_backdrop
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.seeds import seed_for
from layerloop.components.storage.images import decode_png, open_image

if TYPE_CHECKING:
    from layerloop.components.schema.manifest import Manifest
    from layerloop.components.schema.recipe import EvaluationRecipe
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.shards import Sample
    from layerloop.components.storage.spool import Spool, Spooled

Kind = Literal["designs", "pictures"]
UNLABELLED_LAYERS = 4  # of unlabelled images, as the released model is used


@dataclass(frozen=True)
class Case:
    """One image to decompose. Base and adapter start from the noise of the same `seed`."""

    key: str
    kind: Kind
    layers: int
    seed: int
    size: tuple[int, int]  # (H, W)
    members: Mapping[str, bytes] = field(repr=False)  # PNGs: `png`, and of a design `layer0.png` ..., bottom first
    origin: str = ""  # where its image came from, for people: a path or URI, a tar's member, a table's row

    @property
    def source(self) -> Pixels:
        """The image `(H, W, 3)`, decoded anew each time."""
        return on_backdrop(decode_png(self.members["png"]), "white")

    @property
    def truth(self) -> Pixels | None:
        """A design's true layers `(L, H, W, 4)`, straight RGBA, bottom first, decoded anew each time; None of others.

        Raises:
            LayerloopError: a layer is not RGBA of the image's size.
        """
        if self.kind != "designs":
            return None
        layers = [decode_png(self.members[f"layer{index}.png"]) for index in range(self.layers)]
        if any(layer.shape != (*self.size, 4) for layer in layers):
            raise LayerloopError(
                f"design {self.key} is {list(self.size)} and its layers {[list(layer.shape) for layer in layers]}: "
                "shard the designs again"
            )
        return np.stack(layers)

    @property
    def title(self) -> str:
        """The name of its file, or of its folder of layers, as people know it; the beginning of its key without one."""
        origin = self.origin.split("?")[0] if "://" in self.origin else self.origin
        name = origin.rstrip("/").rpartition("/")[2].rpartition(".tar:")[2]
        return name or self.key[:8]

    @property
    def name(self) -> str:
        """Its key in shards and tables: an image may be decomposed into several layer counts."""
        return f"{self.key}-l{self.layers:02d}"

    @property
    def geometry(self) -> tuple[int, int, int]:
        """(L, H, W): cases that agree in it can be sampled in one batch."""
        return (self.layers, *self.size)


@dataclass(frozen=True)
class Cases:
    """All cases of an evaluation, ordered by kind and geometry, and the held-out images that were left out."""

    cases: tuple[Case, ...]
    left_out: Mapping[str, int]  # reason -> number of held-out images
    truth: Mapping[str, int] = field(default_factory=dict)  # sums of what the sources say of the designs (truth.py)

    def of(self, kind: Kind) -> list[Case]:
        """The cases of one kind, in order."""
        return [case for case in self.cases if case.kind == kind]


def read_cases(campaign: Campaign, sources: Manifest) -> Cases:
    """The held-out images that the recipe's evaluation asks for.

    Designs are taken at their own layer count, when that is one of `recipe.evaluation.layers`, and evenly over the
    counts. Unlabelled images, of the benchmark where the campaign has one, are taken at 4 layers, or at the most that
    the recipe evaluates. Within a count, images
    come in the order of their keys, which are content hashes: an arbitrary choice, the same for every adapter.

    Raises:
        LayerloopError: nothing is held out, or a shard is damaged.
    """
    from layerloop.components.storage.shards import read_shard  # not of the processes that measure
    from layerloop.components.storage.spool import Spool

    recipe, seed = campaign.recipe.evaluation, campaign.recipe.seed
    spool = Spool()

    def samples(split: str, members: Iterable[str]) -> Iterator[Sample]:
        for shard in sources.shards_of(split):
            yield from read_shard(campaign.store, shard, required=tuple(members))

    chosen, left_out = _choose_designs(samples("designs", ("png", "layer0.png")), recipe, spool)
    layers = UNLABELLED_LAYERS if UNLABELLED_LAYERS in recipe.layers else max(recipe.layers)
    split = "benchmark" if sources.shards_of("benchmark") else "holdout"
    unlabelled = _First(recipe.pictures, spool)
    for key, members in samples(split, ("png",)):
        unlabelled.offer(key, members)
    if unlabelled.seen > recipe.pictures:
        left_out["images beyond recipe.evaluation.pictures"] = unlabelled.seen - recipe.pictures
    cases = [_case(key, "designs", _layer_count(members), members, seed) for key, members in chosen]
    cases += [_case(key, "pictures", layers, members, seed) for key, members in unlabelled.kept]
    if not cases:
        raise LayerloopError(
            f"{campaign.uri} holds out nothing that recipe.evaluation asks for: begin a campaign with designs, "
            "or with recipe.data.holdout and recipe.evaluation.pictures of 1 or more"
        )
    ordered = sorted(cases, key=lambda case: (case.kind, case.geometry, case.key))
    return Cases(tuple(ordered), left_out, _truth_facts(members for _, members in chosen))


def batches(cases: Iterable[Case], size: int) -> Iterator[list[Case]]:
    """Cases of one geometry, at most `size` together, in order."""
    batch: list[Case] = []
    for case in cases:
        if batch and (len(batch) == size or batch[0].geometry != case.geometry):
            yield batch
            batch = []
        batch.append(case)
    if batch:
        yield batch


class _First:
    """Of the samples that are offered the first `most` by key, spooled."""

    def __init__(self, most: int, spool: Spool) -> None:
        self.kept: list[tuple[str, Spooled]] = []  # in the order of their keys
        self.seen = 0
        self._most, self._spool = most, spool

    def offer(self, key: str, members: Mapping[str, bytes]) -> None:
        self.seen += 1
        if self._most and (len(self.kept) < self._most or key < self.kept[-1][0]):
            bisect.insort(self.kept, (key, self._spool.add(members)), key=lambda sample: sample[0])
            del self.kept[self._most :]


def _choose_designs(
    samples: Iterable[Sample], recipe: EvaluationRecipe, spool: Spool
) -> tuple[list[tuple[str, Spooled]], dict[str, int]]:
    """`recipe.designs` samples, evenly over the layer counts, and how many were left out, by reason."""
    by_count = {count: _First(recipe.designs, spool) for count in sorted(set(recipe.layers))}
    other = 0
    for key, members in samples:
        if (count := _layer_count(members)) in by_count:
            by_count[count].offer(key, members)
        else:
            other += 1
    chosen: list[tuple[str, Spooled]] = []
    for rank in range(recipe.designs):
        for group in by_count.values():
            if rank < len(group.kept) and len(chosen) < recipe.designs:
                chosen.append(group.kept[rank])
    left_out, seen = {}, sum(group.seen for group in by_count.values())
    if other:
        left_out[f"designs with other than {_joined_by_or(by_count)} layers"] = other
    if seen > len(chosen):
        left_out["designs beyond recipe.evaluation.designs"] = seen - len(chosen)
    return chosen, left_out


def _layer_count(members: Mapping[str, bytes]) -> int:
    count = 0
    while f"layer{count}.png" in members:
        count += 1
    return count


def _truth_facts(designs: Iterable[Mapping[str, bytes]]) -> Counter[str]:
    """Sums over the designs of what their records say of their true layers; `designs` counts those that say it."""
    found: Counter[str] = Counter()
    for members in designs:
        facts = json.loads(members.get("json", b"{}")).get("truth")
        found.update({**facts, "designs": 1, "rows": int("text_previews" in facts)} if facts else {"untold": 1})
    return found


def _case(key: str, kind: Kind, layers: int, members: Mapping[str, bytes], seed: int) -> Case:
    width, height = open_image(members["png"]).size
    origin = str(json.loads(members.get("json", b"{}")).get("origin", ""))
    return Case(key, kind, layers, seed_for(seed, "evaluation", key, layers), (height, width), members, origin)


def _joined_by_or(numbers: Iterable[int]) -> str:
    *most, last = [str(number) for number in numbers]
    return f"{', '.join(most)} or {last}" if most else last
