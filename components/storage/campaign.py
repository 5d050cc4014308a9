"""A campaign: everything under one root URI, and the state that is derived from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe, recipe_differences, split_recipe
from layerloop.components.schema.record import DamagedError, seal, unseal
from layerloop.components.schema.runtime import Runtime
from layerloop.components.storage.manifests import commit, load, verify
from layerloop.components.storage.rollouts import committed_groups, manifest_name, sampled_groups
from layerloop.components.storage.runtime import read_runtime
from layerloop.components.storage.stores import LARGEST_RECORD, READS, MissingObjectError, Store, open_store

RECIPE = "recipe.json"
FOLDERS = ("sources", "iterations", "evaluations", "publications", "published", "lease", "runs", "refusals")
MANIFEST = "manifest.json"
BASE_COMMIT = "base_commit"  # of the sources' metadata: what `recipe.model.revision` of the hub was when they were made
_KINDS = {"sources": "sources", "evaluations": "evaluation", "published": "published"}  # by folder
_ITERATION = re.compile(r"\d{6}")
_PUBLICATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class Campaign:
    """A root URI with a frozen recipe, and the runtime of this process. Nothing is cached: every call reads
    the store."""

    def __init__(self, store: Store, recipe: Recipe, runtime: Runtime, *, recipe_sha256: str | None = None) -> None:
        """`recipe_sha256` is of the stored recipe.json; None where there is none yet."""
        self.store, self.recipe, self.runtime, self.uri = store, recipe, runtime, store.uri
        self.recipe_sha256 = recipe_sha256

    @classmethod
    def create_or_open(cls, uri: str, recipe: Recipe, runtime: str | Mapping[str, Any] = "") -> Campaign:
        """Freeze `recipe` as the campaign's, or open the campaign that was made with this very recipe.

        `runtime` is neither stored nor compared: see `read_runtime`.

        Raises:
            LayerloopError: the campaign was made with another recipe; the line lists the fields that differ. Or the
                runtime is not valid.
        """
        store = open_store(uri)
        check_free(store)
        store.create(RECIPE, seal(recipe.to_json()))
        opened = cls.open(uri, runtime)
        if different := recipe_differences(recipe, opened.recipe):
            raise LayerloopError(
                f"campaign {store.uri} was made with another recipe ({'; '.join(different)}): "
                "continue with its own, or give another campaign URI"
            )
        return opened

    @classmethod
    def open(cls, uri: str, runtime: str | Mapping[str, Any] = "") -> Campaign:
        """Open an existing campaign with `runtime` (see `read_runtime`).

        Raises:
            LayerloopError: there is no campaign at `uri`, or the runtime is not valid.
        """
        store = open_store(uri)
        recipe, stored, sha256 = _frozen_recipe(store)
        free = read_runtime(runtime, recipe, stored=stored, where=f"{store.uri}/{RECIPE}")
        return cls(store, recipe, free, recipe_sha256=sha256)

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

    def publication_dir(self, name: str) -> str:
        """Folder of what a publication's manifest names; `published_dir` has copies of it."""
        return f"publications/{name}"

    def publication_name(self, iteration: int) -> str:
        """What an iteration's publication is called where nobody says: the campaign's folder and the iteration.

        The recipe's name stands for a folder that has none to use, and where the iteration is published by it already,
        as earlier versions did.
        """
        earlier = f"{self.recipe.name}-{iteration:06d}"
        if self.store.exists(f"{self.published_dir(earlier)}/{MANIFEST}"):
            return earlier
        return f"{_folder_name(self.uri) or self.recipe.name}-{iteration:06d}"

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
        """The manifest committed in a folder such as `scores_dir(3)`, or None.

        Raises:
            LayerloopError: it is of another step, another iteration or another recipe.
        """
        name = f"{folder}/{MANIFEST}"
        manifest = load(self.store, name)
        if manifest is not None:
            self.check_origin(name, manifest)
        return manifest

    def already_committed(self, folder: str, *, log: Callable[[str], None]) -> Manifest | None:
        """The manifest that an earlier attempt committed in a folder, verified and logged; None where there is work.

        Every step starts with this call, and makes it again once it holds the campaign.

        Raises:
            LayerloopError: as `find`, or what the manifest names is missing or has another size.
        """
        done = self.find(folder)
        if done is not None:
            verify(self.store, done)
            log(f"{self.uri}/{folder} is complete already")
        return done

    def commit(self, folder: str, manifest: Manifest) -> Manifest:
        """Commit an output in its folder, with the recipe's hash in its metadata: see `manifests.commit`."""
        if self.recipe_sha256 is not None:
            metadata = {**manifest.metadata, "recipe_sha256": self.recipe_sha256}
            manifest = manifest.model_copy(update={"metadata": metadata})
        return commit(self.store, f"{folder}/{MANIFEST}", manifest)

    def check_origin(self, name: str, manifest: Manifest) -> None:
        """Refuse a manifest that does not belong where it lies.

        Raises:
            LayerloopError: it is of another step, another iteration or another recipe.
        """
        parts = name.split("/")
        kind = _KINDS.get(parts[0], parts[-2])
        iteration = int(parts[1]) if parts[0] == "iterations" else manifest.iteration
        if (manifest.kind, manifest.iteration) != (kind, iteration):
            raise LayerloopError(
                f"{self.uri}/{name} is of {manifest.kind} {manifest.iteration}, not of {kind} {iteration}: restore the "
                "right one"
            )
        made_with = manifest.metadata.get("recipe_sha256")
        if made_with is not None and self.recipe_sha256 is not None and made_with != self.recipe_sha256:
            raise LayerloopError(
                f"{self.uri}/{name} was made with a {RECIPE} of sha256 {made_with!s:.12}, it is now "
                f"{self.recipe_sha256:.12}: restore the {RECIPE} that the campaign began with"
            )

    def check_unfinished(self, iteration: int) -> None:
        """Refuse work on an iteration whose policy is committed: it has ended, whatever is there of it.

        Raises:
            LayerloopError: the iteration is neither sampled nor scored again.
        """
        if self.find(self.policy_dir(iteration)) is not None:
            raise LayerloopError(
                f"iteration {iteration} of {self.uri} has its policy, so it is not sampled or scored again: restore "
                f"what it lacks, or continue with iteration {self.head() + 1}"
            )

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
        folder = self.rollouts_dir(iteration)
        found = committed_groups(self.store, folder, iteration, groups)
        for group, manifest in found.items():
            self.check_origin(manifest_name(folder, group), manifest)
        return found

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


