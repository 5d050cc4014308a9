"""The step: what it commits, resumes, refuses; for any number of workers, ranks and batches the same."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from warm_python import warm

from layerloop.components.generate_rollouts import candidates
from layerloop.components.generate_rollouts import step as rollout_step
from layerloop.components.generate_rollouts.plan import initial_seed, plan_iteration, share_groups
from layerloop.components.generate_rollouts.step import run
from layerloop.components.policy import adapters, lora, sampling
from layerloop.components.policy.at import policy_at
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.trajectory import CandidateRecord, GroupRecord
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.images import decode_png
from layerloop.components.storage.manifests import add_folder, commit
from layerloop.components.storage.shards import read_shard

from ..campaigns import CampaignBuilder, lay_out_by_worker, named, rank_1_sees


def samples(campaign: Campaign, iteration: int = 1) -> dict[str, dict[str, bytes]]:
    """All samples of an iteration, by key."""
    shards = [shard for manifest in campaign.rollouts(iteration).values() for shard in manifest.shards]
    return {key: members for shard in shards for key, members in read_shard(campaign.store, shard)}


def files(campaign: Campaign, iteration: int = 1) -> dict[str, bytes]:
    """Every file of an iteration's rollouts, by name."""
    return {name: campaign.store.read(name) for name in campaign.store.list(campaign.rollouts_dir(iteration))}


def commit_policy(campaign: Campaign, folder: Path, *, iteration: int = 1, scale: float = 0.05) -> Manifest:
    """An adapter as `update_lora` commits one, and a copy of it in `folder`."""
    return CampaignBuilder(campaign).adapter(iteration, scale=scale, folder=folder)


def test_a_group_is_one_image_with_g_candidates_and_all_that_the_next_steps_need(make_campaign, base_folder) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign()
    result = run(campaign=campaign.uri)
    manifest = result.manifests["rollouts"]
    assert manifest.iteration == 1 and manifest.metadata["groups"] == [0, 1, 2, 3] and len(manifest.shards) == 4
    assert manifest.counts["candidates"] == 12 and manifest.metadata["adapter_sha256"] is None
    assert result.metrics["candidates"] == 12 and result.metrics["seconds"] > 0 and "bad_layers" in result.metrics

    policy = LayeredPolicy.load(campaign.recipe.model)
    assert manifest.metadata["base_fingerprint"] == policy.fingerprint
    found = samples(campaign)
    assert len(found) == 4 * (1 + 3)
    calls = 0
    for group in range(4):
        key = f"i000001-g{group:06d}"
        record = GroupRecord.from_json(found[key]["json"], where=key)
        source = decode_png(found[key]["source.png"])
        assert source.shape == (record.height, record.width, 4) and (source[..., 3] == 255).all()
        assert record.sigmas == policy.sigmas(4, record.height, record.width)
        assert (record.window_start, record.window_size, record.dynamics, record.etas) == (0, 2, "flow_sde", (0.7, 0.7))
        condition = load(found[key]["condition.safetensors"])["condition"]
        tokens = record.latent_height * record.latent_width
        assert condition.shape == (tokens, 64) and condition.dtype == torch.float32
        calls += sampling.Plan.of(record).nfe(3)
        for c in range(3):
            members = found[f"{key}-c{c:02d}"]
            candidate = CandidateRecord.from_json(members["json"], where=key)
            assert candidate.seed == initial_seed(0, 1, record.image_key, group, c)
            latents = load(members["trajectory.safetensors"])
            length = (record.layers + 1) * tokens
            assert latents["window"].shape == (3, length, 64) and latents["final"].shape == (length, 64)
            assert torch.equal(
                latents["window"][0], policy.noise(candidate.seed, record.layers, record.height, record.width)[0]
            )
            stack = policy.layers_uint8(latents["final"][None], record.height, record.width)[0]
            pngs = [decode_png(members[f"layer{index}.png"]) for index in range(record.layers)]
            assert np.array_equal(np.stack(pngs), stack) and f"layer{record.layers}.png" not in members
    assert manifest.counts["model_calls"] == calls


