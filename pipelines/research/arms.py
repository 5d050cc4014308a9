"""What a study runs: its arms, each a change of one recipe, and a campaign for every seed of an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerloop.components.reference_judge.identity import FINE
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe

LAYERS = (2, 3, 4)  # of the designs, in turn


@dataclass(frozen=True)
class Arm:
    """One way to learn: what it changes of the study's recipe, and with how many seeds it is run."""

    what: str
    seeds: int
    changes: Mapping[str, Any]
    samplers: bool = False  # whether its evaluation compares samplers too (`evaluations/samplers-*/samplers.json`)


@dataclass(frozen=True)
class Run:
    """One campaign of a study."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


# `mean` has its own clip: its log-ratios are smaller than those of `sum_rescale` by about s sqrt(D) (D = 3,072 to 6,144
# here), so the same number would never clip.
ARMS: dict[str, Arm] = {
    "full": Arm(
        "the whole method: two phases, sum-and-rescale RatioNorm, CPS noise in the first steps", 5, {}, samplers=True
    ),
    "phase1_only": Arm("without the side-by-side phase", 5, {"judge": {"phase2": {"enabled": False}}}),
    "mean_ratio": Arm(
        "Flow-GRPO's mean log-ratio instead of sum-and-rescale", 3,
        {"update": {"ratio_norm": "mean", "clip_low": 3e-4, "clip_high": 3e-4}},
    ),
    "nft": Arm("DiffusionNFT on deterministic rollouts", 3, {"update": {"algorithm": "nft"}}, samplers=True),
    # for the sampler that people use: does the gain hold at Euler 20?
    "grpo_euler_20": Arm(
        "rollouts of 20 steps, Euler's outside the window", 1,
        {"rollout": {"outside": "euler", "steps": 20}}, samplers=True,
    ),
    "nft_euler_20": Arm(
        "DiffusionNFT on rollouts of 20 Euler steps", 1,
        {"update": {"algorithm": "nft"}, "rollout": {"whole": "euler", "steps": 20}}, samplers=True,
    ),
    "window_middle": Arm("window over steps 2 to 5", 1, {"rollout": {"window": {"start": 2}}}),
    "window_late": Arm(
        "window over the last stochastic steps, shared prefix", 1,
        {"rollout": {"window": {"start": 3}, "share_prefix": True}},
    ),
    "eta_low": Arm("noise level 0.4", 1, {"rollout": {"noise": {"eta": 0.4}}}),
    "eta_high": Arm("noise level 0.9", 1, {"rollout": {"noise": {"eta": 0.9}}}),
    "flow_sde": Arm("Flow-SDE noise of level 1.0", 1, {"rollout": {"noise": {"dynamics": "flow_sde", "eta": 1.0}}}),
    # what the second evaluation of the transformer buys in the steps that no noise enters
    "heun_outside": Arm("Heun's steps outside the window, not Euler's", 3, {"rollout": {"outside": "heun"}}),
    "half_resolution": Arm("sampled and learnt from at half the side", 3, {"rollout": {"resolution": 32}}),
    "lag": Arm("sampled by the policy of one iteration earlier", 3, {"rollout": {"lag": 1}}),
    "full_fine": Arm("the whole method, with a judge that is fine alone too", 3, {"judge": {"model": FINE}}),
    "phase1_fine": Arm(
        "without the side-by-side phase, with a judge that is fine alone too", 3,
        {"judge": {"model": FINE, "phase2": {"enabled": False}}},
    ),
    "shipped_base": Arm("the tiny policy as it ships, which has few faults to unlearn", 1, {"model": {"base": "tiny"}}),
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Where a study lives and what it covers."""

    folder: Path
    recipe: str  # YAML text of the arm `full`
    iterations: int
    images: Path
    designs: Path
    judge_urls: Mapping[str, str]  # model -> base URL

    def recipe_of(self, run: Run) -> str:
        """YAML of a run's recipe: the study's, changed by the arm, with the run's seed.

        Raises:
            LayerloopError: the result is not a valid recipe.
        """
        text = yaml.safe_dump(merged(yaml.safe_load(self.recipe) | {"seed": run.seed}, ARMS[run.arm].changes))
        parse_recipe(text)
        return text

    def campaign(self, run: Run) -> Path:
        return self.folder / run.name

    def done(self, run: Run) -> bool:
        """Whether a run has its evaluation."""
        return (self.campaign(run) / "evaluations" / f"iteration-{self.iterations:06d}" / "manifest.json").exists()


def plan(arms: Sequence[str]) -> list[Run]:
    """All runs, first seeds first, so that a study that is cut short compares arms on equal terms.

    Raises:
        LayerloopError: an arm is unknown.
    """
    for arm in arms:
        if arm not in ARMS:
            raise LayerloopError(f"arm {arm} is not known: choose from {', '.join(ARMS)}")
    runs = [Run(arm, seed) for arm in arms for seed in range(ARMS[arm].seeds)]
    return sorted(runs, key=lambda run: (run.seed, arms.index(run.arm)))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner or {}, value) if isinstance(value, Mapping) else value
    return result