def check_free(store: Store) -> None:
    """Refuse to begin a campaign where something else lies, which would be taken for parts of it. Hidden files, and the
    `lost+found` of a volume, are nothing.

    Raises:
        LayerloopError: names the first thing found.
    """
    if store.exists(RECIPE):
        return
    for child in store.children():
        name = child.rstrip("/")
        if name and name not in (*FOLDERS, "lost+found") and not name.startswith("."):
            raise LayerloopError(
                f"{store.uri} holds {name[:80]!r}, which is not of a campaign: give an empty folder, or a new one below"
            )


def _frozen_recipe(store: Store) -> tuple[Recipe, dict[str, Any], str]:
    """The recipe, runtime values in it (recipe.json of earlier versions held both), and the sha256 of the file."""
    where = f"{store.uri}/{RECIPE}"
    for attempt in range(READS):
        try:
            data = store.read(RECIPE, most=LARGEST_RECORD)
            content = unseal(data, where=where)
            break
        except MissingObjectError:
            raise LayerloopError(f"{store.uri} is no campaign, for it has no {RECIPE}: {_remedy(store)}") from None
        except DamagedError:
            if attempt == READS - 1:
                raise
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    sha256 = hashlib.sha256(data).hexdigest()
    if not isinstance(value, dict):
        return Recipe.from_json(content, where=where), {}, sha256  # says what is wrong with it
    return *split_recipe(value, where=where), sha256


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(str(n) for n in dict.fromkeys(part)) for part in parts)


def _remedy(store: Store) -> str:
    """What to do where no campaign is: the campaigns right below it, where there are some."""
    below = [name for name in store.folders()[:50] if store.exists(f"{name}/{RECIPE}")]
    if below:
        return f"name one of those in it: {', '.join(below[:5])}{', ...' if len(below) > 5 else ''}"
    return "begin one with `layerloop run`, or correct the path or URI"


def _folder_name(uri: str) -> str:
    """The last folder of a campaign's URI that is more than "campaign", as a name to publish under; empty for none."""
    for part in reversed(uri.partition("://")[2].split("/") if "://" in uri else uri.split("/")):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._")[:80]
        if name and name.lower() not in ("campaign", "campaigns"):
            return name
    return ""


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
