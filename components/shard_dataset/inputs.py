"""Sources of images: files in a folder, a glob, WebDataset tars or parquet tables, here or on S3.

Inputs are found by listing only, so that a wrong path is reported at once; then read one by one. An image that cannot
be read is an item with a problem, never the end of the step; a file that is not read is passed over, counted and said.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.shard_dataset.files import (
    Files,
    InputError,
    Listing,
    LocalFiles,
    Passed,
    open_files,
    printable,
    suffix_of,
)
from layerloop.components.shard_dataset.listed import SUFFIXES as LIST_SUFFIXES
from layerloop.components.shard_dataset.listed import ListedFiles

IMAGE_SUFFIXES = frozenset((
    "png", "jpg", "jpeg", "jfif", "webp", "avif", "heic", "heif", "gif", "bmp", "tif", "tiff", "jp2", "j2k", "ppm",
    "pgm",
))  # fmt: skip
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "data")
_CONTAINERS = ("tar", "parquet")
_PACKED = ("gz", "tgz", "bz2", "tbz2", "xz", "txz", "zst", "zip", "7z", "rar")
_PATTERN = re.compile(r"[*?\[]|\{[^{}]*(?:\.\.|,)[^{}]*\}")  # a glob, or braces that braceexpand would expand
_RANGE = re.compile(r"\{[^{},]*\.\.[^{},]*\}")  # {000..099}

# Bounds of a row group of parquet, whose few bytes may stand for any number.
_FREE_BYTES, _MOST_RATIO = 64_000_000, 100
_FREE_ENTRIES = 1_000_000
_BATCH_BYTES = 256_000_000  # unpacked at once
_MOST_TOLD = 10_000  # rows of a group that cannot be read, each in the table of rejects

_EXTENSIONS = (  # types of headers that are not of a member
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_LONGEST_EXTENSION = 1_000_000  # bytes

# `<key>.<word>.png` beside other files of the key is what WebDataset keeps about an image, not the image.
_ROLES = re.compile(
    r"(?:mask|matte|alpha|depth|disparity|normals?|seg|segm|segmentation|labels?|annotations?|edges?|canny|pose|flow"
    r"|layer)[-_]?\d*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Inputs:
    """The files behind a URI, listed and not yet read."""

    uri: str  # as recorded: absolute and printable, so that another run can compare it with its own
    store: Files
    sizes: dict[str, int]  # bytes by name, sorted
    passed: list[Passed] = field(default_factory=list, compare=False)  # what is not read; tars add theirs when read

    @property
    def sha256(self) -> str:
        """SHA-256 of all names and sizes: identifies an unchanged input without reading it."""
        text = "".join(f"{name}\t{size}\n" for name, size in self.sizes.items())
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def images(self) -> int | None:
        """Number of images; None where containers have yet to be opened."""
        return None if any(suffix_of(name) in _CONTAINERS for name in self.sizes) else len(self.sizes)


@dataclass(frozen=True)
class Item:
    """One image: its origin (printable), and either how to get its bytes or why that is impossible."""

    origin: str
    load: Callable[[], bytes]
    problem: str | None = None


def absolute_uri(uri: str) -> str:
    """The URI by which inputs are recorded: local paths absolute, everything without a trailing slash, printable."""
    return _shown(_absolute(uri))


def _shown(uri: str) -> str:
    return printable(without_secrets(uri))


def find_inputs(uri: str, *, what: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> Inputs:
    """List the files at a file, folder (all the way down) or glob (`*`, `?`, `[...]`, `**`, `{000..099}`), or those
    that a text file lists (listed.py).

    In a folder, files that are neither an image by their suffix nor a container are passed over, and hidden files
    everywhere; a file that a glob or the URI itself names is always taken. A place that exists under the very name is
    no glob.

    Args:
        what: what the argument is called in errors, "images".

    Raises:
        LayerloopError: nothing there, nothing usable, or not every number of a range.
    """
    remedy = "give a folder of images, a glob, WebDataset tars, parquet or a list of URIs (.txt)"
    text = _absolute(uri)
    literal = _find_plain(text) if not _PATTERN.search(text) or _exists(text) else None
    if literal is None:
        found = _find_glob(text, what=what)
        if not found.sizes:
            raise LayerloopError(f"{what} {_shown(uri)} matches no file: {remedy}")
        return found
    store, listing, named = literal
    if named and suffix_of(text) in LIST_SUFFIXES:
        listed = ListedFiles(text, _text_of(store, next(iter(listing.sizes)), printable(text)))
        return Inputs(printable(text), listed, listed.listed().sizes)
    if named:
        return Inputs(_shown(text), store, listing.sizes)
    if isinstance(store, LocalFiles) and not store.root.exists():
        raise LayerloopError(f"{what} {_shown(uri)} does not exist: {remedy}")
    if not listing.sizes and not listing.passed:
        raise LayerloopError(f"{what} {_shown(uri)} is empty: {remedy}")
    useful = {
        name: size
        for name, size in listing.sizes.items()
        if suffix_of(name) in (*suffixes, *_CONTAINERS) and not _hidden(name)
    }
    passed = [*listing.passed, *(_passed(name) for name in listing.sizes if name not in useful)]
    if not useful:
        raise LayerloopError(
            f"{what} {_shown(uri)} has {len(listing.sizes)} files but no image, tar or parquet: {remedy}"
        )
    return Inputs(_shown(text), store, useful, passed)


def read_items(inputs: Inputs, *, max_bytes: int) -> Iterator[Item]:
    """The images of all files, in the order of their names. One over `max_bytes` encoded is a problem, and not read."""
    for name, size in inputs.sizes.items():
        try:
            match suffix_of(name):
                case "tar":
                    yield from _tar_items(inputs, name, max_bytes)
                case "parquet":
                    yield from _parquet_items(inputs.store, name, max_bytes)
                case _:
                    yield _item(printable(name), size, max_bytes, _loader(inputs.store, name))
        except InputError as error:  # the container itself cannot be opened
            yield _broken(printable(name), str(error))


# -------------------------------------------------------------------------------------------------------------- finding


def _text_of(store: Files, name: str, where: str) -> str:
    try:
        return store.read(name).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LayerloopError(f"list {where} is not text in UTF-8: write one URI a line") from None


def _absolute(uri: str) -> str:
    text = uri.strip().removeprefix("file://")
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute())


def _exists(text: str) -> bool:
    """Whether there is a file, a folder or a bucket's prefix of this very name, brackets and all."""
    if "://" not in text:
        return os.path.lexists(text)
    return "?" not in text and bool(_find_plain(text)[1].sizes)


