"""The store in a local folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.regular_files import open_regular
from layerloop.components.storage.store import Names, Store, checked_name

TEMPORARY = ".tmp-"  # file name prefix of what is being written to a folder; never listed


class LocalStore(Store):
    """A folder. Files appear by rename or hard link after fsync, so they are complete even after a power cut."""

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
            file = open_regular(self._path(name))
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

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file next to `name`, removed at the end unless it was renamed."""
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
