"""The step `update_lora` on real trajectories: gradients, resuming, what it refuses, and that it learns."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from warm_python import warm

from layerloop.components.policy.lora import new_adapter, put_adapter
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.sampling import COEFFICIENTS, Plan, rollout
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.trajectory import GroupRecord
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import add_folder, read_file
from layerloop.components.storage.rollouts import rollouts_sha256
from layerloop.components.storage.shards import Sample, read_shard
from layerloop.components.update_lora.forward_process import draw
from layerloop.components.update_lora.state import TrainingState
from layerloop.components.update_lora.step import run

from ..campaigns import SIDE, CampaignBuilder, policy_folder, prompt_embeds, varied
from .conftest import WINDOW, G, MakeLab, nan_in_the_last_group

GRPO_EMA = {"ema": 0.9, "kl": 0.1}
NFT_DECAY = {"algorithm": "nft", "ema": 0.9, "nft": {"timesteps": 2, "old_decay": 0.3, "beta": 0.5}}


def state_of(lab: CampaignBuilder, iteration: int, name: str = "optimizer.safetensors") -> dict[str, torch.Tensor]:
    return load((policy_folder(lab.campaign, iteration) / name).read_bytes())


def first_gradient(lab: CampaignBuilder) -> dict[str, torch.Tensor]:
    """The gradient of the only optimizer step taken: AdamW's first moment over 1 - beta_1."""
    return {
        key.removeprefix("exp_avg."): value / 0.1
        for key, value in state_of(lab, 1).items()
        if key.startswith("exp_avg.")
    }


# ---- the gradient


def test_ratio_is_exactly_one_in_the_first_optimizer_step_and_close_to_it_in_the_next(lab: CampaignBuilder) -> None:
    metadata = run(campaign=lab.uri).manifests["policy"].metadata
    assert metadata["first_log_ratio_abs"] == 0.0
    assert 0.0 < metadata["log_ratio_abs"] < 0.01
    assert metadata["replay_noise"] == pytest.approx(1.0, abs=0.03), "what is replayed is what was sampled"


def test_the_metrics_tell_every_diagnostic_of_every_timestep(make_lab: MakeLab) -> None:
    """With a clip range that the second optimizer step leaves, and one group in four that teaches nothing."""
    lab = make_lab(update={"clip_low": 1e-6, "clip_high": 1e-6, "learning_rate": 1e-2, "kl": 0.01})
    lab.ready(1, lambda k, g, c: 0.5 if g == 3 else varied(k, g, c))
    result = run(campaign=lab.uri)
    metrics, metadata = result.metrics, result.manifests["policy"].metadata
    assert metadata["per_timestep"].keys() == {
        "loss", "ratio_mean", "ratio_std", "clip_fraction_low", "clip_fraction_high", "log_ratio_abs",
        "first_log_ratio_abs", "replay_noise", "velocity_gradient", "kl",
    }  # fmt: skip
    for name, row in metadata["per_timestep"].items():
        assert len(row) == WINDOW and all(math.isfinite(value) for value in row)
        if name not in ("ratio_std", "replay_noise"):  # timesteps have equally many points
            assert metrics[name] == pytest.approx(sum(row) / WINDOW, rel=1e-9)
    assert metrics["clip_fraction_low"] > 0 and metrics["clip_fraction_high"] > 0
    assert 0 < metrics["ratio_std"] < 0.5 and metrics["ratio_mean"] == pytest.approx(1, abs=0.5)
    assert (metrics["first_log_ratio_abs"], metrics["filtered_fraction"]) == (0.0, 0.25)
    assert metrics["advantage_std"] == pytest.approx(1, abs=0.01)
    assert len(metadata["gradient_norms"]) == 2 and metrics["gradient_norm"] == max(metadata["gradient_norms"]) > 0


def test_the_spread_of_ratios_is_told_however_small_it_is(make_lab: MakeLab) -> None:
    """The norms `mean` and `guard` give ratios within 1e-5 of 1."""
    lab = make_lab(update={"ratio_norm": "mean"})
    lab.ready(1)
    metrics = run(campaign=lab.uri).metrics
    assert 0 < metrics["log_ratio_abs"] < 1e-3
    # half of the points, those of the first step, have a ratio of 1: the deviation is at least the mean distance
    assert metrics["log_ratio_abs"] <= metrics["ratio_std"] < 10 * metrics["log_ratio_abs"]


