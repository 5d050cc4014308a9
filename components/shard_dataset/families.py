"""Families of images that a thumbnail does not tell apart: forms of one template, posters of one layout.

All members are laid upon the first one, so that equal places lie on equal places, and are averaged over cells of a few
pixels. The cells in which they differ most are where their texts are; there a copy is nearest to its own original. So a
family of thousands costs each new image one alignment and one look at a few numbers of every member.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from layerloop.components.shard_dataset.details import Grey, laid_upon

SIDE = 128  # cells along each side: 5 pixels of the details, a third of a small letter
TELLING = 64  # cells by which a family's members are told apart
SAMPLE = 512  # members whose cells are looked at to choose them

Cells = npt.NDArray[np.uint8]  # (SIDE * SIDE,)


def cells_in(frame: Grey, luma: Grey) -> Cells | None:
    """The cells of a luma image, laid upon `frame`; None where their shapes differ."""
    from PIL import Image

    laid = laid_upon(frame, luma)
    if laid is None:
        return None
    small = Image.fromarray(laid).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(np.clip(np.rint(np.asarray(small)), 0, 255), np.uint8).ravel()


class Family:
    """Images by their numbers, ascending, and the cells that tell them apart: chosen anew whenever it has doubled."""

    def __init__(self, first: int) -> None:
        self._count = 1
        self._members = np.full(8, first, np.intp)
        self._told = np.zeros((8, TELLING), np.int16)
        self._ready = 0  # members whose telling cells are known
        self._chosen_at = 0
        self._telling = np.zeros(0, np.intp)

    def add(self, index: int) -> None:
        """One more; its number is the largest."""
        if self._count == len(self._members):
            self._members = np.concatenate([self._members, np.zeros_like(self._members)])
            self._told = np.concatenate([self._told, np.zeros_like(self._told)])
        self._members[self._count] = index
        self._count += 1

    def nearest(
        self, cells: Cells, members: npt.NDArray[np.intp], cells_of: Callable[[int], Cells], *, most: int
    ) -> list[tuple[float, int]]:
        """(distance, number) of the `most` nearest among some of the members."""
        if self._count >= 2 * self._chosen_at:
            self._choose(cells_of)
        while self._ready < self._count:
            self._told[self._ready] = cells_of(int(self._members[self._ready]))[self._telling]
            self._ready += 1
        places = np.searchsorted(self._members[: self._count], members)
        difference = self._told[: self._count] - cells[self._telling].astype(np.int16)
        distances = np.einsum("nk,nk->n", difference, difference, dtype=np.float32)[places]
        order = np.argsort(distances, kind="stable")[:most]
        return [(float(distances[at]), int(members[at])) for at in order]

    def _choose(self, cells_of: Callable[[int], Cells]) -> None:
        """The cells that vary most among members, evenly taken."""
        taken = np.unique(np.linspace(0, self._count - 1, min(SAMPLE, self._count)).astype(np.intp))
        seen = np.stack([cells_of(int(self._members[at])) for at in taken]).astype(np.float32)
        self._telling = np.argsort(-seen.var(axis=0), kind="stable")[:TELLING]
        self._chosen_at, self._ready = self._count, 0
