"""Changes of a recipe, as a run's `overrides` give them."""

from typing import Any

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe, recipe_differences
from layerloop.components.schema.run_recipe import overridden, packaged_recipes

TINY = parse_recipe(packaged_recipes()["tiny"])


def test_changes_are_merged_section_by_section() -> None:
    changed, free = overridden(TINY, {"judge": {"phase2": {"enabled": False}, "model": "qwen"}, "seed": 3})
    assert (changed.judge.phase2.enabled, changed.judge.model, changed.seed) == (False, "qwen", 3)
    assert changed.judge.phase2.resolution == TINY.judge.phase2.resolution == 64
    assert changed.rollout == TINY.rollout
    assert free == {}


def test_values_of_the_runtime_are_returned_apart() -> None:
    changed, free = overridden(TINY, {"judge": {"concurrency": 64.0, "model": "qwen"}})
    assert changed.judge.model == "qwen"
    assert free == {"judge": {"concurrency": 64}}


def test_no_change_is_the_recipe_itself() -> None:
    assert overridden(TINY, {}) == (TINY, {})


def test_numbers_of_a_struct_arrive_as_floats() -> None:
    changes = {"rollout": {"groups": 5.0, "window": {"size": 3.0}}, "evaluation": {"layers": [2.0, 3.0]}, "seed": 9.0}
    plain = {"rollout": {"groups": 5, "window": {"size": 3}}, "evaluation": {"layers": [2, 3]}, "seed": 9}
    assert overridden(TINY, changes) == overridden(TINY, plain)
    assert overridden(TINY, {"update": {"learning_rate": 1}})[0].update.learning_rate == 1.0


def test_a_list_is_replaced() -> None:
    assert overridden(TINY, {"evaluation": {"layers": [2]}})[0].evaluation.layers == (2,)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"update": {"learning_rat": 1}},
            "overrides: recipe.update.learning_rat is not a known key: did you mean ",
        ),
        ({"updat": {}}, "overrides: recipe.updat is not a known key: did you mean 'update'?"),
        ({"update": 3}, "overrides: recipe.update is 3: give a mapping, keys with values"),
        (
            {"update.learning_rate": 1e-4},
            'overrides: recipe.update.learning_rate is not a known key: write it as {"update": {"learning_rate": ...}}',
        ),
        ({"rollout": {"groups": 2.5}}, "overrides: recipe.rollout.groups is 2.5: "),
        ({"rollout": {"window": {"size": 99}}}, "overrides: recipe.rollout.window.size is 99 but steps is 8"),
    ],
)
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        overridden(TINY, changes)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_paper_exact_is_paper_but_for_the_steps_outside_the_window() -> None:
    paper, exact = (parse_recipe(packaged_recipes()[name]) for name in ("paper", "paper-exact"))
    assert recipe_differences(exact, paper) == ["rollout.outside: 'euler' -> 'heun'"]
    lines = [packaged_recipes()[name].partition("\nname: ")[2].splitlines() for name in ("paper", "paper-exact")]
    assert len([pair for pair in zip(*lines, strict=True) if pair[0] != pair[1]]) == 1  # their comments agree too


def test_every_packaged_recipe_can_be_changed() -> None:
    for text in packaged_recipes().values():
        recipe = parse_recipe(text)
        assert overridden(recipe, recipe.model_dump(mode="json")) == (recipe, {})
        assert overridden(recipe, {"seed": 5})[0].seed == 5
