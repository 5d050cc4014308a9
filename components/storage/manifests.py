"""Committing an output: its files first, its manifest last and create-only. No manifest, no output."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Manifest
from layerloop.components.storage.store import MissingObjectError, Store


def commit(store: Store, name: str, manifest: Manifest) -> Manifest:
    """Commit an output whose files are already in the store.

    Returns:
        The committed manifest: this one, or the one that another attempt committed first, provided that it verifies.

    Raises:
        LayerloopError: a file the manifest names is missing, or another attempt's manifest does not verify.
    """
    verify(store, manifest)
    if store.create(name, manifest.to_json()):
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
    return stored


def already_committed(store: Store, name: str, *, log: Callable[[str], None]) -> Manifest | None:
    """The manifest that an earlier attempt committed under `name`, verified and logged; None where there is work to do.

    Every step starts with this call.

    Raises:
        LayerloopError: what the manifest names is missing or has another size.
    """
    done = load(store, name)
    if done is not None:
        verify(store, done)
        log(f"{store.uri}/{name} is committed already")
    return done


def load(store: Store, name: str) -> Manifest | None:
    """The manifest of that name; None if it was not committed."""
    try:
        data = store.read(name)
    except MissingObjectError:
        return None
    return Manifest.from_json(data, where=f"{store.uri}/{name}")


def verify(store: Store, manifest: Manifest) -> None:
    """Check that every shard and file is there with its size; hashes are checked where they are read.

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
            if found != file.bytes:
                state = "is missing" if found is None else f"has {found} bytes instead of {file.bytes}"
                raise LayerloopError(
                    f"{store.uri}/{file.name} {state} but a {manifest.kind} manifest names it: restore it, or delete "
                    "the manifest to have the step run again"
                )


def add_file(store: Store, name: str, data: bytes | Path) -> File:
    """Put bytes or a local file into the store; returns its manifest entry."""
    if isinstance(data, bytes):
        store.write(name, data)
        return File(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with data.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    store.upload(name, data)
    return File(name=name, bytes=size, sha256=digest)


def describe_file(store: Store, name: str) -> File:
    """The manifest entry of a file that is in the store already. Raises MissingObjectError."""
    data = store.read(name)
    return File(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_file(store: Store, file: File) -> bytes:
    """The bytes of a manifest's file, checked.

    Raises:
        LayerloopError: missing, or not the bytes that were committed.
    """
    data = store.read(file.name)
    if (len(data), hashlib.sha256(data).hexdigest()) != (file.bytes, file.sha256):
        raise LayerloopError(
            f"{store.uri}/{file.name} has {len(data)} bytes that are not the committed {file.bytes}: it was changed "
            "after it was committed, restore it"
        )
    return data


def _size(store: Store, name: str) -> int | None:
    try:
        return store.size(name)
    except MissingObjectError:
        return None
