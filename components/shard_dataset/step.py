"""The step `shard_dataset`: images become a campaign's sources. They are decoded and normalised, duplicates and
unreadable ones are dropped, some are set aside for evaluation, the prompt is embedded, and shards are committed.

Nothing is written before the recipe was checked: a campaign freezes it with the first file.

As the first step of every run it also finds the head to continue from, and whether there is anything left to do.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from layerloop.components.judge.address import judge_address
from layerloop.components.runtime.contract import step_main
from layerloop.components.runtime.outputs import StepResult
from layerloop.components.runtime.progress import log, progress
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.schema.messages import counted, printable
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.seeds import seed_for
from layerloop.components.schema.steps import STEPS
from layerloop.components.shard_dataset.base import CheckedBase, base_commit
from layerloop.components.shard_dataset.duplicates import DuplicateIndex
from layerloop.components.shard_dataset.inputs import Inputs, absolute_uri, find_inputs, read_items
from layerloop.components.shard_dataset.layered import find_designs, read_designs
from layerloop.components.shard_dataset.recipe_choice import check_nothing_lost, choose_recipe
from layerloop.components.shard_dataset.run_target import RunTarget, refuse_ephemeral_folder
from layerloop.components.shard_dataset.samples import (
    Gathered,
    Refused,
    account,
    check_rejects,
    gather,
    in_order,
    prepare_design,
    prepare_image,
)
from layerloop.components.shard_dataset.spool import Spool
from layerloop.components.storage.campaign import BASE_COMMIT, RECIPE, Campaign, check_free
from layerloop.components.storage.lease import hold, sweep
from layerloop.components.storage.manifests import add_file, find_file, read_file
from layerloop.components.storage.runtime import read_runtime
from layerloop.components.storage.shards import existing_shards, write_shard
from layerloop.components.storage.stores import Store, open_store

REJECTS = "rejects.parquet"
_SAID_BY_NAME = ("unreadable folders", "linked folders", "empty containers", "tables without images")
PROMPT = f"{Campaign.sources_dir}/prompt.safetensors"


def run(
    *,
    campaign: str,
    recipe: str = "",
    overrides: Mapping[str, Any] | None = None,
    images: str = "",
    designs: str = "",
    benchmark: str = "",
    judge_url: str = "",
    default_recipe: str = "",
    iterations: int = 1,
    evaluate: str = "end",
    iteration: int = 0,
    until: int = 0,
    max_failures: int = 0,
    publish_as: str = "",
    run_id: str = "",
    runtime: str = "",
) -> StepResult:
    """Shard a campaign's images: normalised, without duplicates, and the embedding of the prompt.

    The first run freezes the recipe, once the base and the images were checked and the prompt is embedded, so that a
    recipe that was refused can be corrected. A campaign that has its sources already is left unchanged: then images may
    be left out, and must not differ from those of the first run.

    Args:
        campaign: Root URI of the campaign, a folder or s3://bucket/prefix.
        recipe: The name of a packaged recipe, the path or URI of a YAML file, or YAML text; empty for `default_recipe`
            or, where that is empty too, for the campaign's own.
        overrides: Changes of the recipe, such as {"update": {"learning_rate": 1e-4}}.
        images: A folder (all the way down) or glob of images, WebDataset tars, parquet with an image column, or a text
            file with a URI on each line; local, s3:// or hf://datasets/owner/name.
        designs: Designs with their true layers, to evaluate on: parquet in Crello's columns, or a folder with a
            subfolder of numbered PNG layers for each. Optional.
        benchmark: Unlabelled pictures to evaluate on, in any form that images may have; by default those that are held
            out of the images. None of them is trained on.
        judge_url: Of the judge that a pipeline's run (one with a `run_id`) will ask: refused here, before hours of
            sampling, where it is no URL. By default the environment's OPENAI_BASE_URL.
        default_recipe: YAML text, of the recipe that a pipeline was compiled with.
        iterations: How many iterations the run has.
        evaluate: When a run evaluates: `end` (where it reaches `until`, or has no target), `every-run`, `never`; `only`
            is a run that does nothing else, on an existing campaign.
        iteration: With `only`, whose adapter; 0 for the head.
        until: The campaign's target: a run whose head is there has nothing left to do. 0 for none.
        max_failures: After this many runs in a row without progress no further one starts. 0 for no limit.
        publish_as: Folder under `published/` in which the run will publish; empty for a name of its own.
        run_id: KFP's id of this run.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults. Of the recipe's, what later steps would not get is refused.

    Raises:
        LayerloopError: no judge's URL, nothing at `images`, too many that cannot be read, a base that the recipe does
            not fit, another recipe or other images than the campaign's, a store that cannot be written to, or too many
            runs without progress. Nothing is committed then.
    """
    refuse_ephemeral_folder(campaign)
    target = RunTarget.of(
        run_id=run_id, iterations=iterations, evaluate=evaluate, until=until, max_failures=max_failures,
        publish_as=publish_as,
    )  # fmt: skip
    if evaluate == "only":
        return _to_evaluate(Campaign.open(campaign, runtime), iteration)
    store = open_store(campaign)
    if (reached := _at_its_target(store, target)) is not None:
        return reached
    target.begin(store)  # before anything can be refused: a run that is refused counts among those that got nowhere
    sweep(store, log=log)
    if run_id:
        judge_address(judge_url)
    chosen, moved = choose_recipe(recipe, overrides or {}, default=default_recipe, store=store)
    found = Campaign.create_or_open(campaign, chosen, runtime) if store.exists(RECIPE) else None
    opened = found or Campaign(store, chosen, read_runtime(runtime, chosen))  # not stored yet
    check_nothing_lost(moved, opened.runtime)
    done = found.already_committed(found.sources_dir, log=log) if found else None
    if found:
        target.check_publication(found)
    if done:
        check_same_inputs(done, images=images, designs=designs, benchmark=benchmark)
        return _result(opened, done, target)
    from layerloop.components.judge.methods import rubric_of

    rubric_of(chosen.judge)  # which the judge's step, hours later, would miss in a recipe that is frozen
    made = shard_sources(opened, images=images, designs=designs, benchmark=benchmark, runtime=runtime)
    return _result(opened, made, target)


def shard_sources(campaign: Campaign, *, images: str, designs: str, benchmark: str = "", runtime: str = "") -> Manifest:
    """Make and commit a campaign's sources, and freeze its recipe where this is its first run.

    Args:
        campaign: the campaign, which need not be stored yet.
        images, designs, benchmark, runtime: as of `run`.

    Raises:
        LayerloopError: as `run`.
    """
    store, chosen = campaign.store, campaign.recipe
    if not images.strip():
        raise LayerloopError(f"images is empty and {store.uri} has no sources yet: give a folder of images")
    unlabelled = find_inputs(images, what="images")
    if printable(f"{store.uri}/").startswith(f"{unlabelled.uri}/"):
        raise LayerloopError(f"campaign {store.uri} lies inside images {images}: choose a folder outside")
    layered = find_designs(designs) if designs.strip() else None
    asked = find_inputs(benchmark, what="benchmark") if benchmark.strip() else None
    check_free(store)
    store.check_writable()
    prompt = find_file(store, PROMPT) if store.exists(RECIPE) else None
    base = None if prompt else CheckedBase.of(chosen, campaign.runtime.model)

    with Spool() as spool:
        # What is held out comes first: a copy of it would leak into training, and is dropped as its duplicate.
        index = DuplicateIndex(chosen.data.duplicate_bits)
        truths = _gather_designs(layered, chosen, spool, index)
        pictures = _gather_images(asked, chosen, spool, index) if asked else Gathered([], [])
        found = _gather_images(unlabelled, chosen, spool, index)
        read = {"designs": (truths, layered), "benchmark": (pictures, asked), "images": (found, unlabelled)}
        table = _table([item for gathered, inputs in read.values() for item in _left_out(gathered, inputs)])
        try:
            _say_what_became(read)
            for what, (gathered, _) in read.items():
                check_rejects(gathered, chosen.data, what=what, log=log)
            train, holdout = hold_out(found.keys, chosen.data.holdout, chosen.seed)
            if not train:
                raise LayerloopError(f"images {images} has no image left to train on: give some that can be read")
        except LayerloopError:  # the table is what such a refusal is mended by
            with contextlib.suppress(LayerloopError):  # the refusal says more than that its table cannot be kept
                store.write(f"{campaign.sources_dir}/{REJECTS}", table)
                log(f"all that was left out is listed in {store.uri}/{campaign.sources_dir}/{REJECTS}")
            raise

        embedding = base.embed_prompt() if base else None
        campaign = Campaign.create_or_open(store.uri, chosen, runtime)
        base_at = base_commit(embedding if embedding is not None else read_file(store, prompt) if prompt else b"")
        with hold(store, log=log):
            if done := campaign.already_committed(campaign.sources_dir, log=log):  # by the run that held it until now
                check_same_inputs(done, images=images, designs=designs, benchmark=benchmark)
                return done
            files = [add_file(store, PROMPT, embedding)] if embedding is not None else [prompt] if prompt else []
            files.append(add_file(store, f"{campaign.sources_dir}/{REJECTS}", table))
            store.write(f"{campaign.sources_dir}/{REJECTS}", table)  # a copy under the name that people look for
            splits = {"train": train, "holdout": holdout, "designs": truths.keys}
            splits |= {"benchmark": pictures.keys} if asked else {}
            shards = [shard for split, keys in splits.items() for shard in _write_split(campaign, spool, split, keys)]
            counts = {
                "images": found.seen,
                "duplicates": sum(gathered.duplicates for gathered, _ in read.values()),
                "rejects": sum(len(gathered.rejects) for gathered, _ in read.values()),
                **{split: len(keys) for split, keys in splits.items()},
            }
            origins = {**_origin("images", unlabelled), **_origin("designs", layered), **_origin("benchmark", asked)}
            manifest = Manifest(
                kind="sources", shards=tuple(shards), files=tuple(files), counts=counts,
                metadata={**origins, **({BASE_COMMIT: base_at} if base_at else {})},
            )  # fmt: skip
            return campaign.commit(campaign.sources_dir, manifest)


def _origin(what: str, inputs: Inputs | None) -> dict[str, JsonValue]:
    return {what: inputs.uri if inputs else "", f"{what}_sha256": inputs.sha256 if inputs else ""}


def hold_out(keys: Sequence[str], wanted: int, seed: int) -> tuple[list[str], list[str]]:
    """(train, holdout), both sorted: the `wanted` keys of the smallest hashes are held out, at most a third of all."""
    ranked = sorted(keys, key=lambda key: (seed_for(seed, "holdout", key), key))
    held = set(ranked[: min(wanted, len(keys) // 3)])
    return sorted(set(keys) - held), sorted(held)


def check_same_inputs(done: Manifest, *, images: str, designs: str, benchmark: str = "") -> None:
    """Refuse other inputs than the sources were made of; inputs left empty mean "the same".

    Raises:
        LayerloopError: another URI, or other files at the same URI.
    """
    remedy = "leave it empty (`layerloop continue`) to go on with the committed sources, or start another campaign"
    inputs = (
        ("images", images, _find_images),
        ("designs", designs, find_designs),
        ("benchmark", benchmark, _find_images),
    )
    for what, given, find in inputs:
        if not given.strip():
            continue
        uri, sha256 = done.metadata.get(what, ""), done.metadata.get(f"{what}_sha256", "")
        if absolute_uri(given) != uri:
            raise LayerloopError(
                f"{what} is {without_secrets(given)} but the campaign's sources were made of {uri or 'none'}: {remedy}"
            )
        try:
            now = find(given).sha256
        except LayerloopError as error:
            log(f"{error}; the committed sources are used")
            continue
        if now != sha256:
            raise LayerloopError(
                f"{what} {without_secrets(given)} has other files than when the campaign's sources were made: {remedy}"
            )


def _find_images(uri: str) -> Inputs:
    return find_inputs(uri, what="images")


def _gather_images(inputs: Inputs, recipe: Recipe, spool: Spool, index: DuplicateIndex) -> Gathered:
    # No image needs more: 16-bit RGBA without any compression is 8 bytes a pixel.
    items = read_items(inputs, max_bytes=int(recipe.data.max_megapixels * 8e6) + 1_000_000)
    prepared = in_order(functools.partial(prepare_image, data=recipe.data), items)
    shown = progress(prepared, what="normalising", unit="images", total=inputs.images)
    return gather(shown, spool, index, near=recipe.data.duplicates == "near")


def _gather_designs(layered: Inputs | None, recipe: Recipe, spool: Spool, index: DuplicateIndex) -> Gathered:
    if layered is None:
        return Gathered([], [])
    prepared = in_order(prepare_design, read_designs(layered, recipe.data))
    return gather(progress(prepared, what="rendering", unit="designs"), spool, index, near=False)


def _write_split(campaign: Campaign, spool: Spool, split: str, keys: Sequence[str]) -> list[Shard]:
    """Shards of one split, ordered by key; those that an interrupted run has written are kept."""
    shards = []
    size = campaign.recipe.data.images_per_shard
    for number, start in enumerate(range(0, len(keys), size)):
        name, part = f"{campaign.sources_dir}/{split}-{number:06d}.tar", keys[start : start + size]
        there = next(existing_shards(campaign.store, name, part), None)
        shard = there or write_shard(campaign.store, name, spool.samples(part))
        log(f"{shard.name}: {counted(shard.samples, 'images')}, {shard.bytes / 1e6:.2f} MB")
        shards.append(shard)
    return shards


def _left_out(gathered: Gathered, inputs: Inputs | None) -> list[Refused]:
    """Everything of one kind of input that is no sample, with the reason."""
    passed = inputs.passed if inputs else []
    return [*gathered.refused, *(Refused(item.origin, "passed over", item.reason) for item in passed)]


def _say_what_became(read: Mapping[str, tuple[Gathered, Inputs | None]]) -> None:
    parts = [account(gathered, inputs.passed, what=what) for what, (gathered, inputs) in read.items() if inputs]
    log("; ".join(reversed(parts)))  # images first
    for item in [item for _, inputs in read.values() if inputs for item in inputs.passed]:
        if item.kind in _SAID_BY_NAME or item.reason.endswith("unpack it"):
            log(f"passed over {item.origin}: {item.reason}")


def _table(refused: Sequence[Refused]) -> bytes:
    """`rejects.parquet`: origin, kind (reject, duplicate or passed over) and reason of everything left out."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: [getattr(item, name) for item in refused] for name in ("origin", "kind", "reason")}
    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), buffer)
    return buffer.getvalue()


