"""A store for a campaign's objects, and the names that objects may have.

Every store keeps two promises that everything else relies on:
- an object is complete or absent: a process killed at any instant leaves nothing half-visible;
- `create` succeeds for exactly one of several writers of the same name. A store of another kind says so in
  `creates_once`; there two may succeed, where one of them stops for seconds in the middle.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import HASH_DIGITS, content_name

Names = list[str]  # `list` itself is a method's name inside the class below


LARGEST_RECORD = 64 << 20  # bytes of a manifest, a recipe, a reply: records are read into memory
READS = 3  # of bytes that are not what they should be: a bit may have flipped on their way


class MissingObjectError(LayerloopError):
    """A named object is not in the store."""


def missing_object(uri: str, name: str) -> MissingObjectError:
    """The error of an object that is not in the store at `uri`."""
    return MissingObjectError(
        f"{uri.rstrip('/')}/{name} does not exist: was it moved or deleted, or is the URI misspelt?"
    )


class StoreError(LayerloopError):
    """The store refuses, which says nothing of the object: credentials, a right that lacks, a clock."""


class TooLargeError(LayerloopError):
    """An object is larger than what is read into memory."""

    def __init__(self, where: str, size: int, most: int) -> None:
        super().__init__(
            f"{where} has {size} bytes, at most {most} are expected: it is not what it is named, restore it"
        )
        self.size = size


@dataclass(frozen=True, slots=True)
class Entry:
    """An object as a listing shows it."""

    size: int  # bytes
    modified: float  # seconds, by the store's clock
    etag: str = ""  # changes with the content, where the store says one


class Store(ABC):
    """A tree of immutable-once-committed objects. Names are relative, with `/` between their parts."""

    uri: str

    @property
    @abstractmethod
    def creates_once(self) -> bool:
        """Whether `create` succeeds for one writer only, whatever their timing."""

    def read(self, name: str, *, most: int | None = None) -> bytes:
        """The object's bytes. Raises MissingObjectError, and TooLargeError, before they are read, of one of more bytes
        than `most`."""
        with self.open(name) as file:
            if most is not None and (size := file.seek(0, io.SEEK_END)) > most:
                raise TooLargeError(f"{self.uri}/{name}", size, most)
            file.seek(0)
            return file.read()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, fewer at the object's end; none of the others are fetched. Raises
        MissingObjectError."""
        with self.open(name) as file:
            file.seek(offset)
            return file.read(size)

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Create or replace the object, at once."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Create the object; False if the name is taken. Of several writers exactly one gets True."""

    @abstractmethod
    def upload(self, name: str, path: Path) -> None:
        """Create or replace the object, at once, from a local file of any size."""

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[tuple[IO[bytes], Callable[[str], None]]]:
        """An empty file in which to make an object, and the function that makes it one when it is complete, under
        `name` or another in the same folder. Without its call nothing is left."""
        with scratch_file() as (file, path):

            def put(own: str) -> None:
                file.flush()
                self.upload(own, path)

            yield file, put

    @abstractmethod
    def download(self, name: str, path: Path) -> None:
        """Write the object to a local file, which appears complete. Raises MissingObjectError."""

    @abstractmethod
    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A seekable file of the object as it is now, unaffected by later writes. Raises MissingObjectError."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Size of the object in bytes. Raises MissingObjectError."""

    @abstractmethod
    def entries(self, prefix: str = "") -> dict[str, Entry]:
        """The objects whose name begins with `prefix`, by sorted name."""

    @abstractmethod
    def clock(self) -> float:
        """Seconds by the clock that dates the entries."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of the objects whose name begins with `prefix`, by sorted name."""
        return {name: entry.size for name, entry in self.entries(prefix).items()}

    def list(self, prefix: str = "") -> Names:
        """Sorted names of the objects whose name begins with `prefix`."""
        return list(self.sizes(prefix))

    @abstractmethod
    def children(self, name: str = "") -> Iterator[str]:
        """Last parts of what is directly in the folder `name`, folders with a trailing slash, in no certain order; what
        is inside them is not listed."""

    def folders(self, name: str = "") -> Names:
        """Sorted last parts of the folders directly in the folder `name`."""
        return sorted(child[:-1] for child in self.children(name) if child.endswith("/"))

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the object; nothing happens if it is not there."""

    @abstractmethod
    def copy(self, name: str, target: str) -> None:
        """Create or replace `target` by the object's content, at once. Raises MissingObjectError."""

    @abstractmethod
    def leftovers(self) -> Names:
        """What killed writers left that is no object, by names for people: unfinished uploads, temporary files."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Remove the leftovers. Only while nobody writes: what is being written looks the same."""

    @abstractmethod
    def remove_abandoned(self) -> int:
        """Remove the leftovers whose writers are gone for certain, whoever writes now; returns how many there were."""

    @abstractmethod
    def check_writable(self) -> None:
        """Check before the work that objects can be written here; nothing is left behind.

        Raises:
            LayerloopError: why not.
        """


def written_before(store: Store, name: str) -> Iterator[tuple[str, str]]:
    """Objects that were written as `name`: their names, and the beginning of their sha256 that the name says.

    One of an earlier version bears `name` itself, which says nothing: ''.
    """
    stem, _, suffix = content_name(name, "0" * HASH_DIGITS).partition("0" * HASH_DIGITS)
    pattern = re.compile(f"{re.escape(stem)}([0-9a-f]{{{HASH_DIGITS}}}){re.escape(suffix)}")
    for found in store.list(stem.removesuffix("-")):
        if match := pattern.fullmatch(found):
            yield found, match[1]
        elif found == name:
            yield found, ""


def hash_file(file: IO[bytes]) -> tuple[str, int]:
    """sha256 and size in bytes; the file is left at its beginning."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # any file that can be read
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return digest, size


@contextlib.contextmanager
def scratch_file() -> Iterator[tuple[IO[bytes], Path]]:
    """A temporary file and a path to it. On Linux it has no name that a kill could leave behind."""
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        with tempfile.TemporaryFile(prefix="layerloop-") as file:
            yield file, descriptors / str(file.fileno())
    else:
        with tempfile.NamedTemporaryFile(prefix="layerloop-") as named:
            yield named, Path(named.name)


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
