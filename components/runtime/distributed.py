"""Data parallelism under torchrun: who this process is, and the collectives that the steps need.

Everything works the same in a single process without torchrun: rank 0 of 1, collectives that do nothing. torch is
imported where it is used, so that steps without torch may ask for their rank.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from layerloop.components.runtime.progress import log
from layerloop.components.runtime.refusals import POD
from layerloop.components.schema.errors import LayerloopError, UnavailableError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from layerloop.components.schema.runtime import ModelRuntime

T = TypeVar("T")

DEVICES = Path("/dev")  # where a container's GPUs are

TIMEOUT = timedelta(minutes=30)  # of ranks that come up, and of the GPUs' collectives

# Of a rank that waits for what another does: a judge's batch takes a day, a slow judge hours, an upload from home one.
# A rank that died is noticed at once, by its connection and by the launcher; one that hangs, by the step's deadline.
PATIENCE = timedelta(days=7)
_patient: list[torch.distributed.ProcessGroup] = []  # the group in which ranks tell each other what is on the CPU


def log_first(message: str) -> None:
    """`log`, on the first rank alone: for what all of them find."""
    if rank() == 0:
        log(message)


def rank() -> int:
    """This process's number among all processes of all nodes; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """`cuda:<local rank>` where there is a GPU, else the CPU.

    Raises:
        UnavailableError: a pod was given GPUs and torch cannot use them; on the CPU it would work for weeks.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and any(DEVICES.glob("nvidia[0-9]*"))
    if POD in os.environ and torch.version.cuda and given:
        raise UnavailableError(
            f"this pod has a GPU that torch {torch.__version__} cannot use: its CUDA {torch.version.cuda} needs a "
            "newer driver on the node, or the node is faulty; set CUDA_VISIBLE_DEVICES to -1 to work on the CPU"
        )
    return torch.device("cpu")


def shares_base(model: ModelRuntime) -> bool:
    """Whether the ranks share one copy of the frozen base: `runtime.model.fsdp` with more than one rank.

    Logs a notice when fsdp is set with one process.
    """
    if model.fsdp and world_size() == 1:
        log("runtime.model.fsdp is true, but this is a single process (one GPU): the base is loaded completely")
    return model.fsdp and world_size() > 1


