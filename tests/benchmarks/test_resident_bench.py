"""What a resident stretch saves: start-up, waiting for the judge, ranks that wait for each other, bytes."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from layerloop.components.generate_rollouts.plan import plan_iteration
from layerloop.components.generate_rollouts.sharing import share_batches
from layerloop.components.runtime.balance import forward_cost
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.shard_dataset.step import run as shard_dataset
from layerloop.components.train_stretch.step import run as train_stretch
from layerloop.components.update_lora.advantages import GroupAdvantage
from layerloop.components.update_lora.plan import candidates_of, plan_steps
from layerloop.components.update_lora.trajectories import reader_of
from layerloop.pipelines.demo import make_pictures, reference_judge
from layerloop.pipelines.inputs import absolute, packaged_recipes
from layerloop.pipelines.local import LocalRun, run_pipeline
from layerloop.pipelines.packages import write_pipeline
from layerloop.pipelines.train import train_pipeline

from .test_judge_bench import server

PAPER = parse_recipe(packaged_recipes()["paper"])
ITERATIONS = 3
ROUNDS = 3
TOKENS = 1600  # of a frame of 640 x 640 pixels
CANDIDATE_BYTES = 15e6  # of a candidate of 4 layers at 640 pixels, nearly proportional to its frames


@pytest.mark.timeout(1800)
def test_rank_balance(record_benchmark: Callable[[str, float], None]) -> None:
    """Makespan over mean of an iteration's sampling, the worst of 200 iterations of the paper's recipe and 2 to 32
    ranks."""
    planned = [plan_iteration(PAPER, iteration, PAPER.rollout.groups) for iteration in range(1, 201)]
    plans = {
        tuple(sorted(group.layers for group in plan)): plan for plan in planned
    }.values()  # what makes a difference

    def worst(ranks: int) -> float:
        return max(makespan(plan, ranks) for plan in plans)

    record_benchmark("rank_balance_worst_64", worst(64))
    found = max(worst(ranks) for ranks in range(2, 33))
    record_benchmark("rank_balance_worst", found)
    assert found <= 1.05


def makespan(plan: list, ranks: int) -> float:  # type: ignore[type-arg]
    tokens = {group.group: TOKENS for group in plan}
    shares = share_batches(plan, tokens, PAPER.rollout, width=3072, batch_size=1, ranks=ranks)
    layers = {group.group: group.layers for group in plan}
    loads = [
        sum(forward_cost(layers[batch.group]) * len(batch.candidates) for batch in mine) for mine in shares.batches
    ]
    return max(loads) / statistics.mean(loads)


@pytest.mark.timeout(1800)
def test_update_fetches(record_benchmark: Callable[[str, float], None]) -> None:
    """Bytes that the busiest of 8 ranks fetches for an update of the paper's recipe, over an equal share of the bytes
    that are learned from; the mean over 200 iterations."""
    factors = []
    for iteration in range(1, 201):
        plan = plan_iteration(PAPER, iteration, PAPER.rollout.groups)
        size = PAPER.rollout.group_size
        groups = [GroupAdvantage(p.group, p.layers, tuple(range(size)), (1.0,) * size) for p in plan]
        steps = plan_steps(groups, steps=2, timesteps=4, microbatch=1, ranks=8, pad=False)
        manifests = {p.group: manifest_of(p.group, int(size * CANDIDATE_BYTES * (p.layers + 1) / 5)) for p in plan}
        readers = reader_of(manifests, [candidates_of(steps, rank) for rank in range(8)])
        fetched = [sum(manifests[g].shards[0].bytes for g, reader in readers.items() if reader == r) for r in range(8)]
        factors.append(max(fetched) / statistics.mean(fetched))
    record_benchmark("update_fetch_factor", statistics.mean(factors))
    assert statistics.mean(factors) <= 1.3


def manifest_of(group: int, size: int) -> Manifest:
    shard = Shard(name=f"g{group}.tar", bytes=size, sha256="0" * 64, samples=17)
    return Manifest(kind="rollouts", iteration=1, shards=(shard,))


@pytest.mark.timeout(3600)
def test_resident_speedup(tmp_path: Path, record_benchmark: Callable[[str, float], None]) -> None:
    """The demo's iterations, every step a process, over the same iterations in a resident stretch."""
    seconds = {resident: trained(tmp_path / str(resident), resident=resident) for resident in (False, True)}
    record_benchmark("resident_iteration_seconds", seconds[True] / ITERATIONS)
    record_benchmark("resident_speedup", seconds[False] / seconds[True])
    assert seconds[False] / seconds[True] >= 1.7


def trained(folder: Path, *, resident: bool) -> float:
    """Seconds from the start of the first iteration to the end of the last."""
    images, _ = make_pictures(folder)
    recipe = packaged_recipes()["demo"]
    with reference_judge(folder / "judge.log") as judge_url:
        pipeline = train_pipeline(iterations=ITERATIONS, workers=2, recipe=recipe, evaluate="never", resident=resident)
        arguments = {"campaign": absolute(str(folder / "campaign")), "images": str(images), "judge_url": judge_url}
        package = write_pipeline(pipeline, folder / "pipeline.yaml")
        run = run_pipeline(package, arguments, folder=folder / "run", processes=2)
    return duration(run)


def duration(run: LocalRun) -> float:
    training = [step for step in run.steps if step.step not in ("shard_dataset", "publish_adapter")]
    return max(step.began + step.seconds for step in training) - min(step.began for step in training)


@pytest.mark.timeout(3600)
def test_the_judge_is_hidden_behind_the_sampler(tmp_path: Path, record_benchmark: Callable[[str, float], None]) -> None:
    """Share of the judge's service time in which no rank waits for it, the median of ROUNDS.

    In each round the judge first answers at once, then sleeps, eight requests at a time, for as long in all as sampling
    took before. Candidates are sampled one by one, as the 20 B base is by default. What the iteration takes more with
    the slow judge is printed: it is the waiting, and what two runs on one machine differ by.
    """
    begun = tmp_path / "begun"
    recipe = parse_recipe(packaged_recipes()["tiny"]).model_dump(mode="json")
    recipe["judge"] |= {"model": "bench", "canaries": False}
    images, _ = make_pictures(tmp_path)
    shard_dataset(campaign=str(begun), recipe=json.dumps(recipe), images=str(images))

    def iteration(name: str, service: float) -> tuple[dict[str, float], int]:
        campaign = shutil.copytree(begun, tmp_path / name)
        runtime = json.dumps({"rollout": {"batch_size": 1}})
        with server(8, service) as url:
            metrics = train_stretch(campaign=str(campaign), iterations=1, judge_url=url, runtime=runtime).metrics
        return metrics, len(list((campaign / "iterations/000001/scores/replies").glob("*.json")))

    iteration("warm-up", 0.0)
    hidden = []
    for number in range(ROUNDS):
        quick, requests = iteration(f"quick-{number}", 0.0)
        service = quick["sampling_seconds"]
        slow, _ = iteration(f"slow-{number}", 8 * service / requests)
        hidden.append(1 - slow["waiting_seconds"] / service)
        more, beside = slow["seconds"] - quick["seconds"], slow["sampling_seconds"]
        print(f"{requests} requests, {service:.1f} s of service, {beside:.1f} s of sampling beside it")
        print(f"{slow['waiting_seconds']:.1f} s of waiting; {more:.1f} s more in all")
    record_benchmark("judge_hidden_fraction", statistics.median(hidden))
    assert statistics.median(hidden) >= 0.75
