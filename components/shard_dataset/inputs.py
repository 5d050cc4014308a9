"""Sources of images: files in a folder, a glob, WebDataset tars or parquet tables, here or on S3.

Inputs are found by listing only, so that a wrong path is reported at once; then read one by one. An image that cannot
be read is an item with a problem, never the end of the step.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.stores import LocalStore, Store, open_store

_DECODABLE = ("png", "jpg", "jpeg", "jfif", "webp", "avif", "gif", "bmp", "tif", "tiff", "jp2", "j2k", "ppm", "pgm")
IMAGE_SUFFIXES = frozenset((*_DECODABLE, "heic", "heif"))  # the last two are rejected by name, not passed over
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "data")
_CONTAINERS = ("tar", "parquet")
_PATTERN = re.compile(r"[*?\[]|\{[^{}]*(?:\.\.|,)[^{}]*\}")  # a glob, or braces that braceexpand would expand


@dataclass(frozen=True)
class Inputs:
    """The files behind a URI, listed and not yet read."""

    uri: str  # as recorded: absolute, so that another run can compare it with its own
    store: Store
    sizes: dict[str, int]  # bytes by name, sorted

    @property
    def sha256(self) -> str:
        """SHA-256 of all names and sizes: identifies an unchanged input without reading it."""
        return hashlib.sha256("".join(f"{name}\t{size}\n" for name, size in self.sizes.items()).encode()).hexdigest()

    @property
    def images(self) -> int | None:
        """Number of images; None where containers have yet to be opened."""
        return None if any(_suffix(name) in _CONTAINERS for name in self.sizes) else len(self.sizes)


@dataclass(frozen=True)
class Item:
    """One image: its origin, and either how to get its bytes or why that is impossible."""

    origin: str
    load: Callable[[], bytes]
    problem: str | None = None


def absolute_uri(uri: str) -> str:
    """The URI by which inputs are recorded: local paths absolute, everything without a trailing slash."""
    text = uri.strip().removeprefix("file://")
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute())


def find_inputs(uri: str, *, what: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> Inputs:
    """List the files at a file, folder (all the way down) or glob (`*`, `?`, `[...]`, `**`, `{000..099}`).

    In a folder, files that are neither an image by their suffix nor a container are passed over, and hidden files
    everywhere; a file that a glob or the URI itself names is always taken.

    Args:
        what: what the argument is called in errors, "images".

    Raises:
        LayerloopError: nothing there, or nothing usable.
    """
    remedy = "give a folder of images, a glob, WebDataset tars or parquet"
    text = absolute_uri(uri)
    if _PATTERN.search(text) and not ("://" not in text and Path(text).exists()):
        found = _find_glob(text)
        if not found.sizes:
            raise LayerloopError(f"{what} {uri} matches no file: {remedy}")
        return found
    store, sizes, named = _find_plain(text)
    if named:
        return Inputs(text, store, sizes)
    if isinstance(store, LocalStore) and not store.root.exists():
        raise LayerloopError(f"{what} {uri} does not exist: {remedy}")
    if not sizes:
        raise LayerloopError(f"{what} {uri} is empty: {remedy}")
    useful = {
        name: size for name, size in sizes.items() if _suffix(name) in (*suffixes, *_CONTAINERS) and not _hidden(name)
    }
    if not useful:
        raise LayerloopError(f"{what} {uri} has {len(sizes)} files but no image, tar or parquet: {remedy}")
    return Inputs(text, store, useful)


def read_items(inputs: Inputs, *, max_bytes: int) -> Iterator[Item]:
    """The images of all files, in the order of their names. One over `max_bytes` encoded is a problem, and not read."""
    for name, size in inputs.sizes.items():
        match _suffix(name):
            case "tar":
                yield from _tar_items(inputs.store, name, max_bytes)
            case "parquet":
                yield from _parquet_items(inputs.store, name, max_bytes)
            case _:
                yield _item(name, size, max_bytes, _loader(inputs.store, name))


# -------------------------------------------------------------------------------------------------------------- finding


def _find_plain(text: str) -> tuple[Store, dict[str, int], bool]:
    """(store, sizes, whether the URI is that of one file)."""
    if "://" not in text and Path(text).is_file():
        return open_store(Path(text).parent), {Path(text).name: Path(text).stat().st_size}, True
    store = open_store(text)
    sizes = store.sizes()
    folder, _, name = text.rpartition("/")
    if not sizes and "://" in folder:
        parent = open_store(folder)
        if parent.exists(name):
            return parent, {name: parent.size(name)}, True
    return store, sizes, False


def _find_glob(text: str) -> Inputs:
    from braceexpand import braceexpand

    try:
        patterns = list(braceexpand(text))
    except ValueError:
        raise LayerloopError(f"{text} has unbalanced braces: close them, or write the folder's name without") from None
    parts = text.split("/")
    fixed = next(n for n, part in enumerate(parts) if _PATTERN.search(part))
    root = "/".join(parts[:fixed])
    store = open_store(root or "/")
    if isinstance(store, LocalStore):  # looks no deeper than the pattern does
        found = sorted({path for pattern in patterns for path in glob.iglob(pattern, recursive=True)})
        sizes = {path[len(root) + 1 :]: os.stat(path).st_size for path in found if os.path.isfile(path)}
    else:
        literal = re.split(r"[*?\[{]", parts[fixed])[0]
        wanted = [re.compile(_regex(pattern[len(root) + 1 :])) for pattern in patterns]
        listed = store.sizes(literal)
        sizes = {name: size for name, size in listed.items() if any(regex.fullmatch(name) for regex in wanted)}
    return Inputs(text, store, {name: size for name, size in sizes.items() if not _hidden(name)})


def _regex(pattern: str) -> str:
    """A glob over `/`-separated names as a regular expression; `**/` is any number of folders."""
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(t) or (f"[^{t[2:]}" if t.startswith("[!") else t if len(t) > 1 and t[0] == "[" else re.escape(t))
        for t in tokens
    )


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _hidden(name: str) -> bool:
    """Dot files, `.DS_Store` and the `._photo.jpg` of macOS among them, and what lies in dot folders."""
    return any(part.startswith(".") for part in name.split("/"))


# -------------------------------------------------------------------------------------------------------------- reading


def _loader(store: Store, name: str) -> Callable[[], bytes]:
    return lambda: store.read(name)


def _item(origin: str, size: int, max_bytes: int, load: Callable[[], bytes]) -> Item:
    if size > max_bytes:
        return _broken(origin, f"file has {size / 1e6:.0f} MB, over the {max_bytes / 1e6:.0f} allowed: make it smaller")
    return Item(origin, load)


def _broken(origin: str, problem: str) -> Item:
    return Item(origin, lambda: b"", problem)


def _tar_items(store: Store, name: str, max_bytes: int) -> Iterator[Item]:
    """Members `<key>.<image suffix>` of a WebDataset tar; `<key>.mask.png` and the like are not its image."""
    with store.open(name) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    base = info.name.rpartition("/")[2]
                    if info.isreg() and base.partition(".")[2].lower() in IMAGE_SUFFIXES and not _hidden(base):
                        file.seek(info.offset_data)
                        data = file.read(info.size) if info.size <= max_bytes else b""
                        yield _item(f"{name}:{info.name}", info.size, max_bytes, lambda data=data: data)  # type: ignore[misc]
                end = tar.offset
            file.seek(end)
            complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except (tarfile.TarError, EOFError) as error:
            yield _broken(name, f"tar is damaged ({error}): make it again")
            return
    if not complete:
        yield _broken(name, "tar has no end-of-archive mark, it was cut short: make it again")


def _parquet_items(store: Store, name: str, max_bytes: int) -> Iterator[Item]:
    with store.open(name) as file:
        table = _open_parquet(file, name)
        if isinstance(table, str):
            yield _broken(name, table)
            return
        column = _image_column(table.schema_arrow, f"{store.uri}/{name}")
        for number, cell in enumerate(_cells(table, column)):
            origin = f"{name}:{number}"
            data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
            if data is None:
                yield _broken(origin, f"row has no image bytes (path {path!r}): embed them")
            else:
                yield _item(origin, len(data), max_bytes, lambda data=data: data)  # type: ignore[misc]


def _open_parquet(file: BinaryIO, name: str) -> Any:
    """The table, or a description of its fault."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        return f"parquet is damaged ({' '.join(str(error).split())[:120]}): make it again"


def _cells(table: Any, column: str) -> Iterator[Any]:
    for batch in table.iter_batches(batch_size=16, columns=[column]):  # a few images in memory, not a row group
        yield from batch.column(0).to_pylist()


def _image_column(schema: Any, where: str) -> str:
    """The column with encoded images: binary, or the `datasets` library's struct with `bytes`.

    Raises:
        LayerloopError: no image column, or several without a usual name.
    """
    from pyarrow import types

    def encoded(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    candidates = [
        field.name
        for field in schema
        if encoded(field.type)
        or (types.is_struct(field.type) and any(sub.name == "bytes" and encoded(sub.type) for sub in field.type))
    ]
    usual = [name for name in IMAGE_COLUMNS if name in candidates]
    if usual:
        return usual[0]
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(candidates or schema.names)
    state = "several image columns" if candidates else "no image column"
    raise LayerloopError(f"{where} has {state} among {names}: name the one with encoded images 'image'")
