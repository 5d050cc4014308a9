"""Recipe section of the judge, and the score rows it produces."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from layerloop.components.schema.record import Record

BackdropName = Literal["white", "black", "checker"]


class PhaseTwoRecipe(Record):
    """Phase 2: re-scoring of a group's candidates against each other, in grids of candidates x layers, or by pairs."""

    enabled: bool = True  # off: rewards are those of phase 1 alone
    method: Literal["grid", "pairwise"] = "grid"  # all candidates in one image, or pairs of them
    repeats: int = Field(default=1, ge=1)  # over the group, each in another shuffled order, averaged
    resolution: int = Field(default=160, ge=32)  # longest side of a grid cell, pixels
    max_candidates: int = Field(default=12, ge=2)  # in one grid; a larger group is split into overlapping grids
    max_megapixels: float = Field(default=4.0, gt=0)  # of one grid image; a larger one is split too
    overlap: int = Field(default=2, ge=1)  # candidates that neighbouring grids share, to merge them on one scale

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.overlap >= self.max_candidates:
            raise ValueError(
                f"recipe.judge.phase2.overlap is {self.overlap} but max_candidates is {self.max_candidates}: "
                f"choose 1..{self.max_candidates - 1}"
            )
        return self


class JudgeRecipe(Record):
    """Settings of the judgement. URL, key and how the endpoint is called (runtime.judge) belong to the run."""

    model: str = "layerloop-reference-judge"  # as the endpoint names it
    rubric: str | dict[str, Any] = "default"  # a name of components/judge/rubrics, a YAML file's path, or what it holds
    resolution: int = Field(default=256, ge=32)  # longest side of an image shown to the judge, pixels
    backdrops: tuple[BackdropName, ...] = ("white",)  # what each layer is shown on
    method: Literal["rubric", "checklist"] = "rubric"  # phase 1: anchors 0..5, or yes/no questions per criterion
    extraction: Literal["sampled", "expected"] = "sampled"  # the number written, or its mean under top_logprobs
    samples: int = Field(default=1, ge=1)  # phase-1 judgements of a candidate, averaged (self-ensemble)
    temperature: float = Field(default=0.0, ge=0, le=2)  # of the judge's answers; 0 repeats one
    max_tokens: int = Field(default=1024, ge=64)  # of a reply about one candidate; more candidates get more
    observations: bool = False  # let the judge describe the images before the numbers
    aggregation: Literal["mean", "log"] = "mean"  # of criteria; "log" so that one criterion cannot dominate
    uncertainty_weighting: bool = False  # weigh a group's update by how far the judge's repeats agree
    artifact_penalty: float = Field(default=0.0, ge=0, le=1)  # reward lost by a stack whose layers are all bad, by rule
    canaries: bool = True  # score the known good and bad decompositions every iteration
    redraws: int = Field(default=4, ge=0)  # times that an unusable answer is asked for again, before a mask
    min_valid: int = Field(default=2, ge=2)  # valid candidates a group needs
    max_dropped_fraction: float = Field(default=0.25, ge=0, le=1)  # of groups; more fails the step
    phase2: PhaseTwoRecipe = PhaseTwoRecipe()

    @field_validator("rubric", mode="before")
    @classmethod
    def _name_or_rubric(cls, value: Any) -> Any:
        if not isinstance(value, str) and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
            raise ValueError(
                f"recipe.judge.rubric is {value!r:.80}: give a name, the path of a .yaml file, or what that holds"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.backdrops or len(set(self.backdrops)) != len(self.backdrops):
            raise ValueError(f"recipe.judge.backdrops is {list(self.backdrops)}: name each of one or more once")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"recipe.judge.samples is {self.samples} but temperature is 0, which repeats one answer: "
                "choose a temperature above 0"
            )
        if self.uncertainty_weighting and self.samples == 1 and self.phase2.repeats == 1:
            raise ValueError(
                "recipe.judge.uncertainty_weighting needs repeats to see a spread: "
                "choose phase2.repeats or samples of 2 or more"
            )
        return self


class ScoreRow(Record):
    """One row of `scores.parquet`: the judgement of one candidate. A failure is a reason, never a number."""

    iteration: int
    group: int
    candidate: int
    image_key: str
    layers: int
    reward: float | None  # [0, 1]; None when the candidate is masked
    reason: str | None  # why it is masked; None when it is valid
    phase1: dict[str, float] | None  # criterion -> [0, 1]
    phase2: dict[str, float] | None
    judge: str
    rubric: str
    rubric_sha256: str
    weight: float = 1.0  # of the group in the update, [0, 1]; below 1 where the judge disagrees with itself
    uncertainty: float | None = None  # standard deviation of the reward over repeats; None without repeats
    reward_phase1: float | None = None  # the reward that phase 1 alone would have given
    penalty: float = 0.0  # rule-based artifact penalty already taken off the reward
    rubric_version: str = ""
    prompt_sha256: str = ""  # of all words sent: the rubric's file and the labels in the requests
    judge_version: str = ""  # model and system fingerprint that the endpoint reported
