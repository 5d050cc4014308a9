from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage import s3
from layerloop.components.storage.stores import LocalStore, MissingObjectError, open_store


def test_what_is_written_is_read_listed_and_measured(store_uri: str) -> None:
    store = open_store(store_uri)
    assert store.list() == []
    store.write("b/two.bin", b"22")
    store.write("b/ten.bin", b"0123456789")
    store.write("a.json", b"")
    store.write("b/two.bin", b"two")
    assert store.read("b/two.bin") == b"two"
    assert store.read("a.json") == b""
    assert store.list() == ["a.json", "b/ten.bin", "b/two.bin"]
    assert store.list("b/t") == ["b/ten.bin", "b/two.bin"]
    assert store.list("b/two") == ["b/two.bin"]
    assert store.list("c/") == []
    assert store.sizes("b/") == {"b/ten.bin": 10, "b/two.bin": 3}
    assert store.size("b/ten.bin") == 10
    assert store.exists("a.json")
    assert not store.exists("b")
    assert store.uri == store_uri


def test_folders_names_the_subfolders_only(store_uri: str) -> None:
    store = open_store(store_uri)
    for name in ("recipe.json", "iterations/000002/scores/x", "iterations/000010/policy/y", "iterations/note.txt"):
        store.write(name, b"1")
    assert store.folders() == ["iterations"]
    assert store.folders("iterations") == ["000002", "000010"]
    assert store.folders("nothing") == []


def test_a_missing_object_is_one_line_that_names_its_uri(store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    store.write("there", b"1")
    for ask in (
        store.read,
        store.size,
        lambda name: store.download(name, tmp_path / "x"),
        lambda n: store.open(n).__enter__(),
    ):
        with pytest.raises(MissingObjectError) as caught:
            ask("nowhere/x.tar")
        assert f"{store_uri}/nowhere/x.tar does not exist" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
    store.delete("nowhere/x.tar")
    store.delete("there")
    assert not store.exists("there")


def test_create_leaves_an_existing_object_as_it_is(store_uri: str) -> None:
    store = open_store(store_uri)
    assert store.create("m.json", b"first")
    assert not store.create("m.json", b"second")
    assert store.read("m.json") == b"first"
    assert store.list() == ["m.json"]


def test_of_several_creators_at_once_exactly_one_wins(store_uri: str) -> None:
    creators, names = 6, 8
    wins: dict[str, list[int]] = {f"n{n}/manifest.json": [] for n in range(names)}
    barrier = threading.Barrier(creators)

    def race(me: int) -> None:
        store = open_store(store_uri)
        for name, winners in wins.items():
            barrier.wait(timeout=60)
            if store.create(name, f"by {me}".encode()):
                winners.append(me)

    threads = [threading.Thread(target=race, args=(me,)) for me in range(creators)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(winners) for winners in wins.values()] == [1] * names
    store = open_store(store_uri)
    assert {name: store.read(name) for name in wins} == {name: f"by {w[0]}".encode() for name, w in wins.items()}
    assert store.list() == sorted(wins)


def test_files_of_any_size_go_up_and_come_back_equal(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)  # the least that S3 allows: so this file goes up in three parts
    store = open_store(store_uri)
    source = tmp_path / "big"
    block = os.urandom(1 << 20)
    source.write_bytes(block * 12 + b"tail")
    store.upload("big.tar", source)
    assert store.size("big.tar") == (12 << 20) + 4
    store.download("big.tar", tmp_path / "in" / "back")
    assert (tmp_path / "in" / "back").read_bytes() == source.read_bytes()
    assert os.listdir(tmp_path / "in") == ["back"]


def test_an_open_file_is_not_disturbed_by_a_later_write(store_uri: str) -> None:
    store = open_store(store_uri)
    store.write("x", b"before")
    with store.open("x") as file:
        store.write("x", b"after, and longer")
        assert file.read() == b"before"
        file.seek(2)
        assert file.read() == b"fore"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", "a\\..\\b", "a\0b"])
def test_names_that_leave_the_store_are_refused(store_uri: str, name: str) -> None:
    store = open_store(store_uri)
    with pytest.raises(LayerloopError, match="object name"):
        store.write(name, b"x")
    with pytest.raises(LayerloopError, match="object name"):
        store.read(name)


def test_file_uris_and_plain_paths_are_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    open_store(folder).write("x", b"1")
    assert open_store(f"file://{tmp_path}/a%20folder").read("x") == b"1"
    assert open_store(str(folder)).uri == str(folder)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "store URI is empty: give a folder or s3://bucket/prefix"),
        ("s3://[2023]/x", "store URI s3://[2023]/x is none: write s3://bucket/prefix"),
        ("gs://bucket/x", "store URI gs://bucket/x has scheme gs://: use a folder, file:// or s3://bucket/prefix"),
        ("file://host/x", "store URI file://host/x names a host: write file:///absolute/path"),
        ("s3:///x", "store URI s3:///x is not s3://bucket/prefix: set the rest by AWS_* variables"),
        ("s3://b/a/../c", "object name 'a/../c' is not a relative path without empty or dotted parts: correct it"),
    ],
)
def test_impossible_uris_are_one_line(uri: str, message: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        open_store(uri)
    assert str(caught.value) == message


def test_a_secret_written_into_a_uri_is_not_repeated() -> None:
    with pytest.raises(LayerloopError) as caught:
        open_store("s3://AKIAEXAMPLE:abcdefsecret@bucket/x")
    assert "secret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(LayerloopError, match=r"/f is a file, not a folder: give a folder$"):
        open_store(tmp_path / "f")
    with pytest.raises(LayerloopError, match=r"f/below cannot be written \(File exists\): give a folder"):
        open_store(tmp_path).write("f/below", b"x")


KILLED_WRITER = """
import sys
from layerloop.components.storage.stores import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in b"ab":
        store.write("object", bytes([letter]) * 4_000_000)
"""


def test_a_writer_killed_at_any_instant_leaves_a_whole_object_and_no_other(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    whole = {b"a" * 4_000_000, b"b" * 4_000_000}
    for milliseconds in (3, 17, 40, 75):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, store.uri], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while not store.exists("object"):
                time.sleep(0.001)
            assert store.read("object") in whole  # while it is written
            time.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGKILL)
        assert store.read("object") in whole
        assert store.list() == ["object"]


def test_a_file_system_without_hard_links_is_noticed_once_and_still_creates_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what FUSE and SMB mounts answer

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path / "store")
    assert store.create("a", b"1")
    assert store.create("b", b"2")
    assert not store.create("a", b"3")
    assert store.read("a") == b"1"
    assert store.list() == ["a", "b"]
    assert os.listdir(store.root) and not [name for name in os.listdir(store.root) if name.startswith(".tmp-")]
    assert [record.getMessage() for record in caplog.records] == [
        f"{store.uri}: this file system has no hard links, so create-only writes are check-then-rename"
    ]
