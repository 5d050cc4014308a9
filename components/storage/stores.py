"""Where a campaign lives: a local folder or an S3 bucket, behind the same few operations.

Two promises everything else stands on, kept by both stores:
- an object is whole or absent: a process killed at any instant leaves nothing half-visible;
- `create` succeeds for exactly one of several writers of the same name.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from layerloop.components.schema.errors import LayerloopError

Names = list[str]  # `list` itself is a method's name inside the classes below

TEMPORARY = ".tmp-"  # file name prefix of what is being written to a folder; never listed
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


class MissingObjectError(LayerloopError):
    """A named object is not in the store."""


class Store(ABC):
    """A tree of immutable-once-committed objects. Names are relative, with `/` between their parts."""

    uri: str

    def read(self, name: str) -> bytes:
        """The object's bytes. Raises MissingObjectError."""
        with self.open(name) as file:
            return file.read()

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Create or replace the object, at once."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Create the object; False if the name is taken. Of several writers exactly one gets True."""

    @abstractmethod
    def upload(self, name: str, path: Path) -> None:
        """Create or replace the object, at once, from a local file of any size."""

    @abstractmethod
    def download(self, name: str, path: Path) -> None:
        """Write the object to a local file, which appears whole. Raises MissingObjectError."""

    @abstractmethod
    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A seekable file of the object as it is now, unaffected by later writes. Raises MissingObjectError."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def size(self, name: str) -> int:
        """Size of the object in bytes. Raises MissingObjectError."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of the objects whose name begins with `prefix`, by sorted name."""

    def list(self, prefix: str = "") -> Names:
        """Sorted names of the objects whose name begins with `prefix`."""
        return list(self.sizes(prefix))

    @abstractmethod
    def folders(self, name: str = "") -> Names:
        """Sorted last parts of the folders directly in the folder `name`, without listing what is inside them."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the object; nothing happens if it is not there."""

    @abstractmethod
    def check_writable(self) -> None:
        """Find out before the work, and not after it, that nothing can be written here, and leave nothing behind.

        Raises:
            LayerloopError: why not.
        """

    @abstractmethod
    def child(self, prefix: str) -> Store:
        """The same store, seen from a folder inside it."""

    def _missing(self, name: str) -> MissingObjectError:
        return MissingObjectError(f"{self.uri}/{name} does not exist: was it moved or deleted, or is the URI misspelt?")


def open_store(uri: str | Path) -> Store:
    """The store at a folder path, `file://` URI or `s3://bucket/prefix` (settings from the environment).

    Raises:
        LayerloopError: an empty or unsupported URI.
    """
    text = str(uri).strip()
    if not text:
        raise LayerloopError("store URI is empty: give a folder or s3://bucket/prefix")
    match = _SCHEME.match(text)
    if match is None:
        return LocalStore(Path(text))
    parts = urlsplit(text)
    match match.group(1).lower():
        case "file":
            if parts.netloc not in ("", "localhost"):
                raise LayerloopError(f"store URI {text} names a host: write file:///absolute/path")
            return LocalStore(Path(unquote(parts.path)))
        case "s3":
            from layerloop.components.storage.s3 import S3Store

            return S3Store.from_uri(text)
        case scheme:
            raise LayerloopError(
                f"store URI {text} has scheme {scheme}://: use a folder, file:// or s3://bucket/prefix"
            )


def read_uri(uri: str | Path) -> bytes:
    """The bytes of one file, at a path, `file://` or `s3://bucket/key`.

    Raises:
        LayerloopError: an impossible URI, or nothing there.
    """
    folder, _, name = str(uri).rpartition("/")
    if not name or folder.endswith(":/"):
        raise LayerloopError(f"{uri} is a folder: give a file")
    return open_store(folder or ("/" if str(uri).startswith("/") else ".")).read(name)


def is_name(name: str) -> bool:
    """Whether a name stays inside its store: relative, without empty or dotted parts."""
    return not ("\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")))


