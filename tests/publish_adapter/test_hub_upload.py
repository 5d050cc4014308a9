"""`layerloop publish --hub`, against a server that answers as the hub does: what arrives there, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from layerloop.components.publish_adapter.hub import token_for
from layerloop.components.publish_adapter.step import run
from layerloop.components.schema.errors import LayerloopError

from .conftest import MakeCampaign

TOKEN = "hf_secretsecretsecret"


@dataclass
class Hub:
    """Repositories by name, file by path; `status` other than 200 refuses every commit."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    cards: list[str] = field(default_factory=list)
    status: int = 200
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> object:
        """The JSON answer to a request, by the protocol of huggingface_hub's HfApi."""
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.repositories.setdefault(name, {})
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.private.add(name)
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return {"warnings": [], "errors": []}
        if found := re.fullmatch(r"/api/models/(\S+/\S+)/preupload/main", path):
            large = re.compile(r"safetensors$")
            files = json.loads(body)["files"]
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "lfs" if large.search(f["path"]) else "regular",
                     "shouldIgnore": False}
                    for f in files
                ]
            }  # fmt: skip
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    {"oid": o["oid"], "size": o["size"],
                     "actions": {"upload": {"href": f"{self.url}/blobs/{o['oid']}"}}}
                    for o in objects
                ],
            }  # fmt: skip
        if method == "PUT" and path.startswith("/blobs/"):
            self.blobs[hashlib.sha256(body).hexdigest()] = body
            return {}
        if found := re.fullmatch(r"/api/models/(\S+/\S+)/commit/main", path):
            repository = self.repositories[found[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository[value["path"]] = self.blobs[value["oid"]]
            return {"commitUrl": f"{self.url}/{found[1]}/commit/{'c' * 40}", "commitOid": "c" * 40}
        raise KeyError(path)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path, status = self.path.split("?")[0], 200
            if path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, found = 401, {"error": f"Invalid token {self.headers.get('Authorization')}"}
            elif "/commit/" in path and hub.status != 200:
                status, found = hub.status, {"error": f"{TOKEN} has no right to write"}
            else:
                found = hub.answer(self.command, path, body)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def publish(hub: Hub, folder: Path, *options: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, "-m", "layerloop.pipelines.cli", "publish", *options],
        env=environment | ({"HF_TOKEN": token} if token else {}), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_a_publication_arrives_at_the_hub_as_it_is(make_campaign: MakeCampaign, tmp_path: Path) -> None:
    campaign = make_campaign()
    with serving(Hub()) as hub:
        done = publish(hub, tmp_path, campaign.uri, "--publish-as", "first", "--hub", "me/layers", "--private")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/layers/commit/{'c' * 40}"
    assert TOKEN not in done.stdout + done.stderr
    sent, folder = hub.repositories["me/layers"], Path(campaign.uri) / "published/first"
    assert set(sent) == {
        "README.md", "peft/adapter_config.json", "peft/adapter_model.safetensors",
        "pytorch_lora_weights.bf16.safetensors", "pytorch_lora_weights.safetensors",
    }  # fmt: skip
    for name in set(sent) - {"README.md"}:
        assert sent[name] == (folder / name).read_bytes()
    assert hub.private == {"me/layers"}
    card = sent["README.md"].decode()
    assert hub.cards == [card] and 'adapter = "me/layers"' in card
    assert campaign.uri not in card and str(tmp_path) not in "".join(
        data.decode("latin1") for name, data in sent.items()
    )


def test_nothing_is_sent_unless_asked_and_refusals_are_one_line_without_the_token(
    make_campaign: MakeCampaign, tmp_path: Path
) -> None:
    campaign = make_campaign()
    run(campaign=campaign.uri, publish_as="first")
    options = (campaign.uri, "--publish-as", "first")
    with serving(Hub()) as hub:
        assert publish(hub, tmp_path, *options).returncode == 0
        assert hub.repositories == {}
        hub.status = 403
        for more, token, message in (
            (("--hub", "me"), TOKEN, "error: --hub is 'me': give owner/name"),
            (("--hub", "me/layers"), None, "error: HF_TOKEN is not set"),
            (("--hub", "me/layers"), "hf_wrong", "error: the hub did not take me/layers (.*401.*: check its name"),
            (("--hub", "me/layers"), TOKEN, "error: the hub did not take me/layers (.*403.*: check its name"),
        ):
            done = publish(hub, tmp_path, *options, *more, token=token)
            assert done.returncode == 2
            assert re.match(message.replace("(", r"\("), done.stderr.splitlines()[-1]), done.stderr[-2000:]
            assert (token or TOKEN) not in done.stdout + done.stderr
    assert hub.repositories.get("me/layers", {}) == {}


@pytest.mark.parametrize("token", ["hf_secret\nmore", "hf_secret é", "hf_ secret"])
def test_a_token_that_no_header_carries_is_refused_without_being_quoted(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(LayerloopError, match="^HF_TOKEN has a blank, a line break or a letter that no token has"):
        token_for("me/layers")
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    assert token_for("me/layers") == TOKEN
