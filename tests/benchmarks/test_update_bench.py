"""How fast an update is, against the loop that one would write first.

The baseline is Flow-GRPO's loop, one window step at a time, in two optimizer steps of half the groups each, on
diffusers' model with an adapter as peft computes it. Both halves go through stored log-probabilities; those are
computed beforehand in the shapes that the loop trains in, for log-probabilities kept from sampling in other shapes
would not give a first ratio of 1 in bfloat16. Ours packs candidates and window steps into forward passes of any size,
needs no second pass for the first half, and adds the adapter's product inside a matrix product. (It also leaves out
groups without a gradient; here every group has one.) The published flow_grpo keeps log-probabilities from sampling:
`update_speedup_kept` is that loop, the pass that stores them not counted, over ours with `rollout.keep_velocities`. All
take the same trajectories on the same tiny model, in turns, in one process, on one thread; what is compared is
processor time, so that other programs on the machine count little.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerloop.components.policy.lora import adapter_state, new_adapter, put_adapter
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.sampling import COEFFICIENTS, Plan, rollout
from layerloop.components.policy.tiny import build_tiny_pipeline
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.learning import LearnerState
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.trajectory import GroupRecord
from layerloop.components.update_lora.advantages import advantages_of
from layerloop.components.update_lora.algorithm import timesteps_of
from layerloop.components.update_lora.learner import learn
from layerloop.components.update_lora.plan import plan_steps
from layerloop.components.update_lora.state import TrainingState
from layerloop.components.update_lora.trajectories import Trajectories, Trajectory

GROUPS, G, SIZE = 6, 8, 64  # pixels: 16 tokens a frame
RECIPE = Recipe.model_validate(
    {
        "name": "bench",
        "model": {"base": "tiny", "dtype": "float32"},
        "rollout": {
            "groups": GROUPS, "group_size": G, "min_layers": 2, "max_layers": 4, "steps": 8, "outside": "euler",
            "window": {"size": 4, "start": 0}, "noise": {"eta": 0.8},
        },
        "update": {"ratio_norm": "mean", "reweight": False, "learning_rate": 1e-3, "steps": 2},
    }
)  # fmt: skip

KEPT = RECIPE.model_copy(update={"rollout": RECIPE.rollout.model_copy(update={"keep_velocities": True})})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh_policy() -> LayeredPolicy:
    pipeline = build_tiny_pipeline()
    policy = LayeredPolicy(transformer=pipeline.transformer, vae=pipeline.vae, scheduler=pipeline.scheduler)
    put_adapter(policy.transformer, new_adapter(policy.transformer, RECIPE.lora, seed=0))
    return policy


def peft_policy() -> LayeredPolicy:
    """The same policy, its adapted layers as peft makes them."""
    policy = fresh_policy()
    for module in policy.transformer.modules():
        vars(module).pop("forward", None)
    return policy


@pytest.fixture(scope="module")
def groups() -> dict[int, Trajectories]:
    """Rollouts of a random policy of the tiny model's size."""
    policy, wanted = fresh_policy(), RECIPE.rollout
    h, w = policy.tokens(SIZE, SIZE)
    found = {}
    for number in range(GROUPS):
        record = GroupRecord(
            iteration=1, group=number, image_key=f"image{number}", layers=2 + number % 3, group_size=G, height=SIZE,
            width=SIZE, latent_height=h, latent_width=w, sigmas=policy.sigmas(wanted.steps, SIZE, SIZE), window_start=0,
            window_size=wanted.window.size, dynamics="flow_sde", etas=(wanted.noise.eta,) * wanted.window.size,
            share_prefix=False, outside="euler", base_fingerprint="0" * 64, adapter_sha256=None,
        )  # fmt: skip
        image = np.random.default_rng(number).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
        condition = policy.encode(image, prompt())
        noise = torch.cat([policy.noise(100 * number + c, record.layers, SIZE, SIZE) for c in range(G)])
        generator = torch.Generator().manual_seed(number)
        done = rollout(
            policy, condition, noise, Plan.of(record),
            step_noise=lambda c, j: torch.randn(noise[:1].shape, generator=generator),  # noqa: B023 - used at once
        )  # fmt: skip
        trajectories = {c: Trajectory(c, done.window[c], done.velocities[c], int(done.rows[c])) for c in range(G)}
        found[number] = Trajectories(record, condition.latents[0], trajectories)
    return found


def prompt() -> torch.Tensor:
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(5))


def varied(group: int, candidate: int) -> float:
    return float(np.random.default_rng(1000 * group + candidate).uniform())


def ours(policy: LayeredPolicy, groups: dict[int, Trajectories]) -> float:
    return update_by(RECIPE, policy, groups)


def ours_with_kept_velocities(policy: LayeredPolicy, groups: dict[int, Trajectories]) -> float:
    return update_by(KEPT, policy, groups)


