from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Manifest
from layerloop.components.storage.manifests import add_file, already_committed, commit, load, read_file, verify
from layerloop.components.storage.shards import write_shard
from layerloop.components.storage.stores import Store, open_store

NAME = "iterations/000001/scores/manifest.json"


def output(store: Store, content: bytes = b"scores") -> Manifest:
    folder = "iterations/000001/scores"
    return Manifest(
        kind="scores",
        iteration=1,
        shards=(write_shard(store, f"{folder}/000000.tar", [("a", {"json": content})]),),
        files=(add_file(store, f"{folder}/scores.parquet", content),),
        counts={"groups": 1},
        metadata={"judge": "x"},
    )


def test_a_committed_manifest_loads_equal(store_uri: str) -> None:
    store = open_store(store_uri)
    assert load(store, NAME) is None
    manifest = output(store)
    assert commit(store, NAME, manifest) == manifest
    assert load(store, NAME) == manifest
    assert store.read(NAME) == manifest.to_json()
    assert commit(store, NAME, manifest) == manifest  # a second attempt that made the same


def test_a_step_that_begins_finds_what_is_committed_and_says_so_once_it_has_verified_it(store_uri: str) -> None:
    store, said = open_store(store_uri), list[str]()
    assert already_committed(store, NAME, log=said.append) is None and said == []
    manifest = commit(store, NAME, output(store))
    assert already_committed(store, NAME, log=said.append) == manifest
    assert said == [f"{store.uri}/{NAME} is committed already"]
    store.delete("iterations/000001/scores/000000.tar")
    with pytest.raises(LayerloopError, match=r"000000\.tar is missing but a scores manifest names it"):
        already_committed(store, NAME, log=said.append)
    assert len(said) == 1


def test_the_first_commit_stands_if_it_verifies(store_uri: str) -> None:
    store = open_store(store_uri)
    first = commit(store, NAME, output(store))
    other = first.model_copy(update={"counts": {"groups": 99}})
    assert commit(store, NAME, other) == first
    assert load(store, NAME) == first


def test_a_manifest_naming_a_missing_or_changed_file_is_not_committed(store_uri: str) -> None:
    store = open_store(store_uri)
    manifest = output(store)
    store.write("iterations/000001/scores/scores.parquet", b"other size")
    with pytest.raises(
        LayerloopError, match=r"scores\.parquet has 10 bytes instead of 6 but a scores manifest names it"
    ):
        commit(store, NAME, manifest)
    store.delete("iterations/000001/scores/000000.tar")
    with pytest.raises(LayerloopError, match=r"000000\.tar is missing but a scores manifest names it"):
        commit(store, NAME, manifest)
    assert load(store, NAME) is None


def test_an_earlier_commit_that_lost_its_shard_is_an_error_and_not_an_output(store_uri: str) -> None:
    store = open_store(store_uri)
    first = commit(store, NAME, output(store))
    replay = add_file(store, "elsewhere/x", b"1")
    second = first.model_copy(update={"shards": (), "files": (replay,)})
    store.delete(first.shards[0].name)
    with pytest.raises(LayerloopError, match="delete the manifest to have the step run again"):
        commit(store, NAME, second)


def test_a_manifest_of_another_step_in_the_same_place_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    commit(store, NAME, output(store))
    with pytest.raises(LayerloopError, match=r"is of scores 1, not of policy 2: two campaigns share a folder"):
        commit(store, NAME, Manifest(kind="policy", iteration=2))


def test_a_single_file_is_verified_without_listing_its_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = Manifest(kind="evaluation", iteration=1, files=(add_file(store, "evaluations/a/metrics.json", b"{}"),))
    verify(store, manifest)
    store.delete("evaluations/a/metrics.json")
    with pytest.raises(LayerloopError, match=r"metrics\.json is missing"):
        verify(store, manifest)


def test_a_truncated_manifest_is_one_line_that_names_it(store_uri: str) -> None:
    store = open_store(store_uri)
    store.write(NAME, output(store).to_json()[:100])
    with pytest.raises(LayerloopError, match=f"^{store_uri}/{NAME} is not JSON"):
        load(store, NAME)


def test_added_files_carry_the_hash_of_what_was_added(store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    (tmp_path / "f").write_bytes(b"weights" * 1000)
    file = add_file(store, "policy/adapter.safetensors", tmp_path / "f")
    assert file == File(
        name="policy/adapter.safetensors", bytes=7000, sha256=hashlib.sha256(b"weights" * 1000).hexdigest()
    )
    assert read_file(store, file) == b"weights" * 1000
    store.write(file.name, b"Weights" * 1000)
    with pytest.raises(LayerloopError, match="it was changed after it was committed"):
        read_file(store, file)


def test_racing_commits_agree_on_one_manifest(store_uri: str) -> None:
    store = open_store(store_uri)
    base = output(store)
    barrier = threading.Barrier(6)
    results: list[Manifest] = []

    def race(me: int) -> None:
        mine = base.model_copy(update={"counts": {"groups": me}})
        barrier.wait(timeout=60)
        results.append(commit(open_store(store_uri), NAME, mine))

    threads = [threading.Thread(target=race, args=(me,)) for me in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(result == load(store, NAME) for result in results)
