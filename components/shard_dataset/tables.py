"""Rows of parquet tables that others wrote: images, and any columns, within bounds of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import counted, printable
from layerloop.components.shard_dataset.items import Item, broken_item, one_line, sized_item

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "data")

# Bounds of a row group of parquet, whose few bytes may stand for any number.
_FREE_BYTES, _MOST_RATIO = 64_000_000, 100
_FREE_ENTRIES = 1_000_000
_BATCH_BYTES = 256_000_000  # unpacked at once
_MISSING = "missing, the parquet is damaged: make it again"
_MOST_TOLD = 10_000  # rows of a group that cannot be read, each in the table of rejects


def parquet_items(file: BinaryIO, where: str, *, folder: str, max_bytes: int) -> Iterator[Item]:
    """The image of every row of a table, or the images of rows that have lists of them.

    Args:
        where: the table's printable name, for origins.
        folder: where it lies, for errors.
        max_bytes: an image of more is a problem, and is not read.

    Raises:
        LayerloopError: no image column, or several without a usual name.
    """
    table = open_parquet(file)
    if isinstance(table, str):
        yield broken_item(where, table)
        return
    column = _image_column(table.schema_arrow, f"{folder}/{where}")
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
                yield broken_item(one_of, f"row has no image bytes (path {path!r}): embed them")
            else:
                yield sized_item(one_of, len(data), max_bytes, lambda data=data: data)  # type: ignore[misc]


def open_parquet(file: BinaryIO) -> Any:
    """The table, or a description of its fault."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        table.schema_arrow.names  # noqa: B018 - read here, where it may fail
    except Exception as error:  # Arrow raises its own kinds, OSError, ValueError and others on hostile bytes
        return f"parquet is damaged ({one_line(error)}): make it again"
    return table


def parquet_rows(table: Any, columns: list[str] | None, *, batch: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(number, row) of all rows, or instead of a row why it cannot be read: a damaged page spoils its rows only."""
    first = 0
    for group in range(table.num_row_groups):
        count, unpacked, problem = _described(table, group, columns)
        done = 0
        batch = max(
            1, min(batch, _BATCH_BYTES // max(1, unpacked))
        )  # a dictionary may give every row its largest value
        for size in (batch, 1) if problem == _MISSING else ():  # one by one where a batch cannot be read
            try:
                start = 0
                for part in table.iter_batches(batch_size=size, row_groups=[group], columns=columns):
                    rows = part.to_pylist() if start + part.num_rows > done else []
                    for row in rows[max(0, done - start) :]:
                        yield first + done, row
                        done += 1
                    start += part.num_rows
            except Exception as error:  # as in `open_parquet`
                problem = f"row cannot be read, the parquet is damaged ({one_line(error)}): make it again"
                continue
            break
        if count - done > (0 if problem == _MISSING else _MOST_TOLD):  # nothing says that missing ones ever were
            yield first + done, f"{counted(count - done, 'rows')}: {problem}"
        else:
            for number in range(done, count):
                yield first + number, problem
        first += count


def _described(table: Any, group: int, columns: list[str] | None) -> tuple[int, int, str]:
    """(rows, bytes unpacked, why they are not read, or _MISSING) of a row group, by the file's own words."""
    count = 1
    try:
        found = table.metadata.row_group(group)
        count = found.num_rows
        packed, unpacked, entries = _sizes(found, columns)
    except Exception as error:  # as in `open_parquet`
        return count, 0, f"row cannot be read, the parquet is damaged ({one_line(error)}): make it again"
    return count, unpacked, _bomb(packed, unpacked, max(entries, count)) or _MISSING


def _sizes(group: Any, columns: list[str] | None) -> tuple[int, int, int]:
    """(bytes as stored, bytes unpacked, most entries of a column) of a row group's columns, by the file's own words."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    read = [c for c in chunks if columns is None or c.path_in_schema.partition(".")[0] in columns]
    return (
        sum(chunk.total_compressed_size for chunk in read),
        sum(chunk.total_uncompressed_size for chunk in read),
        max((chunk.num_values for chunk in read), default=0),
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
        LayerloopError: no image column, or several without a usual name.
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
    raise LayerloopError(
        f"{where} has no image column among {found}: store the bytes of image files in a binary column 'image', or "
        "give their addresses as a list (.txt)"
    )