def candidates_of(
    lab: CampaignBuilder,
) -> Iterator[tuple[GroupRecord, int, Condition, torch.Tensor, dict[str, torch.Tensor]]]:
    """(group, candidate, condition, advantages `[G]` of its group, latents) of every candidate of iteration 1."""
    shards = [shard for manifest in lab.campaign.rollouts(1).values() for shard in manifest.shards]
    for key, members in (sample for shard in shards for sample in read_shard(lab.store, shard)):
        if "condition.safetensors" in members:
            record = GroupRecord.from_json(members["json"], where=key)
            rewards = torch.tensor([varied(1, record.group, c) for c in range(G)], dtype=torch.float64)
            advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
            condition = Condition(
                load(members["condition.safetensors"])["condition"][None], prompt_embeds()[None], 32, 32
            )
        else:
            yield record, int(key[-2:]), condition, advantages, load(members["trajectory.safetensors"])


def test_gradient_is_that_of_the_textbook_surrogate_in_one_large_batch(make_lab: MakeLab) -> None:
    """Against flow_grpo's form written out: log-probabilities of stored steps, PPO ratio, one autograd graph."""
    lab = make_lab(update={"steps": 1, "ratio_norm": "mean", "reweight": False, "max_grad_norm": 1e9})
    lab.ready(1)
    run(campaign=lab.uri, runtime="update: {microbatch: 3}")

    policy = LayeredPolicy.load(lab.recipe.model)
    put_adapter(policy.transformer, new_adapter(policy.transformer, lab.recipe.lora, seed=lab.recipe.seed))
    losses = []
    for record, c, condition, advantages, latents in candidates_of(lab):
        window = latents["window"]
        for j in range(WINDOW):
            i = record.window_start + j
            v = policy.velocity(window[j : j + 1], record.sigmas[i], condition)
            a, b, s = COEFFICIENTS[record.dynamics](record.sigmas, i, record.etas[j])
            step = torch.distributions.Normal(a * window[j : j + 1] + b * v, s)
            logp = step.log_prob(window[j + 1 : j + 2]).mean(dim=(1, 2))
            losses.append(-float(advantages[c]) * (logp - logp.detach()).exp())
    torch.cat(losses).mean().backward()

    ours = first_gradient(lab)
    for name, parameter in policy.trainable_parameters().items():
        textbook = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours[name.replace(".default", "")], textbook, rtol=2e-4, atol=1e-7)
    assert max(float(g.abs().max()) for g in ours.values()) > 1e-4, "there was a gradient to compare"


def test_gradient_of_nft_is_that_of_its_authors_loss(make_lab: MakeLab) -> None:
    """Against NVlabs/DiffusionNFT's train script written out, one candidate at one time after another."""
    beta, clip = 0.5, 5.0
    nft = {"timesteps": 2, "beta": beta}
    lab = make_lab(update={"algorithm": "nft", "steps": 1, "max_grad_norm": 1e9, "nft": nft})
    lab.ready(1)
    run(campaign=lab.uri, runtime="update: {microbatch: 3}")

    policy = LayeredPolicy.load(lab.recipe.model)
    put_adapter(policy.transformer, new_adapter(policy.transformer, lab.recipe.lora, seed=lab.recipe.seed))
    losses = []
    for record, c, condition, advantages, latents in candidates_of(lab):
        x0 = latents["final"]
        r = float((advantages[c].clamp(-clip, clip) / clip) / 2 + 0.5)
        times, noises = draw(
            lab.recipe.seed, 1, record.image_key, record.group, c, "nft", count=2, sigmas=record.sigmas, shape=x0.shape
        )
        for t, noise in zip(times, noises, strict=True):
            xt = (1 - t) * x0 + t * noise
            forward = policy.velocity(xt[None], t[None], condition)[0]
            with torch.no_grad(), policy.without_adapter():  # a new adapter has not moved the sampling policy
                old = policy.velocity(xt[None], t[None], condition)[0]
            terms = []
            for prediction in (beta * forward + (1 - beta) * old, (1 + beta) * old - beta * forward):
                x0_prediction = xt - t * prediction
                weight = (x0_prediction - x0).abs().mean().clamp(min=1e-5).detach()
                terms.append(((x0_prediction - x0) ** 2 / weight).mean())
            losses.append((r * terms[0] / beta + (1 - r) * terms[1] / beta) * clip)
    torch.stack(losses).mean().backward()

    ours = first_gradient(lab)
    scale = max(float(gradient.abs().max()) for gradient in ours.values())
    assert scale > 1e-4, "there was a gradient to compare"
    for name, parameter in policy.trainable_parameters().items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours[name.replace(".default", "")], expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("update", [{}, {"algorithm": "nft", "nft": {"timesteps": 2}}], ids=["grpo", "nft"])
