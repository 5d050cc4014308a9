"""What a parquet table says of its row groups, read in a child process.

Arrow checks the description of a column when it is asked for, and where that is damaged it ends the process: pyarrow
declares the call as one that raises nothing (`ColumnChunk` in its libparquet.pxd, 26.0), so that C++ terminates. One
damaged table would end a step over thousands without naming it. Here it ends a child that does nothing else, and the
rows of that row group are rejects. What pyarrow reads of the rows themselves raises as it should.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from layerloop.components.schema.errors import UnavailableError
from layerloop.components.schema.messages import printable
from layerloop.components.shard_dataset.items import one_line

MODULE = "layerloop.components.shard_dataset.footers"
MOST_ENDED = 4  # children that one table may end; its other row groups are given up
_TAIL = struct.Struct("<I4s")  # the last bytes of a parquet: the footer's length, and a magic
_REQUEST = struct.Struct("<QQ")  # bytes of the footer that follows, and the first row group wanted
_UNREADABLE = "its description cannot be read"


@dataclass(frozen=True)
class Chunk:
    """A column of a row group, by the file's own words."""

    column: str  # of the table, and not of what is nested in it
    packed: int  # bytes as stored
    unpacked: int  # bytes
    entries: int


@dataclass(frozen=True)
class RowGroup:
    """A row group, by the file's own words."""

    rows: int
    chunks: Sequence[Chunk] = ()
    problem: str | None = None  # why its chunks are not known


def read_row_groups(file: BinaryIO, count: int) -> list[RowGroup]:
    """Descriptions of the `count` row groups of a table that Arrow has opened, in order.

    Raises:
        UnavailableError: the process that reads them was ended from outside.
    """
    file.seek(-_TAIL.size, io.SEEK_END)
    length, _ = _TAIL.unpack(file.read(_TAIL.size))
    file.seek(-_TAIL.size - length, io.SEEK_END)
    footer = file.read(length + _TAIL.size)
    found: list[RowGroup] = []
    for _ in range(MOST_ENDED):
        if len(found) < count:
            found += _CHILD.ask(footer, len(found))
    return found + [RowGroup(1, problem=_UNREADABLE)] * (count - len(found))


class _Child:
    """The process that reads footers, started when it is first needed, and again after it was ended by one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._words: Any = None  # what it wrote on standard error

    def ask(self, footer: bytes, first: int) -> list[RowGroup]:
        """The row groups from the `first` on, to the last or to one that ends the child."""
        with self._lock:
            process = self._running()
            found: list[RowGroup] = []
            rows = 1
            try:
                process.stdin.write(_REQUEST.pack(len(footer), first) + footer)  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                while line := process.stdout.readline():  # type: ignore[union-attr]
                    match json.loads(line):
                        case None:
                            return found
                        case int(number):
                            rows = number
                        case str(problem):
                            found.append(RowGroup(rows, problem=problem))
                        case chunks:
                            found.append(RowGroup(rows, [Chunk(*chunk) for chunk in chunks]))
            except OSError:
                pass  # it has ended, which is told below
            return [*found, RowGroup(rows, problem=self._last_words())]

    def close(self) -> None:
        """End it, which the end of its input does."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
            self._words.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._words = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed when the process has ended
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words
            )
        return self._process

    def _last_words(self) -> str:
        """Why C++ ended it."""
        assert self._process is not None
        self._process.communicate()
        status, self._process = self._process.returncode, None
        with self._words as words:
            words.seek(0)
            said = words.read().decode("utf-8", "replace")
        if status not in (-signal.SIGABRT, -signal.SIGSEGV):
            raise UnavailableError(
                f"the process that reads what parquet tables say of themselves ended with status {status} "
                f"({printable(' '.join(said.split()))[-200:] or 'no word'}): give the step more memory"
            )
        return printable(" ".join(said.partition("what():")[2].split()))[:120] or _UNREADABLE


_CHILD = _Child()
atexit.register(_CHILD.close)


def _described(footer: bytes, first: int) -> Iterator[Any]:
    """For each row group its number of rows, and its chunks or why they are not known; None at the end."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_metadata(io.BytesIO(footer))
    except Exception as error:  # as below; the parent's reader took it, so that it is the table's fault all the same
        yield one_line(error)
        yield None
        return
    for number in range(first, table.num_row_groups):
        try:
            group = table.row_group(number)
            yield int(group.num_rows)  # before the columns, which may end this process
            yield [_chunk(group.column(index)) for index in range(group.num_columns)]
        except Exception as error:  # Arrow raises its own kinds, OSError, ValueError and others on hostile bytes
            yield one_line(error)
    yield None


def _chunk(chunk: Any) -> tuple[str, int, int, int]:
    column = chunk.path_in_schema.partition(".")[0]
    return column, chunk.total_compressed_size, chunk.total_uncompressed_size, chunk.num_values


def _answer(read: Callable[[int], bytes], write: Callable[[bytes], Any]) -> None:
    """Answer requests until their end, line by line, so that what is known is told before what ends the process."""
    while len(header := read(_REQUEST.size)) == _REQUEST.size:
        length, first = _REQUEST.unpack(header)
        for value in _described(read(length), first):
            write(json.dumps(value).encode() + b"\n")


def _work() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its end is no news
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal it is the parent's to end
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints does not come between
    _answer(sys.stdin.buffer.read, answers.write)


if __name__ == "__main__":
    _work()
