"""Switching a recurring run off, against a server that answers as the KFP API server does."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.runtime import recurring
from layerloop.components.runtime.recurring import disable_recurring_run


class Kfp(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, Any]] = {
            "by-chain": {"run_id": "by-chain", "recurring_run_id": "chain/1"},
            "by-hand": {"run_id": "by-hand"},
        }
        self.enabled = {"chain/1": True}
        self.token = ""  # that it wants
        self.page: bytes | None = None  # answered to everything
        self.wait = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Kfp

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.server.wait)
        if self.server.page is not None:
            return self._answer(200, self.server.page)
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._answer(401, b'{"error": "Unauthorized"}')
        prefix, _, name = self.path.rpartition("/")
        if self.command == "GET" and prefix == "/apis/v2beta1/runs" and name in self.server.runs:
            return self._answer(200, json.dumps(self.server.runs[name]).encode())
        if self.command == "POST" and self.path == "/apis/v2beta1/recurringruns/chain%2F1:disable":
            self.rfile.read(int(self.headers["Content-Length"]))
            self.server.enabled["chain/1"] = False
            return self._answer(200, b"{}")
        return self._answer(404, b'{"error": "not found"}')

    do_POST = do_GET

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kfp]:
    server = Kfp()
    monkeypatch.setenv("LAYERLOOP_KFP_API", f" {server.url}/ ")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_recurring_run_that_started_the_run_is_switched_off(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    line = disable_recurring_run("by-chain")
    assert line == "recurring run chain/1 is switched off: enable it in Kubeflow to continue"
    assert kfp.enabled == {"chain/1": False}
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_run_that_was_started_by_hand_has_none(kfp: Kfp) -> None:
    assert "was started by hand" in disable_recurring_run("by-hand")
    assert kfp.enabled == {"chain/1": True}


def test_the_mounted_token_is_shown(kfp: Kfp, tmp_path: Path) -> None:
    kfp.token = "of-the-pod"
    assert "answers 401 (it wants a token)" in disable_recurring_run("by-chain", token=tmp_path / "none")
    assert kfp.enabled == {"chain/1": True}
    (tmp_path / "token").write_text("of-the-pod\n")
    assert "is switched off" in disable_recurring_run("by-chain", token=tmp_path / "token")
    assert kfp.enabled == {"chain/1": False}


def test_whatever_goes_wrong_is_one_line_and_no_failure(kfp: Kfp, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [disable_recurring_run("unknown"), disable_recurring_run("")]
    assert "answers 404" in lines[0]
    assert "this run has no id" in lines[1]
    for page in (b"<html>log in</html>", b"[1]", b"\xff"):
        kfp.page = page
        lines.append(disable_recurring_run("by-chain"))
    for url in ("http://127.0.0.1:9", "no url", "http://[::1", "ftp://x"):
        monkeypatch.setenv("LAYERLOOP_KFP_API", url)
        lines.append(disable_recurring_run("by-chain"))
        assert "is not reachable" in lines[-1]
    assert not any("\n" in line for line in lines)
    assert kfp.enabled == {"chain/1": True}


def test_a_server_that_does_not_answer_is_not_waited_for(kfp: Kfp, monkeypatch: pytest.MonkeyPatch) -> None:
    kfp.wait = 5.0
    monkeypatch.setattr(recurring, "TIMEOUT", 0.2)
    began = time.monotonic()
    assert "is not reachable (timed out)" in disable_recurring_run("by-chain")
    assert time.monotonic() - began < 4


def test_without_a_server_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERLOOP_KFP_API", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert "LAYERLOOP_KFP_API names no API server" in disable_recurring_run("by-chain")


def test_inside_a_cluster_the_stock_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERLOOP_KFP_API", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(recurring, "TIMEOUT", 0.5)
    line = disable_recurring_run("by-chain")
    assert line.startswith("the recurring run continues, and its runs end at once: http://ml-pipeline.kubeflow.svc")
