"""How many layers: of several decompositions of one picture the one to keep, and blank layers left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.flags import blank, flags_of
from layerloop.components.layers.measure import recomposition_error

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Trial:
    """A decomposition into `layers` layers, by the measures of the evaluation, at the model's own size."""

    layers: int
    bad_layers: int  # blank, glazed, duplicate or idle
    recomposition_error: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "recomposition_error": round(self.recomposition_error, 6)}


def measured(stack: Pixels, source: Pixels) -> Trial:
    """The trial of a decomposition `(L, h, w, 4)` of `source` `(h, w, 3)`."""
    return Trial(
        len(stack),
        int(flags_of(stack, source).bad.sum()),
        recomposition_error(stack, source),
    )


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the fewest bad layers; of those, with the least recomposition error."""
    return min(trials, key=lambda t: (t.bad_layers, t.recomposition_error, t.layers))


def choose_count(stacks: Mapping[int, Pixels], source: Pixels) -> tuple[Pixels, Trial, list[Trial]]:
    """Of decompositions of one picture by their number of layers: the best, its trial, and the trials of all."""
    trials = [measured(stack, source) for stack in stacks.values()]
    kept = best(trials)
    return stacks[kept.layers], kept, trials


def without_blank(stack: Pixels) -> Pixels:
    """The layers `(L, h, w, 4)` that are not blank; layer 0 where all are."""
    kept = ~blank(stack)
    return stack[kept] if kept.any() else stack[:1]
