"""Shards: WebDataset tars that are byte-reproducible to write and verified before a sample is used.

A sample is a key and its members by suffix, `("i000007-g000003", {"json": ..., "source.png": ...})`; in the tar the
members follow each other as `<key>.<suffix>`. Keys have no dots, since WebDataset cuts a name at its first one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import tarfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Self

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Shard, content_name
from layerloop.components.schema.record import DamagedError
from layerloop.components.storage.removals import explain_missing
from layerloop.components.storage.store import READS, MissingObjectError, Store, hash_file, written_before

Sample = tuple[str, dict[str, bytes]]

LARGEST, LARGEST_JSON = 1 << 30, 16 << 20  # bytes of a member: it is read into memory

_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SUFFIX = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")  # lower case: WebDataset lowers what it reads


def write_shard(store: Store, name: str, samples: Iterable[Sample]) -> Shard:
    """Write samples as one tar, hashed on its way, which appears in the store as `content_name(name)`.

    Equal samples in equal order give equal bytes (mtime 0, no owner, members sorted by suffix).

    Raises:
        ValueError: a key or suffix that WebDataset would misread, a key given twice, or a sample without members.
    """
    keys: list[str] = []
    with store.staging(name) as (file, put):
        with _Hasher() as hasher:
            for block in _blocks(name, samples, keys):
                hasher.add(block)
                file.write(block)
            digest = hasher.hexdigest()
        size = file.tell()
        own = content_name(name, digest)
        put(own)
    return Shard(name=own, bytes=size, sha256=digest, samples=len(keys))


class _Hasher:
    """sha256 of blocks in a thread beside the one that writes them, which takes about as long."""

    BEHIND = 64 << 20  # bytes that it may lag

    def __init__(self) -> None:
        self._digest, self._small = hashlib.sha256(), bytearray()
        self._pool = ThreadPoolExecutor(1)
        self._todo: deque[tuple[Future[None], int]] = deque()
        self._behind = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, block: bytes) -> None:
        """Append a block, which does not change."""
        if len(block) < 1 << 16:
            self._small += block
            return
        self._start(bytes(self._small))
        self._small.clear()
        self._start(block)

    def hexdigest(self) -> str:
        """The hash of all blocks."""
        self._start(bytes(self._small))
        self._small.clear()
        self._catch_up(0)
        return self._digest.hexdigest()

    def _start(self, block: bytes) -> None:
        self._todo.append((self._pool.submit(self._digest.update, block), len(block)))
        self._behind += len(block)
        self._catch_up(self.BEHIND)

    def _catch_up(self, most: int) -> None:
        while self._behind > most or (self._todo and not most):
            done, size = self._todo.popleft()
            done.result()
            self._behind -= size


def _blocks(name: str, samples: Iterable[Sample], keys: list[str]) -> Iterator[bytes]:
    """The tar of samples, piece by piece; their keys are appended to `keys`."""
    size, seen = 0, set[str]()
    for key, members in samples:
        if not _KEY.fullmatch(key) or key in seen:
            raise ValueError(f"shard {name}: key {key!r} is used twice or is not of A-Z a-z 0-9 _ -")
        if not members:
            raise ValueError(f"shard {name}: sample {key!r} has no members")
        seen.add(key)
        keys.append(key)
        for suffix in sorted(members):
            if not _SUFFIX.fullmatch(suffix):
                raise ValueError(f"shard {name}: suffix {suffix!r} of {key!r} is not lower-case words and dots")
            data = members[suffix]
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size, info.mode, info.mtime = len(data), 0o444, 0
            yield info.tobuf(tarfile.USTAR_FORMAT)
            yield data
            yield bytes(-len(data) % tarfile.BLOCKSIZE)
            size += _taken(len(data)) + tarfile.BLOCKSIZE
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(size + end) % tarfile.RECORDSIZE)


def _taken(size: int) -> int:
    """Bytes that data of `size` bytes take in a tar: whole blocks."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def read_shard(
    store: Store,
    shard: Shard,
    *,
    required: Collection[str] = (),
    wanted: Callable[[str], bool] = lambda suffix: True,
) -> Iterator[Sample]:
    """Samples of a shard, in order. The complete shard is fetched and checked before the first is yielded.

    Args:
        required: suffixes that every sample must have.
        wanted: whether a member of that suffix is read; samples come without the others.

    Raises:
        LayerloopError: the shard is missing, its size, sha256 or sample count is not the manifest's, or its tar is not
            one that `write_shard` makes (members apart, nested names, links, a required member missing).
    """
    where = f"{store.uri}/{shard.name}"
    with _checked(store, shard) as file:
        count = _check_members(file, where, required)
        if count != shard.samples:
            raise LayerloopError(f"{where} has {count} samples, its manifest says {shard.samples}: restore it")
        yield from _samples(file, where, wanted)


