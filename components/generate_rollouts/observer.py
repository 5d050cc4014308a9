"""What may look on while an iteration is sampled."""

from __future__ import annotations

import numpy as np


class Observer:
    """Is told what this rank samples; this one does nothing with it."""

    def check(self) -> None:
        """Called between batches; an error that it raises ends the sampling on all ranks."""

    def sampled(self, iteration: int, group: int, candidates: range, image: np.ndarray, stacks: np.ndarray) -> None:
        """Some of a group's candidates are sampled: `stacks[n, L, H, W, 4]` of `image[H, W, 4]`, uint8."""

    def committed(self) -> None:
        """A group is committed. Called in the thread that writes."""
