"""The judge beside the sampler: a process that scores an iteration's groups as they are committed.

A process and not a thread, because the ranks' Python must not wait for an interpreter that decodes images; it has no
torch, and starts while the base loads. It reads one line per iteration on standard input, a number, and answers one
line on standard output:

    {"metrics": {...}}     or     {"error": "one line", "unavailable": false}

Logs go to standard error. It ends with its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import Self, TextIO

from layerloop.components.runtime.contract import end_process
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.steps import RUN
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.lease import run_id

LOOK_SECONDS = 0.5  # between two looks for groups, which is a listing of their folder


class Scoring:
    """The process as its parent sees it, one iteration at a time."""

    def __init__(self, campaign: str, judge_url: str, runtime: str) -> None:
        command = [sys.executable, "-m", __name__, str(os.getpid()), campaign, judge_url, runtime]
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        alone |= {RUN: run_id(), "OMP_NUM_THREADS": "1"}  # it shares our lease
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=alone)
        self._answer: dict[str, object] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

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

    def end(self) -> None:
        """Wait until the scores are committed, if they were begun.

        Raises:
            LayerloopError: as score_rollouts.
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
            raise RuntimeError(f"the scoring process ended with status {answer['crashed']}: its traceback is above")
        if "error" in answer:
            raise (UnavailableError if answer["unavailable"] else LayerloopError)(str(answer["error"]))


def serve(requests: TextIO, answers: TextIO, campaign: str, judge_url: str, runtime: str) -> None:
    """Score every iteration that is asked for, until the input ends."""
    for line in requests:
        try:
            result = run(_wait, campaign=campaign, iteration=int(line), judge_url=judge_url, runtime=runtime)
            answer: dict[str, object] = {"metrics": result.metrics}
        except LayerloopError as error:
            answer = {"error": str(error), "unavailable": isinstance(error, UnavailableError)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait() -> None:
    time.sleep(LOOK_SECONDS)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def main() -> int:
    """The process: arguments are its parent's id, campaign, judge's URL and runtime."""
    parent, campaign, judge_url, runtime = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not be read as an answer
        serve(sys.stdin, answers, campaign, judge_url, runtime)
    return 0


if __name__ == "__main__":
    end_process(main())
