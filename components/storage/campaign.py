"""A campaign: everything under one root URI, and what follows from what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe, recipe_differences, split_recipe
from layerloop.components.schema.runtime import Runtime
from layerloop.components.storage.manifests import load
from layerloop.components.storage.runtime import read_runtime
from layerloop.components.storage.stores import MissingObjectError, Store, open_store

RECIPE = "recipe.json"
MANIFEST = "manifest.json"
_WORKER = re.compile(r"w(\d+)of(\d+)\.json")
_ITERATION = re.compile(r"\d{6}")


class Campaign:
    """A root URI with a frozen recipe, and the runtime of this process. Nothing is cached: every question is put to the
    store."""

    def __init__(self, store: Store, recipe: Recipe, runtime: Runtime) -> None:
        self.store, self.recipe, self.runtime, self.uri = store, recipe, runtime, store.uri

    @classmethod
    def create_or_open(cls, uri: str, recipe: Recipe, runtime: str | Mapping[str, Any] = "") -> Campaign:
        """Freeze `recipe` as the campaign's, or open the campaign that was made with this very recipe.

        `runtime` is never kept and never compared: see `read_runtime`.

        Raises:
            LayerloopError: the campaign was made with another recipe; the line lists the fields that differ. Or the
                runtime is none.
        """
        store = open_store(uri)
        stored: dict[str, Any] = {}
        if not store.create(RECIPE, recipe.to_json()):
            frozen, stored = _frozen_recipe(store)
            if different := recipe_differences(recipe, frozen):
                raise LayerloopError(
                    f"campaign {store.uri} was made with another recipe ({'; '.join(different)}): "
                    "go on with its own, or give another campaign URI"
                )
        return cls(store, recipe, read_runtime(runtime, recipe, stored=stored, where=f"{store.uri}/{RECIPE}"))

    @classmethod
    def open(cls, uri: str, runtime: str | Mapping[str, Any] = "") -> Campaign:
        """An existing campaign, to be worked on with `runtime` (`read_runtime`).

        Raises:
            LayerloopError: there is none, or the runtime is none.
        """
        store = open_store(uri)
        recipe, stored = _frozen_recipe(store)
        return cls(store, recipe, read_runtime(runtime, recipe, stored=stored, where=f"{store.uri}/{RECIPE}"))

    # Names, relative to the root.

    sources_dir = "sources"

    def rollouts_dir(self, iteration: int) -> str:
        return f"iterations/{iteration:06d}/rollouts"

    def scores_dir(self, iteration: int) -> str:
        return f"iterations/{iteration:06d}/scores"

    def policy_dir(self, iteration: int) -> str:
        return f"iterations/{iteration:06d}/policy"

    def evaluation_dir(self, name: str) -> str:
        return f"evaluations/{name}"

    def published_dir(self, name: str) -> str:
        return f"published/{name}"

    # What is committed.

    def iterations(self) -> list[int]:
        """Iterations of which anything is there, committed or not, ascending."""
        return [int(name) for name in self.store.folders("iterations") if _ITERATION.fullmatch(name)]

    def head(self) -> int:
        """The highest iteration with a committed policy; 0 before the first."""
        committed = (k for k in reversed(self.iterations()) if self.store.exists(f"{self.policy_dir(k)}/{MANIFEST}"))
        return next(committed, 0)

    def find(self, folder: str) -> Manifest | None:
        """The manifest committed in a folder such as `scores_dir(3)`, or None."""
        return load(self.store, f"{folder}/{MANIFEST}")

    def sources(self) -> Manifest:
        return self._committed(self.sources_dir, "shard_dataset")

    def scores(self, iteration: int) -> Manifest:
        return self._committed(self.scores_dir(iteration), "score_rollouts")

    def policy(self, iteration: int) -> Manifest:
        """The policy after an iteration; iteration 0 is the recipe's base, which needs no files."""
        if iteration == 0:
            return Manifest(kind="policy", iteration=0)
        return self._committed(self.policy_dir(iteration), "update_lora")

    def worker_manifests(self, iteration: int) -> dict[tuple[int, int], Manifest]:
        """Committed rollout manifests by (workers, worker), whether or not they cover all groups."""
        folder = self.rollouts_dir(iteration)
        found: dict[tuple[int, int], Manifest] = {}
        for name in self.store.list(f"{folder}/w"):
            match = _WORKER.fullmatch(name.rpartition("/")[2])
            manifest = load(self.store, name) if match else None
            if match and manifest:
                found[int(match[2]), int(match[1])] = manifest
        return dict(sorted(found.items()))

    def rollouts(self, iteration: int) -> list[Manifest]:
        """Worker manifests that together hold every group exactly once.

        An iteration resumed with another number of workers has manifests of several layouts. Groups do not depend on
        the layout, so any exact cover will do; the complete layout of the fewest workers is preferred.

        Raises:
            LayerloopError: groups are missing; the line names them.
        """
        manifests = list(self.worker_manifests(iteration).values())
        covers = [_groups(manifest, self.uri) for manifest in manifests]
        wanted = frozenset(range(self.recipe.rollout.groups))
        chosen = exact_cover(covers, wanted)
        if chosen is not None:
            return [manifests[index] for index in chosen]
        missing = sorted(wanted.difference(*covers))
        what = f"lacks groups {_ranges(missing)} of {len(wanted)}" if missing else "has overlapping worker layouts"
        raise LayerloopError(
            f"iteration {iteration} of {self.uri} {what}: run generate_rollouts for every worker of one --workers"
        )

    def evaluations(self) -> list[str]:
        """Names with a committed evaluation."""
        return self._names("evaluations")

    def published(self) -> list[str]:
        """Names of published adapters."""
        return self._names("published")

    def bytes_under(self, folder: str = "") -> int:
        """Size of everything in a folder, committed or not, in bytes."""
        return sum(self.store.sizes(f"{folder}/" if folder else "").values())

    def _names(self, folder: str) -> list[str]:
        return [name for name in self.store.folders(folder) if self.store.exists(f"{folder}/{name}/{MANIFEST}")]

    def _committed(self, folder: str, step: str) -> Manifest:
        manifest = self.find(folder)
        if manifest is None:
            raise LayerloopError(f"{self.uri}/{folder} is not committed: run {step} first")
        return manifest


