"""One process per GPU: a step that runs data parallel starts its own ranks, as torchrun would.

A pod asks for GPUs and has one command, whatever their number; so the number is counted where the step runs. Under
torchrun itself (RANK is set) nothing is started: that is the way to several nodes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence

from layerloop.components.runtime.progress import log
from layerloop.components.runtime.rank_errors import LAUNCHED, raise_reported
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.steps import RUN

VARIABLE = "LAYERLOOP_PROCESSES"
CPU_VARIABLE = "LAYERLOOP_CPU_PROCESSES"  # the same for machines without GPUs; set by local runs
LOOPBACK = "127.0.0.1"  # where the ranks meet: a machine's own name may not resolve, as in a VPN or without a network


def launch_per_gpu(module: str, argv: Sequence[str], arguments: Mapping[str, object]) -> int | None:
    """Run `python -m module argv` in `num_processes()` ranks, if that is more than one.

    `arguments`, those of the step's `run`, are ignored.

    Returns:
        The exit status, or None with one process: the caller does the work itself.

    Raises:
        LayerloopError: $LAYERLOOP_PROCESSES is not an integer in 1..visible GPUs.
    """
    processes = num_processes()
    if processes == 1:
        return None
    log(f"in {processes} processes")
    return launch(module, argv, processes=processes)


def num_processes() -> int:
    """Number of processes of the step: $LAYERLOOP_PROCESSES, else one per visible GPU, and without any GPU
    $LAYERLOOP_CPU_PROCESSES or 1; 1 in a process that is a rank already.

    Raises:
        LayerloopError: a variable is not an integer from 1, or more than the GPUs of a machine with GPUs.
    """
    if "RANK" in os.environ:
        return 1
    import torch

    gpus = torch.cuda.device_count()  # does not initialise CUDA
    name = VARIABLE if gpus or os.environ.get(VARIABLE, "").strip() else CPU_VARIABLE
    text = os.environ.get(name, "").strip()
    if not text:
        return max(1, gpus)
    if not text.isascii() or not text.isdigit() or int(text) < 1 or (gpus and int(text) > gpus):
        what = f"an integer from 1 to {gpus}, the visible GPUs" if gpus else "an integer from 1"
        raise LayerloopError(f"{name} is {text!r}: give {what}, or unset it")
    return int(text)


def launch(module: str, arguments: Sequence[str], *, processes: int) -> int:
    """Run `python -m module arguments` in `processes` ranks on this machine; returns the first failure's status, or 0.

    A rank that fails ends the others. Their output goes where this process prints.

    Raises:
        LayerloopError: what the ranks were refused, once for all of them.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault(RUN, f"ranks-{uuid.uuid4()}")  # they share the campaign's lease
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[LAUNCHED] = "1"
    for name in ("multiprocessing.api", "agent.server.api"):  # "Sending process ... closing signal", and the like
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr=LOOPBACK, max_restarts=0, start_method="spawn",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        for _, failure in sorted(error.failures.items()):  # others may have crashed for want of the refused one
            raise_reported(failure.message, failure.exitcode)
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            log(f"rank {number} of {processes} {ended_by(-failure.exitcode)}")
        return max(1, failure.exitcode)  # its traceback is above
    except SignalException as error:
        return 128 + error.sigval
    return 0


def ended_by(number: int) -> str:
    """What a signal has done to a process, in words."""
    name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
    return f"was ended by {name}" + (", most often because memory ran out" if number == signal.SIGKILL else "")
