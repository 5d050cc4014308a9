"""Outcomes of a study, read from what the steps committed: evaluations' metrics.json and scores.parquet."""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerloop.components.layers.columns import DEFINITIONS, changed_definitions, quoted
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.inference import Inference
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.manifests import read_file
from layerloop.pipelines.research.arms import Run, Study

REWARD_STD = "reward_std"
TIED = 1e-4  # deviation below which a group's rewards are all the same
# Two-sided 95 % quantile of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Spread:
    """How rewards differ within groups, averaged over the groups of an iteration."""

    alone: float  # standard deviation of the phase-1 reward
    used: float  # of the reward that the advantages are made of
    tied: float  # share of groups whose phase-1 rewards are all the same
    agreement: float  # correlation of the two


@dataclass(frozen=True)
class Sampled:
    """Base and tuned policy by one way of sampling."""

    measures: Mapping[str, tuple[float, float]]  # measure -> (base, tuned)
    clear: frozenset[str]  # the measures that differ clearly
    safe: bool | None  # no measure clearly worse than the base's, nor than by the reference sampler


@dataclass(frozen=True)
class Outcome:
    """One finished run, and its rewards by iteration."""

    run: Run
    metrics: Mapping[str, tuple[float, float]]  # measure, or REWARD_STD -> (base, tuned)
    curve: Sequence[tuple[int, float]]  # (iteration, mean phase-1 reward)
    spreads: Sequence[Spread]  # by iteration
    samplers: Mapping[str, Sampled]  # name of the setting -> what came of it; empty where they were not compared

    @property
    def measures(self) -> list[str]:
        """What the study quotes of the evaluation: measures, one for each layer count where they are compared so."""
        return [name for name in self.metrics if name != REWARD_STD]


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with a 95 % t-interval; `half` is None for a single seed."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        mean = f"{self.mean:.4f}".replace("-0.0000", "0.0000")
        return mean if self.half is None else f"{mean} ± {self.half:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """Student's 95 % confidence interval of the mean of independent seeds."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Interval(mean, None, n)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, STUDENT.get(n - 1, 1.96) * deviation / math.sqrt(n), n)


def outcome(study: Study, run: Run) -> Outcome:
    """Read one finished run.

    Raises:
        LayerloopError: its evaluation lacks a measure that the study quotes, or has another definition of it.
    """
    import pyarrow.parquet as pq

    campaign = Campaign.open(str(study.campaign(run)))
    evaluation = campaign.evaluation_dir(f"iteration-{study.iterations:06d}")
    evaluated = campaign.find(evaluation)
    if evaluated is None:
        raise LayerloopError(f"{campaign.uri}/{evaluation} is not committed: run the study again")
    metrics = json.loads(read_file(campaign.store, evaluated.file("metrics.json")))
    found = {}
    remedy = f"remove {campaign.uri}/{evaluation} and run the study again"
    for name in _quoted_in(metrics):
        if (comparison := metrics.get(f"designs.{name}")) is None:
            raise LayerloopError(f"{run.name} lacks {name}, which the study quotes: {remedy}")
        column = name.partition(".")[0]
        if changed_definitions(column, metrics["definitions"], DEFINITIONS):
            raise LayerloopError(f"{run.name} was measured by another definition of {column}: {remedy}")
        found[name] = (float(comparison["base"]), float(comparison["tuned"]))
    curve, spreads = [], []
    for iteration in range(1, study.iterations + 1):
        scores = campaign.scores(iteration).file("scores.parquet")
        table = pq.read_table(io.BytesIO(read_file(campaign.store, scores)))
        rows = [row for row in table.to_pylist() if row["reward"] is not None]
        alone = [row["reward_phase1"] for row in rows]
        curve.append((iteration, sum(alone) / len(alone)))
        spreads.append(_spread(rows))
    found[REWARD_STD] = (mean([spread.alone for spread in spreads]), mean([spread.used for spread in spreads]))
    samplers = campaign.find(campaign.evaluation_dir(f"samplers-{study.iterations:06d}"))
    compared = json.loads(read_file(campaign.store, samplers.file("samplers.json"))) if samplers else None
    return Outcome(run, found, curve, spreads, _sampled(compared))


def _sampled(table: Mapping[str, Any] | None) -> dict[str, Sampled]:
    found = {}
    for setting in table["settings"] if table else ():
        how = Inference(setting["steps"], setting["sampler"], setting["guidance"])
        measures = {name: (float(c["base"]), float(c["tuned"])) for name, c in setting["measures"].items()}
        clear = frozenset(name for name, c in setting["measures"].items() if c["clear"])
        found[how.name] = Sampled(measures, clear, setting["safe"])
    return found


def _quoted_in(metrics: Mapping[str, Any]) -> list[str]:
    """The quoted measures; of those that are compared by layer count too, such as slot_l1, `slot_l1.L2` and so on."""
    names = []
    for name in quoted("study"):
        by_count = sorted(
            key.removeprefix("designs.") for key in metrics if re.fullmatch(rf"designs\.{name}\.L\d+", key)
        )
        names += by_count or [name]
    return names


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(rows: Sequence[Mapping[str, Any]]) -> Spread:
    groups: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append((row["reward_phase1"], row["reward"]))
    alone, used, agreement = [], [], []
    for pairs in groups.values():
        first, final = ([pair[column] for pair in pairs] for column in (0, 1))
        alone.append(statistics.pstdev(first))
        used.append(statistics.pstdev(final))
        if min(alone[-1], used[-1]) >= TIED:
            agreement.append(statistics.correlation(first, final))
    tied = [float(deviation < TIED) for deviation in alone]
    return Spread(mean(alone), mean(used), mean(tied), mean(agreement) if agreement else 0.0)
