"""The judge methods by their names in the recipe (`judge.method`, `judge.phase2.method`), a module each."""

from __future__ import annotations

from layerloop.components.judge.methods import checklist, grid, pairwise, rubric
from layerloop.components.judge.methods.method import Method, PhaseOneMethod, PhaseTwoMethod
from layerloop.components.judge.requests import prompt_sha256
from layerloop.components.judge.rubric import Rubric, load_rubric
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe

PHASE1: dict[str, PhaseOneMethod] = {"rubric": rubric, "checklist": checklist}
PHASE2: dict[str, PhaseTwoMethod] = {"grid": grid, "pairwise": pairwise}


def methods_of(recipe: JudgeRecipe) -> list[Method]:
    """The methods that a campaign asks by. Canaries are compared in grids, whatever the method of phase 2."""
    used: list[Method] = [PHASE1[recipe.method]]
    if recipe.phase2.enabled:
        used += [PHASE2[recipe.phase2.method], *([grid] if recipe.canaries else [])]
    return used


def rubric_of(recipe: JudgeRecipe) -> Rubric:
    """The recipe's rubric, with all that the recipe's methods ask by.

    Raises:
        LayerloopError: no such rubric, a text that no method uses, or a missing text of a method in use.
    """
    found = load_rubric(recipe.rubric)
    known = [method.TEXT for table in (PHASE1, PHASE2) for method in table.values()]
    if unknown := sorted(found.texts.keys() - set(known)):
        raise LayerloopError(f"rubric.{unknown[0]} is not a known key: choose {', '.join(known)}, or remove it")
    for method in methods_of(recipe):
        method.check(found)
    return found


def prompt_hash(rubric: Rubric, recipe: JudgeRecipe) -> str:
    """`prompt_sha256` of the words that a campaign's methods send."""
    return prompt_sha256(rubric, (word for method in methods_of(recipe) for word in method.WORDING))
