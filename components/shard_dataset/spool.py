"""Samples on the local disk until all are known: shards are ordered by key, and keys come in any order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from layerloop.components.storage.shards import Sample


class Spool:
    """An append-only temporary file of samples; only the positions of members are kept in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="layerloop-spool-")  # noqa: SIM115 - closed by __exit__
        self._positions: dict[str, dict[str, tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample."""
        positions = {}
        for suffix, data in members.items():
            positions[suffix] = (self._file.seek(0, 2), len(data))
            self._file.write(data)
        self._positions[key] = positions

    def samples(self, keys: Iterable[str]) -> Iterator[Sample]:
        """The samples of these keys, in this order."""
        for key in keys:
            members = {}
            for suffix, (offset, size) in self._positions[key].items():
                self._file.seek(offset)
                members[suffix] = self._file.read(size)
            yield key, members
