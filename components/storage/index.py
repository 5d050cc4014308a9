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
from layerloop.components.storage.store import MissingObjectError, Store, TooLargeError

INDEX = "index.parquet"
_THREADS = 16
_MOST_ROWS, _MOST_BYTES = 5_000_000, 500_000_000  # of an index that is read
_MOST_SHARDS = 100  # that an index may name for a sample: attempts at a step
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
    rows = itertools.chain(_indexed(campaign.store, folder, key), _walked(campaign.store, shards))
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


def _indexed(store: Store, folder: str, key: str) -> list[Row]:
    """The rows of a sample in a step's index; none where there is no index, or no readable one.

    Nothing vouches for an index, so keys stay in the dictionary that they are stored by: a few bytes of parquet may
    stand for any number of long ones.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    columns = ["shard", "key", "offset", "length"]
    try:
        data = io.BytesIO(store.read(f"{folder}/{INDEX}", most=_MOST_BYTES))
        file = pyarrow.parquet.ParquetFile(data, read_dictionary=["shard", "key"])
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if file.metadata.num_rows > _MOST_ROWS or sum(group.total_byte_size for group in groups) > _MOST_BYTES:
            return []
        found: list[Row] = []
        for batch in file.read(columns).to_batches():
            keys = batch.column(1)
            position = pyarrow.compute.index(keys.dictionary, key).as_py()
            own = batch.filter(pyarrow.compute.equal(keys.indices, position)).slice(0, _MOST_SHARDS)
            found += zip(*(own.column(number).to_pylist() for number in range(4)), strict=True)
    except (MissingObjectError, TooLargeError, pyarrow.ArrowException, KeyError, AttributeError):
        return []
    return [row for row in found if isinstance(row[2], int) and isinstance(row[3], int)]