def test_stored_latents_replay_with_the_bits_of_the_rollout(make_campaign) -> None:  # type: ignore[no-untyped-def]
    """From the shard alone: latents, condition, schedule, and the seeds."""
    campaign = make_campaign(rollout={"group_size": 2, "groups": 1, "keep_velocities": True})
    run(campaign=campaign.uri, runtime="rollout: {batch_size: 2}")
    policy, found = LayeredPolicy.load(campaign.recipe.model), samples(campaign)
    record = GroupRecord.from_json(found["i000001-g000000"]["json"], where="group")
    prompt = load(campaign.store.read(named(campaign.store, "sources/prompt.safetensors")))["prompt_embeds"]
    condition = policy.encode(decode_png(found["i000001-g000000"]["source.png"])[None], prompt)
    assert torch.equal(condition.latents[0], load(found["i000001-g000000"]["condition.safetensors"])["condition"])
    stored = [load(found[f"i000001-g000000-c{c:02d}"]["trajectory.safetensors"]) for c in range(2)]
    window = torch.stack([tensors["window"] for tensors in stored])
    assert [tensors["rows"].tolist() for tensors in stored] == [[2], [2]]
    plan = sampling.Plan.of(record)
    for j, i in enumerate(plan.window):
        with torch.no_grad():
            v = policy.velocity(window[:, j], plan.sigmas[i], condition)
        assert torch.equal(v, torch.stack([tensors["velocities"][j] for tensors in stored]))
        z = torch.cat([candidates.step_noise(policy, campaign.recipe.seed, record, c, j) for c in range(2)])
        step = sampling.stochastic_step(window[:, j], v, z, plan.sigmas, i, plan.etas[j], plan.dynamics)
        assert torch.equal(step, window[:, j + 1])


def test_results_are_byte_for_byte_the_same_for_any_workers_and_batch_size(make_campaign) -> None:  # type: ignore[no-untyped-def]
    one = make_campaign()
    run(campaign=one.uri)
    for workers, batch_size in ((2, 3), (3, 1)):
        other, runtime = make_campaign(), f"rollout: {{batch_size: {batch_size}}}"
        shares = share_groups(plan_iteration(one.recipe, 1, 5), one.recipe.rollout, workers)
        for worker in reversed(range(workers)):
            manifest = run(campaign=other.uri, worker=worker, workers=workers, runtime=runtime).manifests["rollouts"]
            assert manifest.metadata["groups"] == shares[worker]
            assert (manifest.metadata["worker"], manifest.metadata["workers"]) == (worker, workers)
        assert files(other) == files(one), "names, shards and manifests"


