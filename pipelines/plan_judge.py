"""What an iteration asks the judge: its requests are made by the judge's methods, with images that hold nothing, so
that words and counts are those that are sent."""

from __future__ import annotations

import dataclasses
import math
import random

from layerloop.components.judge.canaries import COMPARED, GRADES, ORDERS
from layerloop.components.judge.canaries import LAYERS as CANARY_LAYERS
from layerloop.components.judge.canaries import SIDE as CANARY_SIDE
from layerloop.components.judge.grids import Layout
from layerloop.components.judge.images import CandidateImages, EncodedImage
from layerloop.components.judge.methods import PHASE1, PHASE2, grid, rubric_of
from layerloop.components.judge.methods.method import PhaseTwoMethod
from layerloop.components.judge.requests import Request
from layerloop.components.schema.runtime import PriceRuntime
from layerloop.pipelines.plan_work import Assumptions, Work

NOTHING = EncodedImage(b"")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Requests of one iteration, and tokens of all that is sent and of all that comes back."""

    requests: float
    input_tokens: float
    output_tokens: float

    def seconds(self, assumed: Assumptions) -> float:
        """That the judge takes for them, all its replicas at work."""
        return self.input_tokens / assumed.judge_tokens_per_second / assumed.judge_replicas

    def cost(self, price: PriceRuntime) -> float:
        """In the currency of the prices."""
        return (self.input_tokens * price.input + self.output_tokens * price.output) / 1e6


def asked(work: Work) -> Asked:
    """Of one iteration, with nothing asked twice."""
    rollout, samples = work.recipe.rollout, work.recipe.judge.samples
    height, width = work.sides()
    per_layers = []
    for layers in work.layers:
        first, second = _first(work, (layers, height, width)), _second(work, (layers, height, width))
        per_layers.append([rollout.group_size * samples * x + y for x, y in zip(first, second, strict=True)])
    groups = [rollout.groups * sum(column) / len(per_layers) for column in zip(*per_layers, strict=True)]
    return Asked(*(group + canary for group, canary in zip(groups, _canaries(work), strict=True)))


def _fitted(height: int, width: int, longest: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _image_tokens(work: Work, height: int, width: int) -> int:
    patch = work.assumed.judge_patch_pixels
    return math.ceil(height / patch) * math.ceil(width / patch)


def _text_tokens(work: Work, request: Request) -> float:
    words = len(request.system) + sum(len(part) for part in request.parts if isinstance(part, str))
    return words / work.assumed.characters_per_token


def _reply_tokens(work: Work, request: Request) -> int:
    seen = 80 if work.recipe.judge.observations else 0  # "at most 60 words"
    return seen + request.rows * len(request.names) * work.assumed.reply_tokens_per_score


def _first(work: Work, shape: tuple[int, int, int]) -> tuple[float, float, float]:
    """(requests, input, output tokens) about one candidate of `shape` (L, H, W), alone."""
    judge = work.recipe.judge
    shown: dict[str, tuple[EncodedImage, ...]] = dict.fromkeys(judge.backdrops, (NOTHING,) * shape[0])
    request = PHASE1[judge.method].request(rubric_of(judge), NOTHING, CandidateImages(NOTHING, shown), judge, label="")
    image = _image_tokens(work, *_fitted(shape[1], shape[2], judge.resolution))
    return 1, request.images * image + _text_tokens(work, request), _reply_tokens(work, request)


def _second(work: Work, shape: tuple[int, int, int]) -> tuple[float, float, float]:
    """The same of one group's comparisons."""
    judge, size = work.recipe.judge, work.recipe.rollout.group_size
    if not judge.phase2.enabled:
        return 0, 0, 0
    method = PHASE2[judge.phase2.method]
    cell = _fitted(shape[1], shape[2], judge.phase2.resolution)
    total = [0.0, 0.0, 0.0]
    for order in method.plan(range(size), (shape[0], *cell), judge.phase2, random.Random(0)):
        tokens = _compared(work, method, len(order), shape, cell)
        total = [x + judge.phase2.repeats * y for x, y in zip(total, tokens, strict=True)]
    return total[0], total[1], total[2]


def _compared(
    work: Work, method: PhaseTwoMethod, rows: int, shape: tuple[int, int, int], cell: tuple[int, int]
) -> tuple[float, float, float]:
    """One comparison of `rows` candidates."""
    judge = work.recipe.judge
    rubric = rubric_of(judge)
    request = method.request(
        rubric, NOTHING, dict.fromkeys(judge.backdrops, NOTHING), judge,
        phase1=[dict.fromkeys(rubric.names, 0.5)] * rows, layers=shape[0], label="",
    )  # fmt: skip
    width, height = Layout(rows, shape[0] + 1, *cell).size
    source = _image_tokens(work, *_fitted(shape[1], shape[2], judge.resolution))
    images = source + (request.images - 1) * _image_tokens(work, height, width)
    return 1, images + _text_tokens(work, request), _reply_tokens(work, request)


def _canaries(work: Work) -> tuple[float, float, float]:
    judge = work.recipe.judge
    if not judge.canaries:
        return 0, 0, 0
    shape = (CANARY_LAYERS, CANARY_SIDE, CANARY_SIDE)
    first = [len(GRADES) * x for x in _first(work, shape)]
    if not judge.phase2.enabled:
        return first[0], first[1], first[2]
    cell = _fitted(CANARY_SIDE, CANARY_SIDE, judge.phase2.resolution)
    second = [len(ORDERS) * x for x in _compared(work, grid, len(COMPARED), shape, cell)]
    return first[0] + second[0], first[1] + second[1], first[2] + second[2]