def test_gradient_does_not_depend_on_the_size_of_the_microbatches(make_lab: MakeLab, update: dict[str, Any]) -> None:
    gradients = []
    for microbatch in (1, 3, 100):
        lab = make_lab(f"by-{microbatch}", update={"steps": 1, "max_grad_norm": 1e9} | update)
        lab.ready(1)
        run(campaign=lab.uri, runtime=f"update: {{microbatch: {microbatch}}}")
        gradients.append(first_gradient(lab))
    scale = max(float(g.abs().max()) for g in gradients[0].values())
    for other in gradients[1:]:
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("update", [{}, {"algorithm": "nft", "nft": {"timesteps": 2}}], ids=["grpo", "nft"])
def test_the_runtime_changes_an_adapter_by_no_more_than_the_order_of_a_sum(
    make_lab: MakeLab, update: dict[str, Any]
) -> None:
    """The same three optimizer steps on three runtimes; one of AdamW is at most the learning rate, 1e-3."""
    adapters = []
    runtimes: tuple[dict[str, Any], ...] = (
        {"update": {"microbatch": 8}, "model": {"gradient_checkpointing": False}},
        {"update": {"microbatch": 8}, "model": {"gradient_checkpointing": True}},
        {"update": {"microbatch": 1}, "model": {"gradient_checkpointing": True}},
    )
    for n, runtime in enumerate(runtimes):
        lab = make_lab(f"lab-{n}", update={"steps": 3, "kl": 0.01} | update)
        lab.ready(1)
        run(campaign=lab.uri, runtime=json.dumps(runtime))
        adapters.append(lab.adapter_weights(1))
    assert adapters[0] == adapters[1], "checkpointing computes the same again"
    one, other = load(adapters[0]), load(adapters[2])
    assert max(float(tensor.abs().max()) for key, tensor in one.items() if "lora_B" in key) > 5e-4, "it has learned"
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-5, atol=2e-6)


def test_gradient_is_clipped_by_its_global_norm(make_lab: MakeLab) -> None:
    norms = []
    for limit in (1e9, 1e-3):
        lab = make_lab(f"limit-{limit}", update={"steps": 1, "max_grad_norm": limit})
        lab.ready(1)
        reported = run(campaign=lab.uri).metrics["gradient_norm"]
        applied = math.sqrt(sum(float((g.double() ** 2).sum()) for g in first_gradient(lab).values()))
        norms.append((reported, applied))
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)
    assert norms[1][0] == norms[0][0], "reported before clipping"
    assert norms[1][1] == pytest.approx(1e-3, rel=1e-5)


def test_reweighting_gives_every_timestep_the_same_gradient_on_the_velocity(make_lab: MakeLab) -> None:
    gradients = {}
    for reweight in (True, False):
        lab = make_lab(f"reweight-{reweight}", update={"steps": 1, "reweight": reweight})
        lab.ready(1)
        gradients[reweight] = run(campaign=lab.uri).manifests["policy"].metadata["per_timestep"]["velocity_gradient"]
    assert gradients[True][1] == pytest.approx(gradients[True][0], rel=0.05)
    assert gradients[False][1] > 1.2 * gradients[False][0], "steps of the layered schedule are uneven"


def test_kl_to_the_base_is_zero_before_the_first_update_and_positive_after_it(make_lab: MakeLab) -> None:
    lab = make_lab(update={"kl": 0.1, "steps": 2})
    lab.ready(1)
    assert 0.0 < run(campaign=lab.uri).metrics["kl"] < 1e-3
    one = make_lab("one-step", update={"kl": 0.1, "steps": 1})
    one.ready(1)
    assert run(campaign=one.uri).metrics["kl"] == 0.0, "a new adapter leaves the base as it is, bit for bit"


