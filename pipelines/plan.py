"""`layerloop plan`: what a recipe costs on a cluster, by arithmetic, before anything runs.

Work is counted in operations of the transformer (policy/size.py). It becomes time by one rate, the operations that a
GPU does in a second; everything else that takes time is an assumption of its own, printed and settable. Nothing here
was measured on a GPU, and every text says so.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Mapping, Sequence

from layerloop.components.runtime.balance import share
from layerloop.pipelines.plan_work import Assumptions, Work


@dataclasses.dataclass(frozen=True)
class Gpus:
    """GPUs of an iteration: `workers` rollout pods of `each`, one update pod of `update`, evaluation on `evaluate`; and
    those of the one that does whole iterations where a run is resident."""

    workers: int
    each: int
    update: int
    evaluate: int
    resident: int

    @property
    def total(self) -> int:
        """GPUs that are needed at once, step by step."""
        return max(self.workers * self.each, self.update)


# ---- sharing work


def longest_first(costs: Sequence[float], ranks: int) -> float:
    """The busiest rank's load when each item, the longest first, goes to the least loaded rank."""
    load = [0.0] * ranks  # a heap
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(load, load[0] + cost)
    return max(load)


def dealt_by_index(costs: Sequence[float], workers: int, each: int) -> float:
    """The busiest rank's load when groups go by their number to workers, and a worker's to its ranks."""
    return max(sum(costs[worker::workers][rank::each]) for worker in range(workers) for rank in range(each))


