"""`make bench-gpu`: the policy at real size on one GPU, in parts, in less than six minutes, as JSON.

    python tests/benchmarks/gpu [--out FILE] [--minutes N] [--only PART,PART] [--tiny]

Nothing is downloaded: weights are random, and speed does not depend on them. A part that is done is kept in the file,
so what the minutes did not suffice for is measured by the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests' folder, as pytest has it

import torch
from benchmarks.gpu.model import REAL, TINY, Bench
from benchmarks.gpu.parts import PARTS

LEAST_SECONDS = {"compiled": 150.0, "resident": 75.0, "sampling": 60.0}  # left, for a part to begin (estimates)


def main(argv: list[str] | None = None) -> int:
    """0: all parts are measured; 1: some are left, or failed; 2: no GPU, or another machine's file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="of this call (default: %(default)s)")
    parser.add_argument("--only", default="", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny size on the CPU: whether the script works")
    given = parser.parse_args(argv)
    if not given.tiny and not torch.cuda.is_available():
        print("error: there is no GPU here: run it on one, or with --tiny to try the script", file=sys.stderr)
        return 2
    wanted = [name for name in given.only.split(",") if name] or list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        print(f"error: --only {unknown[0]} is no part: choose of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    return measure(given.out, wanted, tiny=given.tiny, seconds=60 * given.minutes)


def measure(out: Path, wanted: list[str], *, tiny: bool, seconds: float) -> int:
    """Measure the parts that `out` lacks, until the time is over."""
    device = torch.device("cpu" if tiny else "cuda")
    machine = {
        "setting": "tiny" if tiny else "real", "torch": torch.__version__,
        "device": "cpu" if tiny else torch.cuda.get_device_name(device),
    }  # fmt: skip
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"machine": machine, "parts": {}}
    if found["machine"] != machine:
        print(f"error: {out} is of {found['machine']}, this is {machine}: name another --out", file=sys.stderr)
        return 2
    bench, began = Bench(TINY if tiny else REAL, device), time.monotonic()
    for name in wanted:
        left = seconds - (time.monotonic() - began)
        if "numbers" in found["parts"].get(name, {}):
            print(f"{name}: measured before", flush=True)
        elif left < (1.0 if tiny else LEAST_SECONDS.get(name, 30.0)):
            print(f"{name}: left for the next call, {left:.0f} s are too few", flush=True)
        else:
            found["parts"][name] = _part(bench, name)
            _write(out, found)
    missing = [name for name in wanted if "numbers" not in found["parts"].get(name, {})]
    print(
        f"{out}: {len(wanted) - len(missing)} of {len(wanted)} parts{', lacks ' if missing else ''}{', '.join(missing)}"
    )
    return 1 if missing else 0


def _part(bench: Bench, name: str) -> dict[str, Any]:
    start = time.monotonic()
    try:
        numbers = PARTS[name](bench)
    except torch.OutOfMemoryError as error:  # a result as well: this much memory does not do
        numbers = {"out_of_memory": " ".join(str(error).split())[:200]}
    except Exception as error:  # the other parts are still worth measuring
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    took = time.monotonic() - start
    print(f"{name}: {took:.0f} s  {json.dumps(_rounded(numbers))}", flush=True)
    return {"seconds": round(took, 2), "numbers": _rounded(numbers)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _write(out: Path, found: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".tmp")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(partial, out)


if __name__ == "__main__":
    raise SystemExit(main())
