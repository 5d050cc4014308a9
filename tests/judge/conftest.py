"""A judge over real HTTP that answers with exactly the bytes a test gives it, and small candidates to judge."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from layerloop.components.judge.images import candidate_images, encode_image
from layerloop.components.judge.methods import grid, rubric
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import composite
from layerloop.components.schema.judging import JudgeRecipe

from ..judge_server import start_in_thread

Answer = bytes | Callable[[dict[str, Any], int], bytes]


def http(
    body: bytes | str, *, status: str = "200 OK", content_type: str = "application/json", headers: str = ""
) -> bytes:
    """A whole HTTP response."""
    data = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(data)}\r\n{headers}\r\n"
    return head.encode() + data


def completion(text: Any, *, finish: str = "stop", **message: Any) -> bytes:
    """A chat completion whose first choice says `text` (JSON is made of anything but text)."""
    content = text if isinstance(text, str) or text is None else json.dumps(text)
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "scripted", "choices": [choice]}
    body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return http(json.dumps(body))


class ScriptedJudge:
    """Serves `answer` to every chat completion: bytes sent as they are (none: the connection is dropped), or a function
    of the request's JSON and its number. Counts what it was asked and how many were in flight at once."""

    def __init__(self) -> None:
        self.answer: Answer = b""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.seconds = 0.0
        self.lock = threading.Lock()
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outer.serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = allow_reuse_address = True
            request_queue_size = 512

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that hangs up is what some tests are about."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        file = sock.makefile("rb")
        while line := file.readline():
            length = 0
            head = line.decode("latin-1")
            while (line := file.readline()) not in (b"\r\n", b""):
                head += line.decode("latin-1")
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            data = file.read(length)
            if " /v1/models" in head.split("\r\n")[0]:
                sock.sendall(http(json.dumps({"object": "list", "data": [{"id": "scripted", "object": "model"}]})))
                continue
            with self.lock:
                number = len(self.bodies)
                self.bodies.append(json.loads(data))
                self.headers.append(head)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                time.sleep(self.seconds)
                answer = self.answer(self.bodies[number], number) if callable(self.answer) else self.answer
            finally:
                with self.lock:
                    self.in_flight -= 1
            sock.sendall(answer)
            if not answer or b"Content-Length" not in answer[:300] or b"Connection: close" in answer[:300]:
                return


@pytest.fixture
def scripted() -> Iterator[ScriptedJudge]:
    judge = ScriptedJudge()
    yield judge
    judge.server.shutdown()
    judge.server.server_close()


@pytest.fixture(scope="session")
def reference_url() -> Iterator[str]:
    with start_in_thread() as url:
        yield url


@pytest.fixture(scope="session")
def truth() -> np.ndarray:
    """A design of three layers, (3, 32, 32, 4)."""
    return render_sketches(np.random.default_rng(5), count=1, layers=3, size=(32, 32), photo_share=0.0)[0]


@pytest.fixture(scope="session")
def one(truth: np.ndarray) -> Request:
    """A phase-1 request."""
    source = encode_image(composite(truth))
    return rubric.request(
        load_rubric("default"), source, candidate_images(truth, ("white",)), JudgeRecipe(), label="one"
    )


@pytest.fixture(scope="session")
def three(truth: np.ndarray) -> Request:
    """A phase-2 request of three rows."""
    from layerloop.components.judge.grids import draw_grid

    words = load_rubric("default")
    grids = {"white": draw_grid([truth] * 3, "white")}
    phase1 = [dict.fromkeys(words.names, 0.6)] * 3
    source = encode_image(composite(truth))
    return grid.request(words, source, grids, JudgeRecipe(), phase1=phase1, layers=3, label="three")


@pytest.fixture(scope="session")
def say() -> Callable[..., bytes]:
    """`say(text, finish=..., **message)`: a chat completion."""
    return completion


@pytest.fixture(scope="session")
def respond() -> Callable[..., bytes]:
    """`respond(body, status=..., content_type=..., headers=...)`: an HTTP response."""
    return http
