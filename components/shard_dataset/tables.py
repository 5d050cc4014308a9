"""Rows of parquet tables that others wrote: images, and any columns, within bounds of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import counted, printable
from layerloop.components.shard_dataset.footers import RowGroup, read_row_groups
from layerloop.components.shard_dataset.items import Item, broken_item, one_line, sized_item
from layerloop.components.storage.foreign import HEAD, foreign_kind


class NoImagesError(LayerloopError):
    """A table has no column with images, as one about the images beside it."""


IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "data")

# Bounds of a row group of parquet, whose few bytes may stand for any number.
_FREE_BYTES, _MOST_RATIO = 64_000_000, 100
_FREE_ENTRIES = 1_000_000
_BATCH_BYTES = 256_000_000  # unpacked at once
_DAMAGED = "row cannot be read, the parquet is damaged ({}): make it again"
_MISSING = "missing, the parquet is damaged: make it again"
_LONGEST_PATH = 200  # characters of a row's path that are told
_MOST_TOLD = 10_000  # rows of a group that cannot be read, each in the table of rejects


def parquet_items(file: BinaryIO, where: str, *, folder: str, max_bytes: int) -> Iterator[Item]:
    """The image of every row of a table, or the images of rows that have lists of them.

    Args:
        where: the table's printable name, for origins.
        folder: where it lies, for errors.
        max_bytes: an image of more is a problem, and is not read.

    Raises:
        LayerloopError: several image columns without a usual name, or (NoImagesError) none.
    """
    table = open_parquet(file)
    if isinstance(table, str):
        yield broken_item(where, table)
        return
    column = _image_column(table.schema, f"{folder}/{where}")
    for number, row in parquet_rows(table, [column], batch=16):  # a few images in memory, not a row group
        origin = f"{where}:{number}"
        if isinstance(row, str):
            yield broken_item(origin, row)
            continue
        cell = row[column]
        for index, one in enumerate(cell) if isinstance(cell, list) else ((None, cell),):
            one_of = origin if index is None else f"{origin}/{index}"
            data, path = (one.get("bytes"), one.get("path")) if isinstance(one, dict) else (one, None)
            if data is None:
                yield broken_item(one_of, f"row has no image bytes (path {_path(path)}): embed them")
            else:
                yield sized_item(one_of, len(data), max_bytes, lambda data=data: data)  # type: ignore[misc]


def _path(path: object) -> str:
    text = repr(path)
    return text if len(text) <= _LONGEST_PATH else f"{text[:_LONGEST_PATH]}..."


@dataclass(frozen=True)
class Table:
    """A parquet that Arrow has opened: its reader, the schema, and what it says of its row groups."""

    reader: Any
    schema: Any
    groups: Sequence[RowGroup]


def open_parquet(file: BinaryIO) -> Table | str:
    """The table, or a description of its fault."""
    import pyarrow.parquet

    try:
        reader = pyarrow.parquet.ParquetFile(file)
        schema, count = reader.schema_arrow, reader.num_row_groups
        schema.names  # noqa: B018 - read here, where it may fail
    except Exception as error:  # Arrow raises its own kinds, OSError, ValueError and others on hostile bytes
        file.seek(0)
        head = file.read(HEAD)
        if not head.startswith(b"PAR") and (foreign := foreign_kind(head)):
            return f"file named .parquet is {foreign[0]}: {foreign[1]}"
        return f"parquet is damaged ({one_line(error)}): make it again"
    return Table(reader, schema, read_row_groups(file, count))


def parquet_rows(table: Table, columns: list[str] | None, *, batch: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(number, row) of all rows, or instead of a row why it cannot be read: a damaged page spoils its rows only."""
    first = 0
    for number, group in enumerate(table.groups):
        count, done = group.rows, 0
        packed, unpacked, entries = _sizes(group, columns)
        problem = _DAMAGED.format(group.problem) if group.problem else _bomb(packed, unpacked, max(entries, count))
        batch = max(1, min(batch, _BATCH_BYTES // max(1, unpacked)))  # a dictionary may give each row its largest value
        for size in () if problem else (batch, 1):  # one by one where a batch cannot be read
            try:
                start = 0
                for part in table.reader.iter_batches(batch_size=size, row_groups=[number], columns=columns):
                    rows = part.to_pylist() if start + part.num_rows > done else []
                    for row in rows[max(0, done - start) :]:
                        yield first + done, row
                        done += 1
                    start += part.num_rows
            except Exception as error:  # as in `open_parquet`
                problem = _DAMAGED.format(one_line(error))
                continue
            break
        if problem is None and count > done:  # nothing says that they ever were
            yield first + done, f"{counted(count - done, 'rows')}: {_MISSING}"
        elif problem and count - done > _MOST_TOLD:
            yield first + done, f"{counted(count - done, 'rows')}: {problem}"
        elif problem:
            for row_number in range(first + done, first + count):
                yield row_number, problem
        first += count


def _sizes(group: RowGroup, columns: list[str] | None) -> tuple[int, int, int]:
    """(bytes as stored, bytes unpacked, most entries of a column) of a row group's columns, by the file's own words."""
    read = [chunk for chunk in group.chunks if columns is None or chunk.column in columns]
    return (
        sum(chunk.packed for chunk in read),
        sum(chunk.unpacked for chunk in read),
        max((chunk.entries for chunk in read), default=0),
    )


def _bomb(packed: int, unpacked: int, entries: int) -> str | None:
    """Why a row group is not unpacked: images and designs do not shrink to a hundredth; zeros do, to a thousandth."""
    if unpacked > _FREE_BYTES and unpacked > _MOST_RATIO * packed:
        return f"row group has {packed} bytes and unpacks to {unpacked / 1e6:.0f} MB: write it again from the images"
    if entries > max(_FREE_ENTRIES, packed):
        return f"row group has {entries} entries in {packed} bytes: write it again from the images"
    return None


def _image_column(schema: Any, where: str) -> str:
    """The column with encoded images: binary, or the `datasets` library's struct with `bytes`, or lists of these.

    Raises:
        LayerloopError: several image columns without a usual name, or (NoImagesError) none.
    """
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)

    def encoded(kind: Any) -> bool:
        return any(test(kind.value_type if types.is_dictionary(kind) else kind) for test in tests)

    def has_images(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return encoded(kind) or (types.is_struct(kind) and any(f.name == "bytes" and encoded(f.type) for f in kind))

    candidates = [field.name for field in schema if has_images(field.type)]
    usual = [name for name in IMAGE_COLUMNS if name in candidates]
    if usual:
        return usual[0]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = printable(", ".join(candidates))
        raise LayerloopError(
            f"{where} has several image columns among {names}: name the one with encoded images 'image'"
        )
    found = printable(", ".join(f"{field.name}: {str(field.type)[:40]}" for field in schema))[:300] or "no columns"
    raise NoImagesError(
        f"{where} has no image column among {found}: store the bytes of image files in a binary column 'image', or "
        "give their addresses as a list (.txt)"
    )
