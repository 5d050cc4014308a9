"""Local copies of folders (models, adapters) that a library can only read from disk."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.hub import hub_error
from layerloop.components.schema.messages import reason_of, size_text
from layerloop.components.storage.store import Store
from layerloop.components.storage.stores import LocalStore, open_store

WEIGHTS = ".safetensors"  # the end of a URI that names an adapter's file, not its folder
_BESIDE = "adapter_config.json"  # peft's, which such a file may need
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:/[\w./-]+)?")  # owner/name, or a folder in it


def hub_uri(text: str) -> str | None:
    """`hf://owner/name` of an id of the hub; None of other texts, and of a path whose first folder is here: a misspelt
    path is not looked for on the hub."""
    if text.startswith("hf://"):
        return text
    return f"hf://{text}" if HUB_ID.fullmatch(text) and not Path(text.partition("/")[0]).exists() else None


def cache_folder() -> Path:
    """Folder of the copies: LAYERLOOP_CACHE, by default `~/.cache/layerloop`; on a cluster a volume of the node."""
    return Path(os.environ.get("LAYERLOOP_CACHE") or "~/.cache/layerloop").expanduser()


def local_adapter(uri: str) -> Path:
    """A local copy of an adapter: of a folder, or of the one file that a URI names, with peft's config beside it.

    Raises:
        LayerloopError: as `local_folder`, or there is no such file.
    """
    folder, _, name = uri.rpartition("/")
    if "://" not in uri and Path(uri).is_file():
        return Path(uri).absolute()
    if "://" not in uri or not name.endswith(WEIGHTS):
        return local_folder(uri)
    found = local_folder(folder, only=(name, _BESIDE)) / name
    if not found.is_file():
        raise LayerloopError(f"{uri} does not exist: correct the name")
    return found


def local_folder(uri: str, *, cache: Path | None = None, only: Sequence[str] = ()) -> Path:
    """A local folder with the objects under `uri`: the folder itself where it is local, else a copy, made only once.

    A copy is identified by the URI and by the names, sizes and ETags of all objects; of several processes that want it
    at once one downloads it, and an interrupted download is continued.

    Args:
        uri: a folder path, `file://`, `s3://bucket/prefix`, or `hf://owner/name[/subfolder]` of the Hugging Face hub.
        cache: where copies are kept, by default `cache_folder()`; those of the hub lie in its own cache.
        only: names of the objects that are wanted; by default all.

    Raises:
        LayerloopError: nothing is there; the cache cannot be written to, or is full.
    """
    if uri.startswith("hf://"):
        return _from_hub(uri, only)
    store = open_store(uri)
    if isinstance(store, LocalStore):
        if not store.root.is_dir():
            raise LayerloopError(f"folder {store.root} does not exist: correct the path, or give an s3:// URI")
        return store.root
    entries = {name: entry for name, entry in store.entries().items() if not only or name in only}
    sizes = {name: entry.size for name, entry in entries.items()}
    if not sizes:
        what = only[0] if only else "objects"
        raise LayerloopError(f"{store.uri} has no {what}: correct the URI, or upload the files first")
    text = "\n".join([store.uri, *(f"{name} {entry.size} {entry.etag}" for name, entry in entries.items())])
    base = (cache or cache_folder()) / "folders"
    final = base / hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        return _made_once(final, lambda: _download(store, sizes, final))
    except OSError as error:
        raise LayerloopError(
            f"{store.uri} cannot be copied to {base} ({reason_of(error)}): set LAYERLOOP_CACHE to a folder that can be "
            "written to, or give its volume more space"
        ) from None


def _made_once(final: Path, make: Callable[[], None]) -> Path:
    """A folder that `make` gives its name once it is whole: one of the processes that want it makes it, under a lock,
    while the others wait. One that is there is used as it is, in a cache that has become read-only too."""
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with final.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            make()
    return final


def _download(store: Store, sizes: Mapping[str, int], final: Path) -> None:
    partial = final.with_suffix(".partial")
    todo = {name: size for name, size in sizes.items() if not _has(partial / name, size)}
    needed, free = sum(todo.values()), shutil.disk_usage(final.parent).free
    if free < needed:
        raise LayerloopError(
            f"{store.uri} has {size_text(needed)} to copy but {final.parent} has {size_text(free)} left: set "
            "LAYERLOOP_CACHE to a larger disk"
        )
    for name in todo:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        store.download(name, partial / name)
    for path in [path for path in partial.rglob("*") if path.is_file()]:
        if path.relative_to(partial).as_posix() not in sizes:  # of a download that was killed
            path.unlink()
    partial.rename(final)


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


# ---- a copy on the node, of files on a slow claim

PIECE = 16 * 2**20  # bytes of one read


def node_copy(folder: Path, files: Sequence[Path]) -> Path:
    """A copy of `files`, which lie in `folder`, under `$LAYERLOOP_CACHE`: the folder that has them, in the same places.

    `folder` itself where the variable is not set, or where both are on one disk, since a copy would be no quicker. All
    steps and ranks of a node share a copy: one makes it, under a lock, while the others wait. Each file is read once
    from its beginning to its end, and what was written is read back and compared before the copy counts; a copy that
    was interrupted is continued file by file.

    Raises:
        LayerloopError: the cache cannot be written to, is full, or returns other bytes than were written.
    """
    if not os.environ.get("LAYERLOOP_CACHE"):
        return folder
    base = cache_folder() / "bases"
    try:
        base.mkdir(parents=True, exist_ok=True)
        if _same_disk(files[0], base):
            return folder
        states = {file.relative_to(folder).as_posix(): file.stat() for file in files}
        text = "\n".join([str(folder.resolve()), *(f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in states.items())])
        final = base / hashlib.sha256(text.encode()).hexdigest()[:32]
        return _made_once(final, lambda: _fill_copy(folder, states, final))
    except OSError as error:
        raise LayerloopError(
            f"LAYERLOOP_CACHE is {cache_folder()}, where {folder} cannot be copied ({reason_of(error)}): make the "
            "volume writable, give it more space, or leave the variable out"
        ) from None


def _fill_copy(folder: Path, states: Mapping[str, os.stat_result], final: Path) -> None:
    partial = final.with_suffix(".partial")
    todo = {name: state for name, state in states.items() if not (partial / name).is_file()}
    needed, free = sum(state.st_size for state in todo.values()), shutil.disk_usage(final.parent).free
    if free < needed:
        raise LayerloopError(
            f"LAYERLOOP_CACHE is {cache_folder()}, which has {size_text(free)} left where {folder} takes "
            f"{size_text(needed)}: give the volume more space, remove old copies from its bases/, or leave the "
            "variable out"
        )
    for name in todo:
        _copy_file(folder / name, partial / name)
    partial.mkdir(parents=True, exist_ok=True)
    partial.rename(final)


def _copy_file(source: Path, target: Path) -> None:
    """Copy one file; it has its name only once its bytes were read back."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked, digest = target.with_name(f"{target.name}.unchecked"), hashlib.sha256()
    with source.open("rb", buffering=0) as read, unchecked.open("wb") as write:
        while piece := read.read(PIECE):
            digest.update(piece)
            write.write(piece)
        write.flush()
        os.fsync(write.fileno())
    with unchecked.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").digest() != digest.digest():
            unchecked.unlink()
            raise LayerloopError(
                f"LAYERLOOP_CACHE is {cache_folder()}, which returns other bytes of {target.name} than were written: "
                "its disk is faulty, name another volume"
            )
    unchecked.rename(target)


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _from_hub(uri: str, only: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    owner, _, rest = uri.removeprefix("hf://").partition("/")
    name, _, inner = rest.strip("/").partition("/")
    if not owner or not name:
        raise LayerloopError(f"{uri} names no repository: give hf://owner/name or hf://owner/name/subfolder")
    try:
        names = [f"{inner}/{file}" if inner else file for file in only] or ([f"{inner}/*"] if inner else None)
        folder = Path(snapshot_download(f"{owner}/{name}", allow_patterns=names)) / inner
    except Exception as error:  # the hub raises a dozen kinds; each means that the repository is not available
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise hub_error(
            error,
            f"{uri} is not available on the Hugging Face hub ({reason}): check the name, and HF_TOKEN or HF_ENDPOINT",
        ) from None
    if not folder.is_dir():
        raise LayerloopError(f"{uri}: the repository has no folder {inner}; correct it")
    return folder
