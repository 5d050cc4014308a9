"""Reading safetensors files from their beginning to their end, each tensor straight into the memory where it stays.

A lazy map of a file is read page by page, by one thread, at whatever moment a tensor is first touched: over a network
file system that is many times slower than the disk. Here every file is read once, in its own order and in large
pieces, several files at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import torch

from layerloop.components.schema.errors import LayerloopError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MOST_HEADER = 100_000_000  # bytes, as the library allows
PIECE = 64 * 2**20  # bytes of one read
FILES_AT_ONCE = 4


def read_weights(files: Sequence[Path], take: Callable[[str, torch.Tensor], None]) -> None:
    """Call `take(name, tensor)` with every tensor of `files`, on the CPU and in the file's dtype.

    It is called by several threads, each with another tensor, and may keep the tensor.

    Raises:
        LayerloopError: a file that cannot be read, is truncated, or is no safetensors file; or as `take` raises.
    """
    with ThreadPoolExecutor(max_workers=min(FILES_AT_ONCE, len(files))) as pool:
        for done in [pool.submit(_read_file, file, take) for file in files]:
            done.result()


def _read_file(path: Path, take: Callable[[str, torch.Tensor], None]) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            start, tensors = _header(file, path)
            for name, dtype, shape, begin, end in tensors:
                tensor = torch.empty(shape, dtype=dtype)
                if end > begin:
                    file.seek(start + begin)
                    _fill(file, tensor.reshape(-1).view(torch.uint8).numpy().data, path)
                take(name, tensor)
    except OSError as error:
        raise LayerloopError(f"{path} cannot be read ({error.strerror}): fetch it again, or repair its disk") from None


def _header(file: FileIO, path: Path) -> tuple[int, list[tuple[str, torch.dtype, list[int], int, int]]]:
    """(where the data begins, (name, dtype, shape, begin, end) of each tensor in the order of the data)."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    broken = LayerloopError(f"{path} is not a safetensors file: fetch it again")
    if not 2 <= length <= min(MOST_HEADER, size - 8):
        raise broken
    text = bytearray(length)
    _fill(file, memoryview(text), path)
    found = []
    try:
        for name, entry in json.loads(text).items():
            if name != "__metadata__":
                dtype, shape, (begin, end) = DTYPES[entry["dtype"]], list(entry["shape"]), entry["data_offsets"]
                if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
                    raise broken
                found.append((name, dtype, shape, begin, end))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise broken from None
    if 8 + length + max((end for *_, end in found), default=0) > size:
        raise LayerloopError(f"{path} is truncated: fetch it again")
    return 8 + length, sorted(found, key=lambda tensor: tensor[3])


def _fill(file: FileIO, view: memoryview, path: Path) -> None:
    """Fill `view` from where `file` stands."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + PIECE])
        if not count:
            raise LayerloopError(f"{path} is truncated: fetch it again")
        done += count
