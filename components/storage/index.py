"""Where each sample lies: `index.parquet` beside the shards of a step, a row per sample.

    shard   name of the tar, relative to the campaign's root
    key     of the sample
    offset  of its first header, bytes
    length  of its members with their headers, bytes

So one ranged read fetches a sample, by layerloop or by anything else: those bytes are a tar of the sample. An index is
derived from the shards' headers, can be made again at any time, and is trusted for nothing but the place.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Shard
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.removals import removed_files
from layerloop.components.storage.shards import read_sample, sample_ranges
from layerloop.components.storage.store import MissingObjectError, Store

INDEX = "index.parquet"
_THREADS = 16
_SAMPLE = re.compile(r"i(\d{6,})-g(\d{6,})(-c\d{2,})?")
Row = tuple[str, str, int, int]  # shard, key, offset, length


def write_indices(campaign: Campaign, target: Store | None = None) -> Iterator[tuple[str, int]]:
    """Write the index of every step that has shards: yields its name and its number of samples.

    Args:
        target: where to; by default beside the shards.
    """
    for folder, shards in _steps(campaign):
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(lambda shard: _rows(campaign.store, shard), shards))
        rows = [row for of_shard in found for row in of_shard]
        (target or campaign.store).write(f"{folder}/{INDEX}", _encoded(rows))
        yield f"{folder}/{INDEX}", len(rows)


def extract(campaign: Campaign, key: str) -> dict[str, bytes]:
    """The members of a sample, as files by name: of a candidate its score too, as `<key>.score.json`.

    With an index that is one ranged read a sample; without one, the headers of the shards that may hold it are read.

    Raises:
        LayerloopError: nothing committed has that key, or retention removed it.
    """
    match = _SAMPLE.fullmatch(key)
    if match is None:
        found = _sample(campaign, campaign.sources_dir, campaign.sources().shards, key)
        files = {f"{key}.{suffix}": data for suffix, data in (found or {}).items()}
    else:
        iteration, group = int(match[1]), int(match[2])
        shards = [s for m in campaign.committed_groups(iteration, [group]).values() for s in m.shards]
        found = _sample(campaign, campaign.rollouts_dir(iteration), shards, key)
        files = {f"{key}.{suffix}": data for suffix, data in (found or {}).items()}
        scores = campaign.find(campaign.scores_dir(iteration))
        if match[3] and scores is not None:
            row = _sample(campaign, campaign.scores_dir(iteration), scores.shards, key)
            files |= {f"{key}.score.{suffix}": data for suffix, data in (row or {}).items()}
    if not files:
        raise LayerloopError(
            f"{campaign.uri} has no sample {key}: give the key of a source image, i000007-g000003 for a group, or "
            "i000007-g000003-c05 for a candidate"
        )
    return files


def _sample(campaign: Campaign, folder: str, shards: Sequence[Shard], key: str) -> dict[str, bytes] | None:
    by_name = {shard.name: shard for shard in shards}
    rows = itertools.chain(_indexed(campaign.store, folder), _walked(campaign.store, shards))
    for shard, found, offset, length in rows:
        if found == key and shard in by_name:  # an index may be older than the manifests
            return read_sample(campaign.store, by_name[shard], key, offset, length)
    return None


def _steps(campaign: Campaign) -> Iterator[tuple[str, list[Shard]]]:
    """Folders with shards that are there, of everything committed."""
    folders: dict[str, list[Shard]] = {}
    if (sources := campaign.find(campaign.sources_dir)) is not None:
        folders[campaign.sources_dir] = list(sources.shards)
    for iteration in campaign.iterations():
        groups = campaign.committed_groups(iteration).values()
        folders[campaign.rollouts_dir(iteration)] = [shard for manifest in groups for shard in manifest.shards]
        scores = campaign.find(campaign.scores_dir(iteration))
        folders[campaign.scores_dir(iteration)] = list(scores.shards) if scores else []
    for folder, shards in folders.items():
        gone = removed_files(campaign.store, folder)
        if left := [shard for shard in shards if shard.name not in gone]:
            yield folder, left


def _rows(store: Store, shard: Shard) -> list[Row]:
    return [(shard.name, key, offset, length) for key, offset, length in sample_ranges(store, shard)]


def _walked(store: Store, shards: Iterable[Shard]) -> Iterator[Row]:
    for shard in shards:
        yield from _rows(store, shard)


def _encoded(rows: Sequence[Row]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    types = (pyarrow.string(), pyarrow.string(), pyarrow.int64(), pyarrow.int64())
    arrays = [pyarrow.array(column, type=kind) for column, kind in zip(columns, types, strict=True)]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=["shard", "key", "offset", "length"]), out)
    return out.getvalue()


def _indexed(store: Store, folder: str) -> list[Row]:
    """The rows of a step's index; none where there is no index, or no readable one."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(store.read(f"{folder}/{INDEX}")))
        columns = [table.column(name).to_pylist() for name in ("shard", "key", "offset", "length")]
    except (MissingObjectError, pyarrow.ArrowException, KeyError):
        return []
    return [
        (shard, key, offset, length)
        for shard, key, offset, length in zip(*columns, strict=True)
        if isinstance(offset, int) and isinstance(length, int)
    ]