def mean_over(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each key's mean."""
    return {key: sum(draw[key] for draw in draws) / len(draws) for key in draws[0]}


# ---- time


@dataclasses.dataclass(frozen=True)
class Iteration:
    """Seconds of one iteration by what the clock is spent on, and the GPUs' share in it."""

    way: str
    gpus: int
    seconds: Mapping[str, float]  # they add up to the whole
    computing: float  # GPU-seconds of operations

    @property
    def wall(self) -> float:
        """Seconds from one policy to the next."""
        return sum(self.seconds.values())

    @property
    def busy(self) -> float:
        """Share of all GPUs' time in which they compute."""
        return self.computing / (self.gpus * self.wall)


def step_by_step(work: Work, gpus: Gpus, judge_seconds: float) -> Iteration:
    """Every step a pod, one after the other:

    3 pods' starts + 2 loads + the busiest rank's sampling + judge + the busiest rank's update + store. Workers
    share groups by their cost.
    """
    given, rate = work.assumed, work.assumed.tflops
    size, per_step = work.recipe.rollout.group_size, work.recipe.update.steps
    draws = []
    for layers in work.drawn():
        costs = [work.candidate(count) / rate for count in layers]
        update = _update_seconds(work, layers, gpus.update, per_step)
        if given.share_candidates:
            sampling = max(
                longest_first([costs[group] for group in mine for _ in range(size)], gpus.each)
                for mine in share(costs, gpus.workers)
            )
        else:
            sampling = dealt_by_index([size * cost for cost in costs], gpus.workers, gpus.each)
        draws.append({"sampling": sampling, "update": update, "computing": _computing(work, layers)})
    times = mean_over(draws)
    seconds = {
        "pods": 3 * given.pod_seconds, "loading": 2 * load_seconds(work), "sampling": times["sampling"],
        "judge": judge_seconds, "update": times["update"], "store": given.store_seconds,
    }  # fmt: skip
    return Iteration("step by step", gpus.total, seconds, times["computing"])


def resident(work: Work, gpus: int, judge_seconds: float, *, lag: int = 0) -> Iteration:
    """One rank a GPU with the base loaded once a stretch; candidates are shared, and a group is judged as soon as it is
    sampled.

    judged = max(sampling + 2 latencies, first group + judge); wall = start/n + judged + update + store.

    With a lag of one iteration, sampling and update follow each other, and while they do the judge has the iteration
    that is sampled already:
    start/n + max(sampling + update, judge + 2 latencies) + store, with anchors for all points, since another policy
    sampled.
    """
    given = work.assumed
    tail = 2 * given.judge_latency_seconds if judge_seconds else 0.0
    draws = []
    for drawn in _shared(work, gpus, lag > 0):
        if lag:
            waiting = max(0.0, judge_seconds + tail - drawn.sampling - drawn.update)
        else:
            waiting = max(drawn.sampling + tail, drawn.first + judge_seconds) - drawn.sampling
        draws.append(
            {
                "sampling": drawn.sampling, "judge": waiting, "update": drawn.update, "computing": drawn.computing,
            }
        )  # fmt: skip
    times = mean_over(draws)
    computing = times.pop("computing")
    start = (given.pod_seconds + load_seconds(work)) / given.iterations_per_stretch
    seconds = {"start": start, **times, "store": given.sync_seconds}
    return Iteration(f"resident, lag {lag}" if lag else "resident", gpus, seconds, computing)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Seconds of one drawn iteration whose candidates and points all ranks share: of sampling, of its first group, of
    the update with its anchors; and GPU-seconds of operations."""

    sampling: float
    first: float
    update: float
    computing: float


@functools.lru_cache(maxsize=64)
def _shared(work: Work, gpus: int, all_anchors: bool) -> tuple[Drawn, ...]:
    rate, size = work.assumed.tflops, work.recipe.rollout.group_size
    return tuple(
        Drawn(
            sampling=longest_first([work.candidate(count) / rate for count in layers for _ in range(size)], gpus),
            first=-(-size // gpus) * work.candidate(max(layers)) / rate,
            update=_update_seconds(work, layers, gpus, work.recipe.update.steps, all_anchors=all_anchors),
            computing=_computing(work, layers, all_anchors=all_anchors),
        )
        for layers in work.drawn()
    )


def _computing(work: Work, layers: Sequence[int], *, all_anchors: bool = False) -> float:
    """GPU-seconds of all operations of an iteration whose groups have these layer counts."""
    rate, size = work.assumed.tflops, work.recipe.rollout.group_size
    steps = min(work.recipe.update.steps, len(layers))
    total = sum(size * (work.candidate(count) + work.points * work.point(count)) for count in layers)
    for step in range(steps):
        if (all_anchors or step > 0) and not work.keeps_velocities:
            total += sum(size * work.points * work.forward(count) for count in layers[step::steps])
    return total / rate


def _update_seconds(work: Work, layers: Sequence[int], gpus: int, steps: int, *, all_anchors: bool = False) -> float:
    """Of all optimizer steps, each as long as its busiest rank, with the anchors of the points."""
    points = work.recipe.rollout.group_size * work.points
    total = 0.0
    for step in range(min(steps, len(layers))):
        anchored = (all_anchors or step > 0) and not work.keeps_velocities
        costs = [
            (work.point(count) + anchored * work.forward(count)) / work.assumed.tflops
            for count in layers[step::steps]
            for _ in range(points)
        ]
        total += longest_first(costs, gpus)
    return total


def load_seconds(work: Work) -> float:
    """Of the transformer and the autoencoder (0.25 GB) from cold storage; float8 is cast from what is read."""
    read = work.size.base_bytes(dtype=work.recipe.model.dtype, float8=False) + 0.25e9
    return read / 1e9 / work.assumed.load_gb_per_second


def evaluation_hours(work: Work, gpus: int) -> float:
    """Of one model."""
    return work.evaluated_model() / work.assumed.tflops / gpus / 3600


def pods(given: Assumptions, gpus: Gpus, *, way: str, gpus_per_node: int) -> int:
    """Container tasks of the campaign, each a driver's pod and its own."""
    if way == "step by step":
        runs = math.ceil(given.iterations / given.iterations_per_run)
        return runs + given.iterations * (gpus.workers + 2) + 2
    stretches = math.ceil(given.iterations / given.iterations_per_stretch)
    return stretches * (1 + math.ceil(gpus.resident / gpus_per_node)) + 2
