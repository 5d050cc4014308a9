"""A store behind a bad network: a proxy that spoils requests by a schedule, which a seed decides.

What befalls a request follows from its method, its path and how often it was seen, so a schedule is the same whatever
the order of simultaneous requests. A request that was spoiled twice in a row is let through.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
BAD_DIGEST = b"<Error><Code>BadDigest</Code><Message>Not the bytes of Content-MD5.</Message></Error>"
NOT_ALLOWED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
NO_ROOM = b"<Error><Code>QuotaExceeded</Code><Message>The quota is reached.</Message></Error>"
IN_A_ROW = 2


class Proxy(BaseHTTPRequestHandler):
    """Forwards a request, or does to it what the schedule says."""

    protocol_version = "HTTP/1.1"
    server: BadNetwork

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.next_kind(self)
        getattr(self, kind or "passed")()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    # What may befall a request; the names are those of the schedule.

    def passed(self) -> None:
        self.answer(*self.forward(self.body))

    def reset(self) -> None:
        self.cut()

    def lost(self) -> None:
        """It is done, and nobody hears of it."""
        self.forward(self.body)
        self.cut()

    def busy(self) -> None:
        self.answer(503, [], SLOW_DOWN)

    def broken(self) -> None:
        self.answer(500, [], INTERNAL)

    def slow(self) -> None:
        time.sleep(0.5)
        self.passed()

    def truncated(self) -> None:
        """Half an answer; a request without a body to send back is reset."""
        status, headers, data = self.forward(self.body)
        if len(data) > 1 and self.command != "HEAD":
            self.answer(status, headers, data, only=len(data) // 2)
        self.cut()

    def flipped(self) -> None:
        """One bit of an object is another, on its way up or down. The server compares what comes up with the hash that
        came with it, as S3 does and moto does not."""
        if self.command == "PUT" and self.body:
            body = _flip(self.body)
            own = {
                "Content-MD5": hashlib.md5(body).digest(),
                "x-amz-checksum-crc32": zlib.crc32(body).to_bytes(4, "big"),
            }
            if any(self.headers.get(name) not in (None, base64.b64encode(own[name]).decode()) for name in own):
                self.answer(400, [], BAD_DIGEST)
            else:
                self.answer(*self.forward(body))
            return
        status, headers, data = self.forward(self.body)
        an_object = self.command == "GET" and "?" not in self.path and status in (200, 206)
        self.answer(status, headers, _flip(data) if an_object else data)

    def forbidden(self) -> None:
        self.answer(403, [], NOT_ALLOWED)

    def full(self) -> None:
        self.answer(403, [], NO_ROOM)

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        if body is not self.body:
            hashes = ("content-md5", "x-amz-checksum-crc32")
            headers = {name: value for name, value in headers.items() if name.lower() not in hashes}
        connection.request(self.command, self.path, body=body, headers=headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        left_out = ("connection", "transfer-encoding", "content-length")
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in left_out]
        size = response.headers.get("Content-Length") if self.command == "HEAD" else None
        return response.status, [*kept, ("Content-Length", size or str(len(data)))], data

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, only: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers or [("Content-Length", str(len(data)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:only])

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def log_message(self, *_: object) -> None:
        pass


class BadNetwork(ThreadingHTTPServer):
    """The proxy as a server. `chosen(request)` may name what befalls a request in place of the schedule."""

    daemon_threads = True

    def __init__(self, upstream: str, kinds: tuple[str, ...], *, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.upstream = urlsplit(upstream).netloc
        self.kinds, self.share, self.seed = kinds, share, seed
        self.seen, self.done = Counter[str](), Counter[str]()
        self.chosen: Callable[[Proxy], str] = lambda request: ""
        self._lock, self._row = threading.Lock(), Counter[str]()

    def next_kind(self, request: Proxy) -> str:
        """What befalls a request; empty where nothing does."""
        what = f"{request.command} {request.path}"
        with self._lock:
            draw = random.Random(f"{self.seed} {what} {self.seen[what]}")
            self.seen[what] += 1
            kind = self.chosen(request)
            if not kind and draw.random() < self.share and self._row[what] < IN_A_ROW:
                kind = draw.choice(self.kinds)
                self._row[what] += 1
            elif not kind:
                self._row[what] = 0
            self.done[kind or "passed"] += 1
        return kind

    def handle_error(self, *_: object) -> None:
        pass  # a client that was killed


@contextmanager
def bad_network(upstream: str, *kinds: str, share: float = 0.0, seed: int = 0) -> Iterator[tuple[str, BadNetwork]]:
    """The proxy's endpoint, and the proxy, before the server at `upstream`: `share` of the requests are spoiled."""
    server = BadNetwork(upstream, kinds, share=share, seed=seed)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _flip(data: bytes) -> bytes:
    """The bytes with one bit changed, in the middle."""
    if not data:
        return data
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
