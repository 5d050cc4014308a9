"""Pods that start warm: a process that has loaded the libraries forks for each, where a real pod starts an interpreter.

Torch, diffusers, transformers and peft take five seconds of a core to import, which is most of what a step of the tiny
policy takes. Nothing of layerloop is loaded here: a pod imports it as its command does. Whole runs in `make slow` start
real interpreters.

Reads one job per line on standard input, {"command", "environment", "output"}, and answers its exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from typing import Self

HEAVY = ("generate_rollouts", "update_lora", "train_stretch", "evaluate_adapter", "publish_adapter")


class WarmPods:
    """The process that forks, as a test sees it."""

    def __init__(self) -> None:
        pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def takes(self, command: Sequence[str]) -> bool:
        """Whether a command (without its interpreter) is a step that loads the libraries."""
        return command[0] == "-m" and command[1].rpartition(".")[2] in HEAVY

    def run(self, command: Sequence[str], environment: dict[str, str], output: str) -> int:
        """The exit status of `-m MODULE ARGUMENTS`; what it prints goes to the file `output`."""
        assert self._server.stdin is not None and self._server.stdout is not None
        job = {"command": list(command), "environment": environment, "output": output}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def serve() -> None:
    """Fork for every job until the input ends."""
    import accelerate  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import transformers

    assert diffusers.QwenImageLayeredPipeline and transformers.Qwen2_5_VLForConditionalGeneration  # loaded lazily
    assert not [name for name in sys.modules if name.startswith("layerloop")]
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(**job)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(command: list[str], environment: dict[str, str], output: str) -> None:
    status = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(output, os.O_WRONLY | os.O_CREAT), 1)):
            os.dup2(source, target)
        os.dup2(1, 2)
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
