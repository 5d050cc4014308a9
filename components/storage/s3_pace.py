"""How slow a store may be. The time limits of boto3 are of silence: a server, or a box before it, that moves a byte a
second is never silent and would be waited for without end, be it in headers, in a listing, in a body up or down."""

from __future__ import annotations

import io
import socket
import time
from typing import Any

WINDOW = 60.0  # seconds of waiting in which at least
RATE = 1000.0  # bytes a second have to move, on the mean
LONG = 600.0  # the window of calls that work at the store: it sends a space now and then to say that it lives


class TooSlowError(TimeoutError):
    """A connection on which fewer bytes move than RATE."""


def keep_pace(client: Any) -> None:
    """Have a client of boto3 give up connections that are too slow; it then tries as after any lost answer."""
    from botocore.awsrequest import (
        AWSHTTPConnection,
        AWSHTTPConnectionPool,
        AWSHTTPSConnection,
        AWSHTTPSConnectionPool,
    )

    class Connection(_Paced, AWSHTTPConnection):
        pass

    class SecureConnection(_Paced, AWSHTTPSConnection):
        pass

    class Pool(AWSHTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(AWSHTTPSConnectionPool):
        ConnectionCls = SecureConnection

    # boto3 has no setting for it; a test with a slow server says if this place is another one day.
    client._endpoint.http_session._pool_classes_by_scheme.update(http=Pool, https=SecurePool)


class _Paced:
    """A connection whose socket is watched."""

    sock: Any

    _works_long = False  # the call that is under way

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        if isinstance(self.sock, socket.socket):  # what else there is are layers over one
            self.sock = _Watched(self.sock, self._works_long)

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        self._works_long = method == "POST" or any(str(name).lower() == "x-amz-copy-source" for name in headers or ())
        if isinstance(self.sock, _Watched):
            self.sock.begin(self._works_long)
        super().request(method, url, body=body, headers=headers, **options)  # type: ignore[misc]


class _Watched:
    """A socket that counts the bytes that move and the seconds that are waited for them; what its reader does in
    between does not count."""

    def __init__(self, real: Any, works_long: bool) -> None:
        self._real = real
        self.begin(works_long)

    def begin(self, works_long: bool) -> None:
        """Count from here on."""
        self._window = LONG if works_long else WINDOW
        self._bytes, self._seconds = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def recv_into(self, *arguments: Any) -> int:
        began = time.monotonic()
        return self._moved(self._real.recv_into(*arguments), began)

    def sendall(self, data: Any, *flags: int) -> None:
        with memoryview(data) as view, view.cast("B") as rest:
            sent = 0
            while sent < len(rest):
                began = time.monotonic()
                sent += self._moved(self._real.send(rest[sent:], *flags), began)

    def makefile(self, mode: str, buffering: int = -1) -> io.RawIOBase | io.BufferedReader:
        file = socket.SocketIO(self, "r")  # type: ignore[arg-type]
        self._real._io_refs += 1  # which the file's end takes back
        return io.BufferedReader(file) if buffering else file

    def _moved(self, count: int, began: float) -> int:
        self._bytes += count
        self._seconds += time.monotonic() - began
        if self._seconds > self._window:
            if self._bytes < RATE * self._seconds:
                raise TooSlowError(f"{self._bytes} bytes in {self._seconds:.0f} s")
            self._bytes, self._seconds = 0, 0.0
        return count