def _find_plain(text: str) -> tuple[Files, Listing, bool]:
    """(store, listing, whether the URI is that of one file)."""
    try:
        if "://" not in text and Path(text).is_file():
            return LocalFiles(Path(text).parent), Listing({Path(text).name: Path(text).stat().st_size}), True
    except OSError as error:  # a folder above it may not be entered, or a name of it is too long
        remedy = "allow it, or correct it"
        raise LayerloopError(f"{_shown(text)} cannot be reached ({error.strerror}): {remedy}") from None
    store = open_files(text)
    listing = store.listed()
    folder, _, name = text.rpartition("/")
    if not listing.sizes and "://" in folder and not folder.endswith(":/"):
        parent = open_files(folder)
        beside = parent.listed(name).sizes
        if name in beside:
            return parent, Listing({name: beside[name]}), True
    return store, listing, False


def _find_glob(text: str, *, what: str) -> Inputs:
    parts = text.split("/")
    last = len(parts) - 1
    fixed = next(
        n
        for n, part in enumerate(parts)
        if _PATTERN.search(part) and (n == last or not _exists("/".join(parts[: n + 1])))
    )
    root, inner = "/".join(parts[:fixed]), "/".join(parts[fixed:])
    store = open_files(root or "/")
    patterns = _expanded(inner)
    if isinstance(store, LocalFiles):  # looks no deeper than the pattern does
        names = {name for pattern in patterns for name in glob.iglob(pattern, root_dir=store.root, recursive=True)}
        paths = {name: os.path.join(store.root, name) for name in sorted(names)}
        sizes = {name: os.stat(path).st_size for name, path in paths.items() if os.path.isfile(path)}
    else:
        literal = re.split(r"[*?\[{]", parts[fixed])[0]
        wanted = [re.compile(_regex(pattern)) for pattern in patterns]
        listed = store.listed(literal).sizes
        sizes = {name: size for name, size in listed.items() if any(regex.fullmatch(name) for regex in wanted)}
    _check_ranges(inner, list(sizes), f"{what} {_shown(text)}")
    shown = {name: size for name, size in sizes.items() if not _hidden(name)}
    return Inputs(_shown(text), store, shown, [_passed(name) for name in sizes if name not in shown])


