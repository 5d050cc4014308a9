"""A reply that was paid for is stored once, whoever else asks at the same time."""

from __future__ import annotations

import json

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.replies import StoredReplies
from layerloop.components.storage.stores import Store, open_store
from layerloop.components.storage.verification import repair_campaign, verify_campaign

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


def test_a_reply_carries_its_hash_and_a_changed_digit_is_no_other_score(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, Recipe(name="replies"))
    store, name = campaign.store, f"{FOLDER}/{KEY}.json"
    reply = {"id": "chatcmpl-1", "choices": [{"message": {"content": '{"alpha": 4}'}}], "created": 1.5e9}
    StoredReplies(store, FOLDER).put(KEY, json.dumps(reply).encode())
    stored = StoredReplies(store, FOLDER)
    assert json.loads(stored.get(KEY)) == reply and verify_campaign(campaign, log=lambda _: None).sound
    assert {**json.loads(store.read(name)), "sha256": None} == {**reply, "sha256": None}, "anybody can read it"
    store.write(name, store.read(name).replace(b": 4}", b": 5}"))
    with pytest.raises(LayerloopError, match=rf"{name} is not the reply that was stored: delete it, and the judge is"):
        stored.get(KEY)
    found = verify_campaign(campaign, log=lambda _: None)
    assert found.faults == {name: "is not the reply that was stored: delete it, and the judge is asked again"}
    repair_campaign(campaign, log=lambda _: None)
    assert verify_campaign(campaign, log=lambda _: None).sound and KEY not in StoredReplies(store, FOLDER)


def test_what_is_no_object_is_stored_as_it_is_and_a_hash_of_its_own_blocks_nothing(store_uri: str) -> None:
    replies = StoredReplies(open_store(store_uri), FOLDER)
    for key, data in (("b" * 64, b"no json"), ("c" * 64, b"[1]")):
        replies.put(key, data)
        assert replies.get(key) == data
    replies.put(KEY, b'{"sha256": "its own", "id": 1}')
    assert json.loads(replies.get(KEY)) == {"id": 1}
