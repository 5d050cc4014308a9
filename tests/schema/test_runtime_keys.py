"""The runtime is free, and separated from the recipe by its keys, also in recipes that held them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe, parse_recipe, parse_recipe_runtime
from layerloop.components.schema.runtime import (
    TINY,
    Runtime,
    checked_values,
    flat,
    merged,
    runtime_key,
    split_runtime,
)

# Of a recipe.json as it was written when recipes held both, at other values than the defaults.
OLD = {
    "model": {"attention": "_native_math", "compile": True, "gradient_checkpointing": False, "fsdp": True},
    "rollout": {"batch_size": 3},
    "update": {"microbatch": 5},
    "evaluation": {"batch_size": 7},
    "judge": {
        "concurrency": 9,
        "timeout_seconds": 33.0,
        "impatience": 2.5,
        "retries": 6,
        "start_seconds": 8.0,
        "give_up_seconds": 44.0,
        "price": {"input": 2.0, "cached_input": 0.5, "output": 10.0},
        "batch": {
            "enabled": True,
            "poll_seconds": 3.0,
            "max_hours": 2.0,
            "linger_seconds": 1.0,
            "max_requests": 100,
            "max_megabytes": 20,
        },
    },
}
KEPT = {"name": "old", "seed": 3, "rollout": {"groups": 5}, "judge": {"model": "m"}}


def test_the_moved_keys_of_an_old_recipe_are_the_runtimes_and_the_rest_is_the_recipe() -> None:
    recipe, runtime = parse_recipe_runtime(json.dumps(merged(KEPT, OLD)))
    assert recipe == Recipe.model_validate(merged(KEPT, {"judge": {"redraws": 6}}))
    expected = merged(OLD, {"judge": {"timeout_factor": 2.5}})
    del expected["judge"]["impatience"]
    assert runtime == expected
    left_to_defaults = set(flat(Runtime().model_dump())) - set(flat(runtime))
    assert left_to_defaults == set(), "an old recipe.json has every value that the runtime has"
    assert parse_recipe(json.dumps(merged(KEPT, OLD))) == recipe


def test_no_key_is_both_the_recipes_and_the_runtimes() -> None:
    recipe = Recipe(name="x").model_dump(mode="json")
    assert split_runtime(recipe) == (recipe, {})
    assert not set(flat(recipe)) & set(flat(Runtime().model_dump(mode="json")))


def test_redraws_of_the_recipe_are_not_the_retries_of_the_runtime() -> None:
    recipe, runtime = parse_recipe_runtime("name: x\njudge: {redraws: 1, retries: 9}")
    assert (recipe.judge.redraws, runtime) == (1, {"judge": {"retries": 9}})
    recipe, runtime = parse_recipe_runtime("name: x\njudge: {redraws: 1}")
    assert (recipe.judge.redraws, runtime) == (1, {})


def test_a_key_that_means_nothing_any_more_is_left_out_of_an_old_recipe() -> None:
    old = {"name": "x", "evaluation": {"bootstrap": 2000, "steps": 7, "batch_size": 3}}
    assert split_runtime(old) == ({"name": "x", "evaluation": {"steps": 7}}, {"evaluation": {"batch_size": 3}})
    assert split_runtime({"name": "x", "evaluation": {"bootstrap": 2000}}) == ({"name": "x"}, {})


def test_a_section_that_is_all_runtime_is_gone_and_one_that_is_no_mapping_is_refused() -> None:
    assert split_runtime({"name": "x", "update": {"microbatch": 2}}) == ({"name": "x"}, {"update": {"microbatch": 2}})
    with pytest.raises(LayerloopError, match="recipe.judge is 3"):
        parse_recipe("name: x\njudge: 3")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"judge": {"concurrency": 0}}, "runtime.judge.concurrency is 0: input should be greater than or equal to 1"),
        ({"judge": {"concurency": 3}}, "runtime.judge.concurency is not a known key: did you mean 'concurrency'?"),
        ({"judge": {"concurrency": 1.5}}, "runtime.judge.concurrency is 1.5: input should be a valid integer"),
        (
            {"judge": {"batch": {"max_hours": -1}}},
            "runtime.judge.batch.max_hours is -1: input should be greater than 0",
        ),
        ({"judge": {"model": "m"}}, "runtime.judge.model is not a known key"),
        ({"lora": {}}, "runtime.lora is not a known key: known keys: evaluation, judge, model, rollout, update"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(values: dict[str, Any], line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        checked_values(values, where="runtime")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_only_what_was_named_is_there_and_numbers_have_their_own_type() -> None:
    values = checked_values({"judge": {"concurrency": 64.0, "price": {"input": 2}}}, where="runtime")
    assert json.dumps(values) == '{"judge": {"concurrency": 64, "price": {"input": 2.0}}}'


def test_former_names_lead_to_the_new_ones() -> None:
    assert runtime_key("judge", "impatience") == "timeout_factor"
    assert runtime_key("judge", "concurrency") == "concurrency"
    assert runtime_key("judge", "model") is None
    assert runtime_key("lora", "rank") is None


def test_the_tiny_bases_defaults_are_values_of_the_runtime() -> None:
    assert checked_values(TINY, where="TINY") == TINY
