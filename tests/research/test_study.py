"""Studies: arms are valid recipes, runs are ordered fairly, intervals are Student's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe
from layerloop.pipelines.research.arms import ARMS, Run, Study, merged, plan
from layerloop.pipelines.research.outcomes import interval
from layerloop.pipelines.research.study import study_recipe


def study(folder: Path) -> Study:
    return Study(
        folder=folder, recipe=study_recipe(), iterations=2, images=folder / "i",
        designs=folder / "d", judge_urls={},
    )  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_recipe_that_changes_what_it_says(arm: str, tmp_path: Path) -> None:
    changed = parse_recipe(study(tmp_path).recipe_of(Run(arm, 2)))
    assert changed.seed == 2
    full = parse_recipe(study(tmp_path).recipe_of(Run("full", 2)))
    assert (changed == full) == (arm == "full")
    assert changed.model.base == ("tiny" if arm == "shipped_base" else "tiny-faulty")


def test_the_arms_that_the_results_need_have_three_seeds() -> None:
    assert all(ARMS[arm].seeds >= 3 for arm in ("full", "phase1_only", "mean_ratio", "nft"))


def test_first_seeds_of_all_arms_come_first() -> None:
    assert plan(["full", "nft", "eta_low"]) == [
        Run("full", 0), Run("nft", 0), Run("eta_low", 0), Run("full", 1), Run("nft", 1), Run("full", 2), Run("nft", 2),
        Run("full", 3), Run("full", 4),
    ]  # fmt: skip


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(LayerloopError, match="arm fulll is not known: choose from full"):
        plan(["fulll"])


def test_changes_are_laid_over_section_by_section() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "e": {"f": 4}}) == {
        "a": {"b": 9, "c": 2}, "d": 3, "e": {"f": 4},
    }  # fmt: skip


def test_the_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    assert interval([5.0]).half is None
