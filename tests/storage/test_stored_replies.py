"""A reply that was paid for is stored once, whoever else asks at the same time."""

from __future__ import annotations

import pytest

from layerloop.components.storage.replies import StoredReplies
from layerloop.components.storage.stores import Store, open_store

KEY, FOLDER = "a" * 64, "iterations/000001/scores/replies"


@pytest.mark.parametrize("conditions", [True, False])
def test_the_first_reply_stays_and_is_what_both_runs_get(
    store_uri: str, conditions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(store_uri)
    if not conditions:  # a server that ignores If-None-Match
        monkeypatch.setattr(type(store), "creates_once", False)
        monkeypatch.setattr(Store, "create", pytest.fail)
    one, two = StoredReplies(store, FOLDER), StoredReplies(store, FOLDER)
    assert one.put(KEY, b"first") == b"first"
    assert KEY not in two and two.put(KEY, b"second") == b"first" and KEY in two
    assert store.read(f"{FOLDER}/{KEY}.json") == b"first" == one.get(KEY)
    assert len(store.list(f"{FOLDER}/")) == 1