@contextmanager
def process_group() -> Iterator[torch.device]:
    """The device of this process, in a process group (nccl on GPUs, gloo on CPUs) where there is more than one rank.

    An existing group is used and left unchanged: steps may run inside the group of a program around them.
    """
    here = device()
    if world_size() == 1:
        yield here
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield here
        return
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo", timeout=TIMEOUT)
    _patient.append(dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield here
    finally:
        _patient.clear()
        dist.destroy_process_group()


def _host() -> torch.distributed.ProcessGroup | None:
    """The group of `process_group`, None for that of a program around."""
    return _patient[0] if _patient else None


def all_reduce_sum(tensors: Sequence[torch.Tensor]) -> None:
    """Sum each tensor over the ranks, in place, through one flat buffer of the tensors' dtype (float32 for gradients).

    Every rank ends with the same bits. The order of summation is that of the ranks, so with two ranks that hold one
    addend each the result is that of adding the two in one process.
    """
    if world_size() == 1 or not tensors:
        return
    import torch
    import torch.distributed as dist

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()


def broadcast_json(value: object) -> object:
    """Rank 0's JSON-like value on every rank (sent as text, never unpickled from bytes of a store)."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    data = json.dumps(value).encode() if rank() == 0 else b""
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0, group=_host())
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if rank() == 0:
        buffer[:] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(buffer, src=0, group=_host())
    return json.loads(bytes(buffer.numpy().tobytes()))


def gather_to_first(value: T) -> list[T]:
    """Every rank's value in the order of the ranks, on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    gathered: list[T] | None = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered, group=_host())
    return gathered or []


def gather_to_all(value: T) -> list[T]:
    """Every rank's value in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    gathered = [value] * world_size()
    dist.all_gather_object(gathered, value, group=_host())
    return gathered


class Exchange:
    """Arrays from one rank to another while both work, over the process group's CPU backend (gloo).

    A message has a number that both sides know, and is first its description, JSON of a fixed size, then its bytes;
    nothing is unpickled. A thread for each source waits for its messages, because gloo finds out only in `wait` that
    one has arrived.
    """

    DESCRIPTION = 2048  # bytes

    def __init__(self, expected: Mapping[int, Sequence[int]]) -> None:
        """`expected`: by source rank, the numbers of its messages in the order in which it sends them."""
        self._sending: list[tuple[Any, torch.Tensor]] = []
        self._received: queue.SimpleQueue[tuple[int, list[np.ndarray] | Exception]] = queue.SimpleQueue()
        self._awaited = sum(len(tags) for tags in expected.values())
        for source, tags in expected.items():
            threading.Thread(target=self._listen, args=(source, list(tags)), daemon=True).start()

    def send(self, to: int, tag: int, arrays: Sequence[np.ndarray]) -> None:
        """Begin to send arrays, none of them as a mark."""
        import torch

        described = json.dumps([[str(array.dtype), *array.shape] for array in arrays]).encode()
        self._post(to, 2 * tag, torch.frombuffer(bytearray(described.ljust(self.DESCRIPTION)), dtype=torch.uint8))
        if data := b"".join(array.tobytes() for array in arrays):
            self._post(to, 2 * tag + 1, torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def receive(self, *, wait: bool) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Messages (number, arrays) that have come since the last call; with `wait`, all that are still to come."""
        while self._awaited:
            try:
                tag, message = self._received.get(block=wait)
            except queue.Empty:
                return
            if isinstance(message, Exception):  # the source has died, or does not answer
                raise message
            self._awaited -= 1
            yield tag, message

    def finish(self) -> None:
        """Wait until everything that was sent is received."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _post(self, to: int, tag: int, data: torch.Tensor) -> None:
        import torch.distributed as dist

        self._sending.append((dist.isend(data, to, group=_host(), tag=tag), data))  # the tensor lives until it is sent

    def _listen(self, source: int, tags: Sequence[int]) -> None:
        import numpy as np
        import torch
        import torch.distributed as dist

        def get(size: int, tag: int) -> np.ndarray:
            buffer = torch.empty(size, dtype=torch.uint8)
            work = dist.irecv(buffer, source, group=_host(), tag=tag)
            assert work is not None
            work.wait()
            return buffer.numpy()

        try:
            for tag in tags:
                layout = json.loads(get(self.DESCRIPTION, 2 * tag).tobytes())
                sizes = [math.prod(shape) * np.dtype(dtype).itemsize for dtype, *shape in layout]
                data = get(sum(sizes), 2 * tag + 1) if sum(sizes) else np.empty(0, np.uint8)
                parts = np.split(data, list(itertools.accumulate(sizes))[:-1]) if layout else []
                arrays = [part.view(dtype).reshape(shape) for part, (dtype, *shape) in zip(parts, layout, strict=True)]
                self._received.put((tag, arrays))
        except Exception as error:  # raised where the messages are received
            self._received.put((-1, error))


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every rank the LayerloopError that any rank raised inside, the lowest rank's first, as what it was: an
    UnavailableError stays one.

    Without this the ranks that have no fault would wait in the next collective for one that has already left.
    """
    error: LayerloopError | None = None
    try:
        yield
    except LayerloopError as raised:
        error = raised
    if world_size() > 1:
        import torch
        import torch.distributed as dist

        text = str(error).encode()[:2000] if error else b""
        mine = torch.zeros(2001, dtype=torch.uint8)
        mine[0] = isinstance(error, UnavailableError)
        if text:
            mine[1 : len(text) + 1] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        every = [torch.zeros_like(mine) for _ in range(world_size())]
        dist.all_gather(every, mine, group=_host())
        first = next((one.tolist() for one in every if one[1]), None)
        if first is not None:
            message = bytes(first[1:]).rstrip(b"\0").decode(errors="replace")
            if error is None or str(error) != message:
                raise (UnavailableError if first[0] else LayerloopError)(message)
    if error is not None:
        raise error