def _expanded(text: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(text, escape=False))
    except ValueError:
        raise LayerloopError(
            f"{_shown(text)} has unbalanced braces: close them, or write the folder's name without"
        ) from None


def _check_ranges(pattern: str, names: Sequence[str], where: str) -> None:
    """Every number of `{000..099}` must match something; of `{png,jpg}` the words are alternatives.

    Raises:
        LayerloopError: naming the first that matches nothing.
    """
    ranges = _RANGE.findall(pattern)
    if not ranges or not names:
        return
    pieces = _RANGE.split(pattern)
    lost = []
    for values in itertools.product(*(_expanded(part) for part in ranges)):
        one = "".join(itertools.chain(*itertools.zip_longest(pieces, values, fillvalue="")))
        wanted = re.compile("|".join(f"(?:{_regex(alternative)})" for alternative in _expanded(one)))
        if not any(wanted.fullmatch(name) for name in names):
            lost.append(one)
    if lost:
        more = f" and {len(lost) - 1} more of its range" if len(lost) > 1 else ""
        raise LayerloopError(f"{where}: {printable(lost[0])}{more} does not exist: restore it, or narrow the range")


def _regex(pattern: str) -> str:
    """A glob over `/`-separated names as a regular expression; `**/` is any number of folders."""
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(t) or (_character_class(t) if len(t) > 1 and t[0] == "[" else re.escape(t)) for t in tokens
    )


def _character_class(token: str) -> str:
    """`[a-z]` or `[!a]` of a glob; one that means nothing as a class stands for itself."""
    inner = token[1:-1].replace("\\", "\\\\").replace("[", "\\[")
    inner = f"^{inner[1:]}" if inner.startswith("!") else f"\\{inner}" if inner.startswith("^") else inner
    inner = inner.replace("]", "\\]")
    try:
        re.compile(f"[{inner}]")
    except re.error:
        return re.escape(token)
    return f"[{inner}]"


def _hidden(name: str) -> bool:
    """Dot files, `.DS_Store` and the `._photo.jpg` of macOS among them, and what lies in dot folders."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _passed(name: str) -> Passed:
    """A file that is not read, for its name."""
    if _hidden(name):
        return Passed(printable(name), "hidden", "hidden files are not read")
    suffix = suffix_of(name)
    if not suffix:
        return Passed(printable(name), "without suffix", "a file without a suffix is not read: name it .png or .jpg")
    kind = f".{printable(suffix)}"
    if suffix in _PACKED:
        return Passed(printable(name), kind, f"{kind} is packed, which is not read: unpack it")
    return Passed(printable(name), kind, f"{kind} is not read: convert it to PNG or JPEG if it is an image")


# -------------------------------------------------------------------------------------------------------------- reading


def _loader(store: Files, name: str) -> Callable[[], bytes]:
    return lambda: store.read(name)


def _item(origin: str, size: int, max_bytes: int, load: Callable[[], bytes]) -> Item:
    if size > max_bytes:
        return _broken(origin, f"file has {size / 1e6:.0f} MB, over the {max_bytes / 1e6:.0f} allowed: make it smaller")
    return Item(origin, load)


def _broken(origin: str, problem: str) -> Item:
    return Item(origin, lambda: b"", problem)


def one_line(error: BaseException, most: int = 120) -> str:
    """What an exception of a library says, in `most` characters at most, printable."""
    return printable(" ".join(str(error).split()))[:most] or type(error).__name__


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int
    plain: bool  # whether its data are stored at `offset` as they are

    @property
    def key(self) -> str:
        """WebDataset's key: the name up to the first dot of its last part."""
        folder, slash, base = self.name.rpartition("/")
        return f"{folder}{slash}{base.partition('.')[0]}"

    @property
    def extension(self) -> str:
        """WebDataset's extension: the rest."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def _tar_items(inputs: Inputs, name: str, max_bytes: int) -> Iterator[Item]:
    """The image of every sample of a WebDataset tar.

    WebDataset cuts a name at its first dot. `<key>.png` is the image of its sample, and `<key>.mask.png` beside it is
    not; where a key has no `<key>.<image suffix>`, its dot belongs to a name, `22.05.png` or `photo.v2.png`.
    """
    where = printable(name)
    with inputs.store.open(name) as file:
        members, problem = _members(file)
        keys = {member.key for member in members if member.extension in IMAGE_SUFFIXES}
        for member in members:
            origin = f"{where}:{printable(member.name)}"
            reason = _no_image(member, keys)
            if reason is not None:
                if member.key not in keys or suffix_of(member.name) in IMAGE_SUFFIXES:
                    inputs.passed.append(Passed(origin, reason[0], reason[1]))
                continue
            data = b""
            if member.size <= max_bytes:
                try:
                    file.seek(member.offset)
                    data = file.read(member.size)
                except (OSError, ValueError, OverflowError, MemoryError) as error:
                    yield _broken(origin, f"member cannot be read ({one_line(error)}): make the tar again")
                    continue
            yield _item(origin, member.size, max_bytes, lambda data=data: data)  # type: ignore[misc]
    if problem is not None:
        yield _broken(where, problem)


class _Bounded(tarfile.TarInfo):
    """A header. Those that extend others, by a long name or PAX's fields, are read into memory, whatever they say."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENSIONS and self.size > _LONGEST_EXTENSION:
            raise tarfile.HeaderError(f"an extended header has {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _members(file: BinaryIO) -> tuple[list[_Member], str | None]:
    """The members of a tar as far as its headers can be read, and what is wrong with it."""
    members: list[_Member] = []
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Bounded) as tar:
            for info in tar:
                plain = info.isreg() and not info.issparse()
                if not info.isdir():
                    members.append(_Member(info.name, info.offset_data, info.size, plain))
            end = tar.offset
        file.seek(end)
        complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except Exception as error:  # hostile headers raise nearly anything
        return members, f"tar is damaged ({one_line(error)}): make it again"
    return members, None if complete else "tar has no end-of-archive mark, it was cut short: make it again"


