"""The table of algorithms: both halves of each are there, and nobody else asks for a name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from layerloop.components.generate_rollouts.plan import plan_iteration
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import ALGORITHMS, LearnerState
from layerloop.components.schema.recipe import Recipe, parse_recipe
from layerloop.components.update_lora.algorithm import Learner, learner_of, timesteps_of

ROOT = Path(__file__).parents[2]
HOMES = {"components/schema/learning.py", *(f"components/update_lora/{name}.py" for name in ALGORITHMS)}


def recipe(name: str) -> Recipe:
    return Recipe.model_validate({"name": "lab", "update": {"algorithm": name}, "rollout": {"window": {"size": 3}}})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_has_a_learner_and_samples_what_it_learns_from(name: str) -> None:
    assert isinstance(learner_of(name), Learner)
    (plan, *_) = plan_iteration(recipe(name), 1, images=4)
    match ALGORITHMS[name].samples_from:
        case "window":
            assert (plan.window_size, len(plan.etas), timesteps_of(recipe(name))) == (3, 3, 3)
            assert plan.dynamics != "ode"
        case "final":
            assert (plan.window_size, plan.etas, plan.dynamics) == (0, (), "ode")
            assert timesteps_of(recipe(name)) >= 1


def test_only_an_algorithms_own_files_name_it() -> None:
    """No step decides by a name, so none has to be changed for another algorithm. (A study's arms are recipes.)"""
    for path in [*(ROOT / "components").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]:
        home = str(path.relative_to(ROOT))
        if home in HOMES or home == "pipelines/research/arms.py":
            continue
        tree = ast.parse(path.read_text())
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not strings & ALGORITHMS.keys(), home


def test_an_algorithm_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(LayerloopError) as raised:
        parse_recipe("name: lab\nupdate: {algorithm: ppo}")
    expected = f"recipe.update.algorithm: 'ppo' is not a learning algorithm: choose one of {', '.join(ALGORITHMS)}"
    assert str(raised.value) == expected


def test_the_state_of_another_versions_algorithm_is_refused() -> None:
    text = LearnerState(iteration=1, algorithm="grpo", optimizer_steps=2, ema_steps=0).to_json()
    with pytest.raises(LayerloopError, match="learner.json.algorithm: 'ppo' is not a learning algorithm"):
        LearnerState.from_json(text.replace(b'"grpo"', b'"ppo"'), where="learner.json")
