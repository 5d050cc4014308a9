"""The judge beside the sampler: a process that scores an iteration's groups as they are sampled.

A process and not a thread, because the ranks' Python must not wait for an interpreter that decodes images; it has no
torch, and starts while the base loads. It reads one line per iteration on standard input, a number, and answers one
line on standard output:

    {"metrics": {...}}     or     {"error": "one line", "unavailable": false}

On a pipe of its own it is told what the sampler has, a line each time:

    {"iteration": 7, "group": 3, "first": 0, "image": [64, 64, 4], "stacks": [12, 2, 64, 64, 4]}    then the pixels
    {}                                                                                      a group is committed

Logs go to standard error. It ends with its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from queue import SimpleQueue
from typing import BinaryIO, Self, TextIO

import numpy as np

from layerloop.components.generate_rollouts.observer import Observer
from layerloop.components.runtime.contract import end_process
from layerloop.components.runtime.ranks import ended_by
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.steps import RUN
from layerloop.components.score_rollouts.ahead import LOOK_SECONDS, MOST_BYTES, Ahead, Arrivals
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.lease import run_id


class Scoring(Observer):
    """The process as its parent sees it, one iteration at a time."""

    def __init__(self, campaign: str, judge_url: str, runtime: str) -> None:
        news, telling = os.pipe()
        command = [sys.executable, "-m", __name__, str(os.getpid()), str(news), campaign, judge_url, runtime]
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        alone |= {RUN: run_id(), "OMP_NUM_THREADS": "1"}  # it shares our lease
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=alone, pass_fds=[news])
        os.close(news)
        self._teller = Teller(telling)
        self._answer: dict[str, object] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._teller.close()

    def begin(self, iteration: int) -> None:
        """Begin to score an iteration whose groups may still have to come."""
        assert self._process.stdin is not None
        self._answer = None
        with contextlib.suppress(BrokenPipeError):  # it has ended; `end` says so
            self._process.stdin.write(f"{iteration}\n")
            self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def check(self) -> None:
        """Raises what has stopped the scoring, if anything has."""
        if self._answer is not None:
            self._raise(self._answer)

    def sampled(self, iteration: int, group: int, candidates: range, image: np.ndarray, stacks: np.ndarray) -> None:
        """Let the judge see candidates whose group is not complete."""
        self._teller.tell(Ahead(iteration, group, candidates.start, image, stacks))

    def committed(self) -> None:
        """Let the judge look for a group."""
        self._teller.tell(None)

    def end(self) -> None:
        """Wait until the scores are committed, if they were begun.

        Raises:
            LayerloopError: as score_rollouts; or the process was ended by a signal.
            RuntimeError: the process has crashed; its traceback is in the log.
        """
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        self.check()

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._answer = json.loads(line) if line else {"crashed": self._process.wait()}

    def _raise(self, answer: dict[str, object]) -> None:
        if "crashed" in answer:
            status = int(str(answer["crashed"]))
            if status < 0:
                raise UnavailableError(
                    f"the scoring process {ended_by(-status)}: give the step more memory, and run it again, it goes on "
                    "from what is stored"
                )
            raise RuntimeError(f"the scoring process ended with status {status}: its traceback is above")
        if "error" in answer:
            raise (UnavailableError if answer["unavailable"] else LayerloopError)(str(answer["error"]))


class Teller:
    """Writes what the sampler has to the process, in a thread; candidates are left out where too many wait."""

    def __init__(self, pipe: int) -> None:
        self._news: SimpleQueue[Ahead | None] = SimpleQueue()
        self._lock, self._waiting, self._open = threading.Lock(), 0, True  # bytes
        self._thread = threading.Thread(target=self._write, args=(pipe,), daemon=True)
        self._thread.start()

    def tell(self, news: Ahead | None) -> None:
        """Candidates, or None for a group that is committed."""
        if news is not None and not self._hold(news.stacks.nbytes):
            return
        self._news.put(news)

    def close(self) -> None:
        """Stop; the process has ended."""
        self._open = False
        self._news.put(None)
        self._thread.join()

    def _hold(self, size: int) -> bool:
        with self._lock:
            if size > 0 and self._waiting + size > MOST_BYTES:
                return False
            self._waiting += size
            return True

    def _write(self, number: int) -> None:
        with contextlib.suppress(BrokenPipeError), open(number, "wb") as pipe:  # it has ended; `Scoring.end` says so
            while (news := self._news.get()) is not None or self._open:
                write_news(pipe, news)
                if news is not None:
                    self._hold(-news.stacks.nbytes)


def write_news(pipe: BinaryIO, news: Ahead | None) -> None:
    """One line, and the pixels of candidates."""
    if news is None:
        pipe.write(b"{}\n")
    else:
        what = {"iteration": news.iteration, "group": news.group, "first": news.first}
        shapes = {"image": news.image.shape, "stacks": news.stacks.shape}
        pipe.write(json.dumps(what | shapes).encode() + b"\n")
        pipe.write(np.ascontiguousarray(news.image).data)
        pipe.write(np.ascontiguousarray(news.stacks).data)
    pipe.flush()


def read_news(pipe: BinaryIO, arrivals: Arrivals) -> None:
    """Pass on what `write_news` wrote, until the pipe ends."""

    def pixels(shape: list[int]) -> np.ndarray:
        return np.frombuffer(pipe.read(math.prod(shape)), np.uint8).reshape(shape)

    while line := pipe.readline():
        if news := json.loads(line):
            try:
                image, stacks = pixels(news["image"]), pixels(news["stacks"])
            except ValueError:  # cut short: the sampler has ended
                return
            arrivals.put(Ahead(news["iteration"], news["group"], news["first"], image, stacks))
        else:
            arrivals.committed()


def serve(
    requests: TextIO, answers: TextIO, arrivals: Arrivals, *, campaign: str, judge_url: str, runtime: str
) -> None:
    """Score every iteration that is asked for, until the input ends."""
    for line in requests:
        try:
            result = run(arrivals, campaign=campaign, iteration=int(line), judge_url=judge_url, runtime=runtime)
            answer: dict[str, object] = {"metrics": result.metrics}
        except LayerloopError as error:
            answer = {"error": str(error), "unavailable": isinstance(error, UnavailableError)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def _listen(number: int, arrivals: Arrivals) -> None:
    with open(number, "rb") as pipe:
        read_news(pipe, arrivals)


def main() -> int:
    """The process: arguments are its parent's id, the pipe of its news, campaign, judge's URL and runtime."""
    parent, news, campaign, judge_url, runtime = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    arrivals = Arrivals()
    threading.Thread(target=_listen, args=(int(news), arrivals), daemon=True).start()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not be read as an answer
        serve(sys.stdin, answers, arrivals, campaign=campaign, judge_url=judge_url, runtime=runtime)
    return 0


if __name__ == "__main__":
    end_process(main())
