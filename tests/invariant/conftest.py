"""Stored values that what is computed now is held against. `make golden` (pytest --golden) stores them anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).with_name("golden")
Differences = Callable[[Any, Any], list[str]]  # (stored, found) -> a line for each
Held = Callable[..., None]


@pytest.fixture
def held_against(request: pytest.FixtureRequest) -> Held:
    """`held_against("grpo", found, differences)`: fail with the lines of `differences(stored, found)`, or store."""

    def hold(name: str, found: Any, differences: Differences) -> None:
        path = FOLDER / f"{name}.json"
        if request.config.getoption("golden"):
            path.write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        lines = differences(json.loads(path.read_text()), found)
        assert not lines, "\n".join(
            [f"{len(lines)} values are not those of {path.name} (CONTRIBUTING.md, reference values):", *lines[:40]]
        )

    return hold


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order whatever the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
