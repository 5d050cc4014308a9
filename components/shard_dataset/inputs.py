"""Sources of images: files in a folder, a glob, WebDataset tars or parquet tables, here or on S3.

Inputs are found by listing only, so that a wrong path is reported at once; then read one by one. An image that cannot
be read is an item with a problem, never the end of the step; a file that is not read is passed over, counted and said.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import counted, printable
from layerloop.components.shard_dataset.files import (
    Files,
    InputError,
    Listing,
    LocalFiles,
    Passed,
    local_path,
    open_files,
    suffix_of,
)
from layerloop.components.shard_dataset.items import (
    IMAGE_SUFFIXES,
    Item,
    broken_item,
    hidden,
    passed_over,
    sized_item,
)
from layerloop.components.shard_dataset.listed import SUFFIXES as LIST_SUFFIXES
from layerloop.components.shard_dataset.listed import ListedFiles
from layerloop.components.shard_dataset.tables import NoImagesError, parquet_items
from layerloop.components.shard_dataset.tars import tar_items

_CONTAINERS = ("tar", "parquet")
_PATTERN = re.compile(r"[*?\[]|\{[^{}]*(?:\.\.|,)[^{}]*\}")  # a glob, or braces that braceexpand would expand
_RANGE = re.compile(r"\{[^{},]*\.\.[^{},]*\}")  # {000..099}


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


def absolute_uri(uri: str) -> str:
    """The URI by which inputs are recorded: local paths absolute, everything without a trailing slash, printable."""
    return _shown(_absolute(uri))


def _shown(uri: str) -> str:
    return printable(without_secrets(uri))


_REMEDY = "give a folder of images, a glob, WebDataset tars, parquet or a list of URIs (.txt)"


def find_inputs(uri: str, *, what: str, suffixes: frozenset[str] = IMAGE_SUFFIXES, remedy: str = _REMEDY) -> Inputs:
    """List the files at a file, folder (all the way down) or glob (`*`, `?`, `[...]`, `**`, `{000..099}`), or those
    that a text file lists (listed.py).

    In a folder, files that are neither an image by their suffix nor a container are passed over, and hidden files
    everywhere; a file that a glob or the URI itself names is always taken. A place that exists under the very name is
    no glob.

    Args:
        what: what the argument is called in errors, "images".
        remedy: what errors say to give in its place.

    Raises:
        LayerloopError: nothing there, nothing usable, or not every number of a range.
    """
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
        if suffix_of(name) in (*suffixes, *_CONTAINERS) and not hidden(name)
    }
    passed = [*listing.passed, *(passed_over(name) for name in listing.sizes if name not in useful)]
    if not useful:
        raise LayerloopError(
            f"{what} {_shown(uri)} has {counted(len(listing.sizes), 'files')} but no image, tar or parquet: {remedy}"
        )
    return Inputs(_shown(text), store, useful, passed)


def read_items(inputs: Inputs, *, max_bytes: int) -> Iterator[Item]:
    """The images of all files, in the order of their names. One over `max_bytes` encoded is a problem, and not read.

    Raises:
        LayerloopError: a table with several image columns, or none of them where there is nothing else.
    """
    found, without = False, None
    for name, size in inputs.sizes.items():
        where = printable(name)
        if suffix_of(name) not in _CONTAINERS:
            found = True
            yield sized_item(where, size, max_bytes, functools.partial(inputs.store.read, name))
            continue
        before, count = len(inputs.passed), 0
        try:
            for item in _contained(inputs, name, where, max_bytes):
                count, found = count + 1, True
                yield item
        except NoImagesError as error:
            without = without or error
            reason = str(error).removeprefix(f"{inputs.store.uri}/{where} ")
            inputs.passed.append(Passed(where, "tables without images", reason))
        except InputError as error:  # the container itself cannot be opened
            count, found = count + 1, True
            yield broken_item(where, str(error))
        if not count and len(inputs.passed) == before:
            inputs.passed.append(Passed(where, "empty containers", "has no image: leave it out, or fill it"))
    if without is not None and not found:
        raise without


def _contained(inputs: Inputs, name: str, where: str, max_bytes: int) -> Iterator[Item]:
    """The images of a tar or parquet."""
    with inputs.store.open(name) as file:
        if suffix_of(name) == "tar":
            yield from tar_items(file, where, inputs.passed, max_bytes=max_bytes)
        else:
            yield from parquet_items(file, where, folder=inputs.store.uri, max_bytes=max_bytes)


def _text_of(store: Files, name: str, where: str) -> str:
    data = store.read(name)
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")  # as PowerShell writes
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise LayerloopError(f"list {where} is not text in UTF-8: write one URI a line")
    return text


def _absolute(uri: str) -> str:
    text = local_path(uri.strip())
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
    shown = {name: size for name, size in sizes.items() if not hidden(name)}
    return Inputs(_shown(text), store, shown, [passed_over(name) for name in sizes if name not in shown])


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
