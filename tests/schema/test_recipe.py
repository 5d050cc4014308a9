"""The recipe refuses what it does not know and says it in one line."""

from __future__ import annotations

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe, parse_recipe, recipe_differences


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nrolout: {}", "recipe.rolout is not a known key: did you mean 'rollout'?"),
        ("name: x\nrollout: {window: {siz: 3}}", "recipe.rollout.window.siz is not a known key: did you mean 'size'?"),
        ("name: x\ngroups: 3", "recipe.groups is not a known key: did you mean 'rollout.groups'?"),
        ("name: x\nlearning_rat: 3", "recipe.learning_rat is not a known key: did you mean 'update.learning_rate'?"),
        ("name: x\nzzz: 1", "recipe.zzz is not a known key: known keys: data, evaluation"),
        ("name: x\nrollout: {window: {size: 12}}", "recipe.rollout.window.size is 12 but steps is 10: choose 1..9"),
        ("name: x\nrollout: {window: {start: 7}}", "recipe.rollout.window.start is 7 with size 4, past its end 9"),
        ("name: x\nrollout: {window: {stop: 10}}", "recipe.rollout.window.stop is 10 but steps is 10: choose 4..9"),
        (
            "name: x\nrollout: {window: {stop: 2}}",
            "recipe.rollout.window.stop is 2 but window.size is 4, which does not fit before it: choose 4..9, or a",
        ),
        ("name: x\nrollout: {window: {stop: -1}}", "recipe.rollout.window.stop is -1 but window.size is 4"),
        (
            "name: x\nrollout: {noise: {dynamics: cps, eta: 2.0}}",
            "recipe.rollout.noise.eta is 2.0 but dynamics is cps, whose noise sigma' sin(eta pi/2) is greatest at 1: "
            "choose at most 1",
        ),
        ("name: x\nrollout: {noise: {dynamics: cps, eta: 1.0000001}}", "recipe.rollout.noise.eta is 1.0000001 but"),
        (
            "name: x\nrollout: {noise: {dynamics: cps, schedule: decay, final_eta: 1.5}}",
            "recipe.rollout.noise.final_eta is 1.5 but dynamics is cps",
        ),
        (
            "name: x\nrollout: {group_size: 1}",
            "recipe.rollout.group_size is 1: input should be greater than",
        ),
        ("name: x\nrollout: {min_layers: 5, max_layers: 3}", "recipe.rollout.min_layers is 5 but max_layers is 3"),
        (
            "name: x\nrollout: {resolution: 800}",
            "recipe.rollout.resolution is 800 but the pictures are of 640 pixels (data.resolution): choose at most",
        ),
        ("name: x\njudge: {min_valid: 9}", "recipe.judge.min_valid is 9 but rollout.group_size is 8: choose 2..8"),
        ("name: x\nupdate: {adam_betas: [0.9, 1.0]}", "recipe.update.adam_betas has 1.0"),
        (
            "name: x\nlora: {targets: []}",
            "recipe.lora.targets is empty: name linear layers of the transformer, such",
        ),
        ("name: x\nupdate: {learning_rate: .nan}", "recipe.update.learning_rate is nan"),
        ("seed: 1", "recipe.name is missing: set it"),
        ("name: Bad Name", "recipe.name is 'Bad Name'"),
        ("- a\n- b", "recipe is list, not a mapping"),
        ("name: [", "recipe is not YAML"),
        ("", "recipe is NoneType, not a mapping"),
    ],
)
def test_a_bad_recipe_is_refused_with_one_line_naming_field_value_and_remedy(text: str, message: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        parse_recipe(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "noise",
    [
        "{dynamics: cps, eta: 1}",
        "{dynamics: cps, eta: 0.3, schedule: decay, final_eta: 1.0}",
        "{dynamics: cps, final_eta: 1.5}",  # not used without a decay
        "{dynamics: flow_sde, eta: 2, schedule: decay, final_eta: 1.5}",
    ],
)
def test_noise_levels_that_the_dynamics_can_have_are_accepted(noise: str) -> None:
    parsed = parse_recipe(f"name: x\nrollout: {{noise: {noise}}}").rollout.noise
    assert parsed.dynamics in noise


def test_a_recipe_survives_the_round_trip_through_its_canonical_json() -> None:
    recipe = parse_recipe("name: x\nrollout: {group_size: 12, window: {size: 3}}\nupdate: {clip_high: 0.3}")
    assert Recipe.from_json(recipe.to_json(), where="recipe.json") == recipe
    assert parse_recipe(recipe.to_json()).to_json() == recipe.to_json()


def test_integers_that_arrive_as_floats_are_integers_again() -> None:
    assert parse_recipe("name: x\nrollout: {group_size: 12.0}").rollout.group_size == 12


def test_differences_name_each_field_with_both_values() -> None:
    theirs = parse_recipe("name: x\nseed: 1\nrollout: {window: {size: 3}}")
    ours = parse_recipe("name: x\nseed: 2\nrollout: {window: {size: 4}}")
    assert recipe_differences(ours, theirs) == ["rollout.window.size: 3 -> 4", "seed: 1 -> 2"]
    assert recipe_differences(ours, ours) == []


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("name: x\nseed: 1\nname: y\n", "name", 3),
        ("name: x\njudge:\n  model: a\n  samples: 1\n  model: a\n", "model", 5),
        ('{"name": "x", "judge": {"model": "a", "model": "b"}}', "model", 1),
    ],
)
def test_a_key_given_twice_is_one_line(text: str, key: str, line: int) -> None:
    with pytest.raises(
        LayerloopError, match=rf"recipe has the key {key} twice \(line {line}\): keep one of them"
    ) as caught:
        parse_recipe(text)
    assert "\n" not in str(caught.value)


def test_a_yaml_merge_is_no_key_given_twice() -> None:
    text = "name: x\njudge: {phase2: &p {repeats: 2, resolution: 64}}\n"
    assert parse_recipe(text).judge.phase2.repeats == 2
    assert parse_recipe("name: x\njudge:\n  phase2:\n    <<: {repeats: 2}\n    repeats: 3\n").judge.phase2.repeats == 3