def exact_cover(covers: Sequence[frozenset[int]], wanted: frozenset[int]) -> list[int] | None:
    """Indices of covers that are disjoint and make up `wanted`, or None. Earlier covers are preferred.

    Depth-first on the smallest group not covered yet; what was found impossible is remembered. Every worker layout has
    one cover with that group, so there are as many branches as layouts, which are few.
    """
    impossible: set[frozenset[int]] = set()

    def search(left: frozenset[int]) -> list[int] | None:
        if not left:
            return []
        if left in impossible:
            return None
        first = min(left)
        for index, cover in enumerate(covers):
            if first in cover and cover <= left:
                rest = search(left - cover)
                if rest is not None:
                    return [index, *rest]
        impossible.add(left)
        return None

    return search(wanted)


def _frozen_recipe(store: Store) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the runtime's values in it: recipe.json held them once."""
    try:
        data = store.read(RECIPE)
    except MissingObjectError:
        raise LayerloopError(
            f"campaign {store.uri} has no {RECIPE}: begin it with shard_dataset, or correct the URI"
        ) from None
    where = f"{store.uri}/{RECIPE}"
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return Recipe.from_json(data, where=where), {}  # says what is wrong with it
    return split_recipe(value, where=where)


def _groups(manifest: Manifest, uri: str) -> frozenset[int]:
    groups = manifest.metadata.get("groups")
    if not isinstance(groups, list) or not all(isinstance(g, int) for g in groups):
        raise LayerloopError(f"a rollouts manifest of {uri} has no metadata.groups: delete it to have it made again")
    return frozenset(g for g in groups if isinstance(g, int))


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(str(n) for n in dict.fromkeys(part)) for part in parts)
