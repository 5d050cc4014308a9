"""Export and import: a campaign copied as a whole, every object checked against its manifest on the way.

An export is a folder that needs nothing of layerloop to be read: plain tars, JSON, safetensors and parquet, with a page
that says what is what and an index of every sample. It is a campaign too: every command reads it as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File
from layerloop.components.storage.campaign import RECIPE, Campaign
from layerloop.components.storage.index import write_indices
from layerloop.components.storage.inventory import README, committed_objects
from layerloop.components.storage.lease import sweep
from layerloop.components.storage.owners import scratch_folder
from layerloop.components.storage.store import LARGEST_RECORD, READS, Store, TooLargeError, hash_file
from layerloop.components.storage.stores import open_store

Log = Callable[[str], None]
_THREADS = 8


def export_campaign(campaign: Campaign, uri: str, *, log: Log) -> None:
    """Copy a campaign to a folder or another store, with a README and indices. Again: continues.

    Raises:
        LayerloopError: as `copy_campaign`.
    """
    target = copy_campaign(campaign, uri, log=log)
    samples = sum(count for _, count in write_indices(campaign, target))
    target.write(README, _readme(campaign, samples).encode())  # last: with it the export is complete
    log(f"{target.uri}/{README} says what is what")


def import_campaign(folder: str, uri: str, *, log: Log) -> None:
    """Make a campaign of an export, to be continued there.

    Raises:
        LayerloopError: the export is not complete; as `copy_campaign`.
    """
    export = open_store(folder)
    if not export.exists(README):
        raise LayerloopError(
            f"{export.uri} has no {README}: it is not an export, or one that was interrupted, export again"
        )
    copy_campaign(Campaign.open(folder), uri, log=log)


def copy_campaign(campaign: Campaign, uri: str, *, log: Log) -> Store:
    """Copy what is committed, the judge's replies and the records of removals; what no manifest names stays behind.

    The recipe goes last: before it, the copy is no campaign. What is there already with the right hash is left alone.

    Raises:
        LayerloopError: something else is at `uri`, or an object is not what was committed.
    """
    source, target = campaign.store, open_store(uri)
    if target.uri == source.uri:
        raise LayerloopError(f"{uri} is the campaign itself: give another folder")
    recipe = source.read(RECIPE, most=LARGEST_RECORD)
    there = target.sizes()
    if RECIPE in there and target.read(RECIPE, most=LARGEST_RECORD) != recipe:
        raise LayerloopError(f"{target.uri} holds another campaign: give an empty folder")
    named, others = committed_objects(campaign)
    strange = sorted(name for name in there.keys() - named.keys() - others - {RECIPE, README} if name[0] != ".")
    if strange and RECIPE not in there:
        raise LayerloopError(f"{target.uri} holds {strange[0]}, which is not of this campaign: give an empty folder")
    target.check_writable()
    sweep(target, log=log)  # of a copy that was killed
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda file: _copy(source, target, file, there), named.values()))
        for last in (False, True):  # manifests after what lies beside them
            names = [name for name in others - {RECIPE} if name.endswith("manifest.json") == last]
            list(pool.map(lambda name: _copy_unnamed(source, target, name), sorted(names)))
    target.write(RECIPE, recipe)
    size = sum(file.bytes for file in named.values())
    log(f"{len(named)} objects of {size / 1e6:.1f} MB are at {target.uri}, each with the hash of its manifest")
    return target


def _copy(source: Store, target: Store, file: File, there: Mapping[str, int]) -> None:
    """Copy an object of a manifest, checked."""
    if there.get(file.name) == file.bytes and _hash(target, file.name) == file.sha256:
        return
    with scratch_folder() as folder:
        path = folder / "object"
        for _ in range(READS):
            source.download(file.name, path)
            with path.open("rb") as opened:
                found, size = hash_file(opened)
            if (size, found) == (file.bytes, file.sha256):
                target.upload(file.name, path)
                return
    raise LayerloopError(
        f"{source.uri}/{file.name} has {size} bytes of sha256 {found[:12]}, its manifest says {file.bytes} and "
        f"{file.sha256[:12]}: see layerloop campaign verify {source.uri}"
    )


def _copy_unnamed(source: Store, target: Store, name: str) -> None:
    """Copy an object that no manifest has a hash of."""
    try:
        target.write(name, source.read(name, most=LARGEST_RECORD))
    except TooLargeError:  # an adapter where people load it
        with scratch_folder() as folder:
            source.download(name, folder / "object")
            target.upload(name, folder / "object")


def _hash(store: Store, name: str) -> str:
    with store.open(name) as file:
        return hash_file(file)[0]


def _readme(campaign: Campaign, samples: int) -> str:
    recipe = campaign.recipe
    revision = f" at revision {recipe.model.revision}" if recipe.model.revision else ""
    return f"""# Campaign {recipe.name}

A copy of a layerloop campaign: the reinforcement learning of a LoRA adapter for a model that decomposes images into
layers. {campaign.head()} iterations, {samples} samples in shards. Every file is in a common format, and nothing of
layerloop is needed to read it. Not in here: the base model, {recipe.model.base}{revision}.

- `recipe.json`: all settings
- `sources/*.tar`: the images, and designs with their true layers; `train`, `holdout` and `designs` in the file names
- `iterations/000001/rollouts/*.tar`: what the model made of one image a tar: the image (`source.png`), and of each
  candidate the layers from the bottom, `layer0.png` and up, and the latents (`trajectory.safetensors`)
- `iterations/000001/scores/`: a reward for every candidate, in `scores.parquet` and as JSON in the tar; `replies/` has
  the judge's answers
- `iterations/000001/policy/*/`: the adapter after the iteration, for peft, with its optimizer's state
- `evaluations/`, `published/`: evaluations with their report, and adapters for use, with a card
- `manifest.json`, `g000000.json`: what belongs to an output: names, sizes and sha256 of its files
- `removed.json`: what had been deleted to save room before this copy was made; manifests still name it
- `index.parquet`: of every sample its shard, key, offset and length in bytes

The tars are WebDataset shards: the members of a sample follow each other as `<key>.<suffix>`. Any tar opens them:

    tar -xf iterations/000001/rollouts/g000000-*.tar

    import webdataset
    for sample in webdataset.WebDataset("iterations/000001/rollouts/g000000-0123456789abcdef.tar", shardshuffle=False):
        print(sample["__key__"], sorted(sample))

A sample alone is `length` bytes from `offset` of its shard, which are a tar again: `layerloop campaign extract . KEY`.
`layerloop campaign verify .` compares everything with its hash, and `layerloop campaign import . URI` makes a campaign
of it that can be continued.
"""
