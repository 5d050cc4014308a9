"""What is asked when a grid has no answer: the same candidates in another order, then in two halves.

A judge that refuses a grid, or answers it unusably after all redraws, has judged none of its candidates. What it minds
is often the request as a whole: its size, a neighbour, chance. The halves share candidates, so that both are put on one
scale with each other and with all other grids of the group. One that still has no answer loses only its own candidates.
Where neither has one, what the judge minds may be in both, so other halves follow, which share other candidates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Which repeat over the group, which grid of it (a number of its own), and its candidates from the top row down."""

    repeat: int
    number: int
    order: tuple[int, ...]


def follow_ups(grid: Grid, *, grids: int, overlap: int, rng: random.Random) -> list[list[Grid]]:
    """Tries in their order, each of them one or two grids, to take the place of `grid`; the first with an answer does.

    Args:
        grid: The one without an answer; two candidates or more.
        grids: Grids of the repeat, so that the halves get numbers that no other grid has.
        overlap: Candidates that the halves share, a third of all at most.
        rng: Source of the other order.
    """
    order = other_order(grid.order, rng)
    tries = [[Grid(grid.repeat, grid.number, order)]]
    if (count := len(order)) < 3:  # one candidate is not compared
        return tries
    size = (count + max(1, min(overlap, count // 3)) + 1) // 2
    first, middle = grids + 2 * grid.number, count // 2
    for halved in (order, order[middle:] + order[:middle]):
        tries.append([Grid(grid.repeat, first, halved[:size]), Grid(grid.repeat, first + 1, halved[-size:])])
    return tries


def other_order(order: Sequence[int], rng: random.Random) -> tuple[int, ...]:
    """The same candidates in another shuffled order."""
    shuffled = list(order)
    rng.shuffle(shuffled)
    return tuple(shuffled if shuffled != list(order) else reversed(shuffled))
