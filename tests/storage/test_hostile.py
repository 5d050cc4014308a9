"""Hostile shards, tars and parquet: each is refused by name, within limits of memory and time, and nothing is executed.

All run in one process with limits set (hostile_cases.py), so that what they cost shows.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SAID = {
    "sound": r"read ",
    "pixels": r"/pixels-\w{16}.tar:i000001-g000000-c00.layer1.png: image is 10000 x 10000, its group's record says 32",
    "text": r".layer1.png: image header is damaged \(Decompressed data too large",
    "profile": r".layer1.png: image header is damaged \(Decompressed data too large",
    "names": r":i000001-g000000-c00.trajectory.safetensors says that its header has \d+ bytes, over 100000: it is not",
    "length": r":i000001-g000000-c00.trajectory.safetensors says that its header has 4611686018427387904 bytes, over",
    "deep": r"/deep-\w{16}.tar:i000001-g000000-c00.json is not JSON",
    "large-record": r"/large-record-\w{16}.tar: member i000001-g000000-c00.json has \d+ bytes, over 16777216",
    "twice": r":i000001-g000000-c00.json is not JSON \(it has the key 'seed' twice\)",
    "future": r":i000001-g000000.json has schema_version 2, this version of layerloop reads 1: read it with",
    "pickles": r"read \[\('a', \{'npy'",
    "zeros": r"/zeros.tar has no end-of-archive mark",
    "extended": r"/extended.tar holds 'a.json', not <key>.<suffix>",
    "member": r"/member.tar: member a.json has \d+ bytes, over 16777216",
    "foreign": r"read tar is damaged \(an extended header has \d+ bytes\).*; tar is damaged \(an extended header has ",
    "index": r"read \['a.json'\]",  # it is passed over
}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits the memory of a process as asked")
def test_what_is_hostile_is_refused_by_name_within_limits(tmp_path: Path) -> None:
    for folder in ("here", "scratch"):
        (tmp_path / folder).mkdir()
    script, root = Path(__file__).with_name("hostile_cases.py"), Path(__file__).parents[2]
    environment = os.environ | {"TMPDIR": str(tmp_path / "scratch"), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], cwd=root, env=environment, capture_output=True, text=True
    )
    said = {name: (words, seconds) for name, words, seconds in map(json.loads, done.stdout.splitlines())}
    assert said.keys() == SAID.keys(), f"{done.returncode} after {list(said)[-1:]}: {done.stderr[-2000:]}"
    for name, pattern in SAID.items():
        words, seconds = said[name]
        assert re.search(pattern, words, re.DOTALL), f"{name}: {words[:500]}"
        assert "\n" not in words and seconds < 10, f"{name}: {seconds} s"
    assert os.listdir(tmp_path / "here") == [] and os.listdir(tmp_path / "scratch") == []


def test_the_limits_of_that_process_are_limits() -> None:
    """So the test above would have noticed."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20)); bytes(350 << 20)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "MemoryError" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] in (
        resource.RLIM_INFINITY,
        resource.getrlimit(resource.RLIMIT_AS)[1],
    )
