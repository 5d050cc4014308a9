"""The record of what retention removed, `iterations/000003/rollouts/removed.json`: what it names is not missing."""

from __future__ import annotations

import re
from collections.abc import Collection

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Removal
from layerloop.components.schema.record import DamagedError
from layerloop.components.storage.store import LARGEST_RECORD, READS, MissingObjectError, Store

RECORD = "removed.json"
_REMOVABLE = re.compile(r"(iterations/\d{6,}/(?:rollouts|policy))/.+")


class RemovedError(MissingObjectError):
    """An object that retention removed is asked for."""


def removed_files(store: Store, folder: str) -> dict[str, File]:
    """What the record of a folder names, by name; nothing where there is no record.

    Raises:
        LayerloopError: the record is damaged, or is of another folder.
    """
    name = f"{folder}/{RECORD}"
    for attempt in range(READS):
        try:
            record = Removal.from_json(store.read(name, most=LARGEST_RECORD), where=f"{store.uri}/{name}")
            break
        except MissingObjectError:
            return {}
        except DamagedError:
            if attempt == READS - 1:
                raise
    if record.folder != folder or any(removable_folder(file.name) != folder for file in record.files):
        raise LayerloopError(f"{store.uri}/{name} is of {record.folder}, or names objects elsewhere: delete it")
    return {file.name: file for file in record.files}


def removable_folder(name: str) -> str:
    """The folder whose record would name an object: retention removes rollouts and policies; '' for all else."""
    match = _REMOVABLE.fullmatch(name)
    return match[1] if match else ""


def was_removed(store: Store, file: File) -> bool:
    """Whether a record says that retention removed an object of a manifest, with that very content."""
    folder = removable_folder(file.name)
    found = removed_files(store, folder).get(file.name) if folder else None
    return found is not None and (found.bytes, found.sha256) == (file.bytes, file.sha256)


def explain_missing(store: Store, file: File, error: MissingObjectError) -> MissingObjectError:
    """The error for an object of a manifest that is not there."""
    if isinstance(error, RemovedError) or not was_removed(store, file):
        return error
    return RemovedError(
        f"{store.uri}/{file.name} was removed by the campaign's retention: take an iteration that has its own still "
        f"(layerloop campaign show {store.uri})"
    )


def record_removal(store: Store, folder: str, files: Collection[File]) -> None:
    """Write down that files of a folder go, beside those that went before."""
    before = removed_files(store, folder)
    plain = {file.name: File(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in files}
    if not plain.items() <= before.items():
        record = Removal(folder=folder, files=tuple(file for _, file in sorted((before | plain).items())))
        store.write(f"{folder}/{RECORD}", record.to_json())