def checked_name(name: str) -> str:
    """`name` if it stays inside its store; names come from manifests too, which are data.

    Raises:
        LayerloopError: empty, absolute, or with a part that is empty, `.` or `..`.
    """
    if not is_name(name):
        raise LayerloopError(f"object name {name!r} is not a relative path without empty or dotted parts: correct it")
    return name


def folder_prefix(folder: str) -> str:
    """The listing prefix of a folder name: '' for the root, else with one trailing slash."""
    return f"{checked_name(folder.rstrip('/'))}/" if folder else ""


class LocalStore(Store):
    """A folder. Files appear by rename or hard link after fsync, so they are whole even after a power cut."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)
        if self.root.exists() and not self.root.is_dir():
            raise LayerloopError(f"{self.uri} is a file, not a folder: give a folder")

    def write(self, name: str, data: bytes) -> None:
        with self._temporary(name) as (file, temporary):
            file.write(data)
            self._publish(file, temporary, self._path(name))

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        if path.exists():
            return False
        with self._temporary(name) as (file, temporary):
            file.write(data)
            return self._publish_new(file, temporary, path)

    def upload(self, name: str, path: Path) -> None:
        with self._temporary(name) as (file, temporary), path.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
            self._publish(file, temporary, self._path(name))

    def download(self, name: str, path: Path) -> None:
        with self.open(name) as source, LocalStore(path.parent)._temporary(path.name) as (file, temporary):
            shutil.copyfileobj(source, file, 1 << 20)
            self._publish(file, temporary, path)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        try:
            file = self._path(name).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise self._missing(name) from None
        except OSError as error:
            raise LayerloopError(f"{self.uri}/{name} cannot be read ({error.strerror}): allow it") from None
        with file:
            yield file

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def size(self, name: str) -> int:
        path = self._path(name)
        if not path.is_file():
            raise self._missing(name)
        return path.stat().st_size

    def sizes(self, prefix: str = "") -> dict[str, int]:
        folder = prefix.rpartition("/")[0]
        start = self._path(folder) if folder else self.root
        found: dict[str, int] = {}
        for directory, _, files in os.walk(start):
            relative = Path(directory).relative_to(self.root).as_posix()
            for file in files:
                name = file if relative == "." else f"{relative}/{file}"
                if name.startswith(prefix) and not file.startswith(TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):  # replaced or deleted while we walked
                        found[name] = os.stat(os.path.join(directory, file)).st_size
        return dict(sorted(found.items()))

    def folders(self, name: str = "") -> Names:
        path = self._path(name.rstrip("/")) if name else self.root
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def check_writable(self) -> None:
        folder = next(path for path in (self.root, *self.root.parents) if path.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY):
                pass
        except OSError as error:
            raise LayerloopError(
                f"{self.uri} cannot be written ({error.strerror}): give a folder that can be"
            ) from None

    def child(self, prefix: str) -> LocalStore:
        return LocalStore(self._path(prefix.rstrip("/")))

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file beside `name`, removed at the end unless it was renamed."""
        path = self._path(name)
        temporary = path.with_name(f"{TEMPORARY}{path.name[:64]}-{secrets.token_hex(6)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("xb")
        except OSError as error:
            raise LayerloopError(
                f"{self.uri}/{name} cannot be written ({error.strerror}): give a folder that can be written to"
            ) from None
        try:
            with file:
                yield file, temporary
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LayerloopError(f"{self.uri}/{name} does not fit ({error.strerror}): free some space") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _publish(self, file: BinaryIO, temporary: Path, path: Path) -> None:
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)

    def _publish_new(self, file: BinaryIO, temporary: Path, path: Path) -> bool:
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike rename, refuses an existing target
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
                raise
            say_once(f"{self.uri}: this file system has no hard links, so create-only writes are check-then-rename")
            if path.exists():
                return False
            os.replace(temporary, path)
        _fsync_folder(path.parent)
        return True


def _fsync_folder(path: Path) -> None:
    """Make a new directory entry durable."""
    with contextlib.suppress(OSError):  # some network file systems refuse fsync of a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@functools.cache
def say_once(message: str) -> None:
    """One line in the log of this process, however often the occasion arises."""
    logging.getLogger(__name__).warning(message)
