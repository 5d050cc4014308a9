"""From decompositions to numbers: every measure of every case, and their comparison between two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from layerloop.components.evaluate_adapter.cases import Case, Kind
from layerloop.components.evaluate_adapter.statistics import FLIPS, Comparison, compare, holm
from layerloop.components.layers import layerd
from layerloop.components.layers.columns import BY_SLOT, COLUMNS, JUDGED, LAYERD, gives_verdict, is_tabled, slots_of
from layerloop.components.layers.matching import layer_l1, slot_l1
from layerloop.components.layers.measure import MEASURES, match, measure_all
from layerloop.components.layers.planes import cleared, completed
from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.seeds import seed_for

Heading = TypeVar("Heading", bound=str | int)  # of a table: a kind of case, or a layer count
Row = dict[str, Any]  # one decomposition: its case, and its numbers by column; None where undefined


def assess(case: Case, stack: Pixels, *, max_edits: int) -> Row:
    """All numbers of one decomposition, as a flat row. Layers that it lacks of those asked for count as blank.

    Columns in addition to `measure.MEASURES`: `layer_l1_<k>` and `slot_l1_<k>` of slot k; `layerd_<score>_<edits>`, and
    `layerd_clean_...` after alpha of 2/255 and less was cleared; `layerd_edits`, the merges that were made.
    """
    stack = completed(stack, case.layers)
    row: Row = {"key": case.key, "kind": case.kind, "layers": case.layers, "seed": case.seed}
    row |= {"height": stack.shape[1], "width": stack.shape[2]}
    truth = case.truth
    matching = None if truth is None else match(stack, truth)
    row |= measure_all(stack, case.source, matching)
    if truth is None or matching is None:
        return row
    for column, values in (("layer_l1", layer_l1(matching)), ("slot_l1", slot_l1(matching))):
        row |= {f"{column}_{slot}": value for slot, value in enumerate(values)}
    if min(len(stack), len(truth)) < 2:  # LayerD's protocol leaves these out
        return row
    clean = cleared(stack)
    levels = layerd.evaluate(stack, truth, max_edits=max_edits)
    for prefix in ("layerd", "layerd_clean"):
        if prefix == "layerd_clean" and not np.array_equal(clean, stack):
            levels = layerd.evaluate(clean, truth, max_edits=max_edits)
        row[f"{prefix}_edits"] = len(levels) - 1
        for edits in range(max_edits + 1):
            level = layerd.at_edits(levels, edits)
            row |= {f"{prefix}_{score}_{edits}": getattr(level, score) for score in LAYERD}
    return row


@dataclass(frozen=True)
class Comparisons:
    """Two models over the same cases: by kind of case, then by column."""

    by_kind: Mapping[Kind, Mapping[str, Comparison]]
    slots: Mapping[int, Mapping[str, Comparison]] = field(default_factory=dict)  # layer count -> column -> comparison

    def flat(self) -> dict[str, Comparison]:
        """Comparisons by flat name: `designs.bad_layers`, `designs.slot_l1.L3`, `designs.slot_l1.L3.slot0`."""
        named = {f"{kind}.{column}": value for kind, table in self.by_kind.items() for column, value in table.items()}
        for layers, table in self.slots.items():
            for column, value in table.items():
                name = next(name for name in BY_SLOT if column.startswith(name))
                tail = column.removeprefix(name).replace("_", ".slot")
                named[f"designs.{name}.L{layers}{tail}"] = value
        return named


def compare_rows(base: Sequence[Row], tuned: Sequence[Row], *, seed: int, flips: int = FLIPS) -> Comparisons:
    """Paired comparisons of every numeric column, of rows of the same cases in the same order.

    P-values are adjusted for what is read together: the measures of the tables that give verdicts, LayerD's scores
    by number of edits, and the slots by layer count.
    """
    seed = seed_for(seed, "sign flips")

    def table(kind: Kind, columns: Sequence[str], layers: int | None = None) -> dict[str, Comparison]:
        pairs = [
            (b, t) for b, t in zip(base, tuned, strict=True) if b["kind"] == kind and layers in (None, b["layers"])
        ]
        found = {}
        for column in columns:
            result = compare(
                [b.get(column) for b, _ in pairs],
                [t.get(column) for _, t in pairs],
                flips=flips,
                seed=seed,
            )
            if result.base is not None or result.tuned is not None:
                found[column] = result
        return found

    kinds: list[Kind] = [kind for kind in ("designs", "pictures") if any(row["kind"] == kind for row in base)]
    others = (c for row in base for c in row if c.startswith(("layerd_", JUDGED)))
    columns = list(dict.fromkeys([*MEASURES, *others]))
    counts = sorted({row["layers"] for row in base if row["kind"] == "designs"})
    by_kind: Mapping[Kind, Mapping[str, Comparison]] = {kind: table(kind, columns) for kind in kinds}
    slots = {
        count: table("designs", [name for column in BY_SLOT for name in slots_of(column, count)], count)
        for count in counts
    }
    return Comparisons(
        by_kind=_adjusted(_adjusted(by_kind, is_tabled), lambda name: not is_tabled(name)),
        slots=_adjusted(slots, lambda name: True),
    )


def paired_differences(base: Sequence[Row], tuned: Sequence[Row]) -> dict[Kind, dict[str, list[float]]]:
    """tuned - base of every image, by kind and column of the tables, where both are defined."""
    found: dict[Kind, dict[str, list[float]]] = {}
    for b, t in zip(base, tuned, strict=True):
        for column in COLUMNS:
            if b.get(column) is not None and t.get(column) is not None:
                found.setdefault(b["kind"], {}).setdefault(column, []).append(float(t[column]) - float(b[column]))
    return found


def _adjusted(
    tables: Mapping[Heading, Mapping[str, Comparison]], belongs: Callable[[str], bool]
) -> dict[Heading, dict[str, Comparison]]:
    """The tables with the p-values of the columns that belong, and give verdicts, adjusted for each other."""
    flat = {(heading, name): value for heading, table in tables.items() for name, value in table.items()}
    family = [(heading, name) for heading, name in flat if belongs(name) and gives_verdict(name)]
    flat = holm(flat, family)
    return {heading: {name: flat[heading, name] for name in table} for heading, table in tables.items()}
