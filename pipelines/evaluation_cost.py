"""What an evaluation costs, said before it is scheduled, and a deadline that it can keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.inference import COMPARED, COMPARED_CASES, Inference
from layerloop.components.schema.recipe import Recipe, parse_recipe
from layerloop.pipelines.cluster import Cluster

STEP = "evaluate_adapter"
MODELS = 2  # base and adapter; the base's decompositions are kept, so only a campaign's first evaluation pays both
RESOLUTION = 640  # pixels, for which cluster.forward_seconds is given
MARGIN = 2.0  # of the estimate, for slower GPUs and for measuring
LEAST_HOURS = 2.0  # loading the base, measures, contact sheets


@dataclass(frozen=True)
class EvaluationCost:
    """Forwards of the transformer that one evaluation takes, as an upper bound: sources may hold fewer designs."""

    designs: int
    images: int
    forwards: int
    gpus: int
    hours: float
    samplers: bool = False  # whether a comparison of samplers is among them

    @classmethod
    def of(cls, recipe: Recipe, cluster: Cluster, *, samplers: bool = False) -> EvaluationCost:
        """Heun takes two forwards a step, and one in the last; a comparison of `samplers` takes those of all of them,
        on some of the cases. A forward's seconds grow with the tokens, so with the square of the resolution;
        `cluster.forward_seconds` is 0.32 by default: Qwen-Image-Layered at 640 pixels on an H100, from the published
        figure of vllm-omni's CI (40 forwards with guidance in 14.2 s, without loading)."""
        wanted = recipe.evaluation
        forwards = (wanted.designs + wanted.pictures) * Inference(wanted.steps).calls * MODELS
        if samplers:
            compared = sum(min(most, getattr(wanted, kind)) for kind, most in COMPARED_CASES.items())
            forwards += compared * sum(how.calls for how in COMPARED) * MODELS
        seconds = cluster.forward_seconds * (recipe.data.resolution / RESOLUTION) ** 2
        gpus = max(1, cluster.gpus_of(STEP))
        return cls(wanted.designs, wanted.pictures, forwards, gpus, forwards * seconds / gpus / 3600, samplers)

    def __str__(self) -> str:
        what = ", samplers compared," if self.samplers else ""
        return (
            f"{self.designs} designs + {self.images} images{what} are {self.forwards} forwards of base and adapter, "
            f"about {self.hours:.1f} h on {self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        )


def with_evaluation_deadline(cluster: Cluster, recipe: str, *, samplers: bool = False) -> Cluster:
    """The cluster with a deadline for evaluate_adapter that the recipe's evaluation fits, with `samplers` a comparison
    of samplers too; one that the file sets stays.

    Raises:
        LayerloopError: the deadline that the file sets is shorter than the estimate without samplers.
    """
    parsed, own = parse_recipe(recipe), cluster.own_hours(STEP)
    if own is None:
        hours = _deadline(EvaluationCost.of(parsed, cluster, samplers=samplers))
        return cluster.model_copy(update={"timeout_hours": {**cluster.timeout_hours, STEP: hours}})
    cost = EvaluationCost.of(parsed, cluster)
    if own < cost.hours:
        raise LayerloopError(
            f"evaluation does not fit its deadline: {cost} at {cluster.forward_seconds:g} s a forward, but "
            f"cluster.timeout_hours.{STEP} is {own:g}: give it {_deadline(cost):g}, more evaluate_gpus, or fewer "
            "recipe.evaluation.designs"
        )
    return cluster


def _deadline(cost: EvaluationCost) -> float:
    return float(math.ceil(LEAST_HOURS + MARGIN * cost.hours))
