"""The store in a local folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.owners import is_abandoned, owned_name
from layerloop.components.storage.regular_files import open_regular
from layerloop.components.storage.store import Entry, MissingObjectError, Names, Store, checked_name, missing_object

TEMPORARY = ".tmp-"  # file name prefix of what is being written to a folder; never listed


class LocalStore(Store):
    """A folder. Files appear by rename or hard link after fsync, so they are complete even after a power cut."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)
        self._has_links = True  # until a hard link was refused
        if self.root.exists() and not self.root.is_dir():
            raise LayerloopError(f"{self.uri} is a file, not a folder: give a folder")

    @property
    def creates_once(self) -> bool:
        return self._has_links

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

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[tuple[IO[bytes], Callable[[str], None]]]:
        with self._temporary(name) as (file, temporary):
            yield file, lambda own: self._publish(file, temporary, self._path(own))

    def download(self, name: str, path: Path) -> None:
        with self.open(name) as source, LocalStore(path.parent)._temporary(path.name) as (file, temporary):
            shutil.copyfileobj(source, file, 1 << 20)
            self._publish(file, temporary, path)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        try:
            file = open_regular(self._path(name))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise missing_object(self.uri, name) from None
        except OSError as error:
            raise LayerloopError(f"{self.uri}/{name} cannot be read ({error.strerror}): allow it") from None
        with file:
            yield file

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except MissingObjectError:
            return False
        return True

    def size(self, name: str) -> int:
        try:
            found = self._path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise missing_object(self.uri, name) from None
        except OSError as error:
            raise LayerloopError(f"{self.uri}/{name} cannot be read ({error.strerror}): allow it") from None
        if not stat.S_ISREG(found.st_mode):
            raise missing_object(self.uri, name)
        return found.st_size

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        folder = prefix.rpartition("/")[0]
        found: dict[str, Entry] = {}
        for name, path in self._files(self._path(folder) if folder else self.root):
            if name.startswith(prefix) and not path.name.startswith(TEMPORARY):
                try:
                    about = path.stat()
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ELOOP):  # deleted while we walked, or a link to nothing
                        continue
                    raise LayerloopError(f"{path} cannot be read ({error.strerror}): allow it") from None
                found[name] = Entry(about.st_size, about.st_mtime, f"{about.st_ino}-{about.st_mtime_ns}")
        return dict(sorted(found.items()))

    def clock(self) -> float:
        path = self.root / owned_name(f"{TEMPORARY}clock")
        try:  # that of the file system, which may be another machine's
            with path.open("xb") as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def copy(self, name: str, target: str) -> None:
        with self.open(name) as source, self._temporary(target) as (file, temporary):
            shutil.copyfileobj(source, file, 1 << 20)
            self._publish(file, temporary, self._path(target))

    def leftovers(self) -> Names:
        return sorted(name for name, path in self._files(self.root) if path.name.startswith(TEMPORARY))

    def remove_leftovers(self) -> None:
        for name in self.leftovers():
            if is_abandoned(name.rpartition("/")[2], math.inf):  # a sign of life of whoever calls this is being written
                self.delete(name)

    def remove_abandoned(self) -> int:
        now, count = self.clock(), 0
        for name in self.leftovers():
            path = self._path(name)
            with contextlib.suppress(OSError):  # finished or removed meanwhile
                if is_abandoned(path.name, now - path.stat().st_mtime):
                    path.unlink()
                    count += 1
        return count

    def children(self, name: str = "") -> Iterator[str]:
        path = self._path(name.rstrip("/")) if name else self.root
        try:
            found = list(path.iterdir()) if path.is_dir() else []
        except OSError as error:
            raise LayerloopError(f"{path} cannot be read ({error.strerror}): allow it") from None
        yield from (f"{entry.name}/" if entry.is_dir() else entry.name for entry in found)

    def delete(self, name: str) -> None:
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            raise LayerloopError(f"{self.uri}/{name} cannot be removed ({error.strerror}): allow it") from None

    def check_writable(self) -> None:
        folder = next(path for path in (self.root, *self.root.parents) if path.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY):
                pass
        except OSError as error:
            raise LayerloopError(
                f"{self.uri} cannot be written ({error.strerror}): give a folder that can be"
            ) from None

    def _files(self, folder: Path) -> Iterator[tuple[str, Path]]:
        """Names and paths of all files in a folder of the store.

        Raises:
            LayerloopError: a folder in it cannot be read: its objects must not seem to be missing.
        """

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise LayerloopError(f"{error.filename} cannot be read ({error.strerror}): allow it") from None

        for directory, _, files in os.walk(folder, onerror=refuse):
            relative = Path(directory).relative_to(self.root).as_posix()
            for file in files:
                yield file if relative == "." else f"{relative}/{file}", Path(directory, file)

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file next to `name`, removed at the end unless it was renamed."""
        path = self._path(name)
        temporary = path.with_name(owned_name(f"{TEMPORARY}{path.name[:64]}"))
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
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise LayerloopError(f"{self.uri}/{name} does not fit ({error.strerror}): free some space") from None
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE):
                raise
            raise LayerloopError(
                f"{self.uri}/{name} cannot be written ({error.strerror}): see to the disk, and allow it"
            ) from None
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
            self._has_links = False
            warn_once(f"{self.uri}: this file system has no hard links, so create-only writes are check-then-rename")
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
def warn_once(message: str) -> None:
    """One line in the log of this process, however often it is called."""
    logging.getLogger(__name__).warning(message)
