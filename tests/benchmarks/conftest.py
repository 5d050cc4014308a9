"""`record_benchmark(name, value)`: one number per name, collected in build/benchmarks.json.

A name ends in its unit (`_seconds`, `_megabytes`) or is a ratio between two measurements of one run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "build" / "benchmarks.json"


@pytest.fixture
def record_benchmark() -> Callable[[str, float], None]:
    def record(name: str, value: float) -> None:
        assert math.isfinite(value), f"{name} is {value}"
        RESULTS.parent.mkdir(exist_ok=True)
        numbers = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        numbers[name] = float(f"{value:.4g}")
        temporary = RESULTS.with_suffix(".tmp")
        temporary.write_text(json.dumps(numbers, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, RESULTS)
        print(f"{name} {value:.4g}")

    return record
