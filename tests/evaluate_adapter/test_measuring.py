"""Measuring in processes and in this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerloop.components.evaluate_adapter import measuring
from layerloop.components.evaluate_adapter.cases import Case
from layerloop.components.evaluate_adapter.measuring import Measuring
from layerloop.components.schema.errors import LayerloopError, UnavailableError

from .conftest import case_of, drawn_design, source_of


def some_cases() -> list[Case]:
    stacks = [drawn_design(seed, 2 + seed % 2) for seed in range(6)]
    return [case_of(f"{n:016x}", "designs", len(stack), n, source_of(stack), stack) for n, stack in enumerate(stacks)]


def test_processes_measure_what_this_one_does_and_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.os, "cpu_count", lambda: 2)
    with Measuring(2, cases=6) as alone, Measuring(2, cases=1000) as many:
        assert many.truth(some_cases()) == alone.truth(some_cases())
        assert len(many._workers) == 2 and not alone._workers
    assert [worker.returncode for worker in many._workers] == [0, 0]


def test_an_error_in_a_process_is_raised_here_and_a_process_that_is_killed_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring.os, "cpu_count", lambda: 2)
    good, *_ = some_cases()
    layer = drawn_design(1, 2, width=48)
    bad = case_of("f" * 16, "designs", 2, 0, source_of(drawn_design(1, 2)), layer)
    with Measuring(0, cases=1000) as many:
        with pytest.raises(LayerloopError, match="f{16} is .* shard the designs again"):
            many.truth([bad])
        assert len(many.truth([good])) == 1  # it goes on
        for worker in many._workers:
            worker.kill()
        with pytest.raises(UnavailableError, match="a process that measures ended with status -9: give the step more"):
            many.truth([good] * 4)


def test_a_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    """As `multiprocessing` would: the main module is imported nowhere else."""
    import subprocess
    import sys

    script = tmp_path / "main.py"
    script.write_text(
        "import os; os.cpu_count = lambda: 2\nprint('ran')\n"
        "from layerloop.components.evaluate_adapter.measuring import Measuring\n"
        "from layerloop.components.evaluate_adapter.cases import Case\n"
        "with Measuring(0, cases=1000) as many:\n"
        "    try:\n        many.truth([Case('0' * 16, 'pictures', 2, 0, (8, 8), {})])\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "ran\n0000000000000000-l02 has no true layers to measure\n"
