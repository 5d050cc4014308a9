from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import webdataset

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Shard
from layerloop.components.storage.shards import Sample, existing_shards, read_shard, write_shard
from layerloop.components.storage.stores import Store, open_store

NAME = "iterations/000001/rollouts/w00of01-000000.tar"


def existing_shard(store: Store, name: str, keys: Sequence[str]) -> Shard | None:
    return next(existing_shards(store, name, keys), None)


def samples(count: int = 3) -> list[Sample]:
    return [
        (
            f"i000001-g{n:06d}",
            {"source.png": bytes([n]) * 700, "json": json.dumps({"n": n}).encode(), "layer0.png": b""},
        )
        for n in range(count)
    ]


def put_tar(
    store: Store, members: list[tuple[str, bytes]], *, cut: int | None = None, count: int | None = None
) -> Shard:
    """A tar made by hand, with a manifest entry that matches its bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()[:cut]
    store.write(NAME, data)
    keys = {name.split(".")[0] for name, _ in members}
    return Shard(
        name=NAME,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        samples=len(keys) if count is None else count,
    )


def test_samples_come_back_as_they_were(store_uri: str) -> None:
    store = open_store(store_uri)
    shard = write_shard(store, NAME, samples())
    assert (shard.base_name, shard.samples, shard.bytes) == (NAME.rpartition("/")[2], 3, store.size(shard.name))
    assert shard.sha256 == hashlib.sha256(store.read(shard.name)).hexdigest()
    assert list(read_shard(store, shard, required=["json", "source.png"])) == [
        (key, dict(sorted(members.items()))) for key, members in samples()
    ]


def test_equal_samples_give_equal_bytes_whatever_the_order_of_members(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = write_shard(store, "a.tar", samples())
    second = write_shard(store, "b.tar", [(key, dict(reversed(members.items()))) for key, members in samples()])
    assert first.sha256 == second.sha256
    with tarfile.open(tmp_path / first.name) as tar:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in tar} == {(0, 0, "", 0o444)}


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    shard = write_shard(open_store(tmp_path), "s-000000.tar", samples())
    dataset = webdataset.WebDataset(str(tmp_path / shard.name), shardshuffle=False)
    read = [(sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")}) for sample in dataset]
    assert read == [(key, members) for key, members in samples()]


def test_an_empty_shard_is_a_shard(store_uri: str) -> None:
    store = open_store(store_uri)
    shard = write_shard(store, NAME, [])
    assert shard.samples == 0
    assert list(read_shard(store, shard)) == []
    assert existing_shard(store, NAME, []) == shard


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([("a", {"json": b""}), ("b", {"json": b""}), ("a", {"json": b""})], "key 'a' is used twice"),
        ([("a.b", {"json": b""})], "key 'a.b' is used twice or is not of A-Z a-z 0-9 _ -"),
        ([("a/b", {"json": b""})], "key 'a/b' is used twice or is not of"),
        ([("", {"json": b""})], "key '' is used twice or is not of"),
        ([("a", {})], "sample 'a' has no members"),
        ([("a", {"PNG": b""})], "suffix 'PNG' of 'a' is not lower-case"),
        ([("a", {"x/y": b""})], "suffix 'x/y' of 'a' is not lower-case"),
    ],
)
def test_what_webdataset_would_misread_is_refused_and_nothing_is_written(
    tmp_path: Path, bad: list[Sample], message: str
) -> None:
    store = open_store(tmp_path / "store")
    with pytest.raises(ValueError, match=message):
        write_shard(store, NAME, bad)
    assert store.list() == []


def test_a_producer_that_fails_half_way_leaves_no_shard_and_no_temporary_file(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> Iterator[Sample]:
        yield from samples()
        raise RuntimeError("the GPU fell off the bus")

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    store = open_store(store_uri)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        write_shard(store, NAME, failing())
    assert store.list() == []
    assert os.listdir(tmp_path / "scratch") == []


def test_one_changed_bit_is_refused_before_any_sample_is_yielded(store_uri: str) -> None:
    store = open_store(store_uri)
    shard = write_shard(store, NAME, samples())
    data = bytearray(store.read(shard.name))
    data[1500] ^= 1
    store.write(shard.name, bytes(data))
    reader = read_shard(store, shard)
    with pytest.raises(
        LayerloopError, match=r"its manifest says .*: it was changed after it was committed, restore it$"
    ):
        next(reader)


def test_a_shortened_shard_and_a_missing_one_are_refused(store_uri: str) -> None:
    store = open_store(store_uri)
    shard = write_shard(store, NAME, samples())
    store.write(shard.name, store.read(shard.name)[:-512])
    with pytest.raises(LayerloopError, match=f"{store_uri}/{shard.name} has {shard.bytes - 512} bytes"):
        next(read_shard(store, shard))
    store.delete(shard.name)
    with pytest.raises(LayerloopError, match=f"{store_uri}/{shard.name} does not exist"):
        next(read_shard(store, shard))


def test_a_wrong_sample_count_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    shard = put_tar(store, [("a.json", b"1"), ("b.json", b"2")], count=3)
    with pytest.raises(LayerloopError, match="has 2 samples, its manifest says 3"):
        next(read_shard(store, shard))


def test_a_missing_required_member_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    shard = put_tar(store, [("a.json", b"1"), ("a.x.png", b"1"), ("b.json", b"2")])
    with pytest.raises(LayerloopError, match=r"sample b lacks x\.png: make the shard again"):
        next(read_shard(store, shard, required=("json", "x.png")))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b""), ("b.png", b""), ("a.json", b""), ("b.json", b"")], "holds the members of a apart"),
        ([("a.json", b"1"), ("a.json", b"2")], "holds 'a.json' twice"),
        ([("folder/a.json", b"1")], "holds 'folder/a.json', not <key>.<suffix>"),
        ([("../a.json", b"1")], r"holds '\.\./a\.json', not <key>.<suffix>"),
        ([("nosuffix", b"1")], "holds 'nosuffix', not <key>.<suffix>"),
    ],
)
def test_tars_that_are_not_ours_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    store = open_store(tmp_path)
    shard = put_tar(store, members)
    with pytest.raises(LayerloopError, match=message):
        next(read_shard(store, shard))


def test_links_in_a_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    data = (tmp_path / "x.tar").read_bytes()
    shard = Shard(name="x.tar", bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=1)
    with pytest.raises(LayerloopError, match="holds 'a.json', not <key>.<suffix>"):
        next(read_shard(open_store(tmp_path), shard))


@pytest.mark.parametrize("cut", [1024, 1024 + 512, 1024 + 700, 2048, 2048 + 512, 4096, 300, 0])
def test_a_tar_cut_anywhere_is_refused_even_if_its_hash_is_the_manifests(tmp_path: Path, cut: int) -> None:
    store = open_store(tmp_path)
    shard = put_tar(store, [("a.json", b"1" * 512), ("b.json", b"2" * 512)], cut=cut)
    with pytest.raises(LayerloopError, match=r"was cut short|is not a complete tar"):
        next(read_shard(store, shard))
    assert existing_shard(store, NAME, ["a", "b"]) is None


def test_an_earlier_shard_is_taken_only_with_exactly_these_keys(store_uri: str) -> None:
    store = open_store(store_uri)
    keys = [key for key, _ in samples()]
    assert existing_shard(store, NAME, keys) is None
    shard = write_shard(store, NAME, samples())
    assert existing_shard(store, NAME, keys) == shard
    assert existing_shard(store, NAME, keys[:2]) is None
    assert existing_shard(store, NAME, list(reversed(keys))) is None
    store.write(shard.name, b"rubbish")
    assert existing_shard(store, NAME, keys) is None


def test_shards_of_other_bytes_have_names_of_their_own(store_uri: str) -> None:
    store = open_store(store_uri)
    one, other = write_shard(store, NAME, samples()), write_shard(store, NAME, [("a", {"json": b"1"})])
    assert one.name == f"{NAME.removesuffix('.tar')}-{one.sha256[:16]}.tar"
    assert store.list() == sorted([one.name, other.name])
    assert [existing_shard(store, NAME, keys) for keys in ([key for key, _ in samples()], ["a"])] == [one, other]


def test_a_shard_of_an_earlier_version_without_a_hash_in_its_name_is_taken(store_uri: str) -> None:
    store = open_store(store_uri)
    shard = write_shard(store, "elsewhere.tar", samples())
    store.write(NAME, store.read(shard.name))
    keys = [key for key, _ in samples()]
    assert existing_shard(store, NAME, keys) == shard.model_copy(update={"name": NAME})


class Flipping:
    """A store that answers some reads with one bit flipped: the transfer is to blame, the object is whole."""

    def __init__(self, store: Store, flips: int) -> None:
        self._store, self.flips = store, flips

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[io.BytesIO]:
        yield io.BytesIO(self.read(name))

    def read(self, name: str, *, most: int | None = None) -> bytes:
        data = bytearray(self._store.read(name))
        if self.flips:
            self.flips -= 1
            data[700] ^= 4
        return bytes(data)


def test_a_bit_that_flips_on_the_way_is_read_again_and_never_gets_into_a_manifest(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = [key for key, _ in samples()]
    shard = write_shard(store, NAME, samples())
    for flips in (1, 2):
        assert existing_shard(Flipping(store, flips), NAME, keys) == shard  # type: ignore[arg-type]
        assert list(read_shard(Flipping(store, flips), shard)) == list(read_shard(store, shard))  # type: ignore[arg-type]
    assert existing_shard(Flipping(store, 3), NAME, keys) is None  # type: ignore[arg-type]
    with pytest.raises(LayerloopError, match=f"sha256 .*, its manifest says .* and {shard.sha256[:12]}"):
        next(read_shard(Flipping(store, 3), shard))  # type: ignore[arg-type]
    plain = store.read(shard.name)
    store.delete(shard.name)
    store.write(NAME, plain)  # of an earlier version: no name to compare with, so two reads have to agree
    found = existing_shard(Flipping(store, 1), NAME, keys)  # type: ignore[arg-type]
    assert found is None or found.sha256 == shard.sha256


class Explosive:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["EXPLOSION"],)


def test_pickles_stay_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLOSION", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Explosive())
    store = open_store(tmp_path)
    shard = write_shard(store, NAME, [("a", {"pkl": bomb, "pyd": bomb, "pth": bomb})])
    assert list(read_shard(store, shard)) == [("a", {"pkl": bomb, "pyd": bomb, "pth": bomb})]
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)  # our own, made above
    assert (tmp_path / "exploded").exists()  # so the test would have noticed
