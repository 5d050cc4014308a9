"""Manifests and seeds: what every later step trusts."""

from __future__ import annotations

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Manifest, Shard
from layerloop.components.schema.seeds import seed_for

SHA = "0" * 64


def test_seeds_depend_on_every_part_on_its_type_and_on_the_order() -> None:
    seeds = {
        seed_for(*parts)
        for parts in [(1, 2), (2, 1), (12,), ("1", 2), (1, "2"), ("12",), ("a", "bc"), ("ab", "c"), ("abc",)]
    }
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_never_change_between_versions() -> None:
    assert seed_for(0, 7, "0123456789abcdef", 3, "noise") == 1379576317102815296


def test_a_manifest_survives_its_json_and_finds_its_parts() -> None:
    manifest = Manifest(
        kind="sources",
        shards=(
            Shard(name="sources/train-000000.tar", bytes=10, sha256=SHA, samples=2),
            Shard(name="sources/designs-000000.tar", bytes=10, sha256=SHA, samples=1),
        ),
        files=(File(name="sources/prompt.safetensors", bytes=4, sha256=SHA),),
        counts={"images": 3},
    )
    again = Manifest.from_json(manifest.to_json(), where="manifest.json")
    assert again == manifest
    assert [s.name for s in again.shards_of("train")] == ["sources/train-000000.tar"]
    assert again.file("prompt.safetensors").bytes == 4
    with pytest.raises(KeyError):
        again.file("absent.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"schema_version": 2, "kind": "scores"}', "m.json has schema_version 2, this version of layerloop reads 1"),
        (b'{"kind": "scores"}', "m.json has schema_version None"),
        (b'{"schema_version": 1, "ki', "m.json is not JSON"),
        (b'{"schema_version": 1, "kind": "scoers"}', "m.json.kind is 'scoers'"),
        (b"[]", "m.json has schema_version None"),
    ],
)
def test_a_stored_record_of_another_version_or_shape_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        Manifest.from_json(data, where="m.json")
    assert message in str(caught.value)
