from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Manifest
from layerloop.components.storage import campaign, manifests
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.manifests import (
    add_file,
    add_folder,
    commit,
    find_file,
    load,
    place_files,
    read_file,
    verify,
)
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


def test_the_first_commit_stands_if_it_verifies(store_uri: str) -> None:
    store = open_store(store_uri)
    first = commit(store, NAME, output(store))
    other = first.model_copy(update={"counts": {"groups": 99}})
    assert commit(store, NAME, other) == first
    assert load(store, NAME) == first


def test_a_manifest_naming_a_missing_or_changed_file_is_not_committed(store_uri: str) -> None:
    store = open_store(store_uri)
    manifest = output(store)
    store.write(manifest.files[0].name, b"other size")
    with pytest.raises(
        LayerloopError, match=r"scores-.*\.parquet has 10 bytes instead of 6 but a scores manifest names it"
    ):
        commit(store, NAME, manifest)
    store.delete(manifest.shards[0].name)
    with pytest.raises(LayerloopError, match=r"000000-.*\.tar is missing but a scores manifest names it"):
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
    store.delete(manifest.files[0].name)
    with pytest.raises(LayerloopError, match=r"metrics-.*\.json is missing"):
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
    digest = hashlib.sha256(b"weights" * 1000).hexdigest()
    assert file == File(name=f"policy/adapter-{digest[:16]}.safetensors", bytes=7000, sha256=digest)
    assert file.base_name == "adapter.safetensors" and find_file(store, "policy/adapter.safetensors") == file
    assert read_file(store, file) == b"weights" * 1000
    store.write(file.name, b"Weights" * 1000)
    theirs = hashlib.sha256(b"Weights" * 1000).hexdigest()
    message = f"has 7000 bytes of sha256 {theirs[:12]}, its manifest says 7000 and {digest[:12]}: it was changed after"
    with pytest.raises(LayerloopError, match=message):
        read_file(store, file)
    assert find_file(store, "policy/adapter.safetensors") is None
    store.write("policy/adapter.safetensors", b"of an earlier version")
    assert (taken := find_file(store, "policy/adapter.safetensors")) is not None
    assert taken.name == "policy/adapter.safetensors" and read_file(store, taken) == b"of an earlier version"


def test_files_that_keep_their_names_lie_in_a_folder_named_by_them_all(store_uri: str) -> None:
    store = open_store(store_uri)
    one = add_folder(store, "publications/x", {"README.md": b"card", "peft/weights": b"1"})
    other = add_folder(store, "publications/x", {"README.md": b"card", "peft/weights": b"2"})
    assert [file.name.split("/", 3)[3] for file in one] == ["README.md", "peft/weights"]
    assert len({file.name for file in (*one, *other)}) == 4
    assert one == add_folder(store, "publications/x", {"README.md": b"card", "peft/weights": b"1"})
    manifest = Manifest(kind="published", iteration=1, files=one)
    assert manifest.file("weights").sha256 == hashlib.sha256(b"1").hexdigest()
    store.write("published/x/README.md", b"ca")  # half a copy, of an attempt that was killed or lost
    place_files(store, manifest, "published/x")
    assert {name: store.read(f"published/x/{name}") for name in ("README.md", "peft/weights")} == {
        "README.md": b"card", "peft/weights": b"1",
    }  # fmt: skip


def test_a_manifest_carries_its_own_hash(store_uri: str) -> None:
    store = open_store(store_uri)
    manifest = commit(store, NAME, output(store))
    text = store.read(NAME)
    for old, new in (
        (b'"groups": 1', b'"groups": 2'),
        (b'"judge": "x"', b'"judge": "y"'),
        (b'"iteration": 1', b'"iteration": 2'),
    ):
        assert old in text
        store.write(NAME, text.replace(old, new))
        with pytest.raises(
            LayerloopError, match=f"^{store_uri}/{NAME} has content of sha256 .* and says .* restore it$"
        ):
            load(store, NAME)
    unsealed = json.loads(text)
    del unsealed["sha256"]
    store.write(NAME, json.dumps(unsealed).encode())  # of an earlier version
    assert load(store, NAME) == manifest


def test_a_record_of_impossible_size_is_refused_by_name_before_it_is_read(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stray 10 GB under the name of a manifest or a recipe."""
    for module in (manifests, campaign):
        monkeypatch.setattr(module, "LARGEST_RECORD", 9999)
    store = open_store(store_uri)
    for name in ("sources/manifest.json", "recipe.json"):
        store.write(name, bytes(10_000))
        with pytest.raises(LayerloopError, match=rf"{name} has 10000 bytes, at most 9999 are expected: .* restore it$"):
            load(store, name) if name != "recipe.json" else Campaign.open(store_uri)
    file = add_file(store, "metrics.json", b"{}")
    store.write(file.name, bytes(10_000))
    with pytest.raises(LayerloopError, match=rf"{file.name} has 10000 bytes, its manifest says 2: it was changed"):
        read_file(store, file)


def test_a_manifest_that_lists_an_object_twice_is_one_line(tmp_path: Path) -> None:
    manifest = output(open_store(tmp_path))
    twice = manifest.model_copy(update={"shards": manifest.shards * 2})
    with pytest.raises(LayerloopError, match=r"^x: iterations/.*\.tar is listed twice: restore the manifest"):
        Manifest.from_json(twice.to_json(), where="x")


def test_a_slower_attempt_with_other_bytes_takes_over_the_winners_manifest_and_harms_nothing(
    store_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(store_uri)
    slow = output(store, b"slow")  # written, not committed yet
    fast = commit(store, NAME, output(store, b"fast"))
    again = output(store, b"slow")
    assert commit(store, NAME, again) == fast and again == slow
    assert [read_file(store, file) for file in fast.files] == [b"fast"]
    assert "was committed by another attempt first: that one counts" in caplog.text


def test_racing_commits_agree_on_one_manifest(store_uri: str) -> None:
    store = open_store(store_uri)
    base = output(store)
    barrier = threading.Barrier(50)
    results: list[Manifest] = []

    def race(me: int) -> None:
        mine = base.model_copy(update={"counts": {"groups": me}})
        barrier.wait(timeout=120)
        results.append(commit(store, NAME, mine))

    threads = [threading.Thread(target=race, args=(me,)) for me in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = load(store, NAME)
    assert winner is not None and results == [winner] * 50
