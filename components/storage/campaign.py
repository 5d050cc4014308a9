"""A campaign: everything under one root URI, and the state that is derived from it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe, recipe_differences, split_recipe
from layerloop.components.schema.runtime import Runtime
from layerloop.components.storage.manifests import load
from layerloop.components.storage.rollouts import committed_groups, sampled_groups
from layerloop.components.storage.runtime import read_runtime
from layerloop.components.storage.stores import MissingObjectError, Store, open_store

RECIPE = "recipe.json"
MANIFEST = "manifest.json"
BASE_COMMIT = "base_commit"  # of the sources' metadata: what `recipe.model.revision` of the hub was when they were made
_ITERATION = re.compile(r"\d{6}")
_PUBLICATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class Campaign:
    """A root URI with a frozen recipe, and the runtime of this process. Nothing is cached: every call reads
    the store."""

    def __init__(self, store: Store, recipe: Recipe, runtime: Runtime) -> None:
        self.store, self.recipe, self.runtime, self.uri = store, recipe, runtime, store.uri

    @classmethod
    def create_or_open(cls, uri: str, recipe: Recipe, runtime: str | Mapping[str, Any] = "") -> Campaign:
        """Freeze `recipe` as the campaign's, or open the campaign that was made with this very recipe.

        `runtime` is neither stored nor compared: see `read_runtime`.

        Raises:
            LayerloopError: the campaign was made with another recipe; the line lists the fields that differ. Or the
                runtime is not valid.
        """
        store = open_store(uri)
        stored: dict[str, Any] = {}
        if not store.create(RECIPE, recipe.to_json()):
            frozen, stored = _frozen_recipe(store)
            if different := recipe_differences(recipe, frozen):
                raise LayerloopError(
                    f"campaign {store.uri} was made with another recipe ({'; '.join(different)}): "
                    "continue with its own, or give another campaign URI"
                )
        return cls(store, recipe, read_runtime(runtime, recipe, stored=stored, where=f"{store.uri}/{RECIPE}"))

    @classmethod
    def open(cls, uri: str, runtime: str | Mapping[str, Any] = "") -> Campaign:
        """Open an existing campaign with `runtime` (see `read_runtime`).

        Raises:
            LayerloopError: there is no campaign at `uri`, or the runtime is not valid.
        """
        store = open_store(uri)
        recipe, stored = _frozen_recipe(store)
        return cls(store, recipe, read_runtime(runtime, recipe, stored=stored, where=f"{store.uri}/{RECIPE}"))

    # Names, relative to the root.

    sources_dir = "sources"

    def rollouts_dir(self, iteration: int) -> str:
        """Folder of an iteration's rollouts."""
        return f"iterations/{iteration:06d}/rollouts"

    def scores_dir(self, iteration: int) -> str:
        """Folder of an iteration's scores."""
        return f"iterations/{iteration:06d}/scores"

    def policy_dir(self, iteration: int) -> str:
        """Folder of the policy after an iteration."""
        return f"iterations/{iteration:06d}/policy"

    def evaluation_dir(self, name: str) -> str:
        """Folder of an evaluation, such as `iteration-000003`."""
        return f"evaluations/{name}"

    def published_dir(self, name: str) -> str:
        """Folder of a published adapter."""
        return f"published/{name}"

    # Committed outputs.

    def iterations(self) -> list[int]:
        """Iterations with any object, committed or not, ascending."""
        return [int(name) for name in self.store.folders("iterations") if _ITERATION.fullmatch(name)]

    def head(self) -> int:
        """The highest iteration with a committed policy; 0 before the first."""
        committed = (n for n in reversed(self.iterations()) if self.store.exists(f"{self.policy_dir(n)}/{MANIFEST}"))
        return next(committed, 0)

    def open_iteration(self, iteration: int | None) -> int:
        """The iteration that a step of the training loop works on: `iteration`, by default the one after the head.

        Raises:
            LayerloopError: it is below 1.
        """
        current = self.head() + 1 if iteration is None else iteration
        if current < 1:
            raise LayerloopError(f"iteration is {current}: iterations count from 1")
        return current

    def find(self, folder: str) -> Manifest | None:
        """The manifest committed in a folder such as `scores_dir(3)`, or None."""
        return load(self.store, f"{folder}/{MANIFEST}")

    def sources(self) -> Manifest:
        """The committed sources.

        Raises:
            LayerloopError: they are not committed.
        """
        return self._committed(self.sources_dir, "shard_dataset")

    def scores(self, iteration: int) -> Manifest:
        """The committed scores of an iteration.

        Raises:
            LayerloopError: they are not committed.
        """
        return self._committed(self.scores_dir(iteration), "score_rollouts")

    def policy(self, iteration: int) -> Manifest:
        """The policy after an iteration; iteration 0 is the recipe's base, which needs no files.

        Raises:
            LayerloopError: it is not committed.
        """
        if iteration == 0:
            return Manifest(kind="policy", iteration=0)
        return self._committed(self.policy_dir(iteration), "update_lora")

    def rollouts(self, iteration: int) -> dict[int, Manifest]:
        """A manifest for each group of an iteration, by group.

        Raises:
            LayerloopError: groups are missing; the line names them.
        """
        found = self.committed_groups(iteration)
        planned = range(self.recipe.rollout.groups)
        if missing := [group for group in planned if group not in found]:
            raise LayerloopError(
                f"iteration {iteration} of {self.uri} lacks groups {_ranges(missing)} of {len(planned)}: run "
                "generate_rollouts for every worker"
            )
        return {group: found[group] for group in planned}

    def committed_groups(self, iteration: int, groups: Collection[int] | None = None) -> dict[int, Manifest]:
        """Manifests of the groups that are committed, by group, complete or not; only of `groups` if given."""
        return committed_groups(self.store, self.rollouts_dir(iteration), iteration, groups)

    def sampled_groups(self, iteration: int) -> list[int]:
        """Numbers of the groups that are committed; quicker than to read their manifests."""
        return sampled_groups(self.store, self.rollouts_dir(iteration), iteration)

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


def _frozen_recipe(store: Store) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and runtime values in it: recipe.json of earlier versions held both."""
    try:
        data = store.read(RECIPE)
    except MissingObjectError:
        raise LayerloopError(
            f"campaign {store.uri} has no {RECIPE}: start it with shard_dataset, or correct the URI"
        ) from None
    where = f"{store.uri}/{RECIPE}"
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return Recipe.from_json(data, where=where), {}  # says what is wrong with it
    return split_recipe(value, where=where)


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(str(n) for n in dict.fromkeys(part)) for part in parts)


def check_publication_name(name: str) -> None:
    """Refuse a name that is no folder under `published/`.

    Raises:
        LayerloopError: it is not 1 to 96 letters, digits, dots, dashes and underscores, or begins with a sign.
    """
    if not _PUBLICATION.fullmatch(name):
        raise LayerloopError(
            f"publish_as is {name!r}: give 1 to 96 letters, digits, dots, dashes or underscores, not beginning "
            "with a sign"
        )