@pytest.mark.parametrize("wish", [1, -1], ids=["higher", "lower"])
@pytest.mark.parametrize(("update", "least"), [({}, 0.02), ({"algorithm": "nft"}, 0.004)], ids=["grpo", "nft"])
def test_it_learns_what_is_rewarded(make_lab: MakeLab, update: dict[str, Any], least: float, wish: int) -> None:
    """Reward: the mean of some channels of the final latents, or its negative. The deterministic policy follows: by
    0.04 and 0.008 in three iterations."""
    rewards: dict[tuple[int, int, int], float] = {}

    def judge(samples: list[Sample]) -> list[Sample]:
        for key, members in samples:
            if "trajectory.safetensors" in members:
                final = load(members["trajectory.safetensors"])["final"]
                rewards[int(key[1:7]), int(key[9:15]), int(key[17:])] = wish * float(final[:, :16].mean())
        return samples

    lab = make_lab(
        update={"learning_rate": 1e-2} | update,
        rollout={"group_size": 16, "noise": {"eta": 1.0}},
    )

    def value(iteration: int) -> float:
        policy = lab.policy(iteration)
        noise = torch.cat([policy.noise(seed, 2, SIDE, SIDE) for seed in range(16)])
        condition = Condition(torch.ones(1, 4, 64), prompt_embeds()[None], SIDE, SIDE)
        plan = Plan(sigmas=policy.sigmas(10, SIDE, SIDE), outside="euler")
        return float(rollout(policy, condition, noise, plan).final[..., :16].mean())

    for iteration in range(1, 4):
        lab.rollouts(iteration, change=judge)
        lab.scores(iteration, lambda *who: rewards[who])
        run(campaign=lab.uri)
    assert wish * (value(3) - value(0)) > least


# ---- files and resuming


def test_the_adapter_is_peft_layout_and_loads_with_peft_itself(lab: CampaignBuilder) -> None:
    run(campaign=lab.uri)
    folder = policy_folder(lab.campaign, 1)
    ours = lab.policy(1)
    theirs = LayeredPolicy.load(lab.recipe.model)
    latents, condition = ours.noise(3, 2, 32, 32), Condition(torch.ones(1, 4, 64), prompt_embeds()[None], 32, 32)
    with torch.no_grad():
        before = theirs.velocity(latents, 0.9, condition)
        theirs.transformer = PeftModel.from_pretrained(theirs.transformer, folder)
        assert torch.equal(theirs.velocity(latents, 0.9, condition), ours.velocity(latents, 0.9, condition))
    assert not torch.equal(before, ours.velocity(latents, 0.9, condition))


@pytest.mark.parametrize("update", [GRPO_EMA, NFT_DECAY], ids=["grpo-ema", "nft-decay"])
def test_two_and_two_iterations_give_the_adapter_of_four_byte_for_byte(
    make_lab: MakeLab, tmp_path: Path, update: dict[str, Any]
) -> None:
    uninterrupted = make_lab(update=update)
    for iteration in (1, 2):
        uninterrupted.ready(iteration)
        run(campaign=uninterrupted.uri)
    shutil.copytree(uninterrupted.uri, tmp_path / "moved")
    resumed = CampaignBuilder(Campaign.open(str(tmp_path / "moved")))
    for iteration in (3, 4):
        for lab in (uninterrupted, resumed):
            lab.ready(iteration)
        run(campaign=uninterrupted.uri)
        if iteration == 3:
            run(campaign=resumed.uri)
            continue
        subprocess.run(  # in a process that knows nothing of the others
            [warm(), "-m", "layerloop.components.update_lora", "--campaign", resumed.uri],
            check=True, capture_output=True, timeout=600,
        )  # fmt: skip
    names = ["adapter_model.safetensors", "optimizer.safetensors", "ema.safetensors", "learner.json"]
    for name in names:
        one, other = (policy_folder(lab.campaign, 4) / name for lab in (uninterrupted, resumed))
        assert one.read_bytes() == other.read_bytes(), name
    assert uninterrupted.adapter_weights(4) != uninterrupted.adapter_weights(2)


def test_adamws_moments_and_their_count_continue_in_the_next_iteration(make_lab: MakeLab) -> None:
    lab = make_lab(update={"steps": 1, "learning_rate": 1e-3, "adam_betas": (0.9, 0.95)})
    for iteration in (1, 2):
        lab.ready(iteration)
        run(campaign=lab.uri)
    before, after = (state_of(lab, iteration) for iteration in (1, 2))
    start, end = (load(lab.adapter_weights(iteration)) for iteration in (1, 2))
    for key in start:
        name = key.removeprefix("base_model.model.")
        mean, square = after[f"exp_avg.{name}"].double(), after[f"exp_avg_sq.{name}"].double()
        gradient = (mean - 0.9 * before[f"exp_avg.{name}"].double()) / 0.1
        expected = 0.95 * before[f"exp_avg_sq.{name}"].double() + 0.05 * gradient**2
        torch.testing.assert_close(square, expected, rtol=1e-4, atol=1e-16)
        move = 1e-3 * (mean / (1 - 0.9**2)) / ((square / (1 - 0.95**2)).sqrt() + lab.recipe.update.adam_epsilon)
        torch.testing.assert_close(end[key].double(), start[key].double() - move, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("ema", "decay"), [(0.5, 2 / 11), (0.15, 0.15)], ids=["in-the-warm-up", "after-it"])
