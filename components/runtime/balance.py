"""Work shared among ranks by its estimated cost, so that they finish together. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

_SAME = 1e-9  # relative difference of costs that counts as none


def share(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of the items of each rank, longest first.

    Longest processing time first (Graham 1969): the items by falling cost, each to the rank that has the least so far.
    Then, as long as it lowers the greatest sum, an item of the busiest rank moves to another, or is exchanged for a
    cheaper one there. Of equal choices the first is taken, so that every rank finds the same shares by itself.
    """
    load = [0.0] * ranks
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = load.index(min(load))
        owned[rank].append(index)
        load[rank] += costs[index]
    kinds = [_kinds(costs, mine) for mine in owned]
    while (found := _exchange(kinds, load)) is not None:
        busiest, rank, item, other = found
        owned[busiest].remove(item)
        owned[rank].append(item)
        if other is not None:
            owned[rank].remove(other)
            owned[busiest].append(other)
        for changed in (busiest, rank):
            load[changed] = sum(costs[i] for i in owned[changed])
            kinds[changed] = _kinds(costs, owned[changed])
    return [sorted(mine, key=lambda i: (-costs[i], i)) for mine in owned]


def two_stage_order(first: Sequence[float], second: Sequence[float]) -> list[int]:
    """Order of the items that a second stage, which takes them as the first has done them, ends soonest in.

    Johnson's rule (1954): those that are shorter in the first stage, by rising time there, then the others by falling
    time in the second. The stages are taken to be equally long in all, which is when the order matters.

    Args:
        first: time of each item in the first stage.
        second: in the second, in a unit of its own.
    """
    scale = sum(first) / (sum(second) or 1.0)
    sooner = [index for index in range(len(first)) if first[index] < second[index] * scale]
    later = [index for index in range(len(first)) if first[index] >= second[index] * scale]
    return sorted(sooner, key=lambda i: (first[i], i)) + sorted(later, key=lambda i: (-second[i], i))


def _kinds(costs: Sequence[float], mine: Sequence[int]) -> dict[float, int]:
    """One item of each cost, the first."""
    return {costs[item]: item for item in sorted(mine, reverse=True)}


def _exchange(kinds: Sequence[dict[float, int]], load: Sequence[float]) -> tuple[int, int, int, int | None] | None:
    """(busiest rank, other rank, item to give, item to take or None) that lowers the greatest sum most, if any does."""
    busiest = load.index(max(load))
    least = load[busiest] * (1 - _SAME)  # what the greater of the two sums is to be below
    best = None
    for rank, theirs in enumerate(kinds):
        if rank == busiest:
            continue
        for cost, item in kinds[busiest].items():
            for price, other in ((0.0, None), *theirs.items()):
                after = max(load[busiest] - cost + price, load[rank] + cost - price)
                if after < least:
                    least, best = after * (1 - _SAME), (busiest, rank, item, other)
    return best


def forward_cost(layers: int, *, frame_tokens: int = 1600, width: int = 3072) -> float:
    """Relative cost of one forward of one sample: of n image tokens, n (1 + n / (6 width)).

    n is `frame_tokens` for each of L layers, the composite and the condition. A block's linear layers take
    24 width^2 FLOPs a token and its attention 4 n width, hence the ratio. The defaults are Qwen-Image-Layered at
    640 x 640 pixels; its ratios agree to 1 % with torch's FlopCounter (117, 156, 199, 245 TFLOP for 2 to 5 layers).
    """
    tokens = (layers + 2) * frame_tokens
    return tokens * (1 + tokens / (6 * width))
