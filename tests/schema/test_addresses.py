from __future__ import annotations

import pytest

from layerloop.components.judge.address import judge_address
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.shard_dataset.inputs import find_inputs
from layerloop.components.storage.stores import open_store, read_uri


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://ann:sesame@host:8000/v1", "https://...@host:8000/v1"),
        ("https://host/v1?api_key=sesame&x=1", "https://host/v1?..."),
        ("https://b.s3.amazonaws.com/a.png?X-Amz-Signature=sesame", "https://b.s3.amazonaws.com/a.png?..."),
        ("https://host/#access_token=sesame", "https://host/#..."),
        ("s3://bucket/photo?.png", "s3://bucket/photo?.png"),
        ("s3://bucket/{000..099}.tar", "s3://bucket/{000..099}.tar"),
        ("/data/a?b=c@d", "/data/a?b=c@d"),
        ("http://127.0.0.1:8788/v1", "http://127.0.0.1:8788/v1"),
    ],
)
def test_an_address_is_shown_without_its_secrets(address: str, shown: str) -> None:
    assert without_secrets(address) == shown


@pytest.mark.parametrize("use", [open_store, read_uri, lambda uri: find_inputs(uri, what="images"), judge_address])
@pytest.mark.parametrize(
    "uri",
    ["ftp://ann:sesame@host/a.png?sig=sesame", "s3://ann:sesame@bucket/a.png", "s3://bucket/a.png?X-Amz-Token=sesame"],
)
def test_no_refusal_of_an_address_shows_its_secrets(use: object, uri: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        use(uri)  # type: ignore[operator]
    assert "sesame" not in str(caught.value) and "\n" not in str(caught.value)
