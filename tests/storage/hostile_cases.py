"""Hostile files and what is said of each, run under limits: `python hostile_cases.py FOLDER`, for test_hostile.py.

What is made first may take memory; then limits are set, and each case prints its name, what came of it, and seconds.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.trajectory import GroupRecord, candidate_key, group_key
from layerloop.components.shard_dataset.inputs import find_inputs, read_items
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.groups import SampledGroup, read_group, samples_of
from layerloop.components.storage.index import INDEX, extract
from layerloop.components.storage.local import LocalStore
from layerloop.components.storage.shards import Sample, read_shard, write_shard

MEMORY, SECONDS, LARGE = 200 << 20, 20, 220 << 20  # bytes beyond the imports; of each case; bytes of what is too large
PIXELS = 10_000


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


RECORD = GroupRecord(
    iteration=1, group=0, image_key="a", layers=2, group_size=2, height=32, width=32, latent_height=4, latent_width=4,
    sigmas=(1.0, 0.5, 0.0), window_start=0, window_size=0, dynamics="ode", etas=(), share_prefix=False, outside="heun",
    base_fingerprint="0" * 64, adapter_sha256=None,
)  # fmt: skip


def group() -> dict[str, dict[str, bytes]]:
    """The samples of a sound group of 32 pixels, by key."""
    sampled = SampledGroup(
        record=RECORD,
        image=np.full((32, 32, 4), 255, np.uint8),
        condition=np.zeros((16, 64), np.float32),
        seeds=[1, 2],
        window=np.zeros((2, 0, 48, 64), np.float32),
        final=np.zeros((2, 48, 64), np.float32),
        stacks=np.zeros((2, 2, 32, 32, 4), np.uint8),
    )
    return dict(samples_of(sampled))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def zeros(size: int) -> bytes:
    """`size` zeros, deflated to a few hundredths."""
    packer, out = zlib.compressobj(1), []
    for _ in range(size // (1 << 20)):
        out.append(packer.compress(bytes(1 << 20)))
    return b"".join(out) + packer.flush()


def png(width: int, height: int, before: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    body = zeros(LARGE) if width > 1000 else zlib.compress(bytes(height * (1 + 4 * width)))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def header(kind: bytes, name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def sparse(path: Path, begin: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)


def as_shard(path: Path, samples: int) -> Shard:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(name=path.name, bytes=path.stat().st_size, sha256=digest, samples=samples)


def cases(folder: Path) -> dict[str, Callable[[], object]]:
    store, found = LocalStore(folder / "store"), dict[str, Callable[[], object]]()
    (folder / "store").mkdir()
    whole, candidate = group(), candidate_key(1, 0, 0)

    def spoilt(name: str, key: str, members: dict[str, bytes], use: Callable[[Any], object]) -> None:
        samples: list[Sample] = [(k, {**m, **members} if k == key else m) for k, m in whole.items()]
        shard = write_shard(store, f"{name}.tar", samples)
        found[name] = lambda: use(read_group(store, shard, 1, 0, layers=True, latents=True))

    stack = lambda read: read.candidates[0].stack().sum()  # noqa: E731
    final = lambda read: read.candidates[0].final(64).sum()  # noqa: E731
    spoilt("sound", candidate, {}, lambda read: stack(read) + final(read))
    spoilt("pixels", candidate, {"layer1.png": png(PIXELS, PIXELS)}, stack)
    text = chunk(b"zTXt", b"Comment\0\0" + zeros(LARGE))
    spoilt("text", candidate, {"layer1.png": png(32, 32, text)}, stack)
    spoilt("profile", candidate, {"layer1.png": png(32, 32, chunk(b"iCCP", b"x\0\0" + zeros(LARGE)))}, stack)
    many = ",".join(f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(400_000))
    for name, head in (("names", f"{{{many}}}".encode()), ("length", b"")):
        said = len(head) or 1 << 62
        spoilt(name, candidate, {"trajectory.safetensors": struct.pack("<Q", said) + head}, final)
    spoilt("deep", candidate, {"json": b"[" * 1_000_000}, stack)
    spoilt("large-record", candidate, {"json": b'{"x": "' + b"y" * (17 << 20) + b'"}'}, stack)
    twice = json.dumps({"iteration": 1, "group": 0, "candidate": 0, "image_key": "a", "seed": 1})[:-1] + ', "seed": 2}'
    spoilt("twice", candidate, {"json": twice.encode()}, stack)
    future = RECORD.to_json().replace(b'"schema_version": 1', b'"schema_version": 2')
    spoilt("future", group_key(1, 0), {"json": future}, stack)

    bomb = pickle.dumps(Exploding())
    pickles = write_shard(store, "pickles.tar", [("a", {"pkl": bomb, "npy": bomb, "pth": bomb})])
    found["pickles"] = lambda: list(read_shard(store, pickles))
    sparse(folder / "store" / "zeros.tar", header(b"0", "a.json", 0), LARGE)
    sparse(folder / "store" / "extended.tar", header(b"x", "a.json", LARGE - 10240), LARGE)
    sparse(folder / "store" / "member.tar", header(b"0", "a.json", LARGE - 10240), LARGE)
    for name in ("zeros", "extended", "member"):
        shard = as_shard(folder / "store" / f"{name}.tar", 1)
        found[name] = lambda shard=shard: list(read_shard(store, shard))  # type: ignore[misc]

    (folder / "images").mkdir()
    sparse(folder / "images" / "extended.tar", header(b"x", "a.png", LARGE - 10240), LARGE)
    sparse(folder / "images" / "long.tar", header(b"L", "a.png", LARGE - 10240), LARGE)
    inputs = find_inputs(str(folder / "images"), what="images")
    found["foreign"] = lambda: "; ".join(item.problem or "" for item in read_items(inputs, max_bytes=1 << 20))

    campaign = Campaign.create_or_open(str(folder / "campaign"), Recipe(name="test"))
    small = write_shard(campaign.store, "sources/train-000000.tar", [("a", {"json": b"{}"})])
    campaign.commit("sources", Manifest(kind="sources", shards=(small,), counts={"images": 1}))
    rows, key = 2_000_000, "a" * 100_000
    constant = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [key])
    numbers = pyarrow.array(np.zeros(rows, np.int64))
    table = pyarrow.table({"shard": constant, "key": constant, "offset": numbers, "length": numbers})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    campaign.store.write(f"sources/{INDEX}", buffer.getvalue())
    found["index"] = lambda: sorted(extract(campaign, "a"))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    ready = cases(folder)
    os.chdir(folder / "here")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for name, run in ready.items():
        signal.alarm(SECONDS)  # ends the process where a case does not end
        began = time.monotonic()
        try:
            said = f"read {run()!s:.300}"
        except LayerloopError as error:
            said = str(error)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps([name, said, round(time.monotonic() - began, 2)]), flush=True)


if __name__ == "__main__":
    main()
