from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.folders import local_adapter, local_folder
from layerloop.components.storage.stores import Store, open_store

FILES = {"model_index.json": b"{}", "vae/config.json": b"{1}", "vae/weights.safetensors": b"w" * 1000}


@pytest.fixture
def remote(s3_bucket: str) -> Store:
    store = open_store(s3_bucket)
    for name, data in FILES.items():
        store.write(name, data)
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert local_folder(str(tmp_path / "model")) == tmp_path / "model"
    assert local_folder(f"file://{tmp_path}/model") == tmp_path / "model"


def test_links_that_lead_nowhere_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert open_store(str(tmp_path)).sizes() == {"a": 1}


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, s3_bucket: str) -> None:
    with pytest.raises(LayerloopError, match=f"folder {tmp_path}/nowhere does not exist"):
        local_folder(str(tmp_path / "nowhere"))
    with pytest.raises(LayerloopError, match=f"{s3_bucket}/nowhere has no objects"):
        local_folder(f"{s3_bucket}/nowhere", cache=tmp_path)


def test_a_remote_folder_is_copied_once(remote: Store, tmp_path: Path) -> None:
    first = local_folder(remote.uri, cache=tmp_path)
    assert contents(first) == FILES
    assert local_folder(remote.uri, cache=tmp_path) == first
    remote.write("model_index.json", b"[]")  # of the same size, as adapters of one rank are
    second = local_folder(remote.uri, cache=tmp_path)
    assert second != first
    assert contents(second) == FILES | {"model_index.json": b"[]"} and contents(first) == FILES


def test_an_interrupted_copy_is_continued(remote: Store, tmp_path: Path) -> None:
    final = local_folder(remote.uri, cache=tmp_path)
    partial = final.with_suffix(".partial")
    final.rename(partial)
    (partial / "vae" / "weights.safetensors").write_bytes(b"cut")
    (partial / "vae" / "weights.safetensors.b3dD0e8c").write_bytes(b"w" * 67)  # of a download that was killed
    (partial / "model_index.json").write_bytes(b"ok")  # was complete: of the right size, so it is kept
    assert contents(local_folder(remote.uri, cache=tmp_path)) == FILES | {"model_index.json": b"ok"}
    assert not partial.exists()


def test_several_at_once_share_one_copy(remote: Store, tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(local_folder(remote.uri, cache=tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert contents(folders[0]) == FILES


def test_the_cache_is_where_the_environment_says(
    remote: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "big disk"))
    assert (tmp_path / "big disk") in local_folder(remote.uri).parents


def test_object_names_that_lead_elsewhere_are_not_followed(remote: Store, tmp_path: Path) -> None:
    import boto3

    bucket, _, prefix = remote.uri.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/../../evil", Body=b"x")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/vae/", Body=b"")  # what consoles make for a folder
    assert contents(local_folder(remote.uri, cache=tmp_path / "cache")) == FILES
    assert not list(tmp_path.rglob("evil"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with one snapshot of someone/adapters, and no network."""
    snapshot = tmp_path / "models--someone--adapters" / "snapshots" / ("0" * 40)
    (snapshot / "checkpoint-600").mkdir(parents=True)
    (snapshot / "checkpoint-600" / "adapter_config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_a_folder_of_the_hub_is_its_snapshot(hub: Path) -> None:
    assert local_folder("hf://someone/adapters") == hub
    assert contents(local_folder("hf://someone/adapters/checkpoint-600")) == {"adapter_config.json": b"{}"}


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://someone", "hf://someone names no repository: give hf://owner/name"),
        ("hf://someone/nothing", "hf://someone/nothing is not available on the Hugging Face hub"),
        ("hf://someone/adapters/checkpoint-7", "the repository has no folder checkpoint-7"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub: Path, uri: str, words: str) -> None:
    with pytest.raises(LayerloopError, match=words) as caught:
        local_folder(uri)
    assert "\n" not in str(caught.value)


def test_a_uri_may_name_an_adapters_file_and_nothing_else_is_fetched(
    remote: Store, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    remote.write("vae/adapter_config.json", b"{2}")
    found = local_adapter(f"{remote.uri}/vae/weights.safetensors")
    assert contents(found.parent) == {"weights.safetensors": b"w" * 1000, "adapter_config.json": b"{2}"}
    with pytest.raises(LayerloopError, match=r"vae/w\.safetensors does not exist: correct the name"):
        local_adapter(f"{remote.uri}/vae/w.safetensors")
    with pytest.raises(LayerloopError, match=r"nothing has no w\.safetensors: correct the URI"):
        local_adapter(f"{remote.uri}/nothing/w.safetensors")
    (hub / "mine.safetensors").write_bytes(b"m")
    assert local_adapter("hf://someone/adapters/mine.safetensors") == hub / "mine.safetensors"
    assert local_adapter("hf://someone/adapters/checkpoint-600") == hub / "checkpoint-600"
    for uri in (f"file://{hub}/mine.safetensors", str(hub / "mine.safetensors")):
        assert local_adapter(uri) == hub / "mine.safetensors"


@pytest.mark.parametrize(
    ("fault", "says"), [(errno.EROFS, "Read-only file system"), (errno.ENOSPC, "No space left on device")]
)
def test_a_cache_that_cannot_hold_a_copy_is_one_line(
    fault: int, says: str, remote: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault), str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = rf"^{remote.uri} cannot be copied to {tmp_path}/folders \({says}\): set LAYERLOOP_CACHE to a folder"
    with pytest.raises(LayerloopError, match=line):
        local_folder(remote.uri, cache=tmp_path)


def test_a_copy_in_a_cache_that_has_become_read_only_is_used(
    remote: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = local_folder(remote.uri, cache=tmp_path)
    first.with_suffix(".lock").unlink()  # a read-only volume refuses to open it for writing
    first.with_suffix(".lock").mkdir()
    assert local_folder(remote.uri, cache=tmp_path) == first


def test_a_cache_without_room_is_refused_before_the_first_byte(
    remote: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 999, 999))
    line = r"has 1\.0 kB to copy but .*/folders has 999 B left: set LAYERLOOP_CACHE to a larger disk"
    with pytest.raises(LayerloopError, match=line):
        local_folder(remote.uri, cache=tmp_path)
    assert contents(tmp_path / "folders") == dict.fromkeys(contents(tmp_path / "folders"), b"")
