"""Columns of an evaluation's tables: the measures and LayerD's scores, in the order in which reports show them.

A column's position follows from its own declaration: a measure that is added to measure.py has its row in the report,
its definition, and its rank wherever it is quoted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from layerloop.components.layers import measure
from layerloop.components.layers.layerd import PROTOCOL
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
        blind=("untouched", "veils", "split", "fringes", "alpha noise", "junk"),
    ),
    "alpha_iou": Column(
        name="layerd_alpha_iou_0", title="LayerD alpha IoU", better="higher", group="Against the true layers",
        quoted={"designs headline": 2, "kubeflow": 0, "card": 10},
        blind=("background", "filled", "colour noise"),
    ),
}  # fmt: skip

# Names of the columns of the report's tables, by heading.
GROUPS: Mapping[Group, tuple[str, ...]] = {
    group: tuple(column.name for column in (*MEASURES.values(), *LAYERD.values()) if column.group == group)
    for group in get_args(Group)
}
FLAGS = ("blank", "glazed", "duplicate", "idle")  # of layers; terms of DEFINITIONS
JUDGED = "judge_"  # what columns of a judge's criteria begin with: `judge_alpha_cleanliness`, and `judge_mean` of all
BY_SLOT = ("layer_l1", "slot_l1")  # compared by layer count as well, and of each slot: `layer_l1_0` and so on
COLUMNS: Mapping[str, Column] = {
    name: {**MEASURES, **{column.name: column for column in LAYERD.values()}}[name]
    for names in GROUPS.values()
    for name in names
}

# What a report explains: measures by name, and the terms that they use.
DEFINITIONS: Mapping[str, str] = {
    **measure.DEFINITIONS,
    "judge": (
        "A judge's criteria, 0 to 1, of each decomposition on its own: its recomposition and every layer beside the "
        "image, by the campaign's rubric. It is an opinion, of a judge that rewards what it is shown in training too "
        "where it is the same one: an adapter may please it without being better. A decomposition of which it gave no "
        "usable answer has none."
    ),
    "layerd": " ".join(
        [PROTOCOL, *(f"{column.title}: {column.blindness}" for column in LAYERD.values() if column.blind)]
    ),
}


def quoted(place: Place) -> list[str]:
    """Names of the columns that are quoted at a place, in the order of their ranks there."""
    names = [name for name, column in COLUMNS.items() if place in column.quoted]
    return sorted(names, key=lambda name: COLUMNS[name].quoted[place])


def column_of(name: str) -> Column | None:
    """The column of COLUMNS that a name in tables belongs to: `slot_l1` of `slot_l1_2`, which is that of slot 2, and
    `layerd_cost_0` of `layerd_clean_cost_3`; None of `layerd_edits`."""
    if name.startswith("layerd_"):
        return LAYERD.get(_score(name))
    if name.startswith(JUDGED):
        title = f"Judge, {name.removeprefix(JUDGED).replace('_', ' ')}"
        return Column(name=name, title=title, better="higher", group="Against the source")
    return COLUMNS.get(name) or COLUMNS.get(name.rpartition("_")[0])


def is_tabled(name: str) -> bool:
    """Whether a column is in the tables of measures, whose p-values are adjusted for each other."""
    return name in COLUMNS or name.startswith(JUDGED)


def judged(names: Iterable[str]) -> list[str]:
    """Those of some columns that are a judge's."""
    return [name for name in names if name.startswith(JUDGED)]


def slots_of(column: str, layers: int) -> list[str]:
    """The columns of `column`, one of BY_SLOT, for decompositions into so many layers: itself and that of each slot."""
    return [column, *(f"{column}_{slot}" for slot in range(layers))]


def changed_definitions(name: str, one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two evaluations' `definitions` differ in what a column rests on: its own text, and of the layers' flags
    those of the flags."""
    column = MEASURES.get(name)
    texts = [name, *FLAGS] if column is not None and column.takes == "flags" else [name]
    return any(one.get(text) != other.get(text) for text in texts)


def better_of(name: str) -> Better:
    """Whether a lower or a higher value of a column is better."""
    column = column_of(name)
    return column.better if column else None


def gives_verdict(name: str) -> bool:
    """Whether a difference in a column may be called better or worse."""
    column = column_of(name)
    return column is not None and column.better is not None and column.verdict


def title_of(name: str) -> str:
    """A column's human-readable name."""
    column = column_of(name)
    if column is None:
        return "LayerD edits made" if name == "layerd_edits" else name
    if name.startswith("layerd_"):
        edits = name.rpartition("_")[2]
        tail = ", faint alpha cleared" if name.startswith("layerd_clean_") else ""
        return f"{column.title}, {edits} edit{'' if edits == '1' else 's'}{tail}"
    return column.title if name == column.name else f"{column.title}, slot {name.rpartition('_')[2]}"


def _score(column: str) -> str:
    """The score of `layerd_<score>_<edits>` or `layerd_clean_<score>_<edits>`; "" of `layerd_edits`."""
    return column.removeprefix("layerd_").removeprefix("clean_").rpartition("_")[0]
