"""From the judgements of a group to its score rows: rewards, their uncertainty, and the weight of the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerloop.components.judge.methods import prompt_hash
from layerloop.components.judge.rubric import Rubric
from layerloop.components.schema.judging import JudgeRecipe, ScoreRow
from layerloop.components.schema.trajectory import GroupRecord
from layerloop.components.score_rollouts.calibration import aggregate, reliability, std_over_repeats
from layerloop.components.score_rollouts.judgement import Judgement


def reward_of(scores: Mapping[str, float], rubric: Rubric, recipe: JudgeRecipe) -> float:
    """The reward of a candidate's scores, [0, 1], before any penalty."""
    return aggregate(scores, rubric.weights, recipe.aggregation)


def enough_valid(judgements: Sequence[Judgement], recipe: JudgeRecipe) -> bool:
    """Whether a group has the valid candidates that it needs to be compared and learned from."""
    return sum(j.reason is None for j in judgements) >= recipe.min_valid


def score_rows(
    record: GroupRecord, judgements: Sequence[Judgement], rubric: Rubric, recipe: JudgeRecipe
) -> list[ScoreRow]:
    """One row per candidate; too few valid candidates mask the complete group."""
    rewards: dict[int, float] = {}
    stds: dict[int, float | None] = {}
    if enough_valid(judgements, recipe):
        for index, j in enumerate(judgements):
            scores = j.phase2 if recipe.phase2.enabled else j.phase1
            if j.reason is None and scores is not None:
                rewards[index] = min(max(reward_of(scores, rubric, recipe) - j.penalty, 0.0), 1.0)
                stds[index] = std_over_repeats([reward_of(s, rubric, recipe) for s in j.independent])
    weight = 1.0
    if recipe.uncertainty_weighting:
        repeats = max((len(j.independent) for j in judgements), default=1)
        weight = reliability(list(rewards.values()), list(stds.values()), repeats)
    valid = sum(j.reason is None for j in judgements)
    prompt = prompt_hash(rubric, recipe)
    return [
        ScoreRow(
            iteration=record.iteration,
            group=record.group,
            candidate=j.candidate.record.candidate,
            image_key=record.image_key,
            layers=record.layers,
            reward=rewards.get(index),
            reason=None
            if index in rewards
            else j.reason or f"group: {valid} of {len(judgements)} candidates are valid",
            phase1=j.phase1,
            phase2=j.phase2,
            judge=recipe.model,
            rubric=rubric.name,
            rubric_sha256=rubric.sha256,
            weight=weight,
            uncertainty=stds.get(index),
            reward_phase1=None if j.phase1 is None else reward_of(j.phase1, rubric, recipe),
            penalty=j.penalty,
            rubric_version=rubric.version,
            prompt_sha256=prompt,
        )
        for index, j in enumerate(judgements)
    ]
