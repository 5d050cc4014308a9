"""Judge methods: what a rubric must have for those in use, and how answers are combined, by closed form."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from layerloop.components.judge.methods import PHASE1, PHASE2, grid, methods_of, pairwise, rubric_of
from layerloop.components.judge.methods.method import GridScore
from layerloop.components.judge.rubric import file_content, load_rubric
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe, PhaseTwoRecipe
from layerloop.components.schema.recipe import parse_recipe

NAMES = ("a", "b")


def shown(repeat: int, number: int, scores: dict[int, float], offset: float = 0.0) -> list[GridScore]:
    return [
        GridScore(repeat, number, position, candidate, {"a": value + offset, "b": 0.5})
        for position, (candidate, value) in enumerate(scores.items())
    ]


# --------------------------------------------------------------------------------------------------- rubric and recipe


@pytest.fixture
def rubric_file(tmp_path: Path) -> Any:
    """`rubric_file(without=(...), **texts)`: the path of the default rubric with keys left out or set."""
    package = Path(load_rubric.__code__.co_filename).parent

    def write(*without: str, **texts: Any) -> str:
        words = yaml.safe_load((package / "rubrics" / "default.yaml").read_text())
        words = {key: value for key, value in words.items() if key not in without} | {"name": "mine"} | texts
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(words))
        return str(path)

    return write


def recipe(rubric: str | dict[str, Any], **judge: Any) -> JudgeRecipe:
    return JudgeRecipe.model_validate({"rubric": rubric, **judge})


def test_the_recipe_names_exactly_the_methods_that_there_are() -> None:
    assert get_args(JudgeRecipe.model_fields["method"].annotation) == tuple(PHASE1)
    assert get_args(PhaseTwoRecipe.model_fields["method"].annotation) == tuple(PHASE2)
    texts = [method.TEXT for table in (PHASE1, PHASE2) for method in table.values()]
    assert len(set(texts)) == len(texts)


def test_a_rubric_needs_only_the_texts_of_the_methods_in_use(rubric_file: Any) -> None:
    assert rubric_of(recipe(rubric_file("pairwise", "checklist"))).name == "mine"
    checklist = rubric_file("pairwise", "phase1")
    assert rubric_of(recipe(checklist, method="checklist")).name == "mine"
    pairs = rubric_file("phase2", "checklist")
    assert rubric_of(recipe(pairs, phase2={"method": "pairwise"}, canaries=False)).name == "mine"
    alone = rubric_file("phase2", "pairwise", "checklist")
    assert rubric_of(recipe(alone, phase2={"enabled": False})).name == "mine"


def test_what_a_rubrics_file_holds_may_stand_in_the_recipe(rubric_file: Any) -> None:
    path = rubric_file(instructions="Judge – kindly.")
    named, itself = recipe(path), recipe(file_content(path))
    same = {"sha256": ""}
    assert rubric_of(named).model_copy(update=same) == rubric_of(itself).model_copy(update=same)
    assert rubric_of(JudgeRecipe.from_json(itself.to_json(), where="recipe")) == rubric_of(itself)  # frozen and read
    other = recipe(file_content(path) | {"instructions": "Judge sternly."})
    assert rubric_of(other).sha256 != rubric_of(itself).sha256
    for wrong in (5, None, [], {1: 2}):
        with pytest.raises(
            LayerloopError, match=r"^recipe\.judge\.rubric is .*: give a name, the path of a \.yaml file, or"
        ):
            parse_recipe(yaml.safe_dump({"name": "test", "judge": {"rubric": wrong}}))
    with pytest.raises(LayerloopError, match=r"^rubric\.criteria is missing: set it$"):
        rubric_of(recipe({key: value for key, value in file_content(path).items() if key != "criteria"}))


@pytest.mark.parametrize(
    ("without", "judge", "says"),
    [
        ("pairwise", {"phase2": {"method": "pairwise"}}, "no text pairwise, which recipe.judge.phase2.method pairwise"),
        ("phase1", {}, "no text phase1, which recipe.judge.method rubric needs"),
        ("checklist", {"method": "checklist"}, "no text checklist, which recipe.judge.method checklist needs"),
        ("phase2", {}, "no text phase2, which recipe.judge.phase2.method grid"),
        ("phase2", {"phase2": {"method": "pairwise"}}, "no text phase2, .* and the canaries"),
    ],
)
def test_a_text_that_is_missing_is_one_line_that_names_it(
    without: str, judge: dict[str, Any], says: str, rubric_file: Any
) -> None:
    for path in (rubric_file(without), rubric_file(**{without: " \n"}), rubric_file(**{without: None})):
        with pytest.raises(LayerloopError, match=says) as caught:
            rubric_of(recipe(path, **judge))
        assert "\n" not in str(caught.value) and "rubric mine" in str(caught.value)


def test_a_text_of_no_method_and_criteria_without_questions_are_refused(rubric_file: Any) -> None:
    with pytest.raises(LayerloopError, match=r"rubric\.pairwize is not a known key: choose phase1, checklist, phase2"):
        rubric_of(recipe(rubric_file(pairwize="Which is better?")))
    words = yaml.safe_load(Path(rubric_file()).read_text())
    words["criteria"][2]["checklist"] = []
    path = rubric_file(criteria=words["criteria"])
    with pytest.raises(LayerloopError, match="has no checklist for background_inpainting"):
        rubric_of(recipe(path, method="checklist"))
    assert rubric_of(recipe(path)).name == "mine"  # the anchors are enough for the method rubric


def test_the_canaries_are_compared_in_grids_whatever_the_method() -> None:
    assert grid in methods_of(JudgeRecipe.model_validate({"phase2": {"method": "pairwise"}}))
    assert grid not in methods_of(JudgeRecipe.model_validate({"phase2": {"method": "pairwise"}, "canaries": False}))


# ---------------------------------------------------------------------------------------------------- plan and combine


@pytest.mark.parametrize("name", PHASE2)
def test_every_plan_shows_all_candidates_and_depends_on_the_seed_alone(name: str) -> None:
    def plan(seed: int) -> list[list[int]]:
        return PHASE2[name].plan([0, 2, 3, 5, 7, 8], (3, 32, 32), PhaseTwoRecipe(), random.Random(seed))

    assert {candidate for order in plan(1) for candidate in order} == {0, 2, 3, 5, 7, 8}
    assert plan(1) == plan(1) != plan(2)


def test_one_grid_is_taken_as_it_is() -> None:
    merged = grid.combine([shown(0, 0, {2: 0.2, 0: 0.9, 1: 0.5})], NAMES)
    assert {c: s["a"] for c, s in merged.items()} == pytest.approx({0: 0.9, 1: 0.5, 2: 0.2}, abs=1e-3)


def test_repeats_of_the_same_candidates_are_averaged() -> None:
    merged = grid.combine([shown(0, 0, {0: 0.2, 1: 0.6}), shown(1, 0, {1: 0.8, 0: 0.4})], NAMES)
    assert {c: s["a"] for c, s in merged.items()} == pytest.approx({0: 0.3, 1: 0.7}, abs=1e-3)


def test_overlapping_grids_of_different_level_are_put_on_one_scale() -> None:
    truth = {0: 0.3, 1: 0.4, 2: 0.5, 3: 0.6, 4: 0.7}
    first = shown(0, 0, {c: truth[c] for c in (0, 1, 2)}, offset=0.1)
    second = shown(0, 1, {c: truth[c] for c in (2, 3, 4)}, offset=-0.1)
    merged = grid.combine([first, second], NAMES)
    differences = [merged[c + 1]["a"] - merged[c]["a"] for c in range(4)]
    assert differences == pytest.approx([0.1] * 4, abs=2e-3)
    assert sum(s["a"] for s in merged.values()) / 5 == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", PHASE2)
def test_no_grids_give_no_scores(name: str) -> None:
    assert PHASE2[name].combine([], NAMES) == {}


@pytest.mark.parametrize("name", PHASE1)
def test_samples_of_a_candidate_are_averaged(name: str) -> None:
    samples = [{"a": 0.2, "b": 1.0}, {"a": 0.6, "b": 0.0}]
    assert PHASE1[name].combine(samples, NAMES) == pytest.approx({"a": 0.4, "b": 0.5})


def test_win_rates_are_mean_shares() -> None:
    def duel(first: int, second: int, share: float) -> list[GridScore]:
        return [
            GridScore(0, 0, 0, first, {"a": share, "b": 0.5}),
            GridScore(0, 0, 1, second, {"a": 1 - share, "b": 0.5}),
        ]

    rates = pairwise.combine([duel(0, 1, 1.0), duel(1, 2, 0.5), duel(2, 0, 0.0)], NAMES)
    assert {c: s["a"] for c, s in rates.items()} == {0: 1.0, 1: 0.25, 2: 0.25}
