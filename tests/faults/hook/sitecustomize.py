"""Strikes a process at one chosen change of a campaign. Its folder is on PYTHONPATH of the processes under test, whose
code knows nothing of it; only Python's own calls are wrapped.

A change is a call after which the store may be another: in a folder a new file, its fsync, a rename, a link and an
unlink; on S3 any request but GET and HEAD. What is there before change n+1 is what is there after change n, so the
points before every change are all there are; on S3 there is one more for each, with the request sent and its answer
not read. $LAYERLOOP_FAULTS is JSON:

    path      what counts: the campaign's folder, or `/bucket/prefix`
    log       file with a line for every change of all processes that share it
    at        number of the change, from 0; -1 to count only; or
    match     words of the change: the first whose line has them
    action    `kill`: this process before the change; `kill sent`: once the request is sent; `kill victim`: the process
              whose id is in the file `victim`, while this one goes on; `full`: from this change on nothing fits
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import http.client
import io
import json
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

ENVIRONMENT = "LAYERLOOP_FAULTS"
WRITES = ("PUT", "POST", "DELETE")


class Strike:
    """The change at which it happens, and what happens."""

    def __init__(
        self, path: str, log: str, at: int = -1, *, match: str = "", action: str = "kill", victim: str = ""
    ) -> None:
        self.path, self.log, self.at, self.match = path.rstrip("/"), log, at, match
        self.action, self.victim = action, victim
        self.lock = threading.RLock()
        self.busy = threading.local()  # within our own calls nothing counts
        self.awaited: set[int] = set()  # connections whose request is the chosen one

    def counts(self, path: Any) -> bool:
        if getattr(self.busy, "now", False) or not isinstance(path, (str, bytes, os.PathLike)):
            return False
        text = os.path.abspath(os.fsdecode(path))
        return text.startswith(f"{self.path}/")

    def change(self, label: str) -> bool:
        """Count a change; kill here, or return whether it is the chosen one."""
        self.busy.now = True
        try:
            with self.lock:
                number = self._next(label)
                if self.match and self.match in label and self.at < 0:
                    self.at = number
                if self.action == "kill" and number == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.action == "kill victim" and number == self.at:
                    with builtins.open(self.victim) as file:
                        os.kill(int(file.read()), signal.SIGKILL)
                return number >= self.at >= 0 if self.action == "full" else number == self.at
        finally:
            self.busy.now = False

    def _next(self, label: str) -> int:
        with builtins.open(self.log, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            number = sum(1 for _ in file)
            file.write(label.replace("\n", " ") + "\n")
            return number


def install() -> None:
    """Wrap Python's calls as $LAYERLOOP_FAULTS says; nothing without it."""
    given = json.loads(os.environ.get(ENVIRONMENT) or "{}")
    if given:
        strike = Strike(**given)
        _wrap_files(strike)
        _wrap_requests(strike)


def _wrap_files(strike: Strike) -> None:
    def short(path: Any) -> str:
        return os.path.abspath(os.fsdecode(path)).removeprefix(f"{strike.path}/")

    def refuse(path: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))

    def wrapped(name: str, which: int) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            path = arguments[which]
            if strike.counts(path):
                strike.change(f"{name} {short(path)}")
            return real(*arguments, **options)

        return call

    for name, which in (("replace", 1), ("rename", 1), ("link", 1), ("unlink", 0)):
        setattr(os, name, wrapped(name, which))
    real_open, real_fsync = io.open, os.fsync

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        writes = ("x" in mode or "w" in mode) and strike.counts(file)
        if writes and strike.change(f"open {short(file)}") and strike.action == "full":
            refuse(file)
        return real_open(file, mode, *arguments, **options)

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        writes = strike.counts(path) and os.path.isfile(path)
        if writes and strike.change(f"fsync {short(path)}") and strike.action == "full":
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            refuse(path)
        real_fsync(descriptor)

    io.open, os.fsync = open_file, fsync


def _wrap_requests(strike: Strike) -> None:
    connection = http.client.HTTPConnection
    begin, answer = connection.putrequest, connection.getresponse

    def putrequest(self: Any, method: str, url: str, *arguments: Any, **options: Any) -> None:
        writes = method in WRITES and url.startswith(f"{strike.path}/")
        if writes and strike.change(f"{method} {url.removeprefix(strike.path + '/').partition('?')[0]}"):
            strike.awaited.add(id(self))
        begin(self, method, url, *arguments, **options)

    def getresponse(self: Any, *arguments: Any, **options: Any) -> Any:
        if strike.action == "kill sent" and id(self) in strike.awaited:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(self, *arguments, **options)

    connection.putrequest, connection.getresponse = putrequest, getresponse  # type: ignore[method-assign]


install()