def sample_ranges(store: Store, shard: Shard) -> Iterator[tuple[str, int, int]]:
    """Key, offset and length in bytes of every sample of a shard, headers included; only headers are fetched.

    Raises:
        LayerloopError: the shard is missing, or is not a tar of layerloop.
    """
    with io.BufferedReader(_Ranged(store, shard), buffer_size=8 * tarfile.BLOCKSIZE) as file:
        for key, members in _grouped(file, f"{store.uri}/{shard.name}"):
            begin = min(offset for offset, _ in members.values()) - tarfile.BLOCKSIZE
            end = max(offset + _taken(size) for offset, size in members.values())
            yield key, begin, end - begin


def read_sample(store: Store, shard: Shard, key: str, offset: int, length: int) -> dict[str, bytes]:
    """The members of one sample by suffix, by one ranged read; the rest of the shard is not fetched, so its hash is not
    checked: the headers' sums and names are.

    Raises:
        LayerloopError: the range does not hold this sample and nothing else.
    """
    where = f"{store.uri}/{shard.name}"
    try:
        data = store.read_range(shard.name, offset, length)
    except MissingObjectError as error:
        raise explain_missing(store, shard, error) from None
    file = io.BytesIO(data.ljust(length, b"\0") + bytes(2 * tarfile.BLOCKSIZE))
    found = list(_samples(file, where, lambda suffix: True)) if len(data) == length else []
    if [name for name, _ in found] != [key]:
        raise LayerloopError(f"{where} does not hold {key} at byte {offset}: its index is of another shard, delete it")
    return found[0][1]


class _Ranged(io.RawIOBase):
    """A shard as a file of which only what is read is fetched."""

    def __init__(self, store: Store, shard: Shard) -> None:
        self._store, self._shard, self._at = store, shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._shard.bytes}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._shard.bytes - self._at))
        try:
            data = self._store.read_range(self._shard.name, self._at, size) if size else b""
        except MissingObjectError as error:
            raise explain_missing(self._store, self._shard, error) from None
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def existing_shards(store: Store, name: str, keys: Sequence[str]) -> Iterator[Shard]:
    """Complete shards that earlier attempts wrote as `name`, with exactly those keys in that order.

    Their bytes have the hash that their name says. One of an earlier version, whose name says none, is read twice.
    """
    for found, digits in written_before(store, name):
        with contextlib.suppress(LayerloopError):  # gone, cut short, or not a shard of layerloop: it is written again
            if (shard := _described(store, found, digits, keys)) is not None:
                yield shard


def _described(store: Store, name: str, digits: str, keys: Sequence[str]) -> Shard | None:
    """A shard's manifest entry; None if it has other keys, or not the hash that its name says."""
    for _ in range(READS):
        with store.open(name) as file:
            digest, size = hash_file(file)
            if digits and not digest.startswith(digits):
                continue
            if not digits:
                digits = digest
                continue
            _check_members(file, name, ())
            if [key for key, _ in _grouped(file, name)] == list(keys):
                return Shard(name=name, bytes=size, sha256=digest, samples=len(keys))
            return None
    return None


