"""What a process needs of its environment, checked before it works: a folder for temporary files, and a home."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from layerloop.components.schema.errors import LayerloopError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def usable_environment() -> Iterator[None]:
    """Work within an environment that can be used.

    Python takes another folder silently where TMPDIR cannot be written, which may be small, or memory.

    Raises:
        LayerloopError: TMPDIR cannot be written, no folder for temporary files can, it or another disk became full
            meanwhile, or a home is needed and unknown.
    """
    name = next((name for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), None)
    try:
        used = tempfile.gettempdir()
    except FileNotFoundError:
        said = f"{name} is {os.environ[name]}" if name else "TMPDIR is not set"
        raise LayerloopError(
            f"no folder for temporary files can be written ({said}): set TMPDIR to one that can, with room"
        ) from None
    if name and Path(used) != Path(os.path.abspath(os.environ[name])):
        raise LayerloopError(
            f"{name} is {os.environ[name]}, which does not exist, cannot be written or is full: set it to a folder "
            "with room, or unset it"
        )
    try:
        yield
    except RuntimeError as error:
        if "home directory" not in str(error):  # of Path.expanduser, which has no class of its own for it
            raise
        raise LayerloopError("HOME is not set and this user has no home folder: set HOME to one") from None
    except Exception as error:
        if not _is_of_a_full_disk(error):  # which every library says in a class of its own
            raise
        raise LayerloopError(
            f"a disk is full (No space left on device): free some space, or set TMPDIR, which is {used}, to a folder "
            "with more"
        ) from None


def _is_of_a_full_disk(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_of_a_full_disk, error.exceptions))
    return (isinstance(error, OSError) and error.errno in _FULL) or "os error 28" in str(error)  # Rust: safetensors
