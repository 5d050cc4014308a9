"""What a process needs of its environment: a folder for temporary files, a home, and the packages of its extras."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import printable

# What the library of the Hugging Face hub reads as it is imported, also by diffusers and transformers.
_INTEGERS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def usable_environment() -> Iterator[None]:
    """Work within an environment that can be used; output that nobody reads goes nowhere, and what a terminal's
    encoding lacks is escaped.

    Python takes another folder silently where TMPDIR cannot be written, which may be small, or memory.

    Raises:
        LayerloopError: a variable that no library could be imported with, TMPDIR cannot be written, no folder for
            temporary files can, it or another disk became full meanwhile, a home is needed and unknown, or a package of
            an extra is imported that was not installed.
    """
    open_streams()
    _check_variables()
    name = next((name for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), None)
    try:
        used = tempfile.gettempdir()
    except FileNotFoundError:
        said = f"{name} is {os.environ[name]}" if name else "TMPDIR is not set"
        raise LayerloopError(
            f"no folder for temporary files can be written ({said}): set TMPDIR to one that can, with room"
        ) from None
    if name and Path(os.path.abspath(used)) != Path(os.path.abspath(os.environ[name])):
        raise LayerloopError(
            f"{name} is {os.environ[name]}, which does not exist, cannot be written or is full: set it to a folder "
            "with room, or unset it"
        )
    try:
        yield
    except ModuleNotFoundError as error:
        if (extra := _extra_with(error.name or "")) is None:
            raise
        raise LayerloopError(
            f"{error.name} is needed and not installed here: pip install 'layerloop[{extra}]'"
        ) from None
    except RuntimeError as error:
        if "AttentionBackendName" in str(error):  # diffusers' import
            raise LayerloopError(
                f"DIFFUSERS_ATTN_BACKEND is {os.environ.get('DIFFUSERS_ATTN_BACKEND')!r}, which diffusers does not "
                "know: unset it, and set runtime.model.attention"
            ) from None
        if "home directory" not in str(error):  # of Path.expanduser, which has no class of its own for it
            raise
        raise LayerloopError(
            "HOME is not set and this user has no home folder, or a path begins with the ~name of nobody: set HOME, or "
            "write the path in full"
        ) from None
    except Exception as error:
        if (refusal := _refusal_of_import(error)) is not None:
            raise LayerloopError(refusal) from None
        if not _is_of_a_full_disk(error):  # which every library says in a class of its own
            raise
        raise LayerloopError(
            f"a disk is full (No space left on device): free some space, or set TMPDIR, which is {used}, to a folder "
            "with more"
        ) from None


def open_streams() -> None:
    """Standard streams that can be written to: Python has None for one that was closed (`>&-`), and the next file to be
    opened would take its number. What the encoding of output lacks is escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - as long as we live
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # of a stream whose file was exchanged below it
            sys.stdout.reconfigure(errors="backslashreplace")


def _check_variables() -> None:
    """Raises LayerloopError for a variable with which the hub's library or we end in a traceback."""
    if sys.flags.optimize > 1:  # definitions of measures and helps of options are docstrings
        raise LayerloopError(
            "PYTHONOPTIMIZE is 2 (-OO), which leaves out texts that are needed: set it to 1 or unset it"
        )
    for name in _INTEGERS:
        text = os.environ.get(name)
        if text is not None and not re.fullmatch(r"\s*\d+\s*", text, re.ASCII):
            raise LayerloopError(f"{name} is {text!r}: give seconds, an integer such as 10, or unset it")
    text = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(text).port
    except ValueError:  # a port that is no number or over 65535, or brackets that do not match
        raise LayerloopError(
            f"HF_ENDPOINT is {without_secrets(text)!r}, which is no address: write https://host, or unset it"
        ) from None


def _refusal_of_import(error: Exception) -> str | None:
    """Words for an error that a library raised while it was imported, where variables are set that it reads then."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    library = str(frames[-1].f_globals.get("__name__")).partition(".")[0] if frames else ""
    names = sorted(name for name in os.environ if name.startswith((library.upper(), "USE_")))
    if library in ("", "layerloop", "__main__") or not names:
        return None
    reason = printable(" ".join(str(error).split()))[:200]
    return f"{library} cannot be imported ({reason}): correct or unset what it reads of {', '.join(names)}"


def _is_of_a_full_disk(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_of_a_full_disk, error.exceptions))
    return (isinstance(error, OSError) and error.errno in _FULL) or "os error 28" in str(error)  # Rust: safetensors


# Packages of the extras that are imported under another name, or that come with one of them.
_DISTRIBUTIONS = {
    "httpx2": "openai", "pptx": "python-pptx", "psd_tools": "psd-tools", "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}  # fmt: skip


def _extra_with(module: str) -> str | None:
    """The first of layerloop's extras that installs a module; None where none does."""
    name = module.partition(".")[0]
    wanted = _DISTRIBUTIONS.get(name, name)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("layerloop") or ():
            found = re.match(r"([A-Za-z0-9._-]+).*extra == .([a-z]+)", line)
            if found and found[1] == wanted:
                return found[2]
    return None
