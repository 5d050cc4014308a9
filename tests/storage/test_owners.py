"""What killed processes left is told from what is being written, and removed while others work."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe, RetentionRecipe
from layerloop.components.storage import owners, s3
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.lease import hold, sweep
from layerloop.components.storage.local import TEMPORARY
from layerloop.components.storage.owners import ABANDONED, is_abandoned, owned_name, scratch_folder
from layerloop.components.storage.retention import collect_garbage, garbage
from layerloop.components.storage.stores import open_store

KILLED = """
import os, signal, sys
from layerloop.components.storage.lease import hold
from layerloop.components.storage.owners import scratch_folder
from layerloop.components.storage.stores import open_store

store = open_store(sys.argv[1])
with hold(store, log=print), scratch_folder() as folder:
    (folder / "weights").write_bytes(b"x")
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.write("iterations/000001/scores/replies/a.json", b"half")
"""


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, Path]:
    """A campaign's folder and a TMPDIR in which a process was killed that wrote there."""
    campaign, scratch = tmp_path / "campaign", tmp_path / "tmp"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(campaign)], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(campaign.rglob(f"{TEMPORARY}*"))) == 1 and len(list(scratch.iterdir())) == 1
    return campaign, scratch


def test_the_next_run_that_takes_the_lease_removes_what_a_killed_one_was_writing(
    killed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign, scratch = killed
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    mine, said = campaign / owned_name(f"{TEMPORARY}mine"), list[str]()
    mine.write_bytes(b"being written")
    with hold(open_store(campaign), log=said.append):
        assert list(campaign.rglob(f"{TEMPORARY}*")) == [mine]
    assert said == ["removed 1 unfinished writes of processes that were killed"] and list(scratch.iterdir()) == []


def test_the_next_scratch_folder_removes_those_of_killed_processes(
    killed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, scratch = killed
    (kept := scratch / "layerloop-of-somebody").mkdir()
    (link := scratch / "layerloop-0123abcd.1.1-00").symlink_to(kept)
    (kept / "file").write_bytes(b"x")
    os.utime(kept, (0, 0))
    with scratch_folder(scratch) as outer, scratch_folder(scratch) as inner:
        assert sorted(scratch.iterdir()) == sorted([kept, link, outer, inner]) and inner != outer
        assert inner.stat().st_mode & 0o077 == 0, "nobody else may read what is in it"
    assert sorted(scratch.iterdir()) == sorted([kept, link]) and (kept / "file").exists()


def test_a_process_of_another_machine_or_unknown_has_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".tmp-g000000.tar-0123456789ab", ".tmp-x-0123abcd.4711.98765-0123456789ab"):
        assert not is_abandoned(name, ABANDONED - 1) and is_abandoned(name, ABANDONED + 1)
    own = owned_name(".tmp-x")
    assert not is_abandoned(own, 10 * ABANDONED), "it lives"
    number, start = own.split("-")[-2].split(".")[1:]
    assert int(number) == os.getpid()
    assert is_abandoned(own.replace(f".{start}-", f".{int(start) - 1}-"), 0), "its number is another process's now"
    monkeypatch.setattr(owners, "identity", lambda pid: [])  # no /proc
    assert not is_abandoned(owned_name(".tmp-x"), 10) and is_abandoned(owned_name(".tmp-x"), 2 * ABANDONED)


def test_old_temporary_files_of_earlier_versions_go_and_young_ones_stay(tmp_path: Path) -> None:
    old, young = tmp_path / f"{TEMPORARY}a-00", tmp_path / "deep" / f"{TEMPORARY}b-00"
    young.parent.mkdir()
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)
    assert open_store(tmp_path).remove_abandoned() == 1
    assert not old.exists() and young.exists()


def test_where_nothing_may_be_removed_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lost+found`, where a campaign is a volume's root; credentials without the right to list uploads."""

    def refuse() -> int:
        raise LayerloopError(f"{tmp_path}/lost+found cannot be read (Permission denied): allow it")

    store = open_store(tmp_path)
    monkeypatch.setattr(store, "remove_abandoned", refuse)
    sweep(store, log=pytest.fail)


PARTS = """
import sys
from layerloop.components.storage import s3
from layerloop.components.storage.shards import write_shard
from layerloop.components.storage.stores import open_store

s3.PART_BYTES = 5 << 20
samples = [(f"s{n}", {"png": bytes([n]) * 3_000_000}) for n in range(6)]
print(write_shard(open_store(sys.argv[1]), "sources/train-000000.tar", samples).sha256)
"""


def test_an_upload_in_parts_that_is_killed_is_no_object_is_made_again_and_its_parts_go(
    s3_bucket: str, tmp_path: Path
) -> None:
    campaign = Campaign.create_or_open(s3_bucket, Recipe(name="parts"))
    hook = Path(__file__).parents[1] / "faults" / "hook"
    strike = {"path": s3_bucket.removeprefix("s3:/"), "log": str(tmp_path / "log"), "action": "kill sent"}
    command = [sys.executable, "-c", PARTS, s3_bucket]
    path = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
    struck = os.environ | {
        "LAYERLOOP_FAULTS": json.dumps(strike | {"match": "PUT sources/train-000000-"}),
        "PYTHONPATH": path,
    }
    assert subprocess.run(command, env=struck, timeout=60).returncode == -signal.SIGKILL
    (left,) = campaign.store.leftovers()
    assert left.startswith("unfinished upload of sources/train-000000-") and not campaign.store.list("sources/")
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    plain = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, text=True, check=True)
    (name,) = campaign.store.list("sources/")
    assert hashlib.sha256(campaign.store.read(name)).hexdigest() == made.stdout.strip() == plain.stdout.strip()
    assert campaign.store.leftovers() == [left]
    assert garbage(campaign, RetentionRecipe()) == []
    collect_garbage(campaign, RetentionRecipe(), log=lambda _: None)
    assert campaign.store.leftovers() == [] and campaign.store.list("sources/") == [name]


def test_probes_and_unfinished_uploads_go_from_s3_after_a_day(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    store = open_store(s3_bucket)
    bucket, _, prefix = s3_bucket.removeprefix("s3://").partition("/")
    store.write(f"{s3.PROBE}0123", b"")
    store.write("kept", b"1")
    boto3.client("s3").create_multipart_upload(Bucket=bucket, Key=f"{prefix}/big.tar")
    with monkeypatch.context() as patch:
        patch.setattr(s3, "ABANDONED", 1e12)
        assert store.remove_abandoned() == 0 and len(store.leftovers()) == 2
    assert store.remove_abandoned() == 1, "moto says of every upload that it began in 2010"
    assert store.leftovers() == [f"{s3.PROBE}0123"]
    monkeypatch.setattr(s3, "ABANDONED", -10.0)
    assert store.remove_abandoned() == 1
    assert store.leftovers() == [] and store.list() == ["kept"]
