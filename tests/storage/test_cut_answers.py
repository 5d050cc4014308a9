"""A create-only put whose refusal is cut off on its way is refused all the same."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from layerloop.components.storage.stores import Store, open_store

from ..faults.proxy import bad_network


@pytest.fixture
def store(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with bad_network(os.environ["AWS_ENDPOINT_URL"]) as (endpoint, server):
        server.chosen = lambda request: "truncated" if "If-None-Match" in request.headers else ""
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield open_store(s3_bucket)


def test_neither_the_probe_nor_a_manifest_takes_it_for_an_error(store: Store) -> None:
    assert store.creates_once
    store.write("m.json", b"theirs")
    assert not store.create("m.json", b"mine")
    assert store.read("m.json") == b"theirs"
