"""Columns of an evaluation's tables: the measures and LayerD's scores, in the order in which reports show them.

A column's position follows from its own declaration: a measure that is added to measure.py has its row in the report,
its definition, and its rank wherever it is quoted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from layerloop.components.layers.measure import MEASURES, Better, Column, Group, Place

# LayerD's scores, by the name in layerd.EditLevel. There is a column for every number of edits; the first is quoted.
LAYERD: Mapping[str, Column] = {
    "cost": Column(
        name="layerd_cost_0", title="LayerD cost", better="lower", group="Against the true layers",
        quoted={"kubeflow": 0},
    ),
    "rgb_l1": Column(
        name="layerd_rgb_l1_0", title="LayerD RGB L1", better="lower", group="Against the true layers",
        quoted={"kubeflow": 0, "card": 9},
    ),
    "alpha_iou": Column(
        name="layerd_alpha_iou_0", title="LayerD alpha IoU", better="higher", group="Against the true layers",
        quoted={"designs headline": 2, "kubeflow": 0, "card": 10},
    ),
}  # fmt: skip

# Names of the columns of the report's tables, by heading.
GROUPS: Mapping[Group, tuple[str, ...]] = {
    group: tuple(column.name for column in (*MEASURES.values(), *LAYERD.values()) if column.group == group)
    for group in get_args(Group)
}
COLUMNS: Mapping[str, Column] = {
    name: {**MEASURES, **{column.name: column for column in LAYERD.values()}}[name]
    for names in GROUPS.values()
    for name in names
}


def quoted(place: Place) -> list[str]:
    """Names of the columns that are quoted at a place, in the order of their ranks there."""
    names = [name for name, column in COLUMNS.items() if place in column.quoted]
    return sorted(names, key=lambda name: COLUMNS[name].quoted[place])


def better_of(column: str) -> Better:
    """Whether a lower or a higher value of a column is better."""
    if column in MEASURES:
        return MEASURES[column].better
    if column.startswith("layerd_"):
        score = _score(column)
        return LAYERD[score].better if score else None
    return "lower"  # slot_l1_<k>


def title_of(column: str) -> str:
    """A column's human-readable name."""
    if column in MEASURES:
        return MEASURES[column].title
    if column.startswith("layerd_"):
        score, edits = _score(column), column.rpartition("_")[2]
        if not score:
            return "LayerD edits made"
        tail = ", faint alpha cleared" if column.startswith("layerd_clean_") else ""
        return f"{LAYERD[score].title}, {edits} edit{'' if edits == '1' else 's'}{tail}"
    return column


def _score(column: str) -> str:
    """The score of `layerd_<score>_<edits>` or `layerd_clean_<score>_<edits>`; "" of `layerd_edits`."""
    return column.removeprefix("layerd_").removeprefix("clean_").rpartition("_")[0]
