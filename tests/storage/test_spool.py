"""Samples in a scratch file."""

from __future__ import annotations

import errno
import os
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.spool import Spool


def test_members_come_back_in_any_order_and_from_many_threads() -> None:
    spool = Spool()
    samples = [{"a": bytes([n]) * n, "b.png": b"", "c": os.urandom(1000 + n)} for n in range(40)]
    kept = [spool.add(members) for members in samples]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dict, reversed(kept))) == samples[::-1]
    assert list(kept[3]) == ["a", "b.png", "c"] and len(kept[3]) == 3 and "d" not in kept[3]
    assert pickle.loads(pickle.dumps(kept[7])) == samples[7]


def test_memory_holds_where_they_are() -> None:
    spool, data = Spool(), os.urandom(1 << 20)
    tracemalloc.start()
    kept = [spool.add({"png": data}) for _ in range(16)]
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 1 << 16 and all(members["png"] == data for members in kept)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spool = Spool()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LayerloopError, match=r"cannot be written \(No space left on device\): give it space, or name"):
        spool.add({"png": b"x"})
