"""Shards and the S3 store against what moves the same bytes without them: tar, sha256, boto3's own transfers."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.index import extract, write_indices
from layerloop.components.storage.shards import Sample, read_shard, write_shard
from layerloop.components.storage.stores import LocalStore, open_store

from ..conftest import BUCKET, free_port, served

ROUNDS = 5
SAMPLES, SIZES = 100, {"json": 700, "layer0.png": 300_000, "layer1.png": 160_000, "trajectory.safetensors": 2_100_000}
Record = Callable[[str, float], None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 MB of members as files: as large as a group at 640 pixels, of bytes that do not compress."""
    folder = tmp_path_factory.mktemp("members")
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        for suffix, size in SIZES.items():
            (folder / f"s{number:06d}.{suffix}").write_bytes(rng.bytes(size))
    return folder


def samples(folder: Path) -> Iterator[Sample]:
    for number in range(SAMPLES):
        key = f"s{number:06d}"
        yield key, {suffix: (folder / f"{key}.{suffix}").read_bytes() for suffix in SIZES}


def best(contenders: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """The least seconds of each, measured in turns so that all meet the same noise."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


@pytest.mark.timeout(600)
def test_a_shard_is_written_nearly_as_fast_as_tar_does_it(
    files: Path, tmp_path: Path, record_benchmark: Record
) -> None:
    """Hashed, and on the disk: tar alone does neither. The second ratio has a tar that waits for the disk, too."""
    names, store = sorted(os.listdir(files)), LocalStore(tmp_path / "store")
    plain = ["tar", "--format=ustar", "-cf", str(tmp_path / "plain.tar"), "-C", str(files), *names]

    def tar() -> None:
        (tmp_path / "plain.tar").unlink(missing_ok=True)
        subprocess.run(plain, check=True)

    def synced_tar() -> None:
        tar()
        with (tmp_path / "plain.tar").open("rb") as file:
            os.fsync(file.fileno())

    def ours() -> None:
        shutil.rmtree(store.root, ignore_errors=True)
        write_shard(store, "s.tar", samples(files))

    taken = best({"ours": ours, "tar": tar, "synced": synced_tar})
    record_benchmark("shard_write_ratio", taken["ours"] / taken["tar"])
    record_benchmark("shard_write_synced_ratio", taken["ours"] / taken["synced"])
    assert taken["ours"] <= 1.4 * taken["tar"]


@pytest.mark.timeout(600)
def test_a_shard_is_verified_and_read_nearly_as_fast_as_it_is_hashed(
    files: Path, tmp_path: Path, record_benchmark: Record
) -> None:
    store = LocalStore(tmp_path)
    shard = write_shard(store, "s.tar", samples(files))

    def ours() -> None:
        assert sum(len(data) for _, members in read_shard(store, shard) for data in members.values()) > 2.5e8

    def plain() -> None:
        assert hashlib.sha256((tmp_path / shard.name).read_bytes()).hexdigest() == shard.sha256

    taken = best({"ours": ours, "plain": plain})
    record_benchmark("shard_read_ratio", taken["ours"] / taken["plain"])
    assert taken["ours"] <= 1.3 * taken["plain"]


@pytest.mark.timeout(900)
def test_the_store_is_as_fast_as_boto3s_own_transfers(s3_bucket: str, tmp_path: Path, record_benchmark: Record) -> None:
    import boto3

    store, plain = open_store(s3_bucket), boto3.client("s3")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(np.random.default_rng(0).bytes(256_000_000))
    key = f"{s3_bucket.rpartition('/')[2]}/object"
    puts = best(
        {
            "ours": lambda: store.upload("object", source),
            "theirs": lambda: plain.upload_file(str(source), BUCKET, key),
        },
        rounds=8,
    )
    record_benchmark("s3_put_ratio", puts["ours"] / puts["theirs"])
    gets = best(
        {
            "ours": lambda: store.download("object", target),
            "theirs": lambda: plain.download_file(BUCKET, key, str(target)),
        },
    )
    record_benchmark("s3_get_ratio", gets["ours"] / gets["theirs"])
    assert target.read_bytes() == source.read_bytes()
    store.delete("object")
    assert puts["ours"] <= 1.1 * puts["theirs"]
    assert gets["ours"] <= 1.1 * gets["theirs"]


@contextmanager
def counted(upstream: str) -> Iterator[tuple[str, list[int]]]:
    """A relay of TCP before a server: its endpoint, and the bytes of everything that the server has sent."""
    listener, sent = socket.create_server(("127.0.0.1", 0)), list[int]()
    host, port = upstream.split(":")

    def pass_on(source: socket.socket, target: socket.socket, count: bool) -> None:
        while data := source.recv(1 << 16):
            if count:
                sent.append(len(data))
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, int(port)))
            for arguments in ((client, server, False), (server, client, True)):
                threading.Thread(target=pass_on, args=arguments, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", sent
    listener.close()


@pytest.mark.timeout(600)
def test_the_first_sample_of_a_shard_costs_few_bytes(
    files: Path,
    s3_environment: dict[str, str],
    s3_bucket: str,
    record_benchmark: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that a reader fetches which knows the campaign's URI and a key: recipe, manifest, headers, sample; with an
    index beside the shards and without one."""
    campaign = Campaign.create_or_open(s3_bucket, Recipe(name="bench"))
    shard = write_shard(campaign.store, "sources/train-000000.tar", samples(files))
    campaign.commit("sources", Manifest(kind="sources", shards=(shard,), counts={"images": SAMPLES}))
    fractions = []
    for indexed in (False, True):
        if indexed:
            list(write_indices(campaign))
        with counted(urlsplit(s3_environment["AWS_ENDPOINT_URL"]).netloc) as (endpoint, sent):
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            members = extract(Campaign.open(s3_bucket), "s000000")
            monkeypatch.undo()
        assert sum(map(len, members.values())) == sum(SIZES.values())
        assert sum(sent) > sum(SIZES.values()), "all goes through the relay"
        fractions.append(sum(sent) / shard.bytes)
    record_benchmark("first_sample_fraction", max(fractions))
    assert max(fractions) <= 0.05


STEP = """
import json, re, sys
from pathlib import Path
import numpy as np
from layerloop.components.storage.shards import read_shard, write_shard
from layerloop.components.storage.stores import open_store

MEGABYTES, GROUPS, CANDIDATES = 256, 8, 16
store, block = open_store(sys.argv[1]), np.random.default_rng(0).bytes(1 << 20)

def samples(group):
    for candidate in range(CANDIDATES):
        data = (block * (MEGABYTES // CANDIDATES))[:-1] + bytes([group])
        yield f"g{group}-c{candidate}", {"json": b"{}", "trajectory.safetensors": data}

written = 0
for group in range(GROUPS):
    shard = write_shard(store, f"g{group}.tar", samples(group))
    written += shard.bytes
    read = [members for _, members in read_shard(store, shard)]  # a step holds a group at a time
    assert read[-1]["trajectory.safetensors"][-1] == group
    del read
    store.delete(shard.name)
assert written > 2.1e9
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says a process's own peak")
@pytest.mark.timeout(900)
def test_a_step_of_two_gigabytes_takes_little_memory(tmp_path: Path, record_benchmark: Record) -> None:
    """Written and read in a process of its own, group by group, in a folder and on S3; its imports are included."""
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    port = free_port()
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    assert rclone is not None
    command = [rclone, "--config", str(tmp_path / "none"), "serve", "s3", str(tmp_path / "served")]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", "testing-id,testing-secret"]
    environment = os.environ | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "testing-id",
        "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    peaks = []
    with served(command, port, tmp_path / "log"):
        for uri in (str(tmp_path / "folder"), "s3://bucket/step"):
            said = subprocess.run(
                [sys.executable, "-c", STEP, uri], capture_output=True, text=True, env=environment, check=True
            ).stdout
            peaks.append(int(re.findall(r"\d+", said)[-1]) * 1024 / 1e6)
    record_benchmark("step_io_peak_mb", max(peaks))
    assert 256 < max(peaks) < 600
