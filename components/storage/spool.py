"""Members of samples in a scratch file, to be read again in any order: memory holds where they are, not the bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from layerloop.components.schema.errors import LayerloopError


class Spool:
    """A nameless file that is gone with the last of its samples. Threads may read it at once."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="layerloop-", buffering=0)  # noqa: SIM115 - closed with the object
        self._end = 0

    def add(self, members: Mapping[str, bytes]) -> Spooled:
        """Keep the members of a sample.

        Raises:
            LayerloopError: the disk of temporary files is full.
        """
        places = {}
        for name, data in members.items():
            places[name] = (self._end, len(data))
            rest = memoryview(data)
            while rest:
                try:
                    written = os.pwrite(self._file.fileno(), rest, self._end)
                except OSError as error:
                    raise LayerloopError(
                        f"{tempfile.gettempdir()} cannot be written ({error.strerror}): give it space, or name another "
                        "folder by TMPDIR"
                    ) from None
                rest, self._end = rest[written:], self._end + written
        return Spooled(self, places)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        return os.pread(self._file.fileno(), size, offset)

    def __del__(self) -> None:
        self._file.close()


class Spooled(Mapping[str, bytes]):
    """The members of one sample by suffix, each read when it is asked for. Pickled, it is a plain dict of them."""

    def __init__(self, spool: Spool, places: Mapping[str, tuple[int, int]]) -> None:
        self._spool, self._places = spool, places

    def __getitem__(self, name: str) -> bytes:
        return self._spool.read(*self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
