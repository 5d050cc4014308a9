"""Recipe section of the judge, and the score rows it produces."""

from __future__ import annotations

from pydantic import Field

from layerloop.components.schema.record import Record


class PhaseTwoRecipe(Record):
    """Side-by-side re-scoring of a group in grids."""

    enabled: bool = True
    repeats: int = Field(default=1, ge=1)  # passes over the group, each in another shuffled order, averaged


class JudgeRecipe(Record):
    """How candidates are judged. The URL and the key are not here: they belong to the place, not to the campaign."""

    model: str = "layerloop-reference-judge"
    rubric: str = "default"
    resolution: int = Field(default=256, ge=32)  # longest side of an image shown to the judge, pixels
    concurrency: int = Field(default=16, ge=1)
    timeout_seconds: float = Field(default=120.0, gt=0)
    retries: int = Field(default=4, ge=0)
    min_valid: int = Field(default=2, ge=2)  # valid candidates a group needs
    max_dropped_fraction: float = Field(default=0.25, ge=0, le=1)  # of groups; more fails the step
    phase2: PhaseTwoRecipe = PhaseTwoRecipe()


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
