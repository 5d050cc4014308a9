"""Where a column is shown follows from what it says of itself."""

from __future__ import annotations

from typing import get_args

import pytest

from layerloop.components.layers.columns import COLUMNS, GROUPS, LAYERD, quoted
from layerloop.components.layers.layerd import EditLevel
from layerloop.components.layers.measure import MEASURES, Place


def test_every_measure_and_score_is_in_the_tables_once_under_its_own_heading() -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted([*MEASURES, *(score.name for score in LAYERD.values())])
    assert list(COLUMNS) == listed
    for heading, names in GROUPS.items():
        assert names and {COLUMNS[name].group for name in names} == {heading}


@pytest.mark.parametrize("place", get_args(Place))
def test_what_is_quoted_stands_in_the_order_of_its_ranks(place: Place) -> None:
    names = quoted(place)
    assert set(names) == {name for name, column in COLUMNS.items() if place in column.quoted}
    ranks = [COLUMNS[name].quoted[place] for name in names]
    assert ranks == sorted(ranks) and names[0] == "bad_layers"


def test_equal_ranks_keep_the_order_of_the_tables() -> None:
    names = quoted("kubeflow")
    assert {COLUMNS[name].quoted["kubeflow"] for name in names} == {0}
    assert names == [name for name in COLUMNS if name in names]
    assert names.index("slot_l1") < names.index("layerd_cost_0") < names.index("inpainting_ssim")


def test_the_scores_are_those_of_the_protocol() -> None:
    assert set(LAYERD) == set(EditLevel.__dataclass_fields__) - {"edits"}
    assert [score.better for score in LAYERD.values()] == ["lower", "lower", "higher"]
