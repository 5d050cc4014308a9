"""Replies of the judge in the campaign, one object each, named by the hash of what was asked."""

from __future__ import annotations

from layerloop.components.storage.stores import Store


class StoredReplies:
    """A folder of replies. What is there at the start is listed once; a reply written is a reply never paid again."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        names = store.list(f"{folder}/")
        self._known = {name.rpartition("/")[2].removesuffix(".json") for name in names if name.endswith(".json")}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> bytes:
        return self._store.read(self._name(key))

    def put(self, key: str, data: bytes) -> None:
        self._store.write(self._name(key), data)
        self._known.add(key)

    def _name(self, key: str) -> str:
        return f"{self._folder}/{key}.json"
