"""Candidates that the judge sees before their group is committed, where the sampler works beside it.

They are only looked at ahead: the scores are of the committed group, and what was asked about other pixels is not used.
So any of them may be left out, as where more of them wait than memory should hold.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from layerloop.components.layers.stack import Pixels

LOOK_SECONDS = 0.5  # between two looks for groups, which is a listing of their folder
MOST_BYTES = 1 << 29  # of candidates that are ahead of their groups: 80 of 4 layers at 640 pixels


@dataclass(frozen=True)
class Ahead:
    """Candidates from number `first` on of a group: `image[H, W, 4]` and `stacks[n, L, H, W, 4]` uint8, straight RGBA,
    as they will be in its shard."""

    iteration: int
    group: int
    first: int
    image: Pixels
    stacks: Pixels


def pixels_sha256(image: Pixels, stack: Pixels) -> str:
    """Hash of a candidate and its image."""
    found = hashlib.sha256(repr((image.shape, stack.shape)).encode())
    found.update(np.ascontiguousarray(image).data)
    found.update(np.ascontiguousarray(stack).data)
    return found.hexdigest()


class Arrivals:
    """What the sampler tells the judge, from any thread: candidates ahead of their groups, and new groups."""

    def __init__(self) -> None:
        self._lock, self._news = threading.Lock(), threading.Event()
        self._kept: list[Ahead] = []  # of iterations that are not being judged yet
        self._judged = 0  # the iteration
        self._take: Callable[[Ahead], None] | None = None

    def put(self, ahead: Ahead) -> None:
        """Candidates of an iteration that is being judged, or will be."""
        with self._lock:
            if self._take is not None and ahead.iteration == self._judged:
                self._take(ahead)
            elif sum(one.stacks.nbytes for one in self._kept) + ahead.stacks.nbytes <= MOST_BYTES:
                self._kept.append(ahead)

    def committed(self) -> None:
        """A group has been committed."""
        self._news.set()

    def listen(self, iteration: int, take: Callable[[Ahead], None]) -> None:
        """Give the iteration's candidates to `take`, those that came before first, until `stop`."""
        with self._lock:
            self._judged, self._take = iteration, take
            for ahead in self._kept:
                if ahead.iteration == iteration:
                    take(ahead)
            self._kept = [ahead for ahead in self._kept if ahead.iteration > iteration]

    @property
    def listening(self) -> bool:
        """Whether an iteration is being judged."""
        return self._take is not None

    def stop(self) -> None:
        """The iteration is judged, or its judge has failed."""
        with self._lock:
            self._take = None
        self._news.set()

    def wait(self) -> None:
        """Until a group may have been committed."""
        self._news.wait(LOOK_SECONDS)
        self._news.clear()
