"""A short slice of every fuzz target, the same examples each time; `make fuzz` looks further."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, seed, settings

from .targets import TARGETS

EXAMPLES = {
    "documents": 80,
    "exif": 60,
    "pictures": 60,
    "pixels": 60,
    "grey": 40,
    "replies": 150,
    "labelled": 60,
    "coded_bodies": 60,
    "proxies": 30,
    "error_bodies": 60,
    "tars": 50,
    "parquet": 40,
    "lists": 40,
    "columns": 40,
    "adapter_tensors": 60,
    "adapters": 40,
    "recipes": 100,
    "shards": 150,
    "shard_bytes": 40,
}


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_a_result_a_reject_or_one_line(name: str) -> None:
    @seed(7)
    @settings(
        max_examples=EXAMPLES[name],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(TARGETS[name].draws)
    def holds(drawn: object) -> None:
        TARGETS[name].holds(drawn)

    holds()
