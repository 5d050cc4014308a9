"""Turn images into a campaign's sources: decode, normalise, drop duplicates and what cannot be read, set some pictures
aside for evaluation, embed the prompt, write shards, and commit.

Nothing is written before the recipe has been found good: a campaign freezes it with the first file.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.progress import log, progress
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.schema.recipe import Recipe, parse_recipe_runtime
from layerloop.components.schema.runtime import Runtime, flat
from layerloop.components.schema.seeds import seed_for
from layerloop.components.shard_dataset.base import CheckedBase
from layerloop.components.shard_dataset.duplicates import Gallery
from layerloop.components.shard_dataset.inputs import Inputs, absolute_uri, find_inputs, read_items
from layerloop.components.shard_dataset.layered import find_designs, read_designs
from layerloop.components.shard_dataset.pictures import (
    Gathered,
    Refused,
    check_rejects,
    gather,
    in_order,
    prepare_design,
    prepare_picture,
)
from layerloop.components.shard_dataset.spool import Spool
from layerloop.components.storage.campaign import MANIFEST, RECIPE, Campaign
from layerloop.components.storage.manifests import add_file, already_committed, commit, describe_file
from layerloop.components.storage.runtime import read_runtime
from layerloop.components.storage.shards import existing_shard, write_shard
from layerloop.components.storage.stores import open_store, read_uri

PROMPT = f"{Campaign.sources_dir}/prompt.safetensors"


def run(*, campaign: str, recipe: str, images: str = "", designs: str = "", runtime: str = "") -> StepResult:
    """Shard a campaign's images: normalised, without duplicates, with the prompt's embedding beside them.

    The first run freezes the recipe, once the base and the images were checked and the prompt is embedded, so that a
    recipe that was refused can be mended. A campaign that has its sources already is left as it is: then images may be
    left out, and may not be other pictures than the first run's.

    Args:
        campaign: Root URI of the campaign, a folder or s3://bucket/prefix.
        recipe: The recipe as YAML text, or the path or URI of a YAML file.
        images: A folder (all the way down) or glob of pictures, WebDataset tars, or parquet with an image column; local
            or s3://.
        designs: Designs with their true layers, to evaluate on: parquet in Crello's columns, or a folder with a
            subfolder of numbered PNG layers for each. Optional.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults. Of the recipe's, what later steps would not get is refused.

    Raises:
        LayerloopError: nothing at `images`, too many that cannot be read, a base that the recipe does not fit, another
            recipe or other images than the campaign's, or a store that cannot be written to. Nothing is committed then.
    """
    chosen, moved = read_recipe(recipe)
    store = open_store(campaign)
    begun = Campaign.create_or_open(campaign, chosen, runtime) if store.exists(RECIPE) else None
    place = begun or Campaign(store, chosen, read_runtime(runtime, chosen))  # not kept yet
    check_nothing_lost(moved, place.runtime)
    done = already_committed(store, f"{begun.sources_dir}/{MANIFEST}", log=log) if begun else None
    if begun and done:
        check_same_inputs(done, images=images, designs=designs)
        return _result(begun, done)

    if not images.strip():
        raise LayerloopError(f"images is empty and {store.uri} has no sources yet: give a folder of pictures")
    pictures = find_inputs(images, what="images")
    if f"{store.uri}/".startswith(f"{pictures.uri}/"):
        raise LayerloopError(f"campaign {store.uri} lies inside images {images}: choose a folder outside")
    layered = find_designs(designs) if designs.strip() else None
    store.check_writable()
    base = None if begun and store.exists(PROMPT) else CheckedBase.of(chosen, place.runtime.model)

    with Spool() as spool:
        # Designs come first: a picture that shows one of them would leak it into training, and is dropped as its twin.
        gallery = Gallery(chosen.data.duplicate_bits)
        truths = _gather_designs(layered, chosen, spool, gallery)
        found = _gather_pictures(pictures, chosen, spool, gallery)
        check_rejects(truths, chosen.data, what="designs", log=log)
        check_rejects(found, chosen.data, what="images", log=log)
        train, holdout = hold_out(found.keys, chosen.data.holdout, chosen.seed)
        if not train:
            raise LayerloopError(f"images {images} has no picture left to train on: give some that can be read")

        embedding = base.embed_prompt() if base else None
        place = Campaign.create_or_open(campaign, chosen, runtime)
        prompt = add_file(store, PROMPT, embedding) if embedding is not None else describe_file(store, PROMPT)
        splits = {"train": train, "holdout": holdout, "designs": truths.keys}
        shards = [shard for split, keys in splits.items() for shard in _write_split(place, spool, split, keys)]
    table = add_file(store, f"{place.sources_dir}/rejects.parquet", _table([*truths.refused, *found.refused]))
    manifest = Manifest(
        kind="sources",
        shards=tuple(shards),
        files=(table, prompt),
        counts={
            "images": found.seen,
            "duplicates": found.duplicates + truths.duplicates,
            "rejects": len(found.rejects) + len(truths.rejects),
            **{split: len(keys) for split, keys in splits.items()},
        },
        metadata={
            "images": pictures.uri,
            "images_sha256": pictures.sha256,
            "designs": layered.uri if layered else "",
            "designs_sha256": layered.sha256 if layered else "",
        },
    )
    return _result(place, commit(store, f"{place.sources_dir}/{MANIFEST}", manifest))


def read_recipe(recipe: str) -> tuple[Recipe, dict[str, Any]]:
    """A recipe given as text, or as the path or URI of a file, and the runtime's values in it.

    Raises:
        LayerloopError: no such file, or not a recipe.
    """
    text = recipe.strip()
    if not text:
        raise LayerloopError("recipe is empty: give YAML text or the path of a YAML file")
    if "\n" in text or ": " in text or text.startswith("{"):
        return parse_recipe_runtime(text)
    return parse_recipe_runtime(read_uri(text))


def check_nothing_lost(moved: Mapping[str, Any], runtime: Runtime) -> None:
    """Refuse values of the runtime that were given in the recipe, unless the run has them anyway: the recipe reaches
    this step only, so the steps that need them would not get them.

    Raises:
        LayerloopError: naming them, and where they belong.
    """
    given, used = flat(moved), flat(runtime.model_dump(mode="json"))
    if lost := {key: value for key, value in given.items() if value != used[key]}:
        named = ", ".join(f"recipe.{key} is {value!r}" for key, value in lost.items())
        raise LayerloopError(
            f"{named}: that says where and how fast to run, which no recipe keeps: take it out and give the "
            f"parameter runtime {json.dumps(moved)}"
        )


def hold_out(keys: Sequence[str], wanted: int, seed: int) -> tuple[list[str], list[str]]:
    """(train, holdout), both sorted: the `wanted` keys of the smallest hashes are held out, at most a third of all."""
    ranked = sorted(keys, key=lambda key: (seed_for(seed, "holdout", key), key))
    held = set(ranked[: min(wanted, len(keys) // 3)])
    return sorted(set(keys) - held), sorted(held)


def check_same_inputs(done: Manifest, *, images: str, designs: str) -> None:
    """Refuse to go on with other inputs than the sources were made of; inputs left empty mean "the same".

    Raises:
        LayerloopError: another URI, or other files at the same URI.
    """
    go_on = "leave it empty to go on with the committed sources, or begin another campaign"
    for what, given, find in (("images", images, _find_images), ("designs", designs, find_designs)):
        if not given.strip():
            continue
        uri, sha256 = done.metadata[what], done.metadata[f"{what}_sha256"]
        if absolute_uri(given) != uri:
            raise LayerloopError(f"{what} is {given} but the campaign's sources were made of {uri or 'none'}: {go_on}")
        try:
            now = find(given).sha256
        except LayerloopError as error:
            log(f"{error}; the committed sources stand")
            continue
        if now != sha256:
            raise LayerloopError(f"{what} {given} has other files than when the campaign's sources were made: {go_on}")


def _find_images(uri: str) -> Inputs:
    return find_inputs(uri, what="images")


def _gather_pictures(pictures: Inputs, recipe: Recipe, spool: Spool, gallery: Gallery) -> Gathered:
    # No picture needs more: 16-bit RGBA without any compression is 8 bytes a pixel.
    items = read_items(pictures, max_bytes=int(recipe.data.max_megapixels * 8e6) + 1_000_000)
    prepared = in_order(functools.partial(prepare_picture, data=recipe.data), items)
    return gather(
        progress(prepared, what="normalising", unit="images", total=pictures.pictures), spool, gallery, near=True
    )


def _gather_designs(layered: Inputs | None, recipe: Recipe, spool: Spool, gallery: Gallery) -> Gathered:
    if layered is None:
        return Gathered([], [])
    prepared = in_order(prepare_design, read_designs(layered, recipe.data))
    return gather(progress(prepared, what="rendering", unit="designs"), spool, gallery, near=False)


def _write_split(place: Campaign, spool: Spool, split: str, keys: Sequence[str]) -> list[Shard]:
    """Shards of one split, ordered by key; those that an interrupted run has written already are kept."""
    shards = []
    size = place.recipe.data.images_per_shard
    for number, start in enumerate(range(0, len(keys), size)):
        name, part = f"{place.sources_dir}/{split}-{number:06d}.tar", keys[start : start + size]
        shard = existing_shard(place.store, name, part) or write_shard(place.store, name, spool.samples(part))
        log(f"{shard.name}: {shard.samples} images, {shard.bytes / 1e6:.2f} MB")
        shards.append(shard)
    return shards


def _table(refused: Sequence[Refused]) -> bytes:
    """`rejects.parquet`: origin, kind (reject or duplicate) and reason of everything left out."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: [getattr(item, name) for item in refused] for name in ("origin", "kind", "reason")}
    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), buffer)
    return buffer.getvalue()


def _result(place: Campaign, sources: Manifest) -> StepResult:
    megabytes = sum(shard.bytes for shard in sources.shards) / 1e6
    return StepResult(
        manifests={"sources": sources, "policy": place.policy(place.head())},
        metrics={**sources.counts, "megabytes": megabytes},
    )


main = functools.partial(step_main, run)

if __name__ == "__main__":
    raise SystemExit(main())
