"""Merge adapters into one: `python -m layerloop.components.policy.merge OUT ADAPTER=WEIGHT ...`.

The weighted sum of their updates, exactly, in both layouts: diffusers' in `OUT`, peft's in `OUT/peft`. No model is
loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import reason_of

PARTIAL = ".partial"  # in the output folder while it is written


def parse_part(text: str) -> tuple[str, float]:
    """`folder` or `folder=weight`.

    Raises:
        LayerloopError: a weight that is not a finite number, or a URI.
    """
    path, mark, weight = text.rpartition("=")
    if not mark:
        path, weight = text, "1"
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise LayerloopError(f"adapter {text!r} is not ADAPTER=WEIGHT: write a number after the sign, such as a/b=0.5")
    if "://" in path:
        raise LayerloopError(
            f"adapter {path} is a URI: use `layerloop adapter merge`, which fetches it, or copy it here"
        )
    return path, value


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, whose contents are moved to `out` at the end. After a failure `out` is as it was before,
    and the remains of a killed process in it do not count.

    Raises:
        LayerloopError: `out` is not empty, or cannot be made or written.
    """
    partial, made = out / PARTIAL, [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise LayerloopError(f"{out} is not an empty folder: give another one for the merged adapter")
        out.mkdir(parents=True, exist_ok=True)
        with _held(out):
            if any(path.name != PARTIAL for path in out.iterdir()):
                raise LayerloopError(f"{out} is not an empty folder: give another one for the merged adapter")
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                for path in sorted(partial.iterdir()):
                    path.rename(out / path.name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        raise LayerloopError(f"{out} cannot be written ({reason}): give another folder, one with room") from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: all went well
                folder.rmdir()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder against another process that would write there.

    Raises:
        LayerloopError: one does.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LayerloopError(f"{folder} is being written by another process: give another folder") from None
        yield
    finally:
        os.close(opened)


def merge(out: Path, parts: Sequence[tuple[str, float]], *, rank: int | None = None) -> str:
    """Merge and write both layouts; returns a line that describes the result.

    Raises:
        LayerloopError: an adapter that cannot be read, adapters of different bases, or an `out` that is not empty or
            cannot be written.
    """
    from layerloop.components.policy.adapter_files import write_layouts
    from layerloop.components.policy.adapters import merge_adapters

    with output_folder(out) as folder:
        adapter = merge_adapters(parts, rank=rank)
        write_layouts(adapter, folder)
    of = ", ".join(f"{path} x {weight:g}" for path, weight in parts)
    return f"{out}: rank {adapter.rank}, {len(adapter.modules)} layers, {adapter.parameters / 1e6:.1f} M, of {of}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m layerloop.components.policy.merge", description=__doc__)
    parser.add_argument("out", metavar="OUT", help="folder to make: diffusers' weights, and peft's in peft/")
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER=WEIGHT", help="folder or file in either layout; weight 1 if not given"
    )
    parser.add_argument(
        "--rank", type=int, help="reduce the sum to its best approximation of this rank (default: exact)"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.rank is not None and arguments.rank < 1:
            raise LayerloopError(f"--rank is {arguments.rank}: choose 1 or more")
        if "://" in arguments.out:
            raise LayerloopError(f"{arguments.out} is a URI: give a local folder for the merged adapter")
        parts = [parse_part(text) for text in arguments.adapters]
        print(merge(Path(arguments.out), parts, rank=arguments.rank))
    except LayerloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
