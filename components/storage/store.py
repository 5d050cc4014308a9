"""A store for a campaign's objects, and the names that objects may have.

Every store keeps two promises that everything else relies on:
- an object is complete or absent: a process killed at any instant leaves nothing half-visible;
- `create` succeeds for exactly one of several writers of the same name.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO

from layerloop.components.schema.errors import LayerloopError

Names = list[str]  # `list` itself is a method's name inside the class below


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
        """Check before the work that objects can be written here; nothing is left behind.

        Raises:
            LayerloopError: why not.
        """

    @abstractmethod
    def child(self, prefix: str) -> Store:
        """The same store, seen from a folder inside it."""

    def _missing(self, name: str) -> MissingObjectError:
        return MissingObjectError(f"{self.uri}/{name} does not exist: was it moved or deleted, or is the URI misspelt?")


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
