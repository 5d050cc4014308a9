"""`layerloop judge serve`: the reference judge behind the OpenAI chat completions API, standard library only.

    GET  /health                  200 while it runs
    GET  /v1/models               the one model there is
    POST /v1/chat/completions     images as data URLs, `response_format` text, json_object or json_schema, logprobs
    /v1/files, /v1/batches        the Batch API, in memory

Wrong requests get the API's error objects with a 4xx. It listens on loopback by default.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from layerloop.components.reference_judge.answers import QualityCache, answer
from layerloop.components.reference_judge.batches import BatchDesk
from layerloop.components.reference_judge.identity import FINGERPRINT, NAME, SCORE_RANGE
from layerloop.components.reference_judge.request_images import BadRequestError, RequestImages
from layerloop.components.schema.errors import LayerloopError

MAX_BODY = 64 << 20  # bytes of one request
MAX_FILE = 256 << 20  # bytes of a file of batched requests
IDLE_SECONDS = 120  # after which a silent connection is closed
HEAD_SECONDS = 20.0  # from the first byte of a request to the end of its head
BODY_SECONDS, BODY_RATE = 30.0, 100_000  # for a body, and bytes a second beyond
PATCH = 28  # pixels a side that count as one input token, as with Qwen's VLMs


class JudgeServer(ThreadingHTTPServer):
    """One thread per connection. `url` is what a client's `base_url` must be."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, host: str, port: int, *, model: str = NAME, max_body: int = MAX_BODY) -> None:
        self.name, self.cache, self.max_body, self.started = model, QualityCache(), max_body, int(time.time())
        self.desk = BatchDesk(self.complete_or_refuse)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise LayerloopError(
                f"the judge cannot listen on {host}:{port} ({error}): choose another port or host"
            ) from None

    @property
    def url(self) -> str:
        """Base URL of the API, ending in /v1."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}/v1"

    def model(self) -> dict[str, Any]:
        """The model's entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "layerloop",
            "description": FINGERPRINT,
        }

    def complete(self, data: bytes) -> dict[str, Any]:
        """A chat completion for the JSON of a request. Raises BadRequestError."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise BadRequestError("the body is not JSON") from None
        if not isinstance(body, dict):
            raise BadRequestError("the body is not a JSON object")
        check_parameters(body, self.name)
        text, tokens, images = answer(body, self.cache, score_range=SCORE_RANGE[self.name])
        return completion(text, tokens, images, self.name)

    def complete_or_refuse(self, data: bytes) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer: a completion, or the API's error object."""
        try:
            return 200, self.complete(data)
        except BadRequestError as error:
            return error.status, refusal(error)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that disconnects is ignored; any other error is answered with 500 where it happens."""


def serve(host: str = "127.0.0.1", port: int = 8788, *, model: str = NAME, max_body: int = MAX_BODY) -> None:
    """Serve until SIGINT or SIGTERM. Port 0 takes a free one; the line that is printed first names it.

    Raises:
        LayerloopError: the address cannot be listened on.
    """
    server = JudgeServer(host, port, model=model, max_body=max_body)
    with contextlib.suppress(ValueError):  # signals can be set in the main thread only
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"listening on {server.url}", flush=True)
    print(f"model {model}: {FINGERPRINT}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class _TimedReader(io.RawIOBase):
    """Reads a socket up to the moment `until`, in all: a client that sends a byte now and then holds no thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.until: float | None = None  # monotonic seconds; None until the first byte of a request

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = IDLE_SECONDS if self.until is None else self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request takes too long")
        self.connection.settimeout(min(IDLE_SECONDS, left))
        count = self.connection.recv_into(buffer)
        if self.until is None:
            self.until = time.monotonic() + HEAD_SECONDS
        return count


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    wbufsize = -1  # head and body leave in one packet
    disable_nagle_algorithm = True
    server_version = NAME
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._reader = _TimedReader(self.connection)
        self.rfile.close()
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        self._reader.until = None
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        path = self.path.partition("?")[0].rstrip("/")
        try:
            body = self._body(path) if method == "POST" else b""
            self._send(200, self._route(method, path, body))
        except BadRequestError as error:
            if error.status in (411, 413):  # the body was not read, so the connection cannot be reused
                self.close_connection = True
            self._send(error.status, refusal(error))
        except (TimeoutError, ConnectionError):
            self.close_connection = True
        except Exception as error:
            self._send(500, _error(f"the judge failed: {type(error).__name__}", "server_error"))

    def _route(self, method: str, path: str, body: bytes) -> dict[str, Any] | bytes:
        server, desk = self.server, self.server.desk
        routes: dict[str, dict[str, Callable[[], dict[str, Any] | bytes]]] = {
            "/health": {"GET": lambda: {"status": "ok", "model": server.name}},
            "/v1/models": {"GET": lambda: {"object": "list", "data": [server.model()]}},
            f"/v1/models/{server.name}": {"GET": server.model},
            "/v1/chat/completions": {"POST": lambda: server.complete(body)},
            "/v1/files": {"POST": lambda: desk.add_upload(self.headers.get("Content-Type", ""), body)},
            "/v1/batches": {"GET": desk.batches, "POST": lambda: desk.create(body)},
        }
        if found := re.fullmatch(r"/v1/(files|batches)/([^/]+?)(/content)?", path):
            kind, name, content = found.groups()
            if (kind == "files") == bool(content):
                routes[path] = {"GET": lambda: desk.content(name) if content else desk.batch(name)}
        if path not in routes:
            raise BadRequestError(f"there is no {self.path[:200]}", status=404, code="not_found")
        if method not in routes[path]:
            allowed = " or ".join(routes[path])
            raise BadRequestError(f"{path} takes {allowed}, not {method}", status=405, code="method_not_allowed")
        return routes[path][method]()

    def _body(self, path: str) -> bytes:
        length = self.headers.get("Content-Length", "")
        most = MAX_FILE if path == "/v1/files" else self.server.max_body
        if not length.isascii() or not length.isdigit():
            raise BadRequestError("give Content-Length", status=411, code="length_required")
        if int(length) > most:
            what = f"the request has {int(length) >> 20} MB, over {most >> 20}"
            raise BadRequestError(what, status=413, code="too_large")
        self._reader.until = time.monotonic() + BODY_SECONDS + int(length) / BODY_RATE
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise ConnectionError("the client went away")
        return data

    def _send(self, status: int, value: dict[str, Any] | bytes) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.connection.settimeout(IDLE_SECONDS)
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if value is data else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class's own complaints (bad request line, unknown method), in the API's form."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send(code, _error(message or HTTPStatus(code).phrase, "invalid_request_error"))

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: they carry keys and images."""


def check_parameters(body: dict[str, Any], model: str) -> None:
    """Refuse what a completion of this judge cannot honour.

    Raises:
        BadRequestError: another model, streaming, more than one choice, or a value out of range.
    """
    if body.get("model") != model:
        raise BadRequestError(
            f"the model {str(body.get('model'))[:80]!r} does not exist; there is {model!r}", param="model", status=404,
            code="model_not_found",
        )  # fmt: skip
    if body.get("stream"):
        raise BadRequestError("'stream' is not supported", param="stream")
    if body.get("n") not in (None, 1):
        raise BadRequestError("'n' must be 1", param="n")
    for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1), ("top_logprobs", 0, 20)):
        value = body.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
        ):
            raise BadRequestError(f"{name!r} is {value!r}: give a number from {low} to {high}", param=name)
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise BadRequestError(f"{name!r} is {value!r}: give an integer above 0", param=name)
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise BadRequestError("'top_logprobs' needs 'logprobs' to be true", param="top_logprobs")


def completion(
    text: str, tokens: list[dict[str, Any]] | None, images: RequestImages, model: str = NAME
) -> dict[str, Any]:
    """A chat completion object around the judge's text."""
    shown = [p for p in (images.source, images.recomposition) if p is not None]
    shown += [p for layers in images.layers.values() for p in layers.values()]
    patches = sum(math.ceil(p.shape[0] / PATCH) * math.ceil(p.shape[1] / PATCH) for p in shown)
    patches += sum(math.ceil(cells[..., 0].size / PATCH**2) for cells in images.grids.values())
    usage = {"prompt_tokens": patches + len(images.question) // 4, "completion_tokens": math.ceil(len(text) / 4)}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex[:24]}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None if tokens is None else {"content": tokens, "refusal": None},
                "finish_reason": "stop",
            }
        ],
        "usage": {**usage, "total_tokens": sum(usage.values()), "prompt_tokens_details": {"cached_tokens": 0}},
    }


def refusal(error: BadRequestError) -> dict[str, Any]:
    """The API's error object."""
    return _error(error.message, "invalid_request_error", error.param, error.code)


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
