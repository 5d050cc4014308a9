"""Committing an output: its files first, under names that hold their hash; its manifest last and create-only, under a
fixed one. No manifest, no output."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import HASH_DIGITS, File, Manifest, content_name
from layerloop.components.schema.record import DamagedError
from layerloop.components.storage.removals import explain_missing, was_removed
from layerloop.components.storage.store import (
    LARGEST_RECORD,
    READS,
    MissingObjectError,
    Store,
    TooLargeError,
    hash_file,
    written_before,
)

_PUBLICATION = re.compile(rf"publications/[^/]+/[0-9a-f]{{{HASH_DIGITS}}}/")


def commit(store: Store, name: str, manifest: Manifest) -> Manifest:
    """Commit an output whose files are already in the store.

    Returns:
        The committed manifest: this one, or the one that another attempt committed first, provided that it verifies.

    Raises:
        LayerloopError: a file the manifest names is missing, or another attempt's manifest does not verify.
    """
    verify(store, manifest)
    data = manifest.to_json()
    if not store.creates_once:  # then it may be replaced, and what it names must still be found
        store.write(content_name(name, hashlib.sha256(data).hexdigest()), data)
    if store.create(name, data):
        return manifest
    stored = load(store, name)
    if stored is None:
        raise LayerloopError(f"{store.uri}/{name} was deleted while it was committed: run the step again")
    if (stored.kind, stored.iteration) != (manifest.kind, manifest.iteration):
        raise LayerloopError(
            f"{store.uri}/{name} is of {stored.kind} {stored.iteration}, not of {manifest.kind} {manifest.iteration}: "
            "two campaigns share a folder, separate them"
        )
    if stored != manifest:
        verify(store, stored)
        logging.getLogger(__name__).warning(
            "%s/%s was committed by another attempt first: that one counts, this one's files are left aside",
            store.uri,
            name,
        )
    return stored


def load(store: Store, name: str) -> Manifest | None:
    """The manifest of that name; None if it was not committed.

    Raises:
        DamagedError: its content is not that of its hash, however often it is read.
    """
    for attempt in range(READS):
        try:
            return Manifest.from_json(store.read(name, most=LARGEST_RECORD), where=f"{store.uri}/{name}")
        except MissingObjectError:
            return None
        except DamagedError:
            if attempt == READS - 1:
                raise
    raise AssertionError("the last read returns or raises")


def verify(store: Store, manifest: Manifest) -> None:
    """Check that every shard and file is there with its size, or was removed by retention; hashes are checked where
    they are read.

    Raises:
        LayerloopError: names the first that is missing or has another size.
    """
    folders: dict[str, list[File]] = defaultdict(list)
    for file in (*manifest.shards, *manifest.files):
        folders[file.name.rpartition("/")[0]].append(file)
    for folder, files in sorted(folders.items()):
        sizes = store.sizes(f"{folder}/" if folder else "") if len(files) > 1 else None
        for file in files:
            found = sizes.get(file.name) if sizes is not None else _size(store, file.name)
            if found != file.bytes and not (found is None and was_removed(store, file)):
                state = "is missing" if found is None else f"has {found} bytes instead of {file.bytes}"
                raise LayerloopError(
                    f"{store.uri}/{file.name} {state} but a {manifest.kind} manifest names it: restore it, or delete "
                    "the manifest to have the step run again"
                )


def add_file(store: Store, name: str, data: bytes | Path) -> File:
    """Put bytes or a local file into the store, as `content_name(name)`; returns its manifest entry."""
    size, digest = _measure(data)
    return _put(store, File(name=content_name(name, digest), bytes=size, sha256=digest), data)


def add_folder(store: Store, folder: str, files: Mapping[str, bytes | Path]) -> tuple[File, ...]:
    """Put files that keep their names into a folder of their own in `folder`, whose name says the content of them all.

    Args:
        files: bytes or local files, by their names relative to that folder.

    Returns:
        Their manifest entries, in the same order.
    """
    measured = {name: _measure(data) for name, data in files.items()}
    text = "".join(f"{name} {size} {digest}\n" for name, (size, digest) in sorted(measured.items()))
    own = f"{folder}/{hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]}"
    return tuple(
        _put(store, File(name=f"{own}/{name}", bytes=size, sha256=digest), files[name])
        for name, (size, digest) in measured.items()
    )


def find_file(store: Store, name: str) -> File | None:
    """The manifest entry of a file that an interrupted attempt added as `name`; its content has the hash that its name
    says. One of an earlier version, whose name says none, is read twice."""
    for found, digits in written_before(store, name):
        for _ in range(READS):
            with store.open(found) as file:
                digest, size = hash_file(file)
            if digits and digest.startswith(digits):
                return File(name=found, bytes=size, sha256=digest)
            digits = digits or digest
    return None


def read_file(store: Store, file: File) -> bytes:
    """The bytes of a manifest's file, checked, and read again where they are not what was committed.

    Raises:
        DamagedError: missing, or not the bytes that were committed.
    """
    for _ in range(READS):
        try:
            data = store.read(file.name, most=file.bytes)
        except MissingObjectError as error:
            raise explain_missing(store, file, error) from None
        except TooLargeError as error:
            raise DamagedError(
                f"{store.uri}/{file.name} has {error.size} bytes, its manifest says {file.bytes}: it was changed after "
                "it was committed, restore it"
            ) from None
        digest = hashlib.sha256(data).hexdigest()
        if (len(data), digest) == (file.bytes, file.sha256):
            return data
    raise DamagedError(
        f"{store.uri}/{file.name} has {len(data)} bytes of sha256 {digest[:12]}, its manifest says {file.bytes} and "
        f"{file.sha256[:12]}: it was changed after it was committed, restore it"
    )


def place_files(store: Store, manifest: Manifest, folder: str) -> None:
    """Copy a publication's files into `folder`, under the names that people's programs look for and no others: a
    repository that holds a file twice is refused by some.

    The copies are nothing but that: what counts is what the manifest names. Those of the right size are left alone.
    """
    sizes = store.sizes(f"{folder}/")
    for file in manifest.files:
        name = visible_name(folder, file)
        if name != file.name and sizes.get(name) != file.bytes:
            store.copy(file.name, name)


def visible_name(folder: str, file: File) -> str:
    """`published/x/README.md` for `publications/x/0123456789abcdef/README.md` and the folder `published/x`; the file's
    own name where it lies there already, as in earlier versions."""
    match = _PUBLICATION.match(file.name)
    return f"{folder}/{file.name[match.end() :]}" if match else file.name


def _measure(data: bytes | Path) -> tuple[int, str]:
    """Size in bytes and sha256."""
    if isinstance(data, bytes):
        return len(data), hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _put(store: Store, file: File, data: bytes | Path) -> File:
    if isinstance(data, bytes):
        store.write(file.name, data)
    else:
        store.upload(file.name, data)
    return file


def _size(store: Store, name: str) -> int | None:
    try:
        return store.size(name)
    except MissingObjectError:
        return None
