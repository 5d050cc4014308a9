"""A Python that starts warm: what it runs is a fork of one process that has loaded the libraries.

Torch, diffusers, transformers and peft take a core seven seconds to import, which is most of what a step of the tiny
policy takes. `WarmPython.python` stands for `sys.executable`, and is `sys.executable` where it runs, so that the ranks
and helpers that a step starts are warm as well. One serves all processes of a test run. It has nothing of layerloop
loaded: a module is imported as its command does. Interpreters of their own start the steps in `make slow` and
test_packaging.py, and where a test kills one: what it kills here is a process that waits for the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

VARIABLE = "LAYERLOOP_TESTS_PYTHON"  # the path of the one that serves this run
COLD = ("layerloop.components.train_stretch.scoring",)  # is handed open files beside those of every process
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def warm() -> str:
    """In place of `sys.executable`, for a process that imports torch."""
    return os.environ[VARIABLE]


class WarmPython:
    """The server's life; it imports nothing before the first process is asked for."""

    def __init__(self, folder: str) -> None:
        import subprocess

        self.python = os.path.join(folder, "python")
        address = os.path.join(folder, "socket")
        with open(self.python, "w") as script:
            words = [sys.executable, "-IS", __file__, "run", sys.executable, address]
            script.write(f'#!/bin/sh\nexec {shlex.join(words)} "$0" "$@"\n')
        os.chmod(self.python, 0o755)
        # Threads would not survive the fork.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            self._server = subprocess.Popen(
                [sys.executable, __file__, "serve", str(listener.fileno())],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()],
            )  # fmt: skip

    def stop(self) -> None:
        """End the server; processes that still run are ended."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


# ------------------------------------------------------------------------------------------ the process that is started


def run(real: str, address: str, own: str, words: Sequence[str]) -> NoReturn:
    """Stand for `python words`: hand it to the server, pass signals on, end as it ends."""
    if not words[0].endswith(".py") and (words[0] not in ("-m", "-c") or words[1] in COLD):
        os.execv(real, [real, *words])
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        socket.send_fds(line, [b"."], [0, 1, 2])
        asked = {"words": list(words), "environment": dict(os.environ), "folder": os.getcwd(), "executable": own}
        line.sendall(json.dumps(asked).encode() + b"\n")
        answers = line.makefile()
        pid = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, _: _kill(pid, number))
        status = int(answers.readline() or -signal.SIGKILL)
    if status < 0:
        with contextlib.suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# ---------------------------------------------------------------------------------------------------------- the server


def serve(listener: socket.socket) -> None:
    """Fork for each that connects, until standard input ends."""
    ready, watching = False, set[int]()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the forks are told by those that wait for them
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            break
        line, _ = listener.accept()
        ready = ready or _load()
        if (pid := os.fork()) == 0:
            listener.close()
            _watch(line)
        line.close()
        watching.add(pid)
        watching -= {pid for pid in watching if os.waitpid(pid, os.WNOHANG) != (0, 0)}
    for pid in watching:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


def _load() -> bool:
    """Import what steps import, but for layerloop."""
    import ctypes  # noqa: F401
    import gc

    import accelerate  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import transformers

    assert diffusers.QwenImageLayeredPipeline and transformers.Qwen2_5_VLForConditionalGeneration  # loaded lazily
    assert not [name for name in sys.modules if name.startswith("layerloop")]
    gc.freeze()
    return True


def _watch(line: socket.socket) -> NoReturn:
    """Fork once more, answer the process id and the status, and end the fork when nobody waits for it any longer."""
    pid = 0
    try:
        _, files, _, _ = socket.recv_fds(line, 1, 3)
        asked = json.loads(line.makefile().readline())
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        if (pid := os.fork()) == 0:
            for file in (line.detach(), woken, wake):
                os.close(file)
            _become(files, **asked)
        signal.signal(signal.SIGTERM, _nobody_waits)
        for file in files:
            os.close(file)
        line.sendall(f"{pid}\n".encode())
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if line in select.select([line, woken], [], [])[0]:
                raise ConnectionError
            os.read(woken, 100)
        line.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
    except ConnectionError:
        for end in (os.killpg, os.kill) if pid else ():  # it leads a session, or is about to
            with contextlib.suppress(ProcessLookupError):
                end(pid, signal.SIGKILL)
        if pid:
            os.waitpid(pid, 0)
    finally:
        os._exit(0)


def _nobody_waits(*_: object) -> NoReturn:
    raise ConnectionError


def _become(
    files: Sequence[int], *, words: list[str], environment: dict[str, str], folder: str, executable: str
) -> NoReturn:
    """Be the process that was asked for."""
    status = 1
    try:
        os.setsid()
        _end_with_parent()
        signal.set_wakeup_fd(-1, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        _as_if_started(executable)
        status = _main(words)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            _finish()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        _finish()
        os._exit(status & 0xFF)


def _end_with_parent() -> None:
    """The kernel ends this process with the one that watches it (Linux; elsewhere its end is noticed by nobody)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _as_if_started(executable: str) -> None:
    """What an interpreter takes from its environment, and what a fork shares with others by accident."""
    import importlib
    import tempfile

    import numpy as np
    import torch

    sys.executable = executable
    listed = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[1:] = [*listed, *(path for path in sys.path[1:] if path not in listed)]
    if any(os.path.isfile(os.path.join(path, "sitecustomize.py")) for path in listed):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    sys.stdout.reconfigure(line_buffering=False, write_through=bool(os.environ.get("PYTHONUNBUFFERED")))  # type: ignore[union-attr]
    tempfile.tempdir = None
    np.random.seed()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def _main(words: list[str]) -> int:
    import runpy
    import types

    match words:
        case ["-m", name, *_]:
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv, sys.path[0] = ["-c", *rest], os.getcwd()
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), vars(main))
        case [script, *_]:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(script))
            runpy.run_path(script, run_name="__main__")
    return 0


def _finish() -> None:
    """What an interpreter does at its end."""
    import atexit
    import threading

    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        run(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
