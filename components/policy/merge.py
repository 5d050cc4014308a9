"""Merge adapters into one: `python -m layerloop.components.policy.merge OUT ADAPTER=WEIGHT ...`.

The weighted sum of their updates, exactly, in both layouts: `OUT/peft` and `OUT/diffusers`. No model is loaded.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from layerloop.components.schema.errors import LayerloopError


def parse_part(text: str) -> tuple[str, float]:
    """`folder` or `folder=weight`.

    Raises:
        LayerloopError: a weight that is not a finite number.
    """
    path, mark, weight = text.rpartition("=")
    if not mark:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise LayerloopError(f"adapter {text!r} is not ADAPTER=WEIGHT: write a number after the sign, such as a/b=0.5")
    return path, value


def merge(out: Path, parts: Sequence[tuple[str, float]], *, rank: int | None = None) -> str:
    """Merge and write both layouts; returns a line that says what was made.

    Raises:
        LayerloopError: an adapter that cannot be read, adapters of different bases, or an `out` that is not empty.
    """
    from layerloop.components.policy.lora import merge_adapters, write_diffusers, write_peft

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LayerloopError(f"{out} is not an empty folder: give another one for the merged adapter")
    adapter = merge_adapters(parts, rank=rank)
    write_peft(adapter, out / "peft")
    write_diffusers(adapter, out / "diffusers")
    of = ", ".join(f"{path} x {weight:g}" for path, weight in parts)
    return f"{out}: rank {adapter.rank}, {len(adapter.modules)} layers, {adapter.parameters / 1e6:.1f} M, of {of}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m layerloop.components.policy.merge", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make, with peft/ and diffusers/ in it")
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER=WEIGHT", help="folder or file in either layout; weight 1 if not given"
    )
    parser.add_argument("--rank", type=int, help="cut the sum to its best approximation of this rank (default: exact)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.rank is not None and arguments.rank < 1:
            raise LayerloopError(f"--rank is {arguments.rank}: choose 1 or more")
        print(merge(arguments.out, [parse_part(text) for text in arguments.adapters], rank=arguments.rank))
    except LayerloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