def _to_evaluate(campaign: Campaign, iteration: int) -> StepResult:
    """Sources and policy of a run that only evaluates; empty manifests where there is nothing to evaluate yet.

    Raises:
        LayerloopError: an iteration that is not committed.
    """
    head, sources = campaign.head(), campaign.find(campaign.sources_dir)
    if not 0 <= iteration <= head:
        raise LayerloopError(
            f"iteration is {iteration} but the head of {campaign.uri} is {head}: choose 0 for the head"
        )
    if sources is None or not head:
        log(f"campaign {campaign.uri} has no policy yet: there is nothing to evaluate, which is not a failure")
    proceed = sources is not None and head > 0
    return StepResult(
        manifests={"sources": sources or Manifest(kind="sources"), "policy": campaign.policy(iteration or head)},
        metrics={"iteration": iteration or head},
        parameters={"left": "everything" if proceed else "nothing"},
    )


def _at_its_target(store: Store, target: RunTarget) -> StepResult | None:
    """Result of a run whose campaign has reached its target; None where there is work left."""
    campaign = Campaign.open(store.uri) if target.until and store.exists(RECIPE) else None
    sources = campaign.find(campaign.sources_dir) if campaign else None
    if campaign is None or sources is None or not target.is_done(campaign):
        return None
    return _result(campaign, sources, target, proceed=False)


def _result(campaign: Campaign, sources: Manifest, target: RunTarget, *, proceed: bool = True) -> StepResult:
    megabytes, head = sum(shard.bytes for shard in sources.shards) / 1e6, campaign.head()
    return StepResult(
        manifests={"sources": sources, "policy": campaign.policy(head)},
        metrics={**sources.counts, "megabytes": megabytes, "iteration": head},
        parameters={"left": target.left(head) if proceed else "nothing"},
    )


main = functools.partial(step_main, run, step=STEPS["shard_dataset"], store=open_store)

if __name__ == "__main__":
    raise SystemExit(main())