def test_the_average_follows_the_adapter(make_lab: MakeLab, ema: float, decay: float) -> None:
    """Decays of the warm-up are 1/10, 2/11, ..., and never more than `ema`."""
    lab = make_lab(update={"ema": ema, "steps": 1})
    averages = []
    for iteration in (1, 2):
        lab.ready(iteration)
        run(campaign=lab.uri)
        averages.append((state_of(lab, iteration, "ema.safetensors"), load(lab.adapter_weights(iteration))))
    (first, weights), (second, later) = averages
    for key in later:
        expected = decay * first[key] + (1 - decay) * later[key]
        # two weights move by 1e-3 a step: a decay that is wrong by 0.03 shows as 3e-5
        torch.testing.assert_close(second[key], expected, rtol=0, atol=1e-6)
    assert any(not torch.equal(weights[key], first[key]) for key in weights)


def test_nft_with_decay_samples_from_a_policy_that_lags_behind_the_trained_one(make_lab: MakeLab) -> None:
    lab = make_lab(update=NFT_DECAY)
    lab.ready(1)
    run(campaign=lab.uri)
    policy = LayeredPolicy.load(lab.recipe.model)
    put_adapter(policy.transformer, new_adapter(policy.transformer, lab.recipe.lora, seed=lab.recipe.seed))
    start = {name.replace(".default", ""): p.detach() for name, p in policy.trainable_parameters().items()}
    trained = state_of(lab, 1)
    for key, sampling in load(lab.adapter_weights(1)).items():
        key = key.removeprefix("base_model.model.")
        torch.testing.assert_close(sampling, 0.3 * start[key] + 0.7 * trained[f"trained.{key}"])


@pytest.mark.parametrize("update", [GRPO_EMA, NFT_DECAY], ids=["grpo-ema", "nft-decay"])
def test_writing_the_state_leaves_it_as_it_is(make_lab: MakeLab, tmp_path: Path, update: dict[str, Any]) -> None:
    lab = make_lab(update=update)
    lab.ready(1)
    run(campaign=lab.uri)
    policy = lab.policy(1)
    state = TrainingState.resume(policy, lab.recipe.update, lab.store, lab.campaign.policy(1), 2)
    written = []
    for attempt in ("first", "second"):
        (folder := tmp_path / attempt).mkdir()
        written.append({path.name: path.read_bytes() for path in state.write(policy, folder, base=None)})
    assert written[0] == written[1]
    committed = {name: load(written[0][name]) for name in ("adapter_model.safetensors", "optimizer.safetensors")}
    for name, tensors in committed.items():
        stored = state_of(lab, 1, name)
        assert tensors.keys() == stored.keys()
        assert all(torch.equal(tensors[key], stored[key]) for key in tensors), f"{name} is what was resumed from"


def test_a_committed_iteration_is_returned_and_not_done_again(lab: CampaignBuilder) -> None:
    first = run(campaign=lab.uri, iteration=1)
    before = lab.store.sizes()
    lab.store.delete("sources/manifest.json")  # nothing is read but what was committed
    assert run(campaign=lab.uri, iteration=1).manifests == first.manifests
    assert lab.store.sizes().keys() == before.keys() - {"sources/manifest.json"}


def test_scores_of_other_rollouts_are_refused(lab: CampaignBuilder) -> None:
    folder = lab.campaign.scores_dir(1)
    manifest = lab.campaign.scores(1)
    for rollouts, refused in ((rollouts_sha256(lab.campaign.rollouts(1)), False), ("1" * 64, True)):
        changed = manifest.model_copy(update={"metadata": {**manifest.metadata, "rollouts_sha256": rollouts}})
        lab.store.write(f"{folder}/{MANIFEST}", changed.to_json())
        if refused:
            with pytest.raises(LayerloopError, match="scores is of rollouts 111111111111, those that are there have"):
                run(campaign=lab.uri, iteration=1)
        else:
            assert run(campaign=lab.uri, iteration=1).manifests["policy"].metadata["scores_sha256"]
            lab.store.delete(f"{lab.campaign.policy_dir(1)}/{MANIFEST}")
    assert not lab.committed(1)