def test_a_second_run_finds_everything_done(make_campaign, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign()
    first = run(campaign=campaign.uri).manifests["rollouts"]
    monkeypatch.setattr(candidates, "prepare_group", None)  # would fail if it were called
    again = run(campaign=campaign.uri)
    assert again.manifests["rollouts"] == first and again.metrics["candidates"] == 12


class Sampled(list[int]):
    """Groups in the order in which they were started."""

    killed_at: int | None = None  # the next time that this group is started


@pytest.fixture
def sampled(monkeypatch) -> Sampled:  # type: ignore[no-untyped-def]
    real, seen = candidates.prepare_group, Sampled()

    def prepare_group(loaded, recipe, iteration, plan, *rest, **more):  # type: ignore[no-untyped-def]
        seen.append(plan.group)
        if seen.killed_at == plan.group:
            seen.killed_at = None
            raise KeyboardInterrupt
        return real(loaded, recipe, iteration, plan, *rest, **more)

    monkeypatch.setattr(candidates, "prepare_group", prepare_group)
    return seen


def killed_at(group: int, sampled: Sampled, **step: Any) -> None:
    """Run a step that is killed when it comes to sample `group`."""
    sampled.killed_at = group
    with pytest.raises(KeyboardInterrupt):
        run(**step)


def test_an_interrupted_run_is_finished_and_not_redone(make_campaign, sampled) -> None:  # type: ignore[no-untyped-def]
    complete, campaign = make_campaign(), make_campaign()
    expected = run(campaign=complete.uri).manifests["rollouts"]
    sampled.clear()
    killed_at(3, sampled, campaign=campaign.uri)
    assert campaign.committed_groups(1).keys() == {0, 1, 2}, "those of fewer layers come first"
    with pytest.raises(LayerloopError, match="lacks groups 3 of 4"):
        campaign.rollouts(1)
    fourth = complete.rollouts(1)[3].shards[0].name
    campaign.store.write(fourth, complete.store.read(fourth)[:5000])  # cut short
    assert run(campaign=campaign.uri).manifests["rollouts"] == expected
    assert sampled == [0, 2, 1, 3, 3] and files(campaign) == files(complete)


def test_a_shard_that_was_written_before_its_manifest_is_reused(make_campaign, sampled) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign()
    expected = run(campaign=campaign.uri).manifests["rollouts"]
    before = files(campaign)
    for group in (1, 3):
        campaign.store.delete(f"{campaign.rollouts_dir(1)}/g{group:06d}.json")
    sampled.clear()
    assert run(campaign=campaign.uri).manifests["rollouts"] == expected
    assert sampled == [] and files(campaign) == before


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3), (3, 2), (1, 3)])
def test_an_iteration_is_finished_by_another_number_of_workers(make_campaign, sampled, before, after) -> None:  # type: ignore[no-untyped-def]
    """The first attempt ends with a group committed, a group without its manifest, half a shard, and the rest to do."""
    complete, campaign = make_campaign(rollout={"groups": 6}), make_campaign(rollout={"groups": 6})
    run(campaign=complete.uri)
    run(campaign=campaign.uri, worker=0, workers=before)
    planned, folder = plan_iteration(campaign.recipe, 1, 5), campaign.rollouts_dir(1)
    mine = share_groups(planned, campaign.recipe.rollout, before)[0]
    campaign.store.delete(f"{folder}/g{mine[1]:06d}.json")
    sixth = complete.rollouts(1)[5].shards[0].name
    campaign.store.write(sixth, complete.store.read(sixth)[:5000])
    if 5 in mine:
        campaign.store.delete(f"{folder}/g000005.json")
    sampled.clear()
    made = [run(campaign=campaign.uri, worker=worker, workers=after).manifests["rollouts"] for worker in range(after)]
    assert sorted(sampled) == sorted({*range(6)} - set(mine) | {5})
    assert files(campaign) == files(complete)
    assert sorted(group for manifest in made for group in manifest.metadata["groups"]) == list(range(6))
    assert sum(manifest.counts["candidates"] for manifest in made) == 6 * 3


def test_more_workers_than_groups_leave_some_with_nothing(make_campaign) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign(rollout={"groups": 2})
    idle = run(campaign=campaign.uri, worker=2, workers=3)
    assert idle.manifests["rollouts"].shards == () and idle.metrics["groups"] == 0
    assert campaign.committed_groups(1) == {}


@pytest.mark.parametrize("complete", [(0, 1), (1,)], ids=["complete", "half"])
def test_an_iteration_that_an_earlier_version_sampled_is_taken_as_it_is(make_campaign, sampled, complete) -> None:  # type: ignore[no-untyped-def]
    """Worker 0 of the other campaign was killed between its shards and its manifest: its groups are sampled again."""
    new, old = make_campaign(), make_campaign()
    for campaign in (new, old):
        run(campaign=campaign.uri)
    lay_out_by_worker(old, 1, workers=2, complete=complete)
    sampled.clear()
    manifests = [run(campaign=old.uri, worker=worker, workers=3).manifests["rollouts"] for worker in range(3)]
    assert sorted(sampled) == ([] if 0 in complete else [0, 2])
    assert samples(old) == samples(new)
    shards = {shard.base_name for manifest in manifests for shard in manifest.shards}
    of_workers = {"w01of02-000000.tar", "w01of02-000001.tar"}
    assert shards == of_workers | (
        {"w00of02-000000.tar", "w00of02-000001.tar"} if 0 in complete else {"g000000.tar", "g000002.tar"}
    )