@contextlib.contextmanager
def _checked(store: Store, shard: Shard) -> Iterator[BinaryIO]:
    """The shard's file, checked, and fetched again where it is not what was committed."""
    for _ in range(READS):
        with _opened(store, shard) as file:
            digest, size = hash_file(file)
            if (size, digest) == (shard.bytes, shard.sha256):
                yield file
                return
    raise DamagedError(
        f"{store.uri}/{shard.name} has {size} bytes and sha256 {digest[:12]}, its manifest says {shard.bytes} and "
        f"{shard.sha256[:12]}: it was changed after it was committed, restore it"
    )


@contextlib.contextmanager
def _opened(store: Store, shard: Shard) -> Iterator[BinaryIO]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(store.open(shard.name))
        except MissingObjectError as error:
            raise explain_missing(store, shard, error) from None
        yield file


def _headers(file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, in order. Only plain files are followed: the headers that extend others (PAX, GNU, sparse)
    may say any size and any name, and `write_shard` makes none."""
    offset = 0
    while True:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if block == bytes(tarfile.BLOCKSIZE):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise LayerloopError(f"{where} is not a complete tar ({error}): restore it, or delete it") from None
        if info.type != tarfile.REGTYPE or info.size < 0:
            raise _not_ours(where, info)
        info.offset_data = offset + tarfile.BLOCKSIZE
        yield info
        offset = info.offset_data + _taken(info.size)


def _not_ours(where: str, info: tarfile.TarInfo) -> LayerloopError:
    return LayerloopError(f"{where} holds {info.name!r}, not <key>.<suffix>: it is not a shard of layerloop")


def _grouped(file: BinaryIO, where: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Keys and, by suffix, (offset, size) of their members' bytes: one pass over the headers."""
    key, members = None, dict[str, tuple[int, int]]()
    for info in _headers(file, where):
        stem, dot, suffix = info.name.partition(".")
        if not dot or not _KEY.fullmatch(stem) or not _SUFFIX.fullmatch(suffix):
            raise _not_ours(where, info)
        if stem != key:
            if key is not None:
                yield key, members
            key, members = stem, {}
        if suffix in members:
            raise LayerloopError(f"{where} holds {info.name!r} twice: it is not a shard of layerloop")
        members[suffix] = (info.offset_data, info.size)
    if key is not None:
        yield key, members


def _check_members(file: BinaryIO, where: str, required: Collection[str]) -> int:
    """Number of samples of a well-formed shard."""
    seen: set[str] = set()
    end = 0
    for key, members in _grouped(file, where):
        if key in seen:
            raise LayerloopError(
                f"{where} holds the members of {key} apart from each other: it is not a shard of layerloop"
            )
        seen.add(key)
        missing = sorted(set(required) - members.keys())
        if missing:
            raise LayerloopError(f"{where}: sample {key} lacks {', '.join(missing)}: make the shard again")
        end = max(offset + _taken(size) for offset, size in members.values())
    file.seek(end)
    tail = file.read(2 * tarfile.RECORDSIZE)  # a tar cut between two members reads well, but lacks its two empty blocks
    if len(tail) < 2 * tarfile.BLOCKSIZE or any(tail) or file.tell() % tarfile.RECORDSIZE or file.read(1):
        raise LayerloopError(f"{where} has no end-of-archive mark: it was cut short, delete it to have it made again")
    return len(seen)


def _samples(file: BinaryIO, where: str, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    for key, members in _grouped(file, where):
        data = {}
        for suffix, (offset, size) in members.items():
            if wanted(suffix):
                if size > (most := LARGEST_JSON if suffix == "json" else LARGEST):
                    raise LayerloopError(
                        f"{where}: member {key}.{suffix} has {size} bytes, over {most}: it is not of layerloop"
                    )
                file.seek(offset)
                data[suffix] = file.read(size)
        yield key, data
