"""Measuring many decompositions on all cores, with one shard of them in memory at a time.

Of small pictures the measures are thousands of short calls, which the threads of one interpreter make one after the
other, so each core has a process. They are child processes of our own and not those of `multiprocessing`, which import
the main module again: a caller's script would evaluate once more in each of them.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from layerloop.components.evaluate_adapter.assess import Row, assess
from layerloop.components.evaluate_adapter.cases import Case
from layerloop.components.layers.stack import Pixels
from layerloop.components.runtime.progress import progress
from layerloop.components.schema.errors import UnavailableError

if TYPE_CHECKING:
    from layerloop.components.schema.manifest import Shard
    from layerloop.components.storage.store import Store

MOST = 16  # processes
WORTHWHILE = 64  # cases from which a process pays, which takes a second to start
MODULE = "layerloop.components.evaluate_adapter.measuring"
_SIZE = struct.Struct(">Q")  # of a pickle, before it


class Measuring:
    """`assess` over many cases. Use as `with Measuring(max_edits, cases=number) as measuring`.

    Args:
        cases: how many cases there are; few are measured by threads of this process.
        processes: at most so many; by default one for each core.
    """

    def __init__(self, max_edits: int, *, cases: int, processes: int = MOST) -> None:
        self._edits = max_edits
        cores = min(processes, os.cpu_count() or 1)
        self._alone = cores < 2 or cases < WORTHWHILE
        self._pool = ThreadPoolExecutor(cores, "measure")  # of large pictures numpy releases the interpreter lock
        self._own = threading.local()  # the process of each thread
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.communicate()  # closes its input, which ends it

    def shards(
        self, store: Store, chunks: Sequence[Sequence[Case]], shards: Sequence[Shard], *, model: str
    ) -> list[Row]:
        """Numbers of every case, in order, of its decomposition in the shard of its chunk.

        Raises:
            LayerloopError: a shard is damaged, or a process was ended.
        """
        from layerloop.components.evaluate_adapter.decompose import read_decompositions

        rows: list[Row] = []
        for chunk, shard in progress(list(zip(chunks, shards, strict=True)), what=f"measuring {model}", unit="shards"):
            stacks = read_decompositions(store, shard)
            rows += self._pool.map(self._one, chunk, [stacks[case.name] for case in chunk])
        return rows

    def truth(self, cases: Iterable[Case]) -> list[Row]:
        """Numbers of the true layers of designs, in order."""
        return list(self._pool.map(self._one, cases))

    def _one(self, case: Case, stack: Pixels | None = None) -> Row:
        if self._alone:
            return _measured(case, stack, self._edits)
        if not hasattr(self._own, "worker"):
            command = [sys.executable, "-m", MODULE]
            self._own.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._workers.append(self._own.worker)
        worker = self._own.worker
        try:
            _send(worker.stdin, (case, stack, self._edits))
            answer = _receive(worker.stdout)
        except (OSError, EOFError):
            raise UnavailableError(
                f"a process that measures ended with status {worker.wait()}: give the step more memory, and run it "
                "again, it goes on from what is sampled"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        row: Row = answer
        return row


def _measured(case: Case, stack: Pixels | None, max_edits: int) -> Row:
    """The numbers of a decomposition, or where there is none of the case's true layers."""
    layers = case.truth if stack is None else stack
    if layers is None:
        raise ValueError(f"{case.name} has no true layers to measure")
    return assess(case, layers, max_edits=max_edits)


# Pickles go through pipes to processes that this one has started, and back: none comes from a file or a network.


def _send(file: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value, protocol=5)
    file.write(_SIZE.pack(len(data)))
    file.write(data)
    file.flush()


def _receive(file: BinaryIO) -> Any:
    """What the other end of a pipe of our own sent. Raises EOFError where it has ended."""
    header = file.read(_SIZE.size)
    data = file.read(_SIZE.unpack(header)[0]) if len(header) == _SIZE.size else b""
    if not data:
        raise EOFError
    return pickle.loads(data)


def _requests(file: BinaryIO) -> Iterator[Any]:
    try:
        while True:
            yield _receive(file)
    except EOFError:
        return


def _work() -> None:
    """Answer what comes on standard input on standard output, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal it is the parent's to end
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints does not come between
    for case, stack, edits in _requests(sys.stdin.buffer):
        try:
            _send(answers, _measured(case, stack, edits))
        except Exception as error:
            _send(answers, error)


if __name__ == "__main__":
    _work()
