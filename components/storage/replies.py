"""The judge's replies in the campaign, by the hash of what was asked, and its batches in progress."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.record import SEAL, DamagedError, canonical_json, parse_json, seal, unseal
from layerloop.components.storage.stores import LARGEST_RECORD, READS, Store


def read_reply(store: Store, name: str) -> bytes:
    """A stored reply, compared with the hash that it carries; those of earlier versions carry none.

    Raises:
        LayerloopError: it is not what was stored, however often it is read.
    """
    for _ in range(READS):
        with contextlib.suppress(DamagedError):
            content = unseal(store.read(name, most=LARGEST_RECORD), where=name)
            return content if isinstance(content, bytes) else content.encode()
    raise LayerloopError(
        f"{store.uri}/{name} is not the reply that was stored: delete it, and the judge is asked again"
    )


def _sealed(data: bytes) -> bytes:
    """A reply with its hash, in place of such a key of its own: a digit that changes on the disk would be another
    score. What is no JSON object stays as it is."""
    try:
        value = parse_json(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(value, dict):
        return data
    return seal(canonical_json({key: item for key, item in value.items() if key != SEAL}))


class StoredReplies:
    """A folder of replies, one object each, listed once at the start; a stored reply is never paid for again. Batches
    in progress are kept in its folder `batches`."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        self._known = {name.rpartition("/")[2].removesuffix(".json") for name in store.list(f"{folder}/")}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> bytes:
        """A stored reply.

        Raises:
            LayerloopError: it is not what was stored.
        """
        return read_reply(self._store, f"{self._folder}/{key}.json")

    def put(self, key: str, data: bytes) -> bytes:
        """Store a reply, never over another; returns the one that counts: another run's, where that was faster.

        A store without conditional writes is asked first: to bid for each reply (bids.py) would take a second.
        """
        name, sealed = f"{self._folder}/{key}.json", _sealed(data)
        if self._store.creates_once:
            created = self._store.create(name, sealed)
        elif created := not self._store.exists(name):
            self._store.write(name, sealed)
        self._known.add(key)
        return data if created else read_reply(self._store, name)

    def entries(self) -> Mapping[str, dict[str, Any]]:
        """Batches in progress, by name."""
        names = self._store.list(f"{self._folder}/batches/")
        return {
            name.rpartition("/")[2].removesuffix(".json"): json.loads(self._store.read(name, most=LARGEST_RECORD))
            for name in names
        }

    def enter(self, name: str, entry: dict[str, Any]) -> None:
        """Store the state of a batch."""
        self._store.write(f"{self._folder}/batches/{name}.json", json.dumps(entry).encode())
