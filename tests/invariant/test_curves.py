"""The learning curves of fifty small updates are those that are stored, and they go up."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Held
from .curves import UPDATE, UPDATES, curve_of

Curve = list[dict[str, float]]
# Of a column's largest value. Other kernels and other orders of sums (ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS and
# ONEDNN_MAX_CPU_ISA down to SSE, two threads, other microbatches) moved no value by more than 3e-6 of it, and GRPO's
# loss, which is the sum of terms 200 times as large, by 5e-5.
NEAR = {"loss": 1e-3}
ELSE = 1e-4


@pytest.fixture(scope="module", params=UPDATE)
def curve(request: pytest.FixtureRequest, tiny_base: Path) -> tuple[str, Curve]:
    return request.param, curve_of(request.param, tiny_base)


def differences(stored: Curve, found: Curve) -> list[str]:
    scale = {column: max(abs(row[column]) for row in stored) for column in stored[0]}
    return [
        f"update {number}: {column} {was[column]:.6g} -> {now[column]:.6g}"
        for number, (was, now) in enumerate(zip(stored, found, strict=True), 1)
        for column in scale
        if not abs(was[column] - now[column]) <= NEAR.get(column, ELSE) * scale[column]
    ]


def test_fifty_updates_give_the_stored_curve(curve: tuple[str, Curve], held_against: Held) -> None:
    algorithm, found = curve
    held_against(
        algorithm, [{name: float(f"{value:.8g}") for name, value in row.items()} for row in found], differences
    )


def test_fifty_updates_raise_the_reward(curve: tuple[str, Curve]) -> None:
    rewards = [row["reward"] for row in curve[1]]
    assert len(rewards) == UPDATES
    first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
    assert last > first + 0.01 * abs(first)
