"""The step `update_lora`: group-relative advantages from the scores, gradients from the trajectories, optimizer steps
on the adapter, committed together with the optimizer's state.

Under torchrun every rank runs this; microbatches are distributed, gradients summed, and rank 0 writes.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from layerloop.components.policy.at import LoadedPolicy, policy_at
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import (
    broadcast_json,
    failing_together,
    process_group,
    rank,
    shares_base,
    world_size,
)
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.steps import STEPS
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.lease import hold
from layerloop.components.storage.manifests import add_folder
from layerloop.components.storage.rollouts import rollouts_sha256
from layerloop.components.storage.shards import read_shard
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    from layerloop.components.policy.model import LayeredPolicy
    from layerloop.components.update_lora.advantages import Advantages
    from layerloop.components.update_lora.diagnostics import Diagnostics
    from layerloop.components.update_lora.plan import OptimizerStep
    from layerloop.components.update_lora.state import TrainingState


def run(
    loaded: LoadedPolicy | None = None, *, campaign: str, iteration: int | None = None, runtime: str = ""
) -> StepResult:
    """Update the adapter from one iteration's rollouts and scores.

    Args:
        loaded: A policy of this campaign that is in memory already, of whatever iteration: its base is used.
        campaign: Root URI of the campaign.
        iteration: The iteration to learn from; by default the one after the last committed policy.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults (`layerloop runtime`). It changes no result.

    Raises:
        LayerloopError: rollouts or scores are missing, or of another model, adapter or schema version; NaN in latents
            or rewards; a gradient that is not finite or explodes. Nothing is committed then.
    """
    started = time.monotonic()
    opened = Campaign.open(campaign, runtime)
    current = opened.open_iteration(iteration)
    folder = opened.policy_dir(current)
    if (done := opened.already_committed(folder, log=log)) is not None:
        return _result(done)
    with hold(opened.store, log=log):
        if (done := opened.already_committed(folder, log=log)) is not None:  # by the run that held it until now
            return _result(done)
        result = _result(_update(opened, current, loaded))
    return StepResult(manifests=result.manifests, metrics=result.metrics | {"seconds": time.monotonic() - started})


def _update(opened: Campaign, current: int, loaded: LoadedPolicy | None) -> Manifest:
    """Learn from an iteration and commit the policy; on every rank. Raises as `run`."""
    recipe = opened.recipe

    from layerloop.components.update_lora.advantages import advantages_of
    from layerloop.components.update_lora.algorithm import timesteps_of
    from layerloop.components.update_lora.learner import learn
    from layerloop.components.update_lora.plan import candidates_of
    from layerloop.components.update_lora.state import TrainingState
    from layerloop.components.update_lora.trajectories import Expected, read_trajectories

    with process_group() as device:
        with failing_together():
            previous = opened.policy(current - 1)
            rollouts = opened.rollouts(current)
            _check_scored(opened, current, rollouts)
            advantages = advantages_of(score_rows(opened, current), recipe.update)
            steps = _plan(opened, advantages)
            if rank() == 0:
                _log_advantages(advantages, current)
            sharded = shares_base(opened.runtime.model)
            loaded = policy_at(opened, current - 1, device=device, sharded=sharded, trainable=True, loaded=loaded)
            policy = loaded.policy
            expected = Expected(
                current, policy.fingerprint, loaded.adapter_sha256, recipe.update.algorithm, timesteps_of(recipe),
                token_pixels=policy.pixel_multiple, channels=policy.packed_channels,
            )  # fmt: skip
            groups = read_trajectories(opened.store, rollouts, candidates_of(steps, rank()), expected)
            state = TrainingState.resume(policy, recipe.update, opened.store, previous, current)
        prompt_embeds = loaded.prompt.to(device, policy.dtype)
        diagnostics = learn(policy, state, steps, groups, prompt_embeds, recipe, iteration=current)
        with failing_together():
            manifest = None
            if rank() == 0:
                manifest = _commit(opened, current, policy, state, advantages, diagnostics)
        text = broadcast_json(manifest.model_dump(mode="json") if manifest else None)
    return Manifest.model_validate(text)


def score_rows(campaign: Campaign, iteration: int) -> list[ScoreRow]:
    """The score of every candidate of an iteration, masked ones among them.

    Raises:
        LayerloopError: the scores are not committed, or damaged.
    """
    return [
        ScoreRow.from_json(members["json"], where=f"{campaign.uri}/{shard.name}:{key}.json")
        for shard in campaign.scores(iteration).shards
        for key, members in read_shard(campaign.store, shard, required=("json",))
    ]


def _check_scored(campaign: Campaign, iteration: int, rollouts: Mapping[int, Manifest]) -> None:
    """Refuse scores of other rollouts than those that are there; earlier versions did not say which they are of.

    Raises:
        LayerloopError: naming both.
    """
    scored, there = campaign.scores(iteration).metadata.get("rollouts_sha256"), rollouts_sha256(rollouts)
    if scored not in (None, there):
        raise LayerloopError(
            f"{campaign.uri}/{campaign.scores_dir(iteration)} is of rollouts {scored!s:.12}, those that are there have "
            f"{there:.12}: delete {campaign.scores_dir(iteration)}/{MANIFEST} to have them scored"
        )


def _plan(campaign: Campaign, advantages: Advantages) -> tuple[OptimizerStep, ...]:
    """The iteration's optimizer steps, distributed among the ranks."""
    from layerloop.components.update_lora.algorithm import timesteps_of
    from layerloop.components.update_lora.plan import plan_steps

    return plan_steps(
        advantages.groups,
        steps=campaign.recipe.update.steps,
        timesteps=timesteps_of(campaign.recipe),
        microbatch=campaign.runtime.update.microbatch,
        ranks=world_size(),
        pad=campaign.runtime.model.fsdp,
    )


