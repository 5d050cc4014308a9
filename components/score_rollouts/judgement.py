"""State of one candidate while it is judged: its images, and the scores so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerloop.components.judge.images import CandidateImages, candidate_images, fitted
from layerloop.components.layers.flags import flags_of
from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.storage.groups import Candidate

Scores = dict[str, float]  # criterion -> [0, 1]


@dataclass
class Judgement:
    """Scores of one candidate so far; `reason` says why it is masked."""

    candidate: Candidate
    penalty: float = 0.0
    samples: list[Scores] = field(default_factory=list)  # phase 1, one per sample
    phase1: Scores | None = None
    phase2: Scores | None = None
    repeats: list[Scores] = field(default_factory=list)  # phase 2, one per repeat
    reason: str | None = None

    @property
    def independent(self) -> list[Scores]:
        """Scores that the judge gave independently of each other: repeats of phase 2, else samples of phase 1."""
        return self.repeats if len(self.repeats) > 1 else self.samples


@dataclass(frozen=True)
class Prepared:
    """A candidate as it is shown: images for phase 1, layers `(L, h, w, 4)` at the size of a grid's cell, penalty."""

    images: CandidateImages
    cells: Pixels | None  # None without phase 2
    penalty: float


def prepare(image: Pixels, stack: Pixels, recipe: JudgeRecipe) -> Prepared:
    """Images of a candidate `stack[L, H, W, 4]` of `image[H, W, 4]`, for both phases, and the rule-based penalty."""
    penalty = 0.0
    if recipe.artifact_penalty:
        penalty = recipe.artifact_penalty * float(flags_of(stack, image).bad.mean())
    sized = fitted(stack, recipe.resolution)
    cells = None
    if recipe.phase2.enabled:
        # From the original where a cell is larger than the image, so that nothing is enlarged that was reduced.
        cells = fitted(stack if recipe.phase2.resolution > recipe.resolution else sized, recipe.phase2.resolution)
    return Prepared(candidate_images(sized, recipe.backdrops), cells, penalty)