def _no_image(member: _Member, keys: set[str]) -> tuple[str, str] | None:
    """(kind, reason) where a member is not the image of its sample."""
    base = member.name.rpartition("/")[2]
    suffix = suffix_of(base)
    if base.startswith(".") or suffix not in IMAGE_SUFFIXES:
        passed = _passed(base)
        return passed.kind, passed.reason
    if not member.plain:
        return "links in tars", "a link, sparse or special member is not read: store the file itself"
    if member.extension in IMAGE_SUFFIXES:
        return None
    if member.key in keys:
        return "parts of samples", f"belongs to the sample {printable(member.key)}, which has an image of its own"
    word = member.extension.rpartition(".")[0].rpartition(".")[2]
    if _ROLES.fullmatch(word):
        return "parts of samples", f"{word!r} is not an image but about one: name the image <key>.png"
    return None


def _parquet_items(store: Files, name: str, max_bytes: int) -> Iterator[Item]:
    where = printable(name)
    with store.open(name) as file:
        table = open_parquet(file)
        if isinstance(table, str):
            yield _broken(where, table)
            return
        column = _image_column(table.schema_arrow, f"{store.uri}/{where}")
        for number, row in parquet_rows(table, [column], batch=16):  # a few images in memory, not a row group
            origin = f"{where}:{number}"
            if isinstance(row, str):
                yield _broken(origin, row)
                continue
            cell = row[column]
            data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
            if data is None:
                yield _broken(origin, f"row has no image bytes (path {path!r}): embed them")
            else:
                yield _item(origin, len(data), max_bytes, lambda data=data: data)  # type: ignore[misc]


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
        count = table.metadata.row_group(group).num_rows
        done = 0
        packed, unpacked, entries = _sizes(table.metadata.row_group(group), columns)
        problem = _bomb(packed, unpacked, max(entries, count)) or "row is missing"
        batch = max(
            1, min(batch, _BATCH_BYTES // max(1, unpacked))
        )  # a dictionary may give every row its largest value
        for size in (batch, 1) if problem == "row is missing" else ():  # one by one where a batch cannot be read
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
        if count - done > _MOST_TOLD:
            yield first + done, f"{count - done} rows: {problem}"
        else:
            for number in range(done, count):
                yield first + number, problem
        first += count


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