def _log_advantages(advantages: Advantages, iteration: int) -> None:
    """Log how many groups are learned from and why others are left out."""
    log(
        f"iteration {iteration}: learning from {len(advantages.groups)} groups; left out: "
        f"{len(advantages.zero_std_groups)} of equal rewards, {len(advantages.underfilled_groups)} with fewer than two "
        f"valid candidates, {len(advantages.zero_weight_groups)} of weight 0; {advantages.masked} candidates masked; "
        f"reward mean {advantages.reward_mean:.4f}, within-group deviation {advantages.reward_std:.4f}"
    )
    if not advantages.groups:
        log(f"iteration {iteration}: no group gives a gradient, so the adapter is committed unchanged")


def _commit(
    campaign: Campaign,
    iteration: int,
    policy: LayeredPolicy,
    state: TrainingState,
    advantages: Advantages,
    diagnostics: Diagnostics,
) -> Manifest:
    """Write adapter and state, then the manifest that makes them count."""
    folder = campaign.policy_dir(iteration)
    with tempfile.TemporaryDirectory() as temporary:
        paths = state.write(policy, Path(temporary), base=campaign.recipe.model.base)
        if (done := campaign.find(folder)) is not None:  # another attempt was faster: its files stay
            return done
        files = add_folder(campaign.store, folder, {path.name: path for path in paths})
    norms = diagnostics.gradient_norms
    manifest = Manifest(
        kind="policy",
        iteration=iteration,
        files=files,
        counts={
            "groups": len(advantages.groups),
            "groups_filtered": advantages.filtered_groups,
            "candidates": sum(len(group.candidates) for group in advantages.groups),
            "candidates_masked": advantages.masked,
            "optimizer_steps": state.counters.optimizer_steps,
            "adapter_parameters": sum(parameter.numel() for parameter in state.parameters.values()),
        },
        metadata={
            "adapter_sha256": files[0].sha256,
            "base_fingerprint": policy.fingerprint,
            "base": campaign.recipe.model.base,
            "previous_adapter_sha256": campaign.policy(iteration - 1).metadata.get("adapter_sha256"),
            "scores_sha256": [shard.sha256 for shard in campaign.scores(iteration).shards],
            "algorithm": campaign.recipe.update.algorithm,
            "filtered_fraction": advantages.filtered_fraction,
            "reward_mean": advantages.reward_mean,
            "reward_std": advantages.reward_std,
            "advantage_std": advantages.advantage_std,
            "advantages_clipped": advantages.clipped,
            "gradient_norms": list(norms),
            "gradient_norm": max(norms, default=0.0),
            **diagnostics.summary(),
            "per_timestep": {name: list(row) for name, row in diagnostics.per_timestep().items()},
        },
    )
    return campaign.commit(folder, manifest)


def _result(manifest: Manifest) -> StepResult:
    """Result of the step: the committed policy and its metrics."""
    numbers = {**manifest.counts, **manifest.metadata}
    metrics = {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
    return StepResult(manifests={"policy": manifest}, metrics=metrics)


main = functools.partial(
    step_main, run, step=STEPS["update_lora"], beyond=("policy", "previous"),
    launch=ranks.launch_per_gpu, store=open_store,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
