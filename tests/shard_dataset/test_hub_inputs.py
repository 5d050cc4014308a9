"""Inputs on the Hugging Face hub, from a server that answers as the hub does."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from layerloop.components.layers.crello import generate_design, write_designs_parquet
from layerloop.components.policy.base_files import base_folder
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.recipe import DataRecipe, ModelRecipe, Recipe
from layerloop.components.schema.runtime import ModelRuntime
from layerloop.components.shard_dataset.base import CheckedBase
from layerloop.components.shard_dataset.files import InputError, open_files
from layerloop.components.shard_dataset.inputs import find_inputs, read_items
from layerloop.components.shard_dataset.layered import find_designs, read_designs
from layerloop.components.storage.folders import local_folder

COMMIT = "c" * 40
NAME = "cyberagent/crello"


@dataclass
class Hub:
    """One data set at one commit, which is revision 5.1.0 and main."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fails: int = 0  # status of every answer

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.fails:
            return self.fails, {}, b"{}"
        base = f"/api/datasets/{NAME}"
        if path in (f"{base}/revision/main", f"{base}/revision/5.1.0"):
            info = {"id": NAME, "sha": COMMIT, "private": False, "downloads": 0, "likes": 0, "tags": [], "siblings": []}
            return 200, {}, json.dumps(info).encode()
        if path == f"{base}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()
            ]
            return 200, {}, json.dumps([*tree, {"type": "directory", "path": "data", "oid": "1" * 40}]).encode()
        name = path.removeprefix(f"/datasets/{NAME}/resolve/{COMMIT}/")
        if name in self.files:
            etag = hashlib.sha256(self.files[name]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, self.files[name]
        missing = "EntryNotFound" if "/resolve/" in path else "RepoNotFound" if NAME not in path else "RevisionNotFound"
        return 404, {"X-Error-Code": missing, "X-Error-Message": "not found"}, b"{}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            served.asked.append(f"{self.command} {path}")
            status, headers, body = served.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield served
    server.shutdown()
    server.server_close()


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_designs_of_a_revision_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    designs = [generate_design(np.random.default_rng(seed), layers=2 + seed) for seed in range(2)]
    for seed, design in enumerate(designs):
        write_designs_parquet(tmp_path / "d.parquet", [design])
        hub.files[f"data/test-0000{seed}-of-00002.parquet"] = (tmp_path / "d.parquet").read_bytes()
    hub.files |= {"data/train-00000-of-00001.parquet": b"never read", "README.md": b"words"}
    found = find_designs(f"hf://datasets/{NAME}@5.1.0/data/test-*.parquet")
    assert found.uri == f"hf://datasets/{NAME}@5.1.0/data/test-*.parquet"
    data = DataRecipe(resolution=64)
    items = list(read_designs(found, data))
    assert [len(item.render(item.load()).layers) for item in items] == [2, 3]
    assert not any("train-00000" in line for line in hub.asked)
    (one,) = read_designs(find_designs(f"hf://datasets/{NAME}/data/test-00001-of-00002.parquet"), data)
    assert one.origin.endswith(str(designs[1]["id"]))


def test_images_on_the_hub_are_read_once_and_then_from_its_cache(hub: Hub) -> None:
    hub.files |= {"a/1.png": png((200, 0, 0)), "a/2.png": png((0, 200, 0)), "b/3.png": png((0, 0, 200))}
    found = find_inputs(f"hf://datasets/{NAME}/a", what="images")
    assert list(found.sizes) == ["1.png", "2.png"]
    for _ in range(2):
        assert [item.load() for item in read_items(found, max_bytes=10**6)] == [
            hub.files["a/1.png"],
            hub.files["a/2.png"],
        ]
    assert sum(line == f"GET /datasets/{NAME}/resolve/{COMMIT}/a/1.png" for line in hub.asked) == 1


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("hf://cyberagent/crello", "names no repository of the hub: give hf://datasets/owner/name"),
        ("hf://datasets/crello", "names no repository of the hub"),
        ("hf://datasets/nobody/nothing", r"nothing is not available on the Hugging Face hub \(.*\): check the name"),
        (f"hf://datasets/{NAME}@9.9.9", "9.9.9 is not available on the Hugging Face hub"),
    ],
)
def test_what_is_not_on_the_hub_is_one_line(hub: Hub, uri: str, line: str) -> None:
    with pytest.raises(LayerloopError, match=line) as caught:
        find_designs(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "kind"), [(429, UnavailableError), (503, UnavailableError), (403, LayerloopError)])
def test_a_hub_that_is_busy_is_worth_another_attempt(
    hub: Hub, status: int, kind: type[LayerloopError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused for good is remembered, and the next pods of the task repeat it at once."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fails = status
    recipe = {"name": "test", "lora": {"start_from": "hf://someone/adapter"}}
    for ask in (
        lambda: base_folder(ModelRecipe(base="someone/model")),
        lambda: local_folder("hf://someone/adapter"),
        lambda: CheckedBase.of(Recipe.model_validate(recipe), ModelRuntime()),
        lambda: find_designs(f"hf://datasets/{NAME}"),
    ):
        with pytest.raises(LayerloopError) as refused:
            ask()
        assert type(refused.value) is kind, refused.value


def test_a_hub_that_nobody_is_to_ask_is_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LayerloopError) as refused:
        local_folder("hf://someone/adapter")
    assert type(refused.value) is LayerloopError


def test_a_file_that_went_is_a_fault_of_that_input(hub: Hub) -> None:
    hub.files["a.png"] = png((1, 2, 3))
    files = open_files(f"hf://datasets/{NAME}")
    assert list(files.listed().sizes) == ["a.png"]
    del hub.files["a.png"]
    with pytest.raises(InputError, match="file a.png is not in cyberagent/crello at c{40}: correct its name"):
        files.read("a.png")
