"""The GPUs of this machine, divided among the steps of a local run: never two bases on one.

On a cluster a pod has GPUs of its own. Here all steps are processes of one machine, and kfp.local runs workers side by
side; each of them would take every GPU that it sees and load the base onto it a second time. So each is shown its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence

from layerloop.components.schema.steps import STEPS

VARIABLE = "CUDA_VISIBLE_DEVICES"
AT_ONCE = 2  # workers of a loop that kfp.local runs side by side


def visible_gpus() -> list[str]:
    """Numbers or names of the GPUs that a process started here may use, by CUDA's variable or the driver's tool."""
    if (given := os.environ.get(VARIABLE)) is not None:
        names = [name.strip() for name in given.split(",")]
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
        return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]
    return []


class GpuPool:
    """Lends GPUs to the steps of a run, which wait where none is left: workers take turns on a single GPU, and several
    GPUs are divided among those that run side by side."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self.gpus = tuple(gpus)
        self.free = set(gpus)
        self.changed = threading.Condition()

    def share(self, step: str, workers: int) -> int:
        """How many GPUs a step gets: all, a worker its part of them, a step of a single process one."""
        wanted = STEPS[step].gpus if step in STEPS else "none"
        if wanted == "all":
            return len(self.gpus) // max(1, min(workers, AT_ONCE, len(self.gpus)))
        return min(1, len(self.gpus)) if wanted == "one" else 0

    @contextlib.contextmanager
    def lend(self, step: str, workers: int = 1) -> Iterator[dict[str, str]]:
        """The environment of a step's process; its GPUs are given back at the end. Empty without GPUs."""
        if not self.gpus:
            yield {}
            return
        count = self.share(step, workers)
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= count)
            mine = [gpu for gpu in self.gpus if gpu in self.free][:count]
            self.free -= set(mine)
        try:
            yield {VARIABLE: ",".join(mine)}
        finally:
            with self.changed:
                self.free |= set(mine)
                self.changed.notify_all()
