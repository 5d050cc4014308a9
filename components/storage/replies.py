"""The judge's replies in the campaign, by the hash of what was asked, and its batches in progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerloop.components.storage.stores import LARGEST_RECORD, Store


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
        """A stored reply."""
        return self._store.read(f"{self._folder}/{key}.json", most=LARGEST_RECORD)

    def put(self, key: str, data: bytes) -> bytes:
        """Store a reply, never over another; returns the one that counts: another run's, where that was faster.

        A store without conditional writes is asked first: to bid for each reply (s3.py) would take a second.
        """
        name = f"{self._folder}/{key}.json"
        if self._store.creates_once:
            created = self._store.create(name, data)
        elif created := not self._store.exists(name):
            self._store.write(name, data)
        self._known.add(key)
        return data if created else self._store.read(name, most=LARGEST_RECORD)

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