def update_by(recipe: Recipe, policy: LayeredPolicy, groups: dict[int, Trajectories]) -> float:
    update, kept = recipe.update, recipe.rollout.keep_velocities
    if not kept:
        groups = {
            g: replace(group, trajectories={c: replace(t, velocities=None) for c, t in group.trajectories.items()})
            for g, group in groups.items()
        }
    rows = [
        ScoreRow(
            iteration=1, group=g, candidate=c, image_key="", layers=group.record.layers, reward=varied(g, c),
            reason=None, phase1=None, phase2=None, judge="", rubric="", rubric_sha256="",
        )
        for g, group in groups.items()
        for c in range(G)
    ]  # fmt: skip
    steps = plan_steps(
        advantages_of(rows, update).groups,
        steps=update.steps, timesteps=timesteps_of(recipe), microbatch=16, ranks=1, pad=False, by_timestep=kept,
    )  # fmt: skip
    counters = LearnerState(iteration=1, algorithm="grpo", optimizer_steps=0, ema_steps=0)
    learn(policy, TrainingState(policy, update, counters), steps, groups, prompt(), recipe, iteration=1)
    return 0.0


def straightforward(policy: LayeredPolicy, groups: dict[int, Trajectories]) -> float:
    """Returns the processor seconds that went into log-probabilities to store."""
    update = RECIPE.update
    parameters = list(policy.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=update.learning_rate, weight_decay=update.weight_decay)

    def logp(group: Trajectories, j: int) -> torch.Tensor:
        record = group.record
        window = torch.stack([t.latents for t in group.trajectories.values()])
        condition = Condition(group.condition[None].expand(G, -1, -1), prompt()[None], SIZE, SIZE)
        i = record.window_start + j
        v = policy.velocity(window[:, j], record.sigmas[i], condition)
        a, b, s = COEFFICIENTS[record.dynamics](record.sigmas, i, record.etas[j])
        mean = a * window[:, j] + b * v
        density = -((window[:, j + 1] - mean) ** 2) / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi)
        return density.flatten(1).mean(dim=1)

    steps = range(RECIPE.rollout.window.size)
    started = time.process_time()
    with torch.no_grad():
        stored = {(g, j): logp(group, j) for g, group in groups.items() for j in steps}
    storing = time.process_time() - started
    for half in range(update.steps):
        members = [g for g in groups if g % update.steps == half]
        optimizer.zero_grad()
        for g in members:
            reward = torch.tensor([varied(g, c) for c in range(G)], dtype=torch.float64)
            advantages = ((reward - reward.mean()) / (reward.std(correction=0) + update.advantage_epsilon)).float()
            for j in steps:
                ratio = (logp(groups[g], j) - stored[g, j]).exp()
                clipped = ratio.clamp(1 - update.clip_low, 1 + update.clip_high)
                loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
                (loss / (len(members) * len(steps))).backward()
        torch.nn.utils.clip_grad_norm_(parameters, update.max_grad_norm)
        optimizer.step()
    return storing


LOOPS = {ours: fresh_policy, ours_with_kept_velocities: fresh_policy, straightforward: peft_policy}


@pytest.mark.timeout(1800)
def test_all_loops_take_the_same_two_steps(groups: dict[int, Trajectories]) -> None:
    """What is compared is the same work: the adapters are equal to rounding."""
    adapters = []
    for loop, make in LOOPS.items():
        policy = make()
        loop(policy, groups)
        adapters.append(adapter_state(policy.transformer))
    for other in adapters[1:]:
        differences = torch.cat([(adapters[0][key] - other[key]).abs().flatten() for key in adapters[0]])
        assert float(differences.mean()) < 0.02 * RECIPE.update.learning_rate
        assert float((differences < 0.1 * RECIPE.update.learning_rate).float().mean()) > 0.97


@pytest.mark.timeout(1800)
def test_update_speedup(groups: dict[int, Trajectories], record_benchmark: Callable[[str, float], None]) -> None:
    """Processor time of an iteration's update by the straightforward loop over ours: the median of seven turns, each of
    which runs the two side by side, so that what else the machine does meets both alike."""
    ratios, kept = [], []
    for turn in range(7):
        seconds, storing = {}, {}
        for loop, make in list(LOOPS.items())[:: -1 if turn % 2 else 1]:
            policy = make()
            started = time.process_time()
            storing[loop] = loop(policy, groups)
            seconds[loop] = time.process_time() - started
        ratios.append(seconds[straightforward] / seconds[ours])
        kept.append((seconds[straightforward] - storing[straightforward]) / seconds[ours_with_kept_velocities])
    speedup = statistics.median(ratios)
    record_benchmark("update_speedup", speedup)
    record_benchmark("update_speedup_kept", statistics.median(kept))
    assert speedup >= 1.3, ratios
    assert statistics.median(kept) >= 1.0, kept
