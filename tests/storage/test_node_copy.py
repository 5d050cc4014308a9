"""A copy of slow files on the node's disk: made once, checked, and refused in one line where it cannot be."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage import folders
from layerloop.components.storage.folders import node_copy

FILES = {"transformer/config.json": b"{}", "transformer/a.safetensors": bytes(range(256)) * 50, "vae/b": b""}


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "slow" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "slow" / name).write_bytes(data)
    return tmp_path / "slow"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On another disk, which the tests' folder is told to be."""
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "_same_disk", lambda one, other: False)
    yield tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return [folder / name for name in FILES]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(slow: Path) -> str:
    with pytest.raises(LayerloopError) as caught:
        node_copy(slow, files(slow))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_cache_or_on_the_same_disk_nothing_is_copied(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAYERLOOP_CACHE", raising=False)
    assert node_copy(slow, files(slow)) == slow
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    assert node_copy(slow, files(slow)) == slow
    assert contents(tmp_path / "cache") == {}


def test_another_disk_is_told_by_its_number(slow: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == slow.stat().st_dev:
        pytest.skip("this machine has one disk")
    assert not folders._same_disk(files(slow)[0], other)


def test_the_copy_has_the_files_and_is_made_once(slow: Path, cache: Path) -> None:
    (slow / "not-wanted").write_bytes(b"text encoder")
    copy = node_copy(slow, files(slow))
    assert cache in copy.parents
    assert contents(copy) == FILES
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert node_copy(slow, files(slow)) == copy
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    (slow / "vae/b").write_bytes(b"another revision")
    assert node_copy(slow, files(slow)) != copy


def test_many_ranks_at_once_copy_once(slow: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Path] = []
    original = folders._copy_file
    monkeypatch.setattr(folders, "_copy_file", lambda source, target: copied.append(source) or original(source, target))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(node_copy(slow, files(slow)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1
    assert sorted(copied) == sorted(files(slow))


def test_an_interrupted_copy_is_continued_and_never_taken_for_whole(
    slow: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, copied = folders._copy_file, []

    def interrupted(source: Path, target: Path) -> None:
        if len(copied) == 1:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(f"{target.name}.unchecked").write_bytes(b"half")
            raise KeyboardInterrupt
        copied.append(source)
        original(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(folders, "_copy_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            node_copy(slow, files(slow))
    again: list[Path] = []
    monkeypatch.setattr(folders, "_copy_file", lambda source, target: again.append(source) or original(source, target))
    assert contents(node_copy(slow, files(slow))) == FILES
    assert sorted(copied + again) == sorted(files(slow))


def test_a_disk_that_returns_other_bytes_is_refused(slow: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def faulty(descriptor: int) -> None:
        real(descriptor)
        name = Path(f"/proc/self/fd/{descriptor}").resolve()
        if name.name == "a.safetensors.unchecked":
            data = bytearray(name.read_bytes())
            data[7] ^= 1
            name.write_bytes(data)

    monkeypatch.setattr("os.fsync", faulty)
    assert "returns other bytes of a.safetensors than were written" in refusal(slow)
    monkeypatch.setattr("os.fsync", real)
    assert contents(node_copy(slow, files(slow))) == FILES


def test_a_full_cache_is_refused_before_anything_is_copied(
    slow: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = folders.shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: full)
    assert f"LAYERLOOP_CACHE is {cache}, which has 100 B left where {slow} takes 12.8 kB" in refusal(slow)
    assert not list(cache.rglob("*.unchecked"))


def test_a_cache_that_cannot_be_written_to_is_refused(slow: Path, cache: Path) -> None:
    cache.write_bytes(b"a file in its place")
    assert f"LAYERLOOP_CACHE is {cache}, where {slow} cannot be copied (" in refusal(slow)
    assert "make the volume writable" in refusal(slow)