def test_an_attempt_that_was_overtaken_loses_nothing(lab: CampaignBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was paused after its check (a slow disk, a virtual machine that moved) and another committed meanwhile, of
    other bytes (another kind of processor)."""
    real, overtaken = Campaign.commit, list[Manifest]()

    def commit_late(campaign: Campaign, folder: str, manifest: Manifest) -> Manifest:
        monkeypatch.setattr(Campaign, "commit", real)
        content = {"adapter_model.safetensors": b"faster", "optimizer.safetensors": b"1"}
        files = add_folder(campaign.store, folder, content)
        faster = manifest.model_copy(update={"files": files})
        overtaken.append(real(campaign, folder, faster))
        return real(campaign, folder, manifest)

    monkeypatch.setattr(Campaign, "commit", commit_late)
    assert run(campaign=lab.uri).manifests["policy"] == overtaken[0] == lab.campaign.policy(1)
    assert [read_file(lab.store, file) for file in overtaken[0].files] == [b"faster", b"1"]


def test_files_of_a_killed_attempt_do_not_count(lab: CampaignBuilder) -> None:
    lab.store.write(f"{lab.campaign.policy_dir(1)}/{'0' * 16}/adapter_model.safetensors", b"half an adapter")
    manifest = run(campaign=lab.uri).manifests["policy"]
    assert len(lab.adapter_weights(1)) == manifest.file("adapter_model.safetensors").bytes


def test_without_a_group_that_teaches_the_adapter_stays_and_the_campaign_goes_on(
    lab: CampaignBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    run(campaign=lab.uri)
    lab.ready(2, lambda *_: 0.7)
    result = run(campaign=lab.uri)
    assert lab.adapter_weights(2) == lab.adapter_weights(1)
    assert state_of(lab, 2).keys() == state_of(lab, 1).keys()
    filtered = [result.metrics[name] for name in ("groups", "groups_filtered", "filtered_fraction")]
    assert filtered == [0, 4, 1]
    assert "no group gives a gradient, so the adapter is committed unchanged" in capsys.readouterr().err
    lab.ready(3)
    run(campaign=lab.uri)
    assert lab.adapter_weights(3) != lab.adapter_weights(2)


def test_masked_candidates_are_left_out_and_counted(lab: CampaignBuilder, make_lab: MakeLab) -> None:
    lab = make_lab("masked")
    lab.ready(1, lambda k, g, c: None if (g, c) in {(0, 1), (2, 3)} else varied(k, g, c))
    result = run(campaign=lab.uri)
    assert (result.metrics["candidates"], result.metrics["candidates_masked"]) == (14, 2)


def test_it_starts_from_an_adapter_that_the_recipe_names(lab: CampaignBuilder, make_lab: MakeLab) -> None:
    run(campaign=lab.uri)
    source = policy_folder(lab.campaign, 1)
    sha256 = lab.campaign.policy(1).metadata["adapter_sha256"]
    follower = make_lab("follower", lora={"rank": 2, "alpha": 2.0, "start_from": str(source)})
    change = changed_record(everywhere=True, adapter_sha256=sha256)
    follower.rollouts(1, policy=lab.policy(1), change=change)
    follower.scores(1)
    assert run(campaign=follower.uri).metrics["replay_noise"] == pytest.approx(1.0, abs=0.03)
    start, now = load(lab.adapter_weights(1)), load(follower.adapter_weights(1))
    distance = max(float((start[key] - now[key]).abs().max()) for key in start)
    assert 0 < distance < 3e-3, "two steps of 1e-3 away from where it began"


# ---- what it refuses


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_committed(
    lab: CampaignBuilder, make_lab: MakeLab, tmp_path: Path
) -> None:
    run(campaign=lab.uri)
    folder = Path(shutil.copytree(policy_folder(lab.campaign, 1), tmp_path / "adapter"))
    follower = make_lab("follower", lora={"rank": 2, "alpha": 2.0, "start_from": str(folder)})
    follower.ready(1)
    tensors = load((folder / "adapter_model.safetensors").read_bytes())
    key = next(key for key in tensors if "lora_B" in key)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors | {key: torch.zeros(3072, 2)}))
    with pytest.raises(LayerloopError, match=r"lora_B\.weight has shape 3072x2, the base needs \d+x2"):
        run(campaign=follower.uri)
    assert not follower.committed(1)


def changed_record(*, everywhere: bool = False, **fields: object) -> Callable[[list[Sample]], list[Sample]]:
    """Change the record of the last group, or of all."""

    def change(samples: list[Sample]) -> list[Sample]:
        records = [members for _, members in samples if "condition.safetensors" in members]
        for members in records if everywhere else records[-1:]:
            members["json"] = json.dumps(json.loads(members["json"]) | fields).encode()
        return samples

    return change


def changed_latents(
    change: Callable[[torch.Tensor], torch.Tensor], member: str = "trajectory", name: str = "window"
) -> Callable[[list[Sample]], list[Sample]]:
    """Change one tensor wherever it is."""

    def spoil(samples: list[Sample]) -> list[Sample]:
        for _, members in samples:
            if f"{member}.safetensors" in members:
                tensors = load(members[f"{member}.safetensors"])
                tensors[name] = change(tensors[name]).contiguous()
                members[f"{member}.safetensors"] = save(tensors)
        return samples

    return spoil


def swapped_candidates(samples: list[Sample]) -> list[Sample]:
    """The records of the last two candidates change places."""
    first, second = samples[-2][1], samples[-1][1]
    first["json"], second["json"] = second["json"], first["json"]
    return samples


def foreign_tensor(samples: list[Sample]) -> list[Sample]:
    """A tensor in a dtype that safetensors knows and torch has not."""
    header = json.dumps({"window": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    samples[-1][1]["trajectory.safetensors"] = len(header).to_bytes(8, "little") + header + bytes(4)
    return samples


def no_tensors(samples: list[Sample]) -> list[Sample]:
    """Bytes that are not safetensors in the last candidate."""
    samples[-1][1]["trajectory.safetensors"] = b"latents"
    return samples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_record(base_fingerprint="e" * 64), "sampled from a base model with fingerprint eeeeeeeeeeee"),
        (
            changed_record(adapter_sha256="f" * 64),
            "with adapter ffffffffffff, the policy of iteration 0 has none",
        ),
        (changed_record(schema_version=2), "has schema_version 2, this version of layerloop reads 1"),
        (changed_record(iteration=4), "is of iteration 4, not 1"),
        (changed_record(window_size=1, etas=[0.7]), "has an SDE window of 1 steps"),
        (nan_in_the_last_group, "i000001-g000003-c03.trajectory.safetensors window has NaN or infinite latents"),
        (
            changed_latents(lambda window: window[:, :-1]),
            "c00.trajectory.safetensors window is 3 x 7 x 64, its record and the model's channels say 3 x 8 x 64: "
            "delete the iteration's folder, and it is sampled and scored again",
        ),
        (changed_latents(lambda window: window[..., :32]), "window is 3 x 8 x 32, its record and the model's"),
        (changed_latents(lambda window: window[0, 0, 0]), "window is one number, its record and the model's"),
        (changed_latents(lambda window: window.half()), "window is F16, latents are stored in F32"),
        (
            changed_latents(lambda condition: condition[:, :32], "condition", "condition"),
            "i000001-g000000.condition.safetensors condition is 4 x 32, its record and the model's channels say 4 x 64",
        ),
        (foreign_tensor, "i000001-g000003-c03.trajectory.safetensors window is F4, latents are stored in F32: delete"),
        (no_tensors, "i000001-g000003-c03.trajectory.safetensors is not safetensors ("),
        (
            changed_record(height=48),
            "i000001-g000003 has height 48 and width 32, but its 2 x 2 tokens of 16 pixels make 32 and 32: delete",
        ),
        (changed_record(height=48, latent_height=3), "g000003.condition.safetensors condition is 4 x 64, its record"),
        (changed_record(height=-32), "i000001-g000003.json.height is -32: "),
        (changed_record(layers=5), "window is 3 x 12 x 64, its record and the model's channels say 3 x 24 x 64"),
        (
            changed_record(window_start=9),
            "i000001-g000003.json: window_start is 9 and window_size 2, but sigmas has 5 steps and the last is "
            "never stochastic: delete",
        ),
        (changed_record(window_start=3), "window_start is 3 and window_size 2, but sigmas has 5 steps"),
        (changed_record(etas=[0.7]), "etas is [0.7], not one positive value for each of the 2 steps of the window"),
        (changed_record(etas=[0.7, 0.0]), "etas is [0.7, 0.0], not one positive value"),
        (changed_record(sigmas=[1.0, 0.0]), "window_start is 0 and window_size 2, but sigmas has 1 steps"),
        (changed_record(sigmas=[1.0]), "sigmas is [1.0], not 2 values or more that fall from at most 1 to 0"),
        (changed_record(sigmas=[1, 0.8, 0.8, 0.5, 0.2, 0]), "sigmas is [1.0, 0.8, 0.8, 0.5, 0.2, 0.0], not 2 values"),
        (changed_record(dynamics="ode"), "dynamics is 'ode', which is not stochastic, but window_size is 2"),
        (changed_record(group=2), "i000001-g000003 holds the record of i000001-g000002: delete"),
        (swapped_candidates, "i000001-g000003-c02 holds the record of i000001-g000003-c03: delete"),
        (
            lambda samples: samples[:1] + samples[2:],
            ".tar:i000001-g000000-c01 is where i000001-g000000-c00 should be: delete",
        ),
    ],
    ids=[
        "base",
        "adapter",
        "schema",
        "iteration",
        "window",
        "nan",
        "tokens",
        "channels",
        "number",
        "dtype",
        "condition",
        "foreign",
        "no-tensors",
        "height",
        "latent-height",
        "negative",
        "layers",
        "start",
        "late",
        "etas",
        "no-noise",
        "short-sigmas",
        "one-sigma",
        "even-sigmas",
        "ode",
        "group",
        "candidate",
        "missing",
    ],
)
def test_a_shard_that_this_policy_did_not_sample_is_refused(
    make_lab: MakeLab, change: Callable[[list[Sample]], list[Sample]], message: str
) -> None:
    lab = make_lab()
    lab.rollouts(1, change=change)
    lab.scores(1)
    with pytest.raises(LayerloopError) as raised:
        run(campaign=lab.uri)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not lab.committed(1)


def test_trajectories_of_another_iterations_adapter_are_refused(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.ready(1)
    own = str(run(campaign=lab.uri).manifests["policy"].metadata["adapter_sha256"])
    lab.rollouts(2, change=changed_record(everywhere=True, adapter_sha256="0" * 64))
    lab.scores(2)
    with pytest.raises(LayerloopError, match=rf"with adapter 000000000000, the policy of iteration 1 has {own[:12]}: "):
        run(campaign=lab.uri)
    assert not lab.committed(2)


def test_final_latents_of_another_model_are_refused_where_they_are_learnt_from(make_lab: MakeLab) -> None:
    lab = make_lab(update={"algorithm": "nft"})
    lab.rollouts(1, change=changed_latents(lambda final: final[:, :32], name="final"))
    lab.scores(1)
    with pytest.raises(LayerloopError, match="final is 8 x 32, its record and the model's channels say 8 x 64: delete"):
        run(campaign=lab.uri)
    assert not lab.committed(1)


@pytest.mark.parametrize(
    ("group", "candidate", "what"), [(9, 0, "group 9"), (3, 7, "candidate 7 of group 3")], ids=["group", "candidate"]
)
def test_what_was_scored_and_never_sampled_is_named(make_lab: MakeLab, group: int, candidate: int, what: str) -> None:
    """The scores of a larger iteration: its last candidate belongs to no rollout of this one."""
    lab = make_lab()
    lab.rollouts(1)
    larger = lab.recipe.model_copy(
        update={"rollout": lab.recipe.rollout.model_copy(update={"groups": group + 1, "group_size": candidate + 4})}
    )
    scorer = CampaignBuilder(lab.campaign)
    scorer.recipe = larger
    scorer.scores(1, lambda k, g, c: varied(k, g, c) if g == group and c >= candidate else None)
    with pytest.raises(LayerloopError, match=f"rollouts of the iteration lack {what}, which was scored: score the"):
        run(campaign=lab.uri)
    assert not lab.committed(1)


def test_a_reward_that_is_not_a_number_is_refused(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.rollouts(1)
    lab.scores(1, lambda _, g, c: math.nan if (g, c) == (1, 2) else 0.1 * c)
    with pytest.raises(LayerloopError, match=r"i000001-g000001-c02.json.reward is nan"):
        run(campaign=lab.uri)
    assert not lab.committed(1)


def test_an_exploding_gradient_stops_the_step_and_commits_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(update={"stop_grad_norm": 1e-6})
    lab.ready(1)
    with pytest.raises(LayerloopError, match=r"gradient norm of optimizer step 1 of iteration 1 is .* above .* 1e-06"):
        run(campaign=lab.uri)
    assert not lab.committed(1)


def test_a_gradient_that_is_not_finite_stops_the_step_and_commits_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(update={"learning_rate": 1e30})  # the second step meets weights of 1e30
    lab.ready(1)
    with pytest.raises(LayerloopError, match="gradient norm of optimizer step 2 of iteration 1 is nan"):
        run(campaign=lab.uri)
    assert not lab.committed(1)


def test_an_iteration_without_scores_names_what_to_run(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.rollouts(1)
    with pytest.raises(LayerloopError, match="scores is not committed: run score_rollouts first"):
        run(campaign=lab.uri)


def test_iterations_count_from_one(lab: CampaignBuilder) -> None:
    with pytest.raises(LayerloopError, match="iteration is 0: iterations count from 1"):
        run(campaign=lab.uri, iteration=0)


def test_an_iteration_ahead_of_its_policy_is_refused(lab: CampaignBuilder) -> None:
    with pytest.raises(LayerloopError, match="iterations/000002/policy is not committed: run update_lora first"):
        run(campaign=lab.uri, iteration=3)