def test_attempts_that_race_commit_every_group_once(make_campaign) -> None:  # type: ignore[no-untyped-def]
    """Two commands at once, of different numbers of workers, both of which sample groups 1 and 3."""
    complete, campaign = make_campaign(), make_campaign()
    run(campaign=complete.uri)
    command = [warm(), "-m", "layerloop.components.generate_rollouts", "--campaign", campaign.uri]
    layouts = (("0", "1"), ("1", "2"))
    running = [
        subprocess.Popen(
            [*command, "--worker", worker, "--workers", workers],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for worker, workers in layouts
    ]  # fmt: skip
    for step in running:
        _, errors = step.communicate(timeout=240)
        assert step.returncode == 0, errors[-3000:]
    assert files(campaign) == files(complete)


def test_an_attempt_on_another_kind_of_machine_leaves_a_committed_group_as_it_is(make_campaign, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """It sampled other bytes while the group was committed: found before it writes, they are not written."""
    campaign = make_campaign(rollout={"groups": 1})
    run(campaign=campaign.uri)
    before = files(campaign)
    monkeypatch.setattr(Campaign, "committed_groups", lambda *_: {})  # it looked before there was anything
    monkeypatch.setattr(rollout_step, "resume_group", lambda *_, **__: None)  # or the shard would be taken over
    real = candidates.initial_seeds
    monkeypatch.setattr(candidates, "initial_seeds", lambda seed, record: real(seed + 1, record))
    manifest = run(campaign=campaign.uri).manifests["rollouts"]
    assert manifest.shards[0].name in before and files(campaign) == before


def test_an_iteration_is_not_finished_with_another_policy(make_campaign, sampled, tmp_path) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign()
    commit_policy(campaign, tmp_path / "adapter")
    killed_at(2, sampled, campaign=campaign.uri)
    store, folder = campaign.store, campaign.policy_dir(1)
    before = campaign.committed_groups(2).keys()
    assert {1, 3} <= before < {0, 1, 2, 3}
    for name in store.list(folder):
        store.delete(name)
    commit_policy(campaign, tmp_path / "other", scale=0.06)
    with pytest.raises(
        LayerloopError, match=rf"group {min(before)} of iteration 2 was sampled .* the policy is now base .*: use the"
    ):
        run(campaign=campaign.uri)
    assert campaign.committed_groups(2).keys() == before


def test_the_policy_of_the_iteration_before_samples(make_campaign, tmp_path) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign(rollout={"groups": 1})
    with pytest.raises(LayerloopError, match="run update_lora first"):
        run(campaign=campaign.uri, iteration=2)
    committed = commit_policy(campaign, tmp_path / "adapter")
    manifest = run(campaign=campaign.uri).manifests["rollouts"]
    assert manifest.iteration == 2
    assert manifest.metadata["adapter_sha256"] == committed.file("adapter_model.safetensors").sha256
    record = GroupRecord.from_json(samples(campaign, 2)["i000002-g000000"]["json"], where="group")
    assert record.adapter_sha256 == manifest.metadata["adapter_sha256"]

    policy = LayeredPolicy.load(campaign.recipe.model)
    lora.put_adapter(policy.transformer, adapters.read_adapter(tmp_path / "adapter"))
    found = samples(campaign, 2)
    latents = load(found["i000002-g000000-c00"]["trajectory.safetensors"])["window"]
    prompt = load(campaign.store.read(named(campaign.store, "sources/prompt.safetensors")))["prompt_embeds"]
    condition = policy.encode(decode_png(found["i000002-g000000"]["source.png"])[None], prompt)
    for adapted in (True, False):
        with torch.no_grad():
            if adapted:
                v = policy.velocity(latents[:1].expand(2, -1, -1), 1.0, condition)
            else:
                with policy.without_adapter():
                    v = policy.velocity(latents[:1].expand(2, -1, -1), 1.0, condition)
        z = candidates.step_noise(policy, 0, record, 0, 0)
        step = sampling.stochastic_step(latents[:1], v[:1], z, record.sigmas, 0, 0.7, "flow_sde")
        assert torch.equal(step[0], latents[1]) == adapted


def replayed(policy: LayeredPolicy, campaign: Campaign, iteration: int) -> torch.Tensor:
    """Candidate 0 of group 0, its window computed again from its first latents by `policy`: `(w+1, S, 64)`."""
    found, key = samples(campaign, iteration), f"i{iteration:06d}-g000000"
    record = GroupRecord.from_json(found[key]["json"], where=key)
    prompt = load(campaign.store.read(named(campaign.store, "sources/prompt.safetensors")))["prompt_embeds"]
    condition = policy.encode(decode_png(found[key]["source.png"])[None], prompt)
    plan, latents = sampling.Plan.of(record), [window_of(campaign, iteration)[0]]
    for j, i in enumerate(plan.window):
        x = latents[-1][None]
        with torch.no_grad():
            v = policy.velocity(x.expand(2, -1, -1), plan.sigmas[i], condition)[:1]  # as many rows as a batch has
        a, b, s = sampling.COEFFICIENTS[plan.dynamics](plan.sigmas, i, plan.etas[j])
        noise = candidates.step_noise(policy, campaign.recipe.seed, record, 0, j)
        latents.append((sampling.step_mean(x, v, a, b) + s * noise)[0])
    return torch.stack(latents)


def window_of(campaign: Campaign, iteration: int) -> torch.Tensor:
    members = samples(campaign, iteration)[f"i{iteration:06d}-g000000-c00"]
    return load(members["trajectory.safetensors"])["window"]


def test_the_adapter_that_a_campaign_starts_from_samples_and_is_what_the_learner_replays(
    make_campaign, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    """Sampler and learner joined. The adapter's alpha is not the recipe's, so its scale has to be kept as well."""
    commit_policy(make_campaign(), tmp_path / "adapter")
    lora_section = {"rank": 2, "alpha": 8, "start_from": str(tmp_path / "adapter")}
    campaign = make_campaign(lora=lora_section, rollout={"groups": 1})
    manifest = run(campaign=campaign.uri).manifests["rollouts"]
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert manifest.metadata["adapter_sha256"] == hashlib.sha256(weights).hexdigest()

    learner = policy_at(campaign, 0, device="cpu", trainable=True)  # as update_lora loads it
    assert learner.adapter_sha256 == manifest.metadata["adapter_sha256"]
    assert learner.policy.trainable_parameters()
    assert torch.equal(replayed(learner.policy, campaign, 1), window_of(campaign, 1))

    alone = LayeredPolicy.load(campaign.recipe.model)
    assert not torch.equal(replayed(alone, campaign, 1)[1:], window_of(campaign, 1)[1:])
    lora.put_adapter(
        alone.transformer, adapters.read_adapter(tmp_path / "adapter")
    )  # the adapter itself, not by way of the recipe
    assert torch.equal(replayed(alone, campaign, 1), window_of(campaign, 1))

    bare = make_campaign(rollout={"groups": 1})
    run(campaign=bare.uri)
    assert torch.equal(window_of(bare, 1)[0], window_of(campaign, 1)[0]), "the same noise to begin with"
    assert not torch.equal(window_of(bare, 1)[1], window_of(campaign, 1)[1])


def test_a_shared_prefix_gives_a_group_one_start(make_campaign) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign(rollout={"groups": 1, "share_prefix": True, "window": {"size": 1, "start": 2}})
    run(campaign=campaign.uri)
    found = samples(campaign)
    windows = [load(found[f"i000001-g000000-c{c:02d}"]["trajectory.safetensors"])["window"] for c in range(3)]
    seeds = [json.loads(found[f"i000001-g000000-c{c:02d}"]["json"])["seed"] for c in range(3)]
    assert len(set(seeds)) == 1
    assert torch.equal(windows[0][0], windows[1][0]) and not torch.equal(windows[0][1], windows[1][1])


@pytest.mark.parametrize("whole", ["heun", "euler"])
def test_forward_process_learning_stores_final_latents_of_one_sampler(make_campaign, whole) -> None:  # type: ignore[no-untyped-def]
    other = {"heun": "euler", "euler": "heun"}[whole]  # of a window, which there is none of
    campaign = make_campaign(update={"algorithm": "nft"}, rollout={"groups": 1, "outside": other, "whole": whole})
    run(campaign=campaign.uri)
    found = samples(campaign)
    record = GroupRecord.from_json(found["i000001-g000000"]["json"], where="group")
    assert (record.window_size, record.dynamics, record.outside, record.etas) == (0, "ode", whole, ())
    stored = load(found["i000001-g000000-c01"]["trajectory.safetensors"])
    assert stored.keys() == {"final"}
    policy = LayeredPolicy.load(campaign.recipe.model)
    seed = json.loads(found["i000001-g000000-c01"]["json"])["seed"]
    prompt = load(campaign.store.read(named(campaign.store, "sources/prompt.safetensors")))["prompt_embeds"]
    condition = policy.encode(decode_png(found["i000001-g000000"]["source.png"])[None], prompt)
    noise = policy.noise(seed, record.layers, record.height, record.width)
    inference = sampling.rollout(policy, condition, noise, sampling.Plan(record.sigmas, outside=whole))
    assert torch.equal(inference.final[0], stored["final"])


def test_a_base_on_s3_is_fetched_once(make_campaign, base_folder, s3_bucket, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from layerloop.components.storage.stores import open_store

    store = open_store(f"{s3_bucket}/model")
    for path in base_folder.rglob("*.*"):
        if path.is_file():
            store.upload(path.relative_to(base_folder).as_posix(), path)
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    local, remote = make_campaign(), make_campaign(uri=f"{s3_bucket}/campaign", model={"base": f"{s3_bucket}/model"})
    for campaign in (local, remote):
        run(campaign=campaign.uri)
    assert samples(remote) == samples(local)
    monkeypatch.setattr("layerloop.components.storage.s3.S3Store.download", None)
    for name in remote.store.list(remote.rollouts_dir(1)):
        remote.store.delete(name)
    run(campaign=remote.uri, worker=0, workers=2)  # the copy is used again
    store.delete("vae/config.json")
    with pytest.raises(TypeError):  # another listing is another model, which would have to be fetched
        run(campaign=remote.uri, worker=1, workers=2)
    monkeypatch.undo()
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(LayerloopError, match=rf"base is {s3_bucket}/model: .*/vae/config\.json is missing"):
        run(campaign=remote.uri, worker=1, workers=2)


# ---- several ranks, by torchrun and by the step itself


def test_two_ranks_commit_what_one_process_commits(make_campaign, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """One group was committed between the looks of both, as by a pod of a node that was lost."""
    one, two = (make_campaign(rollout={"keep_velocities": True}) for _ in range(2))
    expected = run(campaign=one.uri).manifests["rollouts"]
    for name in [name for name in one.store.list() if "/g000000" in name]:
        two.store.write(name, one.store.read(name))
    command = [warm(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "layerloop.components.generate_rollouts", "--campaign", two.uri]
    late = rank_1_sees(tmp_path, "Campaign.committed_groups = lambda *_: {}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(late)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(two) == files(one)
    assert run(campaign=two.uri).manifests["rollouts"] == expected


def test_two_ranks_that_share_a_sharded_base_commit_what_one_process_commits(make_campaign) -> None:  # type: ignore[no-untyped-def]
    """Three groups, whose windows begin at different steps: the ranks have unequally many calls of the model to do."""
    rollout = {"groups": 3, "steps": 6, "share_prefix": True, "window": {"size": 2, "position": "random"}}
    one = make_campaign(rollout=rollout)
    two = make_campaign(rollout=rollout)
    run(campaign=one.uri)
    command = [warm(), "-m", "layerloop.components.generate_rollouts", "--campaign", two.uri]
    command += ["--runtime", '{"model": {"fsdp": true}}']
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERLOOP_PROCESSES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    starts = [json.loads(members["json"])["window_start"] for key, members in samples(one).items() if len(key) == 15]
    assert len(starts) == 3 and len(set(starts)) > 1
    assert samples(two) == samples(one)


# ---- bad input


def test_latents_that_are_nan_stop_the_step_and_nothing_is_committed(make_campaign, tmp_path) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign()
    commit_policy(campaign, tmp_path / "adapter", scale=1e30)
    with pytest.raises(LayerloopError, match=r"latents of candidate 0 of group 1, iteration 2, are NaN or infinite"):
        run(campaign=campaign.uri)
    assert campaign.committed_groups(2) == {}


def test_an_adapter_of_another_base_is_refused(make_campaign, tmp_path) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign()
    folder = tmp_path / "adapter"
    commit_policy(make_campaign(), folder)
    state = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in state if "lora_A" in key)
    state[key] = torch.zeros(2, 96)
    save_file(state, folder / "adapter_model.safetensors")
    files = add_folder(campaign.store, campaign.policy_dir(1), {path.name: path for path in sorted(folder.iterdir())})
    metadata = {"base_fingerprint": LayeredPolicy.load(campaign.recipe.model).fingerprint}
    manifest = Manifest(kind="policy", iteration=1, files=files, metadata=metadata)
    commit(campaign.store, f"{campaign.policy_dir(1)}/manifest.json", manifest)
    with pytest.raises(LayerloopError, match=r"has shape 2x96, the base needs 2x64"):
        run(campaign=campaign.uri)
    assert campaign.committed_groups(2) == {}


def test_images_that_the_model_does_not_take_are_named(make_campaign) -> None:  # type: ignore[no-untyped-def]
    campaign = make_campaign(sizes=((32, 40),))
    with pytest.raises(LayerloopError, match="image width is 40 pixels: the model needs a multiple of 16"):
        run(campaign=campaign.uri)


@pytest.mark.parametrize(("worker", "workers"), [(2, 2), (-1, 1), (0, 0)])
def test_a_worker_that_is_not_one_of_the_workers_is_refused(make_campaign, worker, workers) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LayerloopError, match=rf"worker is {worker} of {workers}"):
        run(campaign=make_campaign().uri, worker=worker, workers=workers)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    command = [warm(), "-m", "layerloop.components.generate_rollouts", "--campaign", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "has no recipe.json" in lines[0]


def test_images_are_sampled_at_the_recipes_resolution(make_campaign) -> None:  # type: ignore[no-untyped-def]
    """Sources keep their size, which evaluations take; all that a group stores is of the smaller one."""
    full, small = make_campaign(sizes=((32, 48),)), make_campaign(sizes=((32, 48),), rollout={"resolution": 32})
    for campaign in (full, small):
        run(campaign=campaign.uri)
    sizes = {
        campaign.uri: {
            (record["height"], record["width"], decode_png(members["source.png"]).shape[:2])
            for key, members in samples(campaign).items()
            if "source.png" in members
            for record in [json.loads(members["json"])]
        }
        for campaign in (full, small)
    }
    assert sizes == {full.uri: {(32, 48, (32, 48))}, small.uri: {(16, 32, (16, 32))}}
    assert torch.allclose(replayed(LayeredPolicy.load(small.recipe.model), small, 1), window_of(small, 1), atol=1e-5)
