"""Measuring many decompositions on all cores, with one shard of them in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from layerloop.components.evaluate_adapter.assess import Row, assess
from layerloop.components.evaluate_adapter.cases import Case
from layerloop.components.layers.stack import Pixels
from layerloop.components.runtime.progress import progress
from layerloop.components.schema.manifest import Shard

if TYPE_CHECKING:
    from layerloop.components.storage.store import Store

MOST = 16  # threads


class Measuring:
    """`assess` over many cases, by a thread for each core: numpy, scipy and Pillow release the interpreter lock on
    large arrays. Use as `with Measuring(max_edits) as measuring`."""

    def __init__(self, max_edits: int) -> None:
        self._edits = max_edits
        self._pool = ThreadPoolExecutor(min(MOST, os.cpu_count() or 1), "measure")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def shards(
        self, store: Store, chunks: Sequence[Sequence[Case]], shards: Sequence[Shard], *, model: str
    ) -> list[Row]:
        """Numbers of every case, in order, of its decomposition in the shard of its chunk.

        Raises:
            LayerloopError: a shard is damaged.
        """
        from layerloop.components.evaluate_adapter.decompose import read_decompositions

        rows: list[Row] = []
        for chunk, shard in progress(list(zip(chunks, shards, strict=True)), what=f"measuring {model}", unit="shards"):
            stacks = read_decompositions(store, shard)
            rows += self._pool.map(self._one, chunk, [stacks[case.name] for case in chunk])
        return rows

    def truth(self, cases: Iterable[Case]) -> list[Row]:
        """Numbers of the true layers of designs, in order."""
        return list(self._pool.map(self._one, cases))

    def _one(self, case: Case, stack: Pixels | None = None) -> Row:
        layers = case.truth if stack is None else stack
        if layers is None:
            raise ValueError(f"{case.name} has no true layers to measure")
        return assess(case, layers, max_edits=self._edits)
